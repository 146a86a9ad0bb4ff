"""Custom functions: is a backward differentiated that can be, and found out that cannot?"""

import pytest
import torch
from torch import nn
from toys import Applies, WatchedClassifier, flat, mlp
from trainers import fit

from lightning_plugins import GradientPenalty, ODEDiagnostics, gradient_penalty_backward

C = 0.5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Cubes(torch.autograd.Function):
    """Right at any order."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 + 3 * x**2)


class Detaches(Cubes):
    """The right gradient from a value that no graph knows."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 + 3 * x.detach() ** 2)


class RunsInside(Cubes):
    """The right gradient from a graph of its own, which is not differentiable any more."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x + x**3, x, grad.detach())[0]


class Rounds(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Turns(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def net(function, activation=nn.Tanh, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Applies(function), activation(), nn.Linear(6, 3)).to(dtype)


def batches(n=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(6) % 3) for _ in range(n)
    ]


def written(network, data, k=1):
    """The gradient of every step of L + c |grad L|^2 by plain autograd, on the network that is given."""
    module = WatchedClassifier(network.double())
    params, found = list(module.parameters()), []
    for start in range(0, len(data), k):
        losses = [module.loss((x.double(), y)) for x, y in data[start : start + k]]
        loss = sum(losses) / len(losses)
        first = torch.autograd.grad(loss, params, create_graph=True)
        gradient = torch.autograd.grad(loss + C * sum(g.square().sum() for g in first), params)
        found.append(flat(gradient))
        with torch.no_grad():
            for param, g in zip(params, gradient, strict=True):
                param -= 0.1 * g
    return found


def assert_same(gradients, expected, tolerance):
    assert len(gradients) == len(expected) > 0
    for found, right in zip(gradients, expected, strict=True):
        assert (found - right).norm() < tolerance * right.norm()


# at once, by replays of a window, and of micro-batches; with a tolerance for each dtype
SETUPS = {"at once": ({}, 1), "window": ({}, 2), "microbatch": ({"scope": "microbatch"}, 1)}
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setup", SETUPS)
def test_one_that_can_be_differentiated_twice_is_let_be(setup, dtype):
    arguments, k = SETUPS[setup]
    module, data = WatchedClassifier(net(Cubes, dtype=dtype)), batches(4, dtype)
    fit(module, data, GradientPenalty(C, engine="exact", **arguments), accumulate_grad_batches=k)  # warnings are errors
    assert_same(module.gradients, written(net(Cubes), data, k), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("function", [Detaches, RunsInside])
def test_one_that_lacks_a_term_is_refused_before_a_weight_changes(function, setup, dtype):
    arguments, k = SETUPS[setup]
    module = WatchedClassifier(net(function, dtype=dtype))
    before = flat(module.parameters())
    sentence = rf"exact'\): the backward of torch\.autograd\.Function {function.__name__} cannot .* lacks a term"
    with pytest.raises(RuntimeError, match=sentence):
        fit(module, batches(dtype=dtype), GradientPenalty(C, engine="exact", **arguments), accumulate_grad_batches=k)
    assert torch.equal(flat(module.parameters()), before)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("function", [Detaches, RunsInside])
def test_auto_takes_finite_differences(function, setup):
    arguments, k = SETUPS[setup]
    module, data = WatchedClassifier(net(function)), batches(4)
    penalty = GradientPenalty(C, engine="auto", difference="central", **arguments)
    with pytest.warns(UserWarning, match=rf"takes finite differences: .*Function {function.__name__} cannot"):
        fit(module, data, penalty, accumulate_grad_batches=k)
    assert_same(module.gradients, written(net(Cubes), data, k), 1e-7)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("function", [Rounds, Turns])
def test_a_backward_that_is_no_derivative_is_taken_as_it_says(function, k):
    """Differences of such a gradient say nothing: the penalty is on the gradient that trains."""
    module, data = WatchedClassifier(net(function)), batches(4)
    with pytest.warns(UserWarning, match=rf"Function {function.__name__} .*taken as (that|its) backward says") as told:
        fit(module, data, GradientPenalty(C, engine="exact"), accumulate_grad_batches=k)
    assert sum(function.__name__ in str(warning.message) for warning in told) == 1
    assert_same(module.gradients, written(net(function), data, k), 1e-11)


class Selects(nn.Module):
    """A ReLU that no name shows."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.0)


