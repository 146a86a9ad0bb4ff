"""Wrong labels at a known rate, and fewer training images: fixed by the seed and the image, clean in the test set."""

import pytest
import torch
from scipy.stats import binomtest, chisquare

from lightning_plugins.data import Digits, LabelledImages, MultiMNIST
from lightning_plugins.data.images import KeyedImages, symmetric_noise


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_noise_has_its_rate_and_is_uniform_over_the_other_classes(rate):
    labels = torch.arange(100_000) % 10
    noisy = symmetric_noise(labels, rate, num_classes=10, seed=0, streams=(20, 21))
    wrong = noisy != labels
    assert noisy.dtype == torch.int64 and noisy.min() == 0 and noisy.max() == 9
    assert binomtest(int(wrong.sum()), len(labels), rate).pvalue > 1e-3
    for digit in range(10):
        said = noisy[wrong & (labels == digit)].bincount(minlength=10)
        assert said[digit] == 0
        assert chisquare(said[said > 0].numpy()).pvalue > 1e-3


def test_the_ends_of_the_range():
    labels = torch.arange(1000) % 3
    assert torch.equal(symmetric_noise(labels, 0.0, 3, seed=1, streams=(0, 1)), labels)
    assert (symmetric_noise(labels, 1.0, 3, seed=1, streams=(0, 1)) != labels).all()
    assert torch.equal(symmetric_noise(labels % 2, 1.0, 2, seed=1, streams=(0, 1)), 1 - labels % 2)


def labels_of(data, split):
    return data.images(split).labels


def test_test_labels_are_clean_and_the_others_are_not():
    clean, noisy = Digits(image_size=8), Digits(image_size=8, label_noise=0.4)
    for split, rate in (("train", 0.4), ("val", 0.4), ("test", 0.0)):
        wrong = labels_of(clean, split) != labels_of(noisy, split)
        assert binomtest(int(wrong.sum()), len(wrong), rate).pvalue > 1e-3
        assert torch.equal(clean.images(split).pixels, noisy.images(split).pixels)
    assert torch.equal(labels_of(clean, "test"), labels_of(noisy, "test"))


def test_noise_is_the_seeds_and_differs_between_splits():
    first, again, other = (Digits(image_size=8, label_noise=0.4, seed=seed) for seed in (0, 0, 1))
    clean = Digits(image_size=8)
    for split in ("train", "val"):
        assert torch.equal(labels_of(first, split), labels_of(again, split))
        assert not torch.equal(labels_of(first, split), labels_of(other, split))
    wrong = {split: labels_of(first, split) != labels_of(clean, split) for split in ("train", "val")}
    assert not torch.equal(wrong["train"][:179], wrong["val"])


def pairs(batches):
    """Every (image, label) seen, in an order of its own."""
    return sorted((image.numpy().tobytes(), int(y)) for b in batches for image, y in zip(*b.values(), strict=True))


def test_every_epoch_and_any_number_of_workers_sees_the_same_wrong_labels():
    seen = []
    for workers in (0, 2):
        data = Digits(image_size=8, batch_size=100, label_noise=0.4, num_train=600, num_workers=workers)
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            seen.append(pairs(loader))
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_noise_does_not_depend_on_the_rank():
    data = Digits(image_size=8, label_noise=0.4)
    whole = KeyedImages(data.images("train"))
    part = whole.__getitems__(list(range(1, 1259, 2)))  # what rank 1 of 2 draws
    assert torch.equal(part["label"], labels_of(data, "train")[1::2])


def test_num_train_takes_a_fixed_share_of_the_training_images():
    everything, some, fewer, other_seed = (
        Digits(image_size=8, num_train=count, seed=seed) for count, seed in ((None, 0), (600, 0), (300, 0), (600, 7))
    )
    images = {name: pairs_of(data) for name, data in (("all", everything), ("600", some), ("300", fewer))}
    assert [len(labels_of(data, "train")) for data in (everything, some, fewer)] == [1259, 600, 300]
    assert images["300"] < images["600"] < images["all"]
    assert torch.equal(some.images("train").pixels, other_seed.images("train").pixels)
    assert labels_of(some, "train").bincount().min() >= 45  # every digit, 60 on average
    assert len(labels_of(some, "val")) == 179 and len(labels_of(some, "test")) == 359
    assert len(Digits(num_train=1259).images("train").labels) == 1259


def pairs_of(data: Digits) -> set:
    images: LabelledImages = data.images("train")
    return {(image.numpy().tobytes(), int(y)) for image, y in zip(images.pixels, images.labels, strict=True)}


def test_pairs_are_made_of_the_noisy_labels_of_their_source():
    source = Digits(label_noise=0.4)
    batch = next(iter(MultiMNIST(base=source).val_dataloader()))
    assert torch.equal(batch["label"][:, 0], labels_of(source, "val")[: len(batch["label"])])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"label_noise": -0.1}, "label_noise=-0.1 must lie in [0, 1]: the share of wrong labels."),
        ({"label_noise": 40}, "label_noise=40 must lie in [0, 1]: the share of wrong labels."),
        ({"num_train": 0}, "num_train=0 must lie in [1, 1259]: so many training images there are."),
        ({"num_train": 1260}, "num_train=1260 must lie in [1, 1259]: so many training images there are."),
    ],
)
def test_bad_arguments_in_one_sentence(argument, sentence):
    with pytest.raises(ValueError) as error:
        Digits(**argument)
    assert str(error.value) == sentence
