"""The implicit term of SGD, measured on a quadratic, against the formulas."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plugins.callbacks.implicit_regularization import implicit_coefficient, require_sgd

KINDS = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "half heavy ball": {"momentum": 0.5},
    "dampened": {"momentum": 0.9, "dampening": 0.9},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
    "half Nesterov": {"momentum": 0.5, "nesterov": True},
}


def weights(value=1.0):
    return torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))


def measured_coefficient(kind, h, curvature=1.0):
    """``phi`` from the rate at which torch's own SGD shrinks ``theta`` on ``L = curvature theta^2 / 2``.

    The flow of ``L + phi |grad L|^2`` has ``d theta / dt = -(curvature + 2 phi curvature^2) theta``, and a step passes
    the time ``h (1 - dampening) / (1 - momentum)``.
    """
    theta = weights()
    optimizer = torch.optim.SGD([theta], lr=h, **kind)
    path = []
    for _ in range(1200):  # the fast root of heavy ball dies out in the first of them
        theta.grad = curvature * theta.detach().clone()
        optimizer.step()
        path.append(theta.item())
    time = h * (1 - kind.get("dampening", 0.0)) / (1 - kind.get("momentum", 0.0))
    rate = -math.log(path[-1] / path[599]) / (600 * time)
    return (rate - curvature) / (2 * curvature**2)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_formula_against_simulation(kind):
    """The measured coefficient is the formula's up to a relative error of order ``h / (1 - momentum)^2``."""
    ratios = []
    for small in (4e-3, 2e-3):
        h = small * (1 - kind.get("momentum", 0.0)) ** 2
        formula = implicit_coefficient(torch.optim.SGD([weights()], lr=h, **kind))
        ratios.append(measured_coefficient(kind, h) / formula)
    assert ratios[1] == pytest.approx(1.0, abs=0.02)
    assert (ratios[0] - 1) / (ratios[1] - 1) == pytest.approx(2.0, abs=0.25)


def test_heavy_ball_in_closed_form():
    """The slow root of the recurrence gives the rate without simulation."""
    h, beta = 1e-5, 0.9
    slow = max(np.roots([1, -(1 + beta - h), beta]).real)
    rate = -math.log(slow) * (1 - beta) / h
    optimizer = torch.optim.SGD([weights()], lr=h, momentum=beta)
    assert (rate - 1) / 2 == pytest.approx(implicit_coefficient(optimizer), rel=2e-3)


def test_plain_is_a_quarter_and_momentum_is_not():
    assert implicit_coefficient(torch.optim.SGD([weights()], lr=0.4)) == 0.1
    optimizer = torch.optim.SGD([weights()], lr=0.4, momentum=0.9)
    assert implicit_coefficient(optimizer) == pytest.approx(190 * 0.1)
    assert implicit_coefficient(optimizer, 0.8) == pytest.approx(2 * 190 * 0.1)


def test_torch_ignores_dampening_without_momentum():
    h = 1e-3
    kind = {"dampening": 0.5}
    theta = weights()
    theta.grad = torch.ones(1).double()
    torch.optim.SGD([theta], lr=h, **kind).step()
    assert theta.item() == 1 - h
    assert implicit_coefficient(torch.optim.SGD([theta], lr=h, **kind)) == h / 4


def test_a_rate_that_is_a_tensor():
    optimizer = torch.optim.SGD([weights()], lr=torch.tensor(0.4))
    assert implicit_coefficient(optimizer) == pytest.approx(0.1)
    require_sgd(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_adaptive_optimizers_are_refused(kind):
    with pytest.raises(MisconfigurationException, match=f"needs torch.optim.SGD, got {kind.__name__}: .*Give coeff"):
        require_sgd(kind([weights()], lr=0.1))


@pytest.mark.parametrize("other", [{"lr": 0.2}, {"momentum": 0.5}, {"dampening": 0.1, "momentum": 0.9}])
def test_groups_must_agree(other):
    groups = [{"params": [weights()]}, {"params": [weights()], **other}]
    with pytest.raises(MisconfigurationException, match="parameter groups that share lr and momentum"):
        require_sgd(torch.optim.SGD(groups, lr=0.1))


def test_ascent_is_refused():
    with pytest.raises(MisconfigurationException, match="maximize=False"):
        require_sgd(torch.optim.SGD([weights()], lr=0.1, maximize=True))