@pytest.mark.parametrize("activation", [nn.ReLU, Selects])
def test_kinks_do_not_speak_against_it(activation):
    """Units that cross their kink are in the difference, and in no product."""
    module, data = WatchedClassifier(net(Cubes, activation)), batches(4)
    fit(module, data, GradientPenalty(C, engine="exact"))
    assert_same(module.gradients, written(net(Cubes, activation), data), 1e-11)


@pytest.mark.parametrize("activation", [nn.ReLU, Selects])
def test_what_kinks_hide_is_told(activation):
    module = WatchedClassifier(net(Detaches, activation))
    with pytest.warns(
        UserWarning, match=r"Function Detaches is taken as its backward says.*no difference was resolved"
    ):
        fit(module, batches(), GradientPenalty(C, engine="exact"))


@pytest.mark.parametrize("k", [1, 2])
def test_without_a_check_it_is_told(k):
    module = WatchedClassifier(net(Detaches))
    with pytest.warns(UserWarning, match=r"Function Detaches is taken as its backward says.*\(check='off'\)"):
        fit(module, batches(), GradientPenalty(C, engine="exact", check="off"), accumulate_grad_batches=k)


def test_a_step_that_cannot_be_repeated_is_told():
    class Draws(WatchedClassifier):
        generator = torch.Generator().manual_seed(3)

        def loss(self, batch):
            noise = torch.randn(batch[0].shape, generator=self.generator, dtype=batch[0].dtype)
            return super().loss((batch[0] + noise, batch[1]))

    with pytest.warns(UserWarning, match=r"Function Cubes is taken .*\(running the step again gives another gradient"):
        fit(Draws(net(Cubes)), batches(), GradientPenalty(C, engine="exact"))


class Manual(WatchedClassifier):
    def __init__(self, network):
        super().__init__(network)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        gradient_penalty_backward(self, lambda: self.loss(batch), C, engine="exact")
        optimizer.step()


def test_manual_optimization():
    module, data = Manual(net(Cubes)), batches(4)
    fit(module, data)
    assert_same(module.gradients, written(net(Cubes), data), 1e-11)
    with pytest.raises(
        RuntimeError, match=r"gradient_penalty_backward\(engine='exact'\): .*Function Detaches cannot be"
    ):
        fit(Manual(net(Detaches)), data)
    with pytest.warns(UserWarning, match=r"gradient_penalty_backward\(engine='exact'\): .*Function Rounds"):
        fit(Manual(net(Rounds)), data)


def sharpness(function, engine):
    diagnostics = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_engine=engine)
    return fit(WatchedClassifier(net(function)), batches(1), diagnostics).callback_metrics["ode/sharpness"].item()


def test_the_sharpness_is_that_of_the_loss():
    right = sharpness(Cubes, "exact")
    with pytest.warns(UserWarning, match=r"finite differences for the sharpness: .*Function Detaches cannot"):
        assert sharpness(Detaches, "auto") == pytest.approx(right, rel=1e-3)


def test_a_compiled_or_checkpointed_part_is_none_of_them():
    network = mlp(4, 6, 3, seed=0).double()
    module = WatchedClassifier(network)
    module.loss = lambda batch: nn.functional.cross_entropy(
        torch.utils.checkpoint.checkpoint(network, batch[0], use_reentrant=False), batch[1]
    )
    fit(module, batches(), GradientPenalty(C, engine="exact"))
    assert_same(module.gradients, written(mlp(4, 6, 3, seed=0), batches()), 1e-11)
