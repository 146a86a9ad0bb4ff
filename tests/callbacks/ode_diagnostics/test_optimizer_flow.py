"""Stability limits and flow times by simulating torch's own optimizers; what is read from groups and states."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from lightning_plugins import NormRMSprop
from lightning_plugins.callbacks.ode_diagnostics.optimizer_flow import (
    FlowTime,
    implicit_term,
    read_flow,
    rule_of,
    why_unreadable,
)

NEARLY_ONE = 1 - 1e-12  # memory of a mean square that does not change any more
LATE = 1e15  # steps after which it needs no correction
OPTIMIZERS = {  # class, arguments, limit of the table
    "sgd": (SGD, {}, 2),
    "sgd-l2": (SGD, {"weight_decay": 0.3}, 2),
    "momentum": (SGD, {"momentum": 0.9}, 3.8),
    "momentum-l2": (SGD, {"momentum": 0.9, "weight_decay": 0.3}, 3.8),
    "dampened": (SGD, {"momentum": 0.9, "dampening": 0.9}, 38),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    "nesterov-l2": (SGD, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.3}, 3 / 2),
    "rmsprop": (RMSprop, {"alpha": 1.0}, 2),
    "rmsprop-l2": (RMSprop, {"alpha": 1.0, "weight_decay": 0.3, "momentum": 0.9}, 3.8),
    "norm-rmsprop": (NormRMSprop, {"alpha": NEARLY_ONE}, 2),
    "norm-rmsprop-momentum": (NormRMSprop, {"alpha": NEARLY_ONE, "momentum": 0.9}, 3.8),
    "adam": (Adam, {"betas": (0.9, NEARLY_ONE)}, 38),
    "adam-l2": (Adam, {"betas": (0.5, NEARLY_ONE), "weight_decay": 0.3}, 6),
    "amsgrad": (Adam, {"betas": (0.9, NEARLY_ONE), "amsgrad": True}, 38),
    "adamw": (AdamW, {"betas": (0.9, NEARLY_ONE), "weight_decay": 0.0}, 38),
    "adamw-decay": (AdamW, {"betas": (0.9, NEARLY_ONE), "weight_decay": 0.02}, None),
}
CURVATURE = 1.7


def frozen(kind, arguments, lr, square):
    """An optimizer of one parameter at rest, with a mean square that stays; the state is made by a zero step."""
    theta = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = kind([theta], lr=0.0, **arguments)
    theta.grad = torch.zeros_like(theta)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    state = optimizer.state[theta]
    if kind is SGD:
        state.clear()  # its first step fills the buffer
    for name, value in state.items():
        value.fill_(square if "sq" in name or "square" in name else 0.0)
    if kind in (Adam, AdamW):
        state["step"].fill_(LATE)
    return theta, optimizer


def moves_away(kind, arguments, lr):
    """Whether torch's own steps on a parabola leave its minimum."""
    theta, optimizer = frozen(kind, arguments, lr, square=4.0)
    for _ in range(3000):
        theta.grad = CURVATURE * theta.detach()
        optimizer.step()
        if abs(theta.item()) > 1e3:
            return True
    return abs(theta.item()) > 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_limits_by_simulation(name):
    """The rate at which steps begin to diverge is where the edge ratio is one, within 1 %."""
    kind, arguments, limit = OPTIMIZERS[name]
    theta, optimizer = frozen(kind, arguments, 0.1, square=4.0)
    rule = rule_of(optimizer)
    if limit is not None:
        assert rule.limit == pytest.approx(limit)

    def edge_ratio(lr):
        optimizer.param_groups[0]["lr"] = lr
        flow = read_flow(optimizer, rule, [theta])
        return float(flow.rates[0]) * (CURVATURE + flow.decays[0]) / flow.limit

    edge = 1.0
    for _ in range(50):
        edge /= edge_ratio(edge)
    assert edge_ratio(edge) == pytest.approx(1)
    assert not moves_away(kind, arguments, 0.99 * edge)
    assert moves_away(kind, arguments, 1.01 * edge)


