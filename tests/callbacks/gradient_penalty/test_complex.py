"""Complex parameters are pairs of real ones: the gradient of every step against autograd on the pairs."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from toys import flat
from trainers import fit

from lightning_plugins import Flooding, GradientPenalty, gradient_penalty_backward

C = 0.3


class Wave(LightningModule):
    """A complex layer and a real one, with no absolute value that would have a kink."""

    def __init__(self, manual=None):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.complex128))
        self.a = nn.Parameter(torch.randn(3, generator=g, dtype=torch.float64))
        self.manual, self.gradients = manual, []
        self.automatic_optimization = manual is None

    @staticmethod
    def loss(w, a, x):
        z = 0.3 * x @ w
        return (z * z.conj()).real.mul(a).sum(1).sin().mean() + (z.real * z.imag).square().mean()

    def training_step(self, x, batch_idx):
        if self.manual is None:
            return self.loss(self.w, self.a, x)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        gradient_penalty_backward(self, lambda: self.loss(self.w, self.a, x), C, **self.manual)
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(flat([torch.view_as_real(self.w.grad), self.a.grad]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(n=4):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=g, dtype=torch.complex128) for _ in range(n)]


def written(batches, k, norm, scope):
    """Plain descent on the penalised loss, whose parameters are real numbers: real and imaginary parts, and ``a``."""
    start = Wave()
    pairs = torch.view_as_real(start.w.detach()).clone().requires_grad_()
    a = start.a.detach().clone().requires_grad_()
    params, found = [pairs, a], []

    def penalty(loss):
        squared = sum(g.square().sum() for g in torch.autograd.grad(loss, params, create_graph=True))
        return C * (squared if norm == "squared" else squared.sqrt())

    for at in range(0, len(batches), k):
        losses = [Wave.loss(torch.view_as_complex(pairs), a, x) for x in batches[at : at + k]]
        mean = sum(losses) / len(losses)
        terms = [mean] if scope == "step" else losses
        gradient = torch.autograd.grad(mean + sum(map(penalty, terms)) / len(terms), params)
        found.append(flat(gradient))
        with torch.no_grad():
            for param, g in zip(params, gradient, strict=True):
                param -= 0.05 * g
    return found


def assert_same(module, expected, tolerance):
    assert len(module.gradients) == len(expected) > 0
    for found, right in zip(module.gradients, expected, strict=True):
        assert (found - right).norm() < tolerance * right.norm()


# more arguments, relative error
ENGINES = {
    "exact": ({"engine": "exact"}, 1e-12),
    "central": ({"difference": "central"}, 1e-6),
    "forward": ({"difference": "forward"}, 1e-4),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradient(engine, norm, scope, k):
    arguments, tolerance = ENGINES[engine]
    module = Wave()
    fit(module, data(), GradientPenalty(C, norm=norm, scope=scope, **arguments), accumulate_grad_batches=k)
    assert_same(module, written(data(), k, norm, scope), tolerance)


def test_exact_by_replay():
    module = Wave()
    fit(module, data(), GradientPenalty(C, engine="exact"), Flooding(-100.0))
    assert_same(module, written(data(), 1, "squared", "step"), 1e-12)


@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_manual_optimization(engine, norm):
    arguments, tolerance = ENGINES[engine]
    module = Wave(arguments | {"norm": norm})
    fit(module, data())
    assert_same(module, written(data(), 1, norm, "step"), tolerance)


def test_the_imaginary_parts_are_penalised():
    """Else the tests above could not fail."""
    penalised, plain = Wave(), Wave()
    fit(penalised, data(1), GradientPenalty(C, engine="exact"))
    fit(plain, data(1))
    parts = [(module.gradients[0][:-3].view(4, 3, 2)[..., 1]) for module in (penalised, plain)]
    assert (parts[0] - parts[1]).norm() > 0.1 * parts[1].norm()
