import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_plugins.eae import gaussianity
from lightning_plugins.eae.gaussianity import mmd, sigreg


def draw(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_mmd(z, y):
    """WAE's penalty, pair by pair."""

    def kernel(a, b):
        return sum(2 * len(a) * s / (2 * len(a) * s + ((a - b) ** 2).sum()) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    n = len(z)
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = np.mean([kernel(z[i], z[j]) for i, j in others]) + np.mean([kernel(y[i], y[j]) for i, j in others])
    return within - 2 * np.mean([kernel(z[i], y[j]) for i in range(n) for j in range(n)])


def test_sigreg_is_the_integral():
    """In one dimension there is but one slice."""
    z = draw(50, 1, dtype=torch.float64) + 0.4
    x = z[:, 0].numpy()
    integral, _ = quad(
        lambda t: abs(np.exp(1j * t * x).mean() - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2), -3, 3
    )
    assert sigreg(z, num_knots=3001).item() == pytest.approx(50 * integral, rel=1e-6)
    assert sigreg(z).item() == pytest.approx(50 * integral, rel=0.01)
    assert sigreg(z.float(), num_knots=3001).item() == pytest.approx(50 * integral, rel=1e-5)
    assert torch.autograd.gradcheck(sigreg, z.requires_grad_())


def test_sigreg_is_the_mean_over_slices():
    z = draw(40, 3, dtype=torch.float64)
    directions = torch.randn(3, 5, generator=seeded(), dtype=torch.float64)
    slices = z @ (directions / directions.norm(dim=0))
    each = [sigreg(one[:, None]) for one in slices.T]
    torch.testing.assert_close(sigreg(z, num_slices=5, generator=seeded()), torch.stack(each).mean())


def test_mmd_is_the_published_penalty():
    z = draw(9, 3, 1, torch.float64)
    y = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    assert mmd(z, generator=seeded()).item() == pytest.approx(naive_mmd(z.numpy(), y.numpy()), rel=1e-10)
    assert torch.autograd.gradcheck(lambda z: mmd(z, generator=seeded()), z.requires_grad_())
    y = torch.randn(9, 3, generator=seeded()).double()
    expected = naive_mmd(z.detach().numpy(), y.numpy())
    assert mmd(z.detach().float(), generator=seeded()).item() == pytest.approx(expected, abs=1e-5)


def test_sums_of_a_group_are_those_of_all_its_codes(monkeypatch):
    """Two processes that have the same codes and draws: the statistic of twice the codes."""
    z = draw(30, 3)
    alone, twice = sigreg(z, generator=seeded()), sigreg(torch.cat([z, z]), generator=seeded())
    monkeypatch.setattr(gaussianity, "sum_over_ranks", lambda x, group: 2 * x)
    torch.testing.assert_close(sigreg(z, generator=seeded(), group="both"), twice)
    assert torch.equal(sigreg(z, generator=seeded()), alone)


def test_values_of_normal_codes():
    """What the docstrings say: 1.06 and 0, whatever N and d."""
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    for n, d in ((64, 4), (256, 16)):
        scores = torch.stack([sigreg(draw(n, d, seed), generator=seeded(seed)) for seed in range(40)])
        assert abs(scores.mean() - expected) < 4 * scores.std() / math.sqrt(40) + 0.01  # the integral ends at 3
        distances = torch.stack([mmd(draw(n, d, seed), generator=seeded(100 + seed)) for seed in range(40)])
        assert abs(distances.mean()) < 4 * distances.std() / math.sqrt(40)


@pytest.mark.parametrize("distance", [sigreg, mmd])
def test_distance(distance):
    """Grows away from normal, falls by gradient descent, and forgets neither precision nor the given generator."""
    normal = draw(256, 8)
    clusters = 2 * draw(10, 8, 1).repeat(26, 1)[:256] + 0.1 * normal
    near, wide, far = (distance(z, generator=seeded()) for z in (normal, 1.5 * normal, clusters))
    assert near < wide < far
    assert torch.equal(distance(normal, generator=seeded()), near)
    assert not torch.equal(distance(normal, generator=seeded(1)), near)
    z = clusters.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(z, generator=seeded()), z)
    assert distance(z - gradient * 0.5 * z.norm() / gradient.norm(), generator=seeded()) < 0.9 * far
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance(normal, generator=seeded()), near)
    half = distance(normal.bfloat16(), generator=seeded())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(near.item(), abs=0.05)
    assert distance(normal.double()).dtype == torch.float64
    same = torch.zeros(5, 3, requires_grad=True)
    distance(same).backward()
    assert same.grad.isfinite().all()
    with FakeTensorMode():  # nothing waits for the device
        assert distance(torch.zeros(9, 3)).shape == ()


@pytest.mark.parametrize("distance", [sigreg, mmd])
def test_wrong_arguments_are_refused(distance):
    with pytest.raises(ValueError, match=r"cannot be told from 1 code\(s\)"):
        distance(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"codes \(N, d\), got \(4,\)"):
        distance(torch.ones(4))
    with pytest.raises(ValueError, match="num_slices=0 must be 1 or more"):
        sigreg(torch.ones(4, 2), num_slices=0)