def test_limit_of_adamw_is_the_written_one():
    theta = torch.nn.Parameter(torch.ones(1))
    optimizer = AdamW([theta], lr=0.1, weight_decay=0.02)
    theta.grad = torch.ones(1)
    optimizer.step()
    assert read_flow(optimizer, rule_of(optimizer), [theta]).limit == pytest.approx(1.9 * (2 - 0.1 * 0.02) / 0.1)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "l2" not in name and "decay" not in name])
def test_flow_time_is_the_way_under_a_constant_gradient(name):
    """From rest, under a unit gradient, with a rate that changes; ``P`` is one."""
    kind, arguments, _ = OPTIMIZERS[name]
    theta, optimizer = frozen(kind, arguments, 0.1, square=1.0)
    if kind in (Adam, AdamW):
        optimizer.state.clear()  # it corrects a start from zero
    time = FlowTime(optimizer)
    time._resumed = False
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.9**step
        theta.grad = torch.ones_like(theta)
        optimizer.step()
        time.advance(optimizer, rule_of(optimizer))
        assert 1 - theta.item() == pytest.approx(time.time, rel=1e-7)  # eps is 1e-8


def test_flow_time_of_full_momentum():
    """After many steps one is worth h (1-d) / (1-b); a resumed buffer counts as full, a restored time as it was."""
    theta = torch.nn.Parameter(torch.ones(1))
    optimizer = SGD([theta], lr=0.1, momentum=0.9, dampening=0.5)
    time, rule = FlowTime(optimizer), rule_of(optimizer)
    for _ in range(300):
        theta.grad = torch.ones(1)
        optimizer.step()
        before = time.time
        time.advance(optimizer, rule)
    assert time.time - before == pytest.approx(0.1 * 0.5 / 0.1)
    resumed = FlowTime(optimizer)
    resumed.advance(optimizer, rule)
    assert resumed.time == pytest.approx(0.5)
    restored = FlowTime(optimizer)
    restored.load_state_dict(time.state_dict())
    assert restored.time == time.time
    optimizer.param_groups[0]["momentum"] = 0.0  # a schedule that ends
    restored.advance(optimizer, rule_of(optimizer))
    assert restored.time - time.time == pytest.approx(0.1)


