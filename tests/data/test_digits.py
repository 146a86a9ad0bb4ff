"""The embedded digits, their split, upscaling and augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lightning_plugins.data import Digits
from lightning_plugins.data.digits import _split_indices, embedded_digits
from lightning_plugins.data.images import KeyedImages, LabelledImages, shift_images


def test_embedded_arrays_are_those_of_sklearn():
    reference = load_digits()
    images, labels = embedded_digits()
    np.testing.assert_array_equal(images.numpy(), reference.images)
    np.testing.assert_array_equal(labels.numpy(), reference.target)


def test_split_is_a_stratified_partition():
    _, labels = embedded_digits()
    parts = _split_indices(labels)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(1797))
    assert {name: len(index) for name, index in parts.items()} == {"train": 1259, "val": 179, "test": 359}
    for digit in range(10):
        count = int((labels == digit).sum())
        assert abs(int((labels[parts["test"]] == digit).sum()) - 0.2 * count) <= 0.5
        assert abs(int((labels[parts["val"]] == digit).sum()) - 0.1 * count) <= 0.5


def test_batches():
    data = Digits(batch_size=50)
    assert (data.image_shape, data.num_classes, data.num_labels) == ((1, 28, 28), 10, 1)
    for loader, count in ((data.train_dataloader(), 1250), (data.val_dataloader(), 179), (data.test_dataloader(), 359)):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(batch["label"]) for batch in batches) == count
        for batch in batches:
            assert batch["image"].shape == (len(batch["label"]), 1, 28, 28)
            assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.int64
            assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert set(data.dataset("test")[3]) == {"image", "label"}


def test_raw_size_gives_the_raw_pixels():
    images, labels = embedded_digits()
    data = Digits(image_size=8)
    index = _split_indices(labels)["test"]
    got = torch.cat([batch["image"] for batch in data.test_dataloader()])
    torch.testing.assert_close(got[:, 0], images[index] / 16, atol=0.5 / 255 + 1e-6, rtol=0)


def test_upscaling_equals_pillow():
    images, labels = embedded_digits()
    index = _split_indices(labels)["test"][:20]
    got = Digits(image_size=28).images("test").pixels[:20, 0].float()
    for ours, raw in zip(got, images[index], strict=True):
        reference = Image.fromarray(raw.numpy() * np.float32(255 / 16)).resize((28, 28), Image.BILINEAR)
        np.testing.assert_allclose(ours.numpy(), np.asarray(reference), atol=0.51)


def test_shift_moves_by_whole_pixels_on_zeros():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 255, (64, 2, 5, 6), dtype=torch.uint8, generator=generator)
    down, right = torch.randint(-3, 4, (2, 64), generator=generator)
    got = shift_images(images, down, right, margin=1)
    assert got.shape == (64, 2, 7, 8)
    expected = torch.zeros_like(got)
    for n in range(64):
        for y in range(5):
            for x in range(6):
                to_y, to_x = y + 1 + int(down[n]), x + 1 + int(right[n])
                if 0 <= to_y < 7 and 0 <= to_x < 8:
                    expected[n, :, to_y, to_x] = images[n, :, y, x]
    assert torch.equal(got, expected)


def test_augmentation_reaches_every_shift_and_changes_with_the_epoch():
    pixels = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    pixels[:, :, 4, 4] = 255
    dataset = KeyedImages(LabelledImages(pixels, torch.zeros(200, dtype=torch.int64)), shift=2)
    places = [dataset.__getitems__(range(e * 200, e * 200 + 200))["image"].flatten(1).argmax(1) for e in (0, 1)]
    assert not torch.equal(*places)
    rows, columns = torch.cat(places) // 9, torch.cat(places) % 9
    assert rows.unique().tolist() == columns.unique().tolist() == [2, 3, 4, 5, 6]


def test_flip_mirrors_half_of_the_images():
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).expand(1000, 1, 3, 4)
    dataset = KeyedImages(LabelledImages(pixels, torch.zeros(1000, dtype=torch.int64)), flip=True)
    images = (dataset.__getitems__(range(1000))["image"] * 255).round()
    plain = (images == pixels[0]).all(-1).all(-1).all(-1)
    mirrored = (images == pixels[0].flip(-1)).all(-1).all(-1).all(-1)
    assert (plain ^ mirrored).all() and 400 < int(mirrored.sum()) < 600


def test_evaluation_is_not_augmented():
    still, moving = (torch.cat([b["image"] for b in Digits(shift=s).val_dataloader()]) for s in (0, 3))
    assert torch.equal(still, moving)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"batch_size": 0}, "batch_size=0 must be 1 or more."),
        ({"num_workers": -1}, "num_workers=-1 must be 0 or more."),
        ({"shift": -2}, "shift=-2 must be 0 or more."),
        ({"image_size": 7}, "image_size=7 must be 8 or more."),
    ],
)
def test_bad_arguments_in_one_sentence(argument, sentence):
    with pytest.raises(ValueError) as error:
        Digits(**argument)
    assert str(error.value) == sentence
