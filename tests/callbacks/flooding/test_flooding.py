"""Flooding against loops of plain torch that train on the written objective."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Regression, mlp, weights
from trainers import fit

from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.callbacks.gradient_penalty.callback import GradientPenalty

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

LEVEL = 0.35  # the losses of the first steps lie on both sides
MIDDLE = 0.55  # those of all modes' first epoch do


def batches(batch_size, number=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 4, generator=generator)
    y = x.sum(1, keepdim=True).sin() * torch.linspace(0.2, 1.8, number)[:, None]  # micro-batches differ
    return DataLoader(TensorDataset(x, y), batch_size)


class Net(Regression):
    """Remembers what it returned."""

    def __init__(self, **options):
        super().__init__(mlp(4, 8, 1, seed=0), partial(torch.optim.SGD, **({"lr": 0.3} | options)))
        self.returned = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.returned.append(loss)
        return loss


class Signs(Callback):
    """The sign of every step."""

    def __init__(self):
        self.signs = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.signs += [c.sign.item() for c in trainer.callbacks if isinstance(c, Flooding)]


def trained(model, *callbacks, data=None, **options):
    signs = Signs()
    fit(
        model,
        batches(4) if data is None else data,
        *callbacks,
        signs,
        **({"max_epochs": 2, "log_every_n_steps": 1} | options),
    )
    model.signs = signs.signs
    return model


def flooded(losses, level, scope):
    """The objective as it is written."""
    terms = torch.stack(losses).mean()[None] if scope == "step" else torch.stack(losses)
    return ((terms - level).abs() + level).mean()


def descend(model, data, accumulate, objective, epochs=2, clip=None):
    """Plain gradient descent on ``objective(losses of a window)``, times n / k for a window cut short."""
    model.double()
    data = [[x.double() for x in batch] for batch in data]
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for start in range(0, len(data), accumulate):
            window = data[start : start + accumulate]
            optimizer.zero_grad()
            value = objective([model.loss(batch) for batch in window])
            (value * len(window) / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (4, 4)])  # the last cuts windows short
def test_trains_on_the_written_objective(batch_size, accumulate, scope, clip):
    data = batches(batch_size)
    options = {"precision": "64-true", "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    model = trained(Net(), Flooding(LEVEL, scope), data=data, max_epochs=4, **options)
    expected = descend(Net(), data, accumulate, lambda losses: flooded(losses, LEVEL, scope), 4, clip)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-12, atol=1e-15)
    assert set(model.signs) == ({1, -1} if scope == "step" else {1})
    signs = {"step": model.signs, "microbatch": [loss.item() < LEVEL for loss in model.returned]}[scope]
    assert len(set(signs)) == 2, "the level was not crossed"


def test_how_a_batch_is_spread_does_not_matter():
    """One batch of 8, and two of 4 with accumulation; decided alone, the two of 4 train something else."""
    runs = [
        weights(
            trained(Net(), Flooding(LEVEL, scope), data=batches(size), precision="64-true", accumulate_grad_batches=k)
        )
        for size, k, scope in [(8, 1, "step"), (4, 2, "step"), (8, 1, "microbatch"), (4, 2, "microbatch")]
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-12, atol=1e-15)
    assert (runs[0] - runs[3]).norm() > 0.01 * runs[0].norm()


def with_dropout(model):
    model.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
    return model


def checkpointed(model):
    forward = model.net.forward
    model.net.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    return model


def compiled(model):
    model.net.compile(backend="aot_eager")
    return model


def fp16():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


MODES = {
    "plain": (lambda model: model, dict),
    "dropout and batch norm": (with_dropout, dict),
    "accumulation, clipped by value": (
        lambda model: model,
        lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ),
    "bf16-mixed": (lambda model: model, lambda: {"precision": "bf16-mixed"}),
    "bf16-true": (lambda model: model, lambda: {"precision": "bf16-true"}),
    "fp16 with a scaler": (lambda model: model, fp16),
    "checkpointing": (checkpointed, dict),
    "compiled": (compiled, dict),
}


@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("mode", MODES)
def test_below_the_level_it_ascends_and_above_it_is_not_there(mode, scope):
    """Bit for bit as torch's own ``maximize=True``, and as without the callback."""
    change, options = MODES[mode]

    def run(*callbacks, **optimizer):
        return weights(trained(change(Net(lr=0.01, momentum=0.9, **optimizer)), *callbacks, max_epochs=1, **options()))

    assert torch.equal(run(Flooding(-1e6, scope)), run())
    assert torch.equal(run(Flooding(1e6, scope)), run(maximize=True))
    assert not torch.equal(run(), run(maximize=True))


