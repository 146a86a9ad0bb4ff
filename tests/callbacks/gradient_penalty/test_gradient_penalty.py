"""The gradient of each optimizer step against float64 autograd on the written objective, and theory's predictions."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from scipy.integrate import odeint
from torch import nn
from toys import WatchedClassifier, flat, mlp
from trainers import fit

from lightning_plugins.callbacks import GradientPenalty

C = 3.0


def net(dtype=torch.float64):
    return mlp(5, 7, 3, seed=0).to(dtype)


def batches(n, size, dtype=torch.float64):
    torch.manual_seed(1)
    x, y = torch.randn(n * size, 5).double(), torch.randint(3, (n * size,))
    return [(x[i : i + size].to(dtype), y[i : i + size]) for i in range(0, n * size, size)]


def objective(losses, params, c, scope, norm):
    """The objective as the docstring writes it."""

    def penalty(loss):
        squared = sum((grad**2).sum() for grad in torch.autograd.grad(loss, params, create_graph=True))
        return squared if norm == "squared" else squared.sqrt()

    mean = sum(losses) / len(losses)
    if scope == "step":
        return mean + c * penalty(mean)
    return mean + c * sum(penalty(loss) for loss in losses) / len(losses)


def errors(module, windows, k=1, c=C, scope="step", norm="squared"):
    """Relative error of each step's gradient, and the penalty's share in it."""
    reference = copy.deepcopy(module).double()
    params = list(reference.parameters())
    for before, gradient, window in zip(module.before, module.gradients, windows, strict=True):
        reference.load_state_dict(before, strict=False)
        losses = [reference.loss((x.double(), y)) for x, y in window]
        share = len(window) / k  # Lightning divides an incomplete window by the full k
        plain = share * flat(torch.autograd.grad(sum(losses) / len(losses), params, retain_graph=True))
        expected = share * flat(torch.autograd.grad(objective(losses, params, c, scope, norm), params))
        assert (expected - plain).norm() > 0.3 * expected.norm()  # else the test would say little of the penalty
        yield ((gradient.double() - expected).norm() / expected.norm()).item()


def windows_of(data, k):
    return [data[i : i + k] for i in range(0, len(data), k)]


PRECISE = {
    "exact": ({"engine": "exact"}, 1e-12),
    "central": ({"difference": "central"}, 1e-7),
    "forward": ({}, 1e-5),
}


@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("engine", PRECISE)
def test_gradient(engine, k, norm, scope):
    arguments, tolerance = PRECISE[engine]
    module, data = WatchedClassifier(net()), batches(4, 5)  # k = 3: a window of three and one of one
    fit(module, data, GradientPenalty(C, norm=norm, scope=scope, **arguments), accumulate_grad_batches=k)
    found = list(errors(module, windows_of(data, k), k, C, scope, norm))
    assert len(found) == -(-4 // k)
    assert max(found) < tolerance


@pytest.mark.parametrize(("difference", "step"), [("forward", 1e-4), ("central", 1e-3)])  # the automatic ones
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_in_fp32(k, difference, step):
    tolerance = 4 * torch.finfo(torch.float32).eps / step  # rounding of two gradients, divided by the displacement
    module, data = WatchedClassifier(net(torch.float32)), batches(4, 5, torch.float32)
    fit(module, data, GradientPenalty(C, difference=difference), accumulate_grad_batches=k)
    assert max(errors(module, windows_of(data, k), k)) < tolerance


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("arguments", [{}, {"difference": "central"}, {"engine": "exact"}], ids=str)
def test_gradient_in_bf16(arguments, k):
    module, data = WatchedClassifier(net(torch.float32)), batches(4, 200, torch.float32)
    fit(module, data, GradientPenalty(C, **arguments), accumulate_grad_batches=k, precision="bf16-mixed")
    assert max(errors(module, windows_of(data, k), k)) < 5e-2


@pytest.mark.parametrize("arguments", PRECISE.values(), ids=PRECISE)
def test_a_step_does_not_depend_on_how_its_batch_is_cut(arguments):
    arguments, _ = arguments
    whole, halves = WatchedClassifier(net()), WatchedClassifier(net())
    fit(whole, batches(3, 10), GradientPenalty(C, **arguments))
    fit(halves, batches(6, 5), GradientPenalty(C, **arguments), accumulate_grad_batches=2)
    torch.testing.assert_close(flat(whole.parameters()), flat(halves.parameters()), rtol=1e-6, atol=1e-8)


def test_accumulation_that_changes_between_epochs():
    module, data = WatchedClassifier(net()), batches(6, 5)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    fit(module, data, GradientPenalty(C, difference="central"), scheduler, max_epochs=3)
    before, gradients = module.before, module.gradients
    for k, steps in {1: slice(0, 6), 2: slice(6, 9), 4: slice(9, 11)}.items():
        module.before, module.gradients = before[steps], gradients[steps]
        assert max(errors(module, windows_of(data, k), k)) < 1e-7


def test_unused_parameters_and_those_without_curvature():
    class Odd(WatchedClassifier):
        def __init__(self):
            super().__init__(net())
            self.unused = nn.Parameter(torch.ones(2).double())
            self.linear = nn.Parameter(torch.ones(3).double())

        def on_before_optimizer_step(self, optimizer):
            assert self.unused.grad is None
            self.gradients.append([p.grad.clone() for p in self.net.parameters()] + [self.linear.grad.clone()])

        def loss(self, batch):
            return super().loss(batch) + self.linear.sum()

    for arguments, tolerance in PRECISE.values():
        module, data = Odd(), batches(1, 5)
        reference = copy.deepcopy(module)
        fit(module, data, GradientPenalty(C, **arguments))
        params = [*reference.net.parameters(), reference.linear]
        loss = reference.loss(data[0])
        total = loss + C * sum((g**2).sum() for g in torch.autograd.grad(loss, params, create_graph=True))
        expected = torch.autograd.grad(total, params)
        (found,) = module.gradients
        torch.testing.assert_close(flat(found), flat(expected), rtol=tolerance, atol=tolerance)
        assert torch.equal(found[-1], torch.ones(3).double())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize("engine", ["finite_difference", "exact"])
def test_nothing_is_added_where_the_gradient_is_zero(engine, norm, scope, k):
    class Hinge(WatchedClassifier):
        def loss(self, batch):
            return F.relu(self.net(batch[0]) - 100.0).sum()  # every margin is met

    module, data = Hinge(net()), batches(2, 5)
    fit(module, data, GradientPenalty(C, engine=engine, norm=norm, scope=scope), accumulate_grad_batches=k)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in module.gradients)


@pytest.mark.parametrize("arguments", [{}, {"engine": "exact"}], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_a_loss_with_one_element_is_a_loss(k, arguments):
    class OneElement(WatchedClassifier):
        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch).reshape(1), "more": 0}

    module, data = OneElement(net()), batches(2, 5)
    fit(module, data, GradientPenalty(C, **arguments), accumulate_grad_batches=k)
    assert max(errors(module, windows_of(data, k), k)) < 1e-5


@pytest.mark.parametrize("arguments", [{}, {"engine": "exact"}], ids=str)
@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping_acts_on_the_sum(by, arguments):
    limit = 0.05
    module, data = WatchedClassifier(net(), partial(torch.optim.SGD, lr=1.0)), batches(1, 20)
    start = flat(module.parameters())
    fit(module, data, GradientPenalty(C, **arguments), gradient_clip_val=limit, gradient_clip_algorithm=by)
    (gradient,) = module.gradients
    assert max(errors(module, [data])) < 1e-5
    clipped = gradient.clamp(-limit, limit) if by == "value" else gradient * limit / gradient.norm()
    assert (clipped - gradient).norm() > 0.1 * gradient.norm()
    torch.testing.assert_close(start - flat(module.parameters()), clipped, rtol=1e-5, atol=1e-7)


def test_dropout_and_batch_norm():
    class Reference(WatchedClassifier):
        def loss(self, batch):
            torch.manual_seed(5)  # the same mask again for the objective written out
            return super().loss(batch)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 3)).double()
    data = batches(4, 6)
    for k in (1, 3):
        for arguments, tolerance in PRECISE.values():
            module = Reference(copy.deepcopy(net))
            fit(module, data, GradientPenalty(C, **arguments), accumulate_grad_batches=k)
            assert max(errors(module, windows_of(data, k), k)) < tolerance


# Theory


def test_the_norm_is_sam():
    """``g + c H g / |g|`` by a forward difference of length ``rho = c`` is the gradient at ``theta + rho g / |g|``."""
    rho = 0.3
    module, data = WatchedClassifier(net()), batches(1, 20)
    start = copy.deepcopy(module)
    relative = rho / flat(start.parameters()).norm().item()
    fit(module, data, GradientPenalty(rho, norm="norm", relative_step=relative))
    expected = sam_gradient(start, data[0], lambda g: rho * g / g.norm())
    torch.testing.assert_close(module.gradients[0], expected, rtol=1e-12, atol=1e-14)


def test_the_square_is_sam_without_normalisation():
    """``2c = h``: the gradient at ``theta + h g``."""
    c = 0.4
    module, data = WatchedClassifier(net()), batches(1, 20)
    start = copy.deepcopy(module)
    params = list(start.parameters())
    gradient = flat(torch.autograd.grad(start.loss(data[0]), params))
    relative = 2 * c * (gradient.norm() / flat(params).norm()).item()
    fit(module, data, GradientPenalty(c, relative_step=relative))
    expected = sam_gradient(start, data[0], lambda g: 2 * c * g)
    torch.testing.assert_close(module.gradients[0], expected, rtol=1e-12, atol=1e-14)


def sam_gradient(module, batch, move):
    params = list(module.parameters())
    theta = nn.utils.parameters_to_vector(params).detach()
    gradient = flat(torch.autograd.grad(module.loss(batch), params))
    nn.utils.vector_to_parameters(theta + move(gradient), params)
    return flat(torch.autograd.grad(module.loss(batch), params))


class Bowl(LightningModule):
    """A loss of two weights that is neither quadratic nor convex everywhere."""

    def __init__(self, h):
        super().__init__()
        self.theta, self.h = nn.Parameter(torch.tensor([1.2, -0.7]).double()), h

    @staticmethod
    def loss(theta):
        x, y = theta
        return 0.5 * (x * y + 1) ** 2 + 0.3 * torch.cos(x) + 0.1 * y**4 + 0.5 * x**2

    def training_step(self, batch, batch_idx):
        return self.loss(self.theta)

    def configure_optimizers(self):
        return torch.optim.SGD([self.theta], self.h)


def flow(c, time):
    """The end of the flow of ``L + c |grad L|^2``, by scipy."""

    def velocity(theta, _):
        theta = torch.tensor(theta, requires_grad=True)
        (gradient,) = torch.autograd.grad(Bowl.loss(theta), theta, create_graph=True)
        (extra,) = torch.autograd.grad(gradient @ gradient, theta)
        return (-gradient - c * extra).detach().numpy()

    return torch.tensor(odeint(velocity, Bowl(0).theta.detach().numpy(), [0, time], rtol=1e-11, atol=1e-11)[-1])


def descend(h, steps, *callbacks):
    module = Bowl(h)
    fit(module, [torch.zeros(1)] * steps, *callbacks, max_steps=steps)
    return module.theta.detach()


def test_gradient_descent_follows_the_modified_flow():
    """The distance falls with h squared; to the plain flow with h (Barrett and Dherin 2021)."""
    time = 0.4
    plain, modified = [], []
    for h in (0.04, 0.02, 0.01):
        end = descend(h, round(time / h))
        plain.append((end - flow(0.0, time)).norm().item())
        modified.append((end - flow(h / 4, time)).norm().item())
    for (a, b), (c, d) in [(plain[:2], modified[:2]), (plain[1:], modified[1:])]:
        assert 1.8 < a / b < 2.3
        assert 3.6 < c / d < 4.4


@pytest.mark.parametrize("arguments", [{"engine": "exact"}, {"difference": "central"}], ids=str)
def test_small_steps_with_the_penalty_end_where_large_ones_do(arguments):
    """``match_lr``: the rest falls with the square of the large rate, as the flow's truncation does."""
    rest = []
    for h_ref in (0.04, 0.02):
        large = descend(h_ref, round(0.4 / h_ref))
        small = descend(h_ref / 10, round(4 / h_ref))
        matched = descend(h_ref / 10, round(4 / h_ref), GradientPenalty(match_lr=h_ref, **arguments))
        rest.append((matched - large).norm().item())
        assert rest[-1] < 0.2 * (small - large).norm().item()
    assert 3.4 < rest[0] / rest[1] < 4.6
