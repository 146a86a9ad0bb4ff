"""Precision, recall, density and coverage against the definitions, point by point."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_plugins.metrics import PrecisionRecallDensityCoverage, feature_extractor
from lightning_plugins.metrics import precision_recall as neighbours_file


def by_definition(real, fake, k):
    """Loops over points: Kynkäänniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 2 to 5."""
    real, fake = real.double().numpy(), fake.double().numpy()

    def radius(points):
        return [sorted(np.linalg.norm(points - point, axis=1))[k] for point in points]  # [0] is the point itself

    def inside(point, centre, r):
        return np.linalg.norm(point - centre) < r

    real_radius, fake_radius = radius(real), radius(fake)
    balls = [sum(inside(y, x, r) for x, r in zip(real, real_radius, strict=True)) for y in fake]
    return {
        "precision": np.mean([count > 0 for count in balls]),
        "recall": np.mean([any(inside(x, y, r) for y, r in zip(fake, fake_radius, strict=True)) for x in real]),
        "density": np.mean(balls) / k,
        "coverage": np.mean([any(inside(y, x, r) for y in fake) for x, r in zip(real, real_radius, strict=True)]),
    }


def of_features(real, fake, **options):
    metric = PrecisionRecallDensityCoverage(feature=None, **options)
    for part, kind in ((real, True), (fake, False)):
        for batch in part.split(23):
            metric.update(batch, real=kind)
    return metric


@pytest.mark.parametrize(
    ("k", "dim", "num_real", "num_fake", "shift"), [(5, 3, 60, 45, 0.5), (1, 8, 30, 50, 0.0), (3, 2, 40, 40, 2.0)]
)
def test_equals_the_definitions(monkeypatch, k, dim, num_real, num_fake, shift):
    monkeypatch.setattr(neighbours_file, "_CHUNK", 7)
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(num_real, dim, generator=generator)
    fake = torch.randn(num_fake, dim, generator=generator) + shift
    expected = by_definition(real, fake, k)
    found = of_features(real, fake, k=k).compute()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)
    assert all(value > 0 for value in expected.values())


def test_planted_faults_are_seen():
    """A few copied images are precise but cover little; noise covers nothing; perfect samples cover 1 - 2^-k."""
    generator = torch.Generator().manual_seed(0)
    real, other = (torch.randn(600, 6, generator=generator) for _ in range(2))
    perfect, collapsed = of_features(real, other).compute(), of_features(real, real[:5].repeat(100, 1)).compute()
    far = of_features(real, other + 50).compute()
    assert perfect["coverage"].item() == pytest.approx(1 - 2**-5, abs=0.03)
    assert perfect["density"].item() == pytest.approx(1, abs=0.15)
    assert collapsed["precision"] == 1 and collapsed["recall"] == 0 and collapsed["coverage"] < 0.1
    assert all(value == 0 for value in far.values())


def test_equal_points_have_distance_zero():
    """Real duplicates have an empty ball, also far from the origin."""
    real = torch.full((9, 3), 1000.1)
    found = of_features(real, real, k=2).compute()
    assert all(value == 0 for value in found.values())


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_memory_grows_with_the_images_not_with_their_square():
    metric = of_features(torch.randn(1500, 2), torch.randn(1200, 2))
    with LargestTensor() as largest:
        metric.compute()
    assert largest.elements <= 512 * 1500


def test_images_and_resets():
    real, fake = torch.rand(30, 1, 8, 8), torch.rand(25, 1, 8, 8)
    metric, extractor = PrecisionRecallDensityCoverage("digits"), feature_extractor("digits")
    expected = by_definition(extractor(real), extractor(fake), 5)
    metric.update(real, real=True)
    for _ in range(2):
        metric.update(fake, real=False)
        assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-6)
        metric.reset()


def test_wrong_use_gets_a_sentence():
    with pytest.raises(ValueError, match="k=0 must be 1 or more"):
        PrecisionRecallDensityCoverage(k=0)
    metric = of_features(torch.zeros(9, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="k=5 neighbours need more than 5 images of each kind, got 9 real and 5"):
        metric.compute()
