"""Each kind of flood() against its formula, by float64 autograd on the formula as written."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_plugins.callbacks.flooding.loss import flood

LEVEL = 0.7

FORMULAS = {
    "batch": lambda losses: (losses.mean() - LEVEL).abs() + LEVEL,
    "sample": lambda losses: ((losses - LEVEL).abs() + LEVEL).mean(),
    "soft": lambda losses: LEVEL + (torch.sqrt(1 + (losses - LEVEL) ** 2) - 1).mean(),
}


def losses_of(weight, scale=1.0):
    """Cross entropies of 16 samples on both sides of the level, from logits that depend on ``weight``."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (16,), generator=generator)
    return scale * cross_entropy(inputs @ weight, labels, reduction="none")


def weight():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])  # the mean is below, near and above the level
@pytest.mark.parametrize("kind", FORMULAS)
def test_value_and_gradient(kind, scale):
    w = weight()
    losses = losses_of(w, scale)
    assert scale != 1.0 or ((losses < LEVEL).any() and (losses > LEVEL).any())
    expected = FORMULAS[kind](losses)
    (gradient,) = torch.autograd.grad(expected, w, retain_graph=True)
    value = flood(losses, LEVEL, kind)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], gradient, rtol=1e-12, atol=1e-16)


def test_weights_of_samples():
    """+1 and -1 for iFlood, a smooth signed distance for SoftAD; one sign for the batch."""
    losses = torch.tensor([0.2, 0.7, 0.8, 5.0], dtype=torch.float64, requires_grad=True)
    weights = {kind: 4 * torch.autograd.grad(flood(losses, LEVEL, kind), losses)[0] for kind in FORMULAS}
    assert weights["batch"].tolist() == [1, 1, 1, 1]
    assert weights["sample"].tolist() == [-1, 1, 1, 1]  # at the level itself it descends
    distance = losses.detach() - LEVEL
    torch.testing.assert_close(weights["soft"], distance / torch.sqrt(distance**2 + 1))


@pytest.mark.parametrize("kind", FORMULAS)
def test_minus_infinity_is_the_plain_mean(kind):
    w = weight()
    losses = losses_of(w)
    value = flood(losses, -math.inf, kind)
    assert torch.equal(value, losses.mean())
    gradients = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in (value, losses.mean())]
    assert torch.equal(*gradients)


def test_loss_above_the_level_is_not_rounded():
    """``(l - b) + b`` is not ``l`` in floating point; here it is."""
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.2
    assert ((losses - 0.1) + 0.1 != losses).any()
    assert torch.equal(flood(losses, 0.1, "sample"), losses.mean())
    assert torch.equal(flood(losses, 0.1), losses.mean())


@pytest.mark.parametrize("kind", FORMULAS)
def test_half_precision_is_widened(kind):
    losses = losses_of(weight().detach()).bfloat16()
    value = flood(losses, LEVEL, kind)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), FORMULAS[kind](losses.double()), rtol=1e-6, atol=0)


def test_any_shape_and_the_mean_alone():
    losses = losses_of(weight().detach())
    for kind in FORMULAS:
        torch.testing.assert_close(flood(losses.reshape(2, 4, 2), LEVEL, kind), flood(losses, LEVEL, kind))
    assert flood(losses.mean(), LEVEL) == flood(losses, LEVEL)


@pytest.mark.parametrize("kind", ["sample", "soft"])
def test_a_mean_has_no_samples(kind):
    with pytest.raises(ValueError, match=r"needs a loss for each sample, got a single number: .*reduction='none'"):
        flood(torch.tensor(0.3), 0.1, kind)


@pytest.mark.parametrize("level", [math.nan, math.inf, "0.1", None, True])
def test_bad_level(level):
    with pytest.raises(ValueError, match=f"level={level!r} must be a finite number: it is in units of the loss"):
        flood(torch.ones(3), level)


def test_bad_kind():
    with pytest.raises(ValueError, match="kind='hard' must be one of batch, sample, soft"):
        flood(torch.ones(3), 0.1, "hard")
