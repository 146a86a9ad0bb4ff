"""Paths between codes: SciPy's great circles, exact ends, straight lines where there is no circle."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from lightning_plugins.eae import interpolate_codes


def codes(n=5, d=6, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_great_circles_are_scipys():
    a, b = (torch.nn.functional.normalize(codes(seed=seed)) for seed in (0, 1))
    path = interpolate_codes(a, b, 7, "slerp")
    expected = [geometric_slerp(p, q, np.linspace(0, 1, 7)) for p, q in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(path, expected, atol=1e-12)
    torch.testing.assert_close(interpolate_codes(3 * a, 3 * b, 7, "slerp"), 3 * path)
    torch.testing.assert_close(interpolate_codes(a, b, 2, "slerp"), torch.stack([a, b], 1))


def test_lines():
    a, b = codes(seed=0), codes(seed=1)
    path = interpolate_codes(a, b, 5)
    torch.testing.assert_close(path[:, 1], 0.75 * a + 0.25 * b)
    torch.testing.assert_close(path[:, 2], (a + b) / 2)
    for mode in ("linear", "slerp"):
        path = interpolate_codes(a.float(), b.float(), 5, mode)
        assert path.shape == (5, 5, 6) and path.dtype == torch.float32
        assert torch.equal(path[:, 0], a.float()) and torch.equal(path[:, -1], b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_without_a_circle_between_them(dtype):
    """Equal, opposite, nearly equal, zero, and of one dimension: the line, with the line's gradient."""
    a = codes(4, dtype=dtype)
    a[3] = 0
    b = torch.stack([a[0], -2 * a[1], a[2] + 1e-9, a[0]])
    for start, end in ((a, b), (a[:, :1], b[:, :1])):
        start, end = start.clone().requires_grad_(), end.clone().requires_grad_()
        path = interpolate_codes(start, end, 5, "slerp")
        torch.testing.assert_close(path[:3], interpolate_codes(start, end, 5)[:3])
        assert path.isfinite().all()
        gradient = torch.autograd.grad(path.sum(), [start, end])
        torch.testing.assert_close(gradient[0][:3], torch.full_like(start[:3], 2.5))
        assert torch.cat(gradient).isfinite().all()


def test_a_right_angle():
    """Half of the way along a quarter of a circle, between different radii."""
    path = interpolate_codes(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 3, "slerp")
    torch.testing.assert_close(path[0, 1], torch.tensor([2.0, 1.0]) * math.sin(math.pi / 4))


def test_mistakes():
    z = codes()
    with pytest.raises(ValueError, match="num_steps=1 must be 2 or more: both ends are included"):
        interpolate_codes(z, z, 1)
    with pytest.raises(ValueError, match=r"a must be .*\(B, d\)"):
        interpolate_codes(z[0], z, 3)
    with pytest.raises(ValueError, match="mode='cubic' must be one of linear, slerp"):
        interpolate_codes(z, z, 3, "cubic")
