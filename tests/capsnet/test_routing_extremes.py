"""The small pieces of a routing iteration where numbers are extreme: signs, zeros, and both ends of float32."""

import pytest
import torch

from lightning_plugins.capsnet.routing import next_centres, squash, unit
from lightning_plugins.capsnet.streamed_routing import next_centres_vjp

SIZES = [1e-30, 1e-20, 1e-9, 1.0, 1e9, 1e25, 1e30]  # squares of the outer ones leave float32
KINDS = ["dynamic", "kmeans", "kmeans_squash"]


def vectors(size):
    """Rows with entries of either sign, of one sign, and with a zero at the largest place."""
    rows = torch.tensor([[3.0, -4.0, 1.0], [-3.0, -4.0, -1.0], [3.0, 4.0, 1.0], [-3.0, 0.0, -4.0], [0.0, 0.0, -5.0]])
    return rows * size


@pytest.mark.parametrize("size", SIZES)
def test_squash_and_unit_do_not_depend_on_signs_or_overflow(size):
    s = vectors(size)
    exact = s.double()
    square = exact.square().sum(-1, keepdim=True)
    torch.testing.assert_close(squash(s), (square / (1 + square) * exact / square.sqrt()).float(), atol=0, rtol=1e-5)
    torch.testing.assert_close(unit(s), (exact / square.sqrt()).float(), atol=0, rtol=1e-5)
    assert torch.equal(squash(-s), -squash(s))
    assert torch.equal(unit(-s), -unit(s))


@pytest.mark.parametrize("function", [squash, unit])
def test_zero_stays_zero_and_so_does_its_gradient(function):
    s = torch.tensor([[0.0, 0.0, 0.0], [0.0, -2.0, 0.0]], requires_grad=True)
    v = function(s)
    (gradient,) = torch.autograd.grad(v.sum(), s, create_graph=True)
    assert v[0].tolist() == gradient[0].tolist() == [0, 0, 0]
    assert v[1, 1] < 0
    (second,) = torch.autograd.grad(gradient.square().sum(), s)
    assert second.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-20, 1e-9, 1.0, 1e9])
def test_the_written_derivative_is_float64_autograds(kind, size):
    s, grad = vectors(size), torch.tensor([0.5, -1.0, 2.0]).expand(5, 3)
    exact = s.double().requires_grad_()
    (expected,) = torch.autograd.grad(next_centres(None, exact, kind, 0.5), exact, grad.double())
    found = next_centres_vjp(grad, s, kind, 0.5)
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close((found / largest).double(), expected / largest, atol=1e-5, rtol=0)
    assert next_centres_vjp(grad, torch.zeros(5, 3), kind, 0.5).tolist() == [[0.0] * 3] * 5