class FloodsItself(Net):
    """What a user may write instead, for micro-batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return (loss - MIDDLE).abs() + MIDDLE


@pytest.mark.parametrize("mode", MODES)
def test_the_level_is_in_units_of_the_raw_loss(mode):
    """Whatever the scale of the loss or the number of micro-batches: bit for bit as a module that floods its loss."""
    change, options = MODES[mode]
    itself = trained(change(FloodsItself(lr=0.01)), max_epochs=1, **options())
    losses = [loss.item() for loss in itself.returned]
    assert min(losses) < MIDDLE < max(losses)
    scopes = ["microbatch"] if "accumulation" in mode else ["step", "microbatch"]
    for scope in scopes:
        model = trained(change(Net(lr=0.01)), Flooding(MIDDLE, scope), max_epochs=1, **options())
        assert torch.equal(weights(model), weights(itself))
        assert [loss.item() for loss in model.returned] == losses


@pytest.mark.parametrize("off", [{"level": -math.inf}, {"level": 1e6, "start": "epoch 9"}])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_off_is_bitwise_as_without(scope, off):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "max_epochs": 3}
    plain = trained(with_dropout(Net(momentum=0.9, weight_decay=0.1)), **options)
    drawn = torch.rand(3)
    model = trained(with_dropout(Net(momentum=0.9, weight_decay=0.1)), Flooding(**off, scope=scope), **options)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(weights(model), weights(plain))
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), plain.buffers(), strict=True))


def test_an_overflow_step_of_the_scaler_is_skipped():
    class Spikes(Net):
        def training_step(self, batch, batch_idx):
            self.before.append(weights(self))
            return super().training_step(batch, batch_idx) * (1e9 if batch_idx == 2 else 1.0)

    class Fp16(Spikes):
        before: list

        def __init__(self, **optimizer):
            super().__init__(**optimizer)
            self.before = []

    up = trained(Fp16(), Flooding(1e12), max_epochs=1, **fp16())
    ascended = trained(Fp16(maximize=True), max_epochs=1, **fp16())
    assert torch.equal(up.before[2], up.before[3]), "the step was not skipped"
    assert torch.equal(weights(up), weights(ascended))
    assert torch.isfinite(weights(up)).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_together_with_a_penalty_of_the_gradient(scope, accumulate, order):
    """``F + c |grad F|^2`` with ``F = |L - b| + b``, whatever the order of callbacks."""

    def objective(losses):
        value = flooded(losses, LEVEL, scope)
        grads = torch.autograd.grad(value, list(expected.parameters()), create_graph=True)
        return value + 0.05 * sum(grad.square().sum() for grad in grads)

    both = [Flooding(LEVEL, scope), GradientPenalty(0.05, engine="exact")]
    options = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    model = trained(Net(), *(both[i] for i in order), **options)
    expected = Net()
    descend(expected, batches(4), accumulate, objective)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-10, atol=1e-13)
    assert scope == "microbatch" or set(model.signs) == {1, -1}


def test_down_and_up_again_descend_on_the_squared_norm_of_the_gradient():
    """Two steps of size h move by -(h^2 / 2) grad |grad L|^2; what is left over falls like h."""
    data = batches(24)
    start = Net().double()
    batch = [x.double() for x in next(iter(data))]
    loss = start.loss(batch)
    grads = torch.autograd.grad(loss, list(start.parameters()), create_graph=True)
    squared = sum(grad.square().sum() for grad in grads)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(squared, list(start.parameters()))])
    errors = []
    for h in (1e-2, 1e-3, 1e-4):
        level = loss.item()  # the first step begins at the level itself: it descends
        model = trained(Net(lr=h), Flooding(level), data=data, max_epochs=2, precision="64-true")
        assert model.signs == [1, -1]
        moved = weights(model) - weights(start)
        errors.append(((moved + h**2 / 2 * slope).norm() / moved.norm()).item())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
