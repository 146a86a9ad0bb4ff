"""Steps that run a backward pass of their own, stop the trainer, or keep what few others do."""

import argparse
import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from toys import flat
from trainers import fit

from lightning_plugins import Flooding, GradientPenalty, ODEDiagnostics


class Base(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

    def loss(self, x, goal):
        return ((self(x) - goal) ** 2).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch, batch.sum(1, keepdim=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Settings(Base):
    def __init__(self):
        super().__init__()
        self.args = argparse.Namespace(alpha=1.0)

    def training_step(self, batch, batch_idx):
        self.args.alpha *= 0.8
        return self.args.alpha * super().training_step(batch, batch_idx)


class AbsDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a - b)
        return (a - b).abs()

    @staticmethod
    def backward(ctx, grad):
        sign = ctx.saved_tensors[0].sign()
        return grad * sign, -grad * sign


class CalledAbs(Base):
    def training_step(self, batch, batch_idx):
        return AbsDifference.apply(self(batch), self.last.bias * batch[:, :1]).mean()


class Stops(Base):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if loss < 2:
            self.trainer.should_stop = True
        return loss


class Lazy(Base):
    def __init__(self):
        super().__init__()
        self.first = nn.LazyLinear(5, dtype=torch.float64)


class Attacks(Base):
    """As fast gradient signs do; ``clears`` the gradients that it has left."""

    clears = False

    def training_step(self, batch, batch_idx):
        goal, x = batch.sum(1, keepdim=True), batch.clone().requires_grad_()
        self.loss(x, goal).backward()
        if self.clears:
            self.zero_grad()
        return self.loss((batch + 0.1 * torch.tanh(x.grad)).detach(), goal)


class AttacksAndClears(Attacks):
    clears = True


class Jagged(Base):
    def training_step(self, batch, batch_idx):
        x = torch.nested.nested_tensor([batch[:1], batch[1:]], layout=torch.jagged) if batch.dim() == 2 else batch
        x = torch.tanh(x) + x
        return super().training_step(x.values(), batch_idx)


class TurnsManual(Base):
    def on_train_epoch_start(self):
        self.automatic_optimization = False


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def jagged():
    return [torch.nested.nested_tensor([b[:1], b[1:]], layout=torch.jagged) for b in batches()]


def trained(kind, *callbacks, data=None):
    module = kind()
    torch.manual_seed(5)
    fit(module, data or batches(), *callbacks)
    return torch.cat([param.detach().flatten() for param in module.parameters()])


@pytest.mark.parametrize("kind", [Settings, CalledAbs, Stops, Lazy, Attacks, AttacksAndClears])
def test_watched_training_is_the_same(kind):
    assert torch.equal(trained(kind), trained(kind, ODEDiagnostics(every_n_steps=1)))


def written(kind, data, coefficient, relative_step):
    """Central differences of gradients of copies; the attacks within move with the weights, too."""
    module = kind()
    optimizer = module.configure_optimizers()

    def gradient(batch, shift):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for param, part in zip(moved.parameters(), shift, strict=True):
                param += part
        return torch.autograd.grad(moved.training_step(batch, 0), list(moved.parameters()))

    for batch in data:
        theta = list(module.parameters())
        g = gradient(batch, [torch.zeros_like(p) for p in theta])
        h = relative_step * flat(theta).norm() / flat(g).norm()
        above, below = (gradient(batch, [side * h * part for part in g]) for side in (1, -1))
        for param, part, up, down in zip(theta, g, above, below, strict=True):
            param.grad = part + coefficient * (up - down) / h
        optimizer.step()
    return flat(module.parameters())


@pytest.mark.parametrize("kind", [Attacks, AttacksAndClears, Jagged])
def test_central_differences_are_those_of_copies(kind):
    data = jagged() if kind is Jagged else batches()
    found = trained(kind, GradientPenalty(0.05, difference="central", relative_step=1e-5), data=data)
    assert (found - trained(kind, data=data)).norm() > 1e-3
    torch.testing.assert_close(found, written(kind, data, 0.05, 1e-5), rtol=0, atol=1e-8)


@pytest.mark.parametrize("callback", [GradientPenalty(0.05), Flooding(0.1)])
def test_manual_optimization_that_begins_later_is_refused(callback):
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        trained(TurnsManual, callback)
