"""Whatever a probe meets, training goes on bit for bit; what failed is said once, and left out."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from ode_names import names
from torch import nn
from torch.optim import SGD
from toys import Classifier, LeastSquares, rows, weights
from trainers import fit

from lightning_plugins import ODEDiagnostics, is_replaying

RATE = 0.05


def batches(n=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


class Net(Classifier):
    """Batch norm and dropout, so that a replay which is broken off has something to put back."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)))
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.seen.append(loss.item())
        self.log("loss", loss)
        return loss


class ReturnsNothingWhenSmall(Net):
    """The probe, a step further, falls below what training has not yet reached."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if is_replaying() and loss < 1.2 else loss


class RefusesALoss(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if is_replaying():
            raise ValueError(f"a loss of {loss.item():.3f} cannot be")
        return loss


class FailsInItsBackward(Net):
    def backward(self, loss):
        if is_replaying():
            raise ArithmeticError("backward")
        loss.backward()


class FailsHalfWay(Net):
    """With autograd switched off and the network in evaluation."""

    def training_step(self, batch, batch_idx):
        if is_replaying():
            torch.set_grad_enabled(False)
            self.net.eval()
            self.net(batch[0])
            self.net[0].weight.grad = torch.ones_like(self.net[0].weight)
            raise IndexError("half way")
        return super().training_step(batch, batch_idx)


def trained(kind, *callbacks, **options):
    module = kind()
    trainer = fit(module, batches(), *callbacks, **options)
    return {
        "weights": weights(module),
        "buffers": list(module.buffers()),
        "seen": module.seen,
        "training": [part.training for part in module.modules()],
        "logged": {n: v for n, v in trainer.callback_metrics.items() if not n.startswith("ode/")},
        "random": torch.rand(3),
    }


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (ReturnsNothingWhenSmall, "RuntimeError: training_step returned a loss at first, but None"),
        (RefusesALoss, r"ValueError: a loss of .* cannot be"),
        (FailsInItsBackward, "ArithmeticError: backward"),
        (FailsHalfWay, "IndexError: half way"),
    ],
)
def test_errors_of_probes(kind, sentence, accumulate):
    plain = trained(kind, accumulate_grad_batches=accumulate)
    callback = ODEDiagnostics(1, sharpness_every_n_steps=2)
    with pytest.warns(UserWarning, match=f"running the window again failed with {sentence}") as caught:
        watched = trained(kind, callback, accumulate_grad_batches=accumulate)
    assert len([w for w in caught if "ODEDiagnostics" in str(w.message)]) == 1
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    assert len(callback.history) == 12 // accumulate
    assert all({"grad_norm", "update_norm", "predicted_dloss", "loss"} <= names(row) for row in callback.history)


def test_later_probes_try_again():
    """An error in some probes leaves the rows of the others; one in the search for the sharpness leaves the rest."""

    class Moody(LeastSquares):
        probes = itertools.count()

        def training_step(self, batch, batch_idx):
            if is_replaying() and next(Moody.probes) in (0, 4):
                raise OSError("not now")
            return super().training_step(batch, batch_idx)

    callback = ODEDiagnostics(1)
    with pytest.warns(UserWarning, match="OSError: not now") as caught:
        fit(Moody(lambda p: SGD(p, lr=RATE)), [rows()] * 6, callback)
    assert len([w for w in caught if "ODEDiagnostics" in str(w.message)]) == 1
    # replays: the check of step 1 (0); of step 2, and its probe (1, 2); of step 3 (3, as the third); of step 4 (4)
    assert ["curvature_step" in names(row) for row in callback.history] == [False, True, True, False, True, True]


def test_a_search_that_fails_leaves_the_other_rows():
    class NoSecond(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    class Once(LeastSquares):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return NoSecond.apply(x @ self.theta - y).square().mean()

    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_engine="exact")
    with pytest.warns(
        UserWarning, match=r"search for the sharpness failed with RuntimeError: sharpness_engine='exact'"
    ):
        fit(Once(lambda p: SGD(p, lr=RATE)), [rows()] * 2, callback)
    assert all("curvature_step" in names(row) and "sharpness" not in names(row) for row in callback.history)


@pytest.mark.parametrize("compiled", ["module", "part"])
def test_an_engine_that_is_known_to_be_impossible_is_refused_before_training(compiled):
    class Compiled(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("it has begun to train")

    module = Compiled()
    module.net.compile(backend="eager")
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_engine="exact")
    sentence = r"sharpness_engine='exact'\) is not possible: torch.compile .* use sharpness_engine='finite_difference'"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(module, batches(1), callback)


def test_batches_drawn_in_the_step_are_not_drawn_again():
    class Draws(Net):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    found = []
    for callbacks in ([], [ODEDiagnostics(1)]):
        module = Draws()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, batches(), *callbacks)
        found.append(weights(module))
    assert torch.equal(*found)
    assert any("takes batches from dataloader_iter" in str(w.message) for w in caught)


class Wanders(LeastSquares):
    """Repeatable for a while: noise from an iterator from its sixth step on."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.noise = iter(np.random.default_rng(0).uniform(1, 2, 100))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * next(self.noise) if batch_idx >= 5 else loss


def test_the_check_is_repeated_at_growing_intervals():
    callback = ODEDiagnostics(1)
    sentence = r"another gradient .* in step 8; it was the same in 1, 2, 4: .*omitted from now on"
    with pytest.warns(UserWarning, match=sentence):
        fit(Wanders(lambda p: SGD(p, lr=RATE)), [rows()] * 12, callback)
    assert ["curvature_step" in names(row) for row in callback.history] == [True] * 7 + [False] * 5


def test_tied_weights_listed_twice():
    """torch steps them twice; the rows that hold for any optimizer are left, each parameter counted once."""

    class Tied(LeastSquares):
        def configure_optimizers(self):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return SGD([self.a, self.b, self.a], lr=RATE)

    module, callback = Tied(None), ODEDiagnostics(1)
    x, y = rows()
    before = module.theta.detach().clone()
    with pytest.warns(UserWarning, match="SGD lists a parameter twice in a group"):
        fit(module, [(x, y)], callback)
    gradient = x.T @ (x @ before - y) / len(x)
    (row,) = callback.history
    move = module.theta.detach() - before
    torch.testing.assert_close(move, -RATE * gradient * torch.tensor([2.0, 2, 2, 2, 1], dtype=torch.float64))
    assert row["ode/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert row["ode/update_norm"] == pytest.approx(move.norm().item(), rel=1e-12)
    assert "time" not in names(row)