KINDS = {
    "rmsprop": (RMSprop, {"alpha": 0.9}),
    "centered": (RMSprop, {"alpha": 0.9, "centered": True}),
    "adam": (Adam, {}),
    "amsgrad": (Adam, {"amsgrad": True}),
    "adam-foreach": (Adam, {"foreach": True}),
    "adam-fused": (Adam, {"fused": True}),
    "adam-single": (Adam, {"foreach": False, "betas": (torch.tensor(0.9), torch.tensor(0.999))}),
    "adamw": (AdamW, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_preconditioner_is_that_of_the_step(name, maximize):
    """A step without its decay is the mean gradient times ``h / P``, for every implementation and kind of state."""
    kind, arguments = KINDS[name]
    torch.manual_seed(0)
    start = torch.randn(5, dtype=torch.float64)
    grads = torch.randn(7, 5, dtype=torch.float64)
    theta = torch.nn.Parameter(start.clone())
    optimizer = kind([theta], lr=torch.tensor(0.01) if name == "adam-single" else 0.01, maximize=maximize, **arguments)
    for grad in grads:
        theta.grad = grad.clone()
        before = theta.detach().clone()
        optimizer.step()
    rule = rule_of(optimizer)
    flow = read_flow(optimizer, rule, [theta])
    assert (rule.sign, flow.h) == (-1 if maximize else 1, pytest.approx(0.01))
    # the part of the move that is not decay is -rate * mean gradient
    mean = grads[-1]
    if rule.momentum:
        weights = rule.momentum ** torch.arange(6, -1, -1, dtype=torch.float64)
        mean = (weights[:, None] * grads).sum(0) / weights.sum()
    decay = 0.01 * optimizer.param_groups[0]["weight_decay"] if kind is AdamW else 0.0
    move = theta.detach() - before * (1 - decay)
    torch.testing.assert_close(move, -rule.sign * flow.rates[0].double() * mean, rtol=1e-5, atol=0)


def test_groups_with_rates_and_decays_of_their_own():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SGD([{"params": [a], "lr": 0.1, "weight_decay": 0.5}, {"params": [b]}], lr=0.4, momentum=0.9)
    rule = rule_of(optimizer)
    flow = read_flow(optimizer, rule, [b, a])
    assert flow == (0.4, pytest.approx(3.8), [0.4, 0.1], [0.0, 0.5])
    assert implicit_term(optimizer, rule, [b, a]) == [(pytest.approx(19), 0.0), (pytest.approx(4.75), 0.5)]
    frozen = SGD([{"params": [a], "lr": 0.0}, {"params": [b]}], lr=0.4)
    assert read_flow(frozen, rule_of(frozen), [a, b]).rates == [0.0, 0.4]


class Preset(SGD):
    """Another constructor only: still SGD."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)


class Shrinking(SGD):
    """A step of its own."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(0.9)
        return loss


def test_unknown_optimizers_are_known_to_be_unknown():
    theta = [torch.nn.Parameter(torch.ones(1))]
    assert rule_of(Preset(theta)).family == "SGD"
    for kind in (Shrinking, NAdam, torch.optim.LBFGS, torch.optim.Adagrad):
        assert f"{kind.__name__} is none of SGD, RMSprop" in rule_of(kind(theta, lr=0.1))
    other = [torch.nn.Parameter(torch.ones(1))]
    mixed = SGD([{"params": theta, "momentum": 0.9}, {"params": other}], lr=0.1)
    assert "differ in more than rate and weight decay" in rule_of(mixed)
    game = SGD([{"params": theta, "maximize": True}, {"params": other}], lr=0.1)
    assert "differ in more" in rule_of(game)


def test_a_scheduler_around_the_step_changes_nothing():
    theta = [torch.nn.Parameter(torch.ones(1))]
    optimizer = SGD(theta, lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    assert rule_of(optimizer).limit == pytest.approx(3.8)


def test_the_implicit_term_is_of_the_sgd_family_only():
    theta = [torch.nn.Parameter(torch.ones(1))]
    for optimizer in (Adam(theta, lr=0.1), RMSprop(theta, lr=0.1), NormRMSprop(theta, lr=0.1)):
        assert implicit_term(optimizer, rule_of(optimizer), theta) is None


def test_damping_ratio():
    """Critical at ``h lambda = (1 - sqrt b)^2``, within the continuous limit's accuracy; not for others."""
    theta = [torch.nn.Parameter(torch.ones(1))]
    rule = rule_of(SGD(theta, lr=0.1, momentum=0.9))
    assert rule.damping_ratio((1 - math.sqrt(0.9)) ** 2) == pytest.approx(1, rel=0.03)
    assert rule.damping_ratio(-1.0) is None
    for optimizer in (SGD(theta), SGD(theta, momentum=0.9, nesterov=True), Adam(theta)):
        assert rule_of(optimizer).damping_ratio(1.0) is None


def test_gradients_that_cannot_be_read():
    table = torch.nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    assert "sparse" in why_unreadable(SGD(table.parameters()), False, list(table.parameters()))
    theta = torch.nn.Parameter(torch.ones(1))
    theta.grad = torch.ones(1)
    assert "fused=False" in why_unreadable(Adam([theta], fused=True), True, [theta])
    assert why_unreadable(Adam([theta], fused=True), False, [theta]) is None
    theta = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
    theta.grad = torch.ones_like(theta)
    assert "complex" in why_unreadable(SGD([theta]), False, [theta])
