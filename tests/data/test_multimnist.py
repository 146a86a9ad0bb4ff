"""Pairs of digits: classes, geometry, fixed and fresh pairs."""

import pytest
import torch
from PIL import Image

from lightning_plugins.data import Digits, ImageData, LabelledImages, MultiMNIST, box_overlap
from lightning_plugins.data.multimnist import PairedImages


class Squares(ImageData):
    """Images of 12 x 12 px with a filled square of 4 x 4 in the middle, class n has grey 20 (n + 1)."""

    image_shape = (1, 12, 12)
    num_classes = 5

    def read(self, split):
        labels = torch.arange(500) % 5
        pixels = torch.zeros(500, 1, 12, 12, dtype=torch.uint8)
        pixels[:, :, 4:8, 4:8] = (20 * (labels + 1)).to(torch.uint8)[:, None, None, None]
        return LabelledImages(pixels, labels)


def test_shapes_and_clipped_sum():
    data = MultiMNIST(batch_size=64)
    assert (data.image_shape, data.num_classes, data.num_labels) == ((1, 36, 36), 10, 2)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))):
        assert batch["image"].shape == (64, 1, 36, 36) and batch["image"].dtype == torch.float32
        assert batch["parts"].shape == (64, 2, 1, 36, 36) and batch["parts"].dtype == torch.float32
        assert batch["label"].shape == (64, 2) and batch["label"].dtype == torch.int64
        assert (batch["label"][:, 0] != batch["label"][:, 1]).all()
        assert torch.equal(batch["image"], batch["parts"].sum(1).clamp(max=1))
        assert batch["parts"].sum(1).max() > 1  # there is something to clip


def test_parts_are_the_shifted_images_of_their_labels():
    base = Squares()
    keys = range(2000)
    batch = PairedImages(base.read("train"), seed=0, shift=3, pad=2).__getitems__(keys)
    parts = (batch["parts"] * 255).round()
    for n in range(2):
        grey = parts[:, n].flatten(1).amax(1)
        assert torch.equal(grey, 20.0 * (batch["label"][:, n] + 1))
        assert torch.equal((parts[:, n] > 0).flatten(1).sum(1), torch.full((2000,), 16))  # nothing is cut
        first = (parts[:, n, 0] > 0).flatten(1).int().argmax(1)
        rows, columns = first // 16, first % 16
        assert rows.unique().tolist() == columns.unique().tolist() == list(range(6 - 3, 6 + 3 + 1))


def test_partners_are_uniform_over_the_other_classes():
    labels = torch.tensor([0] * 600 + [1] * 100 + [3] * 300)
    data = LabelledImages(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), labels)
    first, second = PairedImages(data, seed=1, shift=0, pad=0).__getitems__(range(100_000))["label"].T
    assert not (first == second).any()
    of_zero = second[first == 0].bincount(minlength=4).double()
    torch.testing.assert_close(of_zero / of_zero.sum(), torch.tensor([0, 0.25, 0, 0.75]).double(), atol=0.01, rtol=0)


def test_every_image_is_first_once_in_an_epoch_and_pairs_change():
    dataset = MultiMNIST(base=Squares()).dataset("train")
    assert len(dataset) == 500
    epochs = [dataset.__getitems__(range(e * 500, e * 500 + 500)) for e in (0, 1)]
    assert torch.equal(epochs[0]["label"][:, 0], epochs[1]["label"][:, 0])
    assert not torch.equal(epochs[0]["label"][:, 1], epochs[1]["label"][:, 1])
    assert not torch.equal(epochs[0]["parts"][:, 0], epochs[1]["parts"][:, 0])


def test_evaluation_pairs_are_fixed():
    data = MultiMNIST(base=Squares(), pairs_per_image=3, batch_size=200)
    loader = data.test_dataloader()
    runs = []
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch)
        runs.append(torch.cat([batch["image"] for batch in loader]))
    assert runs[0].shape == (1500, 1, 20, 20)
    assert torch.equal(*runs)
    assert len(runs[0].flatten(1).unique(dim=0)) > 1000


def test_box_overlap_against_loops():
    parts = MultiMNIST("digits", shift=6, seed=2).dataset("val").__getitems__(range(100))["parts"]
    for pair, got in zip(parts[:, :, 0], box_overlap(parts), strict=True):
        boxes = []
        for image in pair:
            rows, columns = (image > 0).nonzero().T
            boxes.append(
                {(y, x) for y in range(rows.min(), rows.max() + 1) for x in range(columns.min(), columns.max() + 1)}
            )
        assert got.item() == pytest.approx(len(boxes[0] & boxes[1]) / min(map(len, boxes)))


def test_mean_overlap_of_shifted_squares_has_its_closed_form():
    """Two squares of side a with uniform shifts in -s..s: the mean is (sum_d p(d) max(0, a - |d|) / a) squared."""
    a, s = 4, 3
    parts = PairedImages(Squares().read("train"), seed=0, shift=s, pad=4).__getitems__(range(20_000))["parts"]
    side = sum((2 * s + 1 - abs(d)) * max(0, a - abs(d)) for d in range(-2 * s, 2 * s + 1)) / (2 * s + 1) ** 2 / a
    assert box_overlap(parts).mean().item() == pytest.approx(side**2, abs=0.005)


def test_source_and_base_give_the_same_pairs():
    by_name, by_module = MultiMNIST("digits", batch_size=16), MultiMNIST(base=Digits(), batch_size=16)
    x, y = (next(iter(data.val_dataloader())) for data in (by_name, by_module))
    assert torch.equal(x["image"], y["image"])


def test_one_class_is_refused():
    data = LabelledImages(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="MultiMNIST pairs two different classes, but all images are of one class"):
        PairedImages(data, seed=0, shift=1, pad=1)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"pad": -1}, "pad=-1 must be 0 or more."),
        ({"pairs_per_image": 0}, "pairs_per_image=0 must be 1 or more."),
        ({"shift": -1}, "shift=-1 must be 0 or more."),
        ({"image_size": 8, "base": Squares()}, "image_size=8 beside base: give it to the Squares."),
    ],
)
def test_bad_pair_arguments_in_one_sentence(argument, sentence):
    with pytest.raises(ValueError) as error:
        MultiMNIST(**argument)
    assert str(error.value) == sentence


def test_single_digits_are_resized(tmp_path, monkeypatch):
    """Pictures of two sizes, which need it; digits of the package; files that stay as they are."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for n, size in enumerate([(6, 9), (8, 8)] * 10):
        (folder := tmp_path / "pictures" / str(n // 10)).mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 200).save(folder / f"{n}.png")
    mixed = MultiMNIST(str(tmp_path / "pictures"))
    with pytest.raises(ValueError, match=r"Images differ in size: .*; give image_size"):
        mixed.prepare_data()
    assert MultiMNIST(str(tmp_path / "pictures"), image_size=10).images("train").pixels.shape[1:] == (1, 10, 10)
    assert MultiMNIST(image_size=8, pad=1).image_shape == (1, 10, 10)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").touch()
    with pytest.raises(ValueError, match=r"image_size=8, but source=.* holds idx files, which stay as they are"):
        MultiMNIST(str(tmp_path / "idx"), image_size=8)
