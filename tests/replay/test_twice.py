"""What differentiating twice cannot see: found by comparing it with the real backward pass."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Squares, flat, mlp
from trainers import fit

from lightning_plugins import GradientPenalty
from lightning_plugins.replay.graph import coarsest_precision, custom_functions
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import (
    Arrivals,
    MissedTermError,
    explain,
    first_derivative,
    rounding_of,
    second_derivative,
)
from lightning_plugins.replay.window import WindowLoss


class Inside(torch.autograd.Function):
    """Its backward pass differentiates a layer by a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(grad.detach())
        return x.grad, None


def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 3).double()


def inputs():
    return torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()


def test_gradients_that_arrive_meanwhile_are_found_and_taken_away():
    inner, x = layer(), inputs()
    before = inner.weight.grad = torch.ones_like(inner.weight)
    loss = Inside.apply(x, inner).square().sum()
    with pytest.raises(MissedTermError, match="the gradient of 2 parameters is computed inside a node"):
        first_derivative(loss, [x, *inner.parameters()])
    assert inner.weight.grad is before
    assert torch.equal(before, torch.ones_like(before))
    assert inner.bias.grad is None


def test_gradients_that_arrive_in_the_second_derivative_are_found():
    x, shift = inputs(), torch.ones(3, dtype=torch.float64, requires_grad=True)

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            if not torch.is_grad_enabled():  # only when a gradient is differentiated
                with torch.enable_grad():
                    shift.sum().backward()
            return 2 * grad

    (first,) = torch.autograd.grad(Late.apply(x).pow(3).sum(), [x], create_graph=True)
    with pytest.raises(MissedTermError, match="the gradient of 1 parameter is computed inside a node"):
        second_derivative([first, None], [x, shift], [torch.ones_like(x), torch.ones_like(shift)])
    assert shift.grad is None


class Hides(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = layer(), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(self):
        hidden = checkpoint(self.layer, inputs(), use_reentrant=True)
        return (hidden.square().sum() + self.layer.bias.square().sum()) * self.scale


@pytest.mark.parametrize("all_of_them", [True, False])
def test_arrivals(all_of_them):
    """A parameter in a hidden part, one in both, one in the open."""
    module = Hides()
    params, loss = list(module.parameters()), module.loss()
    first = first_derivative(loss, params)
    assert [g is None for g in first] == [False, True, False]  # scale, weight, bias
    arrivals = Arrivals(first, params, module, all_of_them=all_of_them)
    loss.backward()
    named = "layer.weight and 1 more" if all_of_them else r"layer\.weight \("
    with pytest.raises(MissedTermError, match=named):
        arrivals.check()
    assert not any(param._backward_hooks for param in params)


def test_arrivals_of_the_same_gradient():
    module = Hides()
    params = list(module.parameters())
    loss = (module.layer(inputs()) ** 3).sum() * module.scale
    arrivals = Arrivals(first_derivative(loss, params), params, module)
    loss.backward()
    arrivals.check()


def test_arrivals_that_are_not_finite_say_nothing():
    module = Hides()
    params = list(module.parameters())
    loss = module.layer(inputs()).sum() * module.scale * torch.inf
    arrivals = Arrivals(first_derivative(loss, params), params, module)
    loss.backward()
    arrivals.check()


class Hidden(Squares):
    def __init__(self, reentrant):
        super().__init__(mlp(3, 4, 2, seed=0).double())
        self.reentrant = reentrant

    def loss(self, batch):
        x = batch.detach().requires_grad_()
        return self.net[1:](checkpoint(self.net[0], x, use_reentrant=self.reentrant)).square().mean()


@pytest.mark.parametrize("given", [True, False])
def test_an_exact_product_is_compared_with_the_gradient(given):
    """Given, or of a pass of its own."""
    products = {}

    def look(trainer, module, calls):
        params = list(module.parameters())
        window, vectors = WindowLoss(trainer, module, calls, params), [torch.ones_like(param) for param in params]
        gradient = [param.grad for param in params] if given else None
        if module.reentrant:
            with pytest.raises(MissedTermError, match=r"in net\.0\.weight and 1 more .*use_reentrant=False"):
                window.exact_product(vectors, gradient)
            products[True] = window.product(vectors, 1e-6, "central")
        else:
            products[False] = window.exact_product(vectors, gradient)

    class Looks(Hidden):
        def on_train_start(self):
            self.recorder = StepRecorder.attach(self.trainer, self, self)
            self.recorder.keep(self, True)

        def on_before_optimizer_step(self, optimizer):
            look(self.trainer, self, self.recorder.calls)

        def on_train_end(self):
            self.recorder.detach(self)

    for reentrant in (True, False):
        fit(Looks(reentrant), [torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)])
    for found, right in zip(products[True], products[False], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_custom_functions_are_named_and_those_of_torch_are_not():
    inner, x = layer(), inputs()
    assert custom_functions(Inside.apply(x, inner).sum()) == {"Inside"}
    assert custom_functions(checkpoint(inner, x, use_reentrant=True).sum()) == set()
    assert custom_functions(checkpoint(inner, x, use_reentrant=False).sum()) == set()


def test_coarsest_precision():
    x = inputs()
    assert coarsest_precision([x.sum(), x.half().sum()]) == torch.float16
    assert coarsest_precision([(x * 1j).abs().sum()]) == torch.float64
    assert coarsest_precision([x.to(torch.complex64).real.sum()]) == torch.float32


class EightBits(nn.Module):
    def forward(self, x):
        return x.to(torch.float8_e4m3fn).to(x.dtype)


def test_numbers_of_eight_bits_round_by_their_unit():
    x = inputs()
    assert coarsest_precision([EightBits()(x).sum()]) == torch.float8_e4m3fn
    assert rounding_of([x], torch.float8_e4m3fn) == 0.125
    assert rounding_of([x], torch.float64) < 1e-6
    module = Squares(nn.Sequential(mlp(4, 4, seed=0), EightBits()))
    before = flat(module.parameters())
    fit(module, [torch.ones(2, 4)], GradientPenalty(0.1, engine="exact"))
    assert not torch.equal(flat(module.parameters()), before)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("derivative for aten::foo is not implemented", "aten::foo has no second derivative; use engine="),
        (
            "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()",
            "reentrant .* use_reentrant=F",
        ),
        ("This backward function was compiled with non-empty donated buffers", "torch.compile does not differentiate"),
        ("One of the differentiated Tensors does not require grad", r"failed \(One of .* require grad\); use engine="),
        (
            "Some Tensors appear to not have been used in the graph.\nMore",
            r"failed \(Some .* in the graph\); use engine=",
        ),
        ("a checkpoint of mine is missing", r"failed \(a checkpoint of mine is missing\)"),
        ("", r"failed \(RuntimeError\)"),
    ],
)
def test_explanations(text, told):
    """Only a cause that the words prove is named."""
    assert re.search(told, explain(RuntimeError(text)))
