"""Extractors: frozen and out of sight of the module they serve; the digits' classifier knows its digits."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn

from lightning_plugins import Digits
from lightning_plugins.metrics import FrechetDistance, KernelDistance, feature_extractor
from lightning_plugins.metrics import extractors as extractors_file


class Network(nn.Module):
    """Dropout and batch normalisation, which training mode would give away."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.layers(torch.zeros(2, 1, 4, 4))

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("size", [8, 28, 64])
def test_digits_are_recognised(size):
    data = Digits(image_size=size).require("test")
    found = feature_extractor("digits").classify(data.pixels.float() / 255)
    assert (found == data.labels).float().mean() >= 0.97


def test_digits_features_see_blur():
    """Blur is farther than noise of the same squared error: blurred samples are what these features must tell."""
    data = Digits(image_size=8)
    images = torch.cat([data.require(split).pixels for split in ("train", "test")]) / 255
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * 0.45**2))
    kernel /= kernel.sum()
    blurred = F.conv2d(images, torch.outer(kernel, kernel)[None, None], padding=3).clamp(0, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + noise * 1.4 * (blurred - images).square().mean().sqrt()).clamp(0, 1)
    assert (noisy - images).square().mean() >= (blurred - images).square().mean()  # clamping took less than 1.4 added
    assert distance(blurred, images) > 5 * distance(noisy, images)


def distance(images, real):
    metric = FrechetDistance("digits")
    metric.update(real, real=True)
    metric.update(images, real=False)
    return metric.compute()


def test_features_have_a_variance_of_one():
    images = Digits(image_size=8).require("train").pixels / 255
    torch.testing.assert_close(feature_extractor("digits")(images).var(0).mean(), torch.tensor(1.0))


def test_the_weights_are_small():
    (path,) = (Path(extractors_file.__file__).parent / "embedded").glob("digits_classifier.pt")
    assert path.stat().st_size < 300_000


def test_colour_becomes_grey_for_digits():
    extractor, grey = feature_extractor("digits"), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(extractor(grey.expand(-1, 3, -1, -1)), extractor(grey), atol=1e-4, rtol=1e-4)
    red = torch.cat([grey, torch.zeros(5, 2, 8, 8)], 1)
    torch.testing.assert_close(extractor(red), extractor(0.299 * grey))


def test_an_extractor_stays_frozen_and_the_users_module_untouched():
    network = Network()
    extractor, images = feature_extractor(network), torch.rand(6, 1, 4, 4)
    assert network.training and all(p.requires_grad for p in network.parameters())
    expected = extractor(images)
    extractor.train()
    assert not any(part.training for part in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(extractor(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(network.eval()(images), expected)
    assert not expected.requires_grad
    assert feature_extractor(extractor) is extractor
    assert extractor(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_a_metric_hides_its_extractor_from_the_module_that_owns_it(metric):
    class Owner(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.distance = metric(Network())

    owner = Owner()
    names = {"layer.weight", "layer.bias"}
    assert {name for name, _ in owner.named_parameters()} == set(owner.state_dict()) == names
    assert list(owner.buffers()) == []
    owner.train()
    extractor = owner.distance.extractor
    assert not extractor.network.layers[2].training
    owner.bfloat16().to(torch.float16)
    assert {value.dtype for value in extractor.state_dict().values()} == {torch.float32, torch.int64}
    if metric is FrechetDistance:
        assert owner.distance.real_features_cov_sum.dtype == torch.float64
    owner.to("meta")
    assert {value.device.type for value in extractor.state_dict().values()} == {"meta"}
    assert owner.distance.device.type == "meta"


def test_a_fingerprint_is_of_the_weights():
    network = Network()
    same, again = feature_extractor(network).fingerprint(), feature_extractor(network).fingerprint()
    with torch.no_grad():
        network.layers[2].running_mean[0] = 1
    other = feature_extractor(network).fingerprint()
    assert same == again
    assert {name for name in same if same[name] != other[name]} == {"weights"}
    assert same["num_features"] == 3 and same["name"].endswith("Network")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 8, 8), r"images must be \(B, C, H, W\) with one channel or three, got \(2, 8, 8\)"),
        (torch.zeros(2, 2, 8, 8), r"one channel or three, got \(2, 2, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "got torch.uint8: divide bytes by 255"),
        (torch.full((2, 1, 8, 8), -1.0), r"must lie in \[0, 1\], got \[-1, -1\]"),
        (torch.full((2, 1, 8, 8), 255.0), r"must lie in \[0, 1\], got \[255, 255\]"),
        (torch.full((2, 1, 8, 8), float("nan")), r"must lie in \[0, 1\], got \[nan, nan\]"),
    ],
)
def test_wrong_images_get_a_sentence(images, words):
    with pytest.raises(ValueError, match=words):
        feature_extractor("digits")(images)


def test_wrong_features_get_a_sentence():
    with pytest.raises(ValueError, match='feature=\'vgg\' must be "digits", "inception", or a module'):
        feature_extractor("vgg")
    with pytest.raises(ValueError, match="feature=Flatten needs the attribute num_features"):
        feature_extractor(nn.Flatten())
    network = nn.Flatten()
    network.num_features = 5
    with pytest.raises(ValueError, match="Flatten gave 64 features: set its num_features=5 to that number"):
        feature_extractor(network)(torch.zeros(2, 1, 8, 8))


def test_no_images_give_no_features():
    assert feature_extractor("digits")(torch.zeros(0, 1, 8, 8)).shape == (0, 32)


class FakeInception(nn.Module):
    """What torchmetrics' InceptionV3 takes and gives."""

    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["2048"]

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return images.float().flatten(1)[:, :1].expand(-1, 2048)


def test_inception_is_given_bytes_in_three_channels(monkeypatch):
    monkeypatch.setattr(extractors_file, "NoTrainInceptionV3", FakeInception)
    extractor = feature_extractor("inception")
    grey = torch.arange(256.0)[:, None, None, None].expand(-1, 1, 2, 2) / 255
    assert extractor.num_features == 2048
    assert extractor(grey)[:, 0].tolist() == list(range(256))
    assert extractor(grey.expand(-1, 3, -1, -1))[:, 0].tolist() == list(range(256))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ModuleNotFoundError("no"), ModuleNotFoundError, 'feature="inception" needs torch-fidelity'),
        (OSError("no route"), RuntimeError, r"could not download its weights \(no route\); connect once"),
    ],
)
def test_without_inception_there_is_one_sentence(monkeypatch, error, kind, words):
    def missing(**_):
        raise error

    monkeypatch.setattr(extractors_file, "NoTrainInceptionV3", missing)
    with pytest.raises(kind, match=words):
        FrechetDistance("inception")
