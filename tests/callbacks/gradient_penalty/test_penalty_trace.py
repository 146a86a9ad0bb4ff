"""The penalty changes gradients and nothing else: a run with a vanishing one is the run without it, bit for bit."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall
from toys import Classifier
from trainers import quiet_trainer

from lightning_plugins.callbacks import GradientPenalty
from lightning_plugins.replay.recorder import is_replaying

NOTHING = 1e-40  # a coefficient that vanishes beside every gradient in fp32, yet takes every path


class Everything(LightningModule):
    """Has all that a training_step may leave behind."""

    def __init__(self):
        super().__init__()
        self.first = spectral_norm(nn.Linear(6, 12))
        self.norm, self.dropout, self.last = nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 3)
        self.register_buffer("reassigned", torch.zeros(12))
        self.register_buffer("written", torch.zeros((), dtype=torch.long))
        self.register_buffer("late", None)
        self.mean, self.kept = MeanMetric(), CatMetric()
        kinds = (MulticlassAccuracy, MulticlassPrecision, MulticlassRecall)
        self.group = MetricCollection([kind(3, average="macro") for kind in kinds])
        self.seen = []

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.randn(6)
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        if self.late is not None:
            loss = loss + 0.1 * (scores - self.late).square().mean()
        self.reassigned = 0.9 * self.reassigned + 0.1 * self.norm.running_mean
        self.written += 1
        self.late = scores.detach().mean(0)
        self.mean.update(loss)
        self.kept.update(scores.detach())
        self.group(scores, y)
        values = {name: metric.compute() for name, metric in self.group.items()}  # which unties the shared states
        if not is_replaying():
            self.seen.append(values)
        self.group.update(scores, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.group)
        return loss

    def on_train_epoch_end(self):
        self.seen.append(self.kept.compute())
        self.kept.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Validated(Everything):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))


class Book(DummyLogger):
    """Writes down what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {name: value for name, value in metrics.items() if not name.startswith("igr/")}))


def data(n=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


def fit(module, *callbacks, **options):
    trainer = quiet_trainer(*callbacks, **({"max_epochs": 2, "log_every_n_steps": 1} | options))
    validates = trainer.limit_val_batches and type(module).validation_step is not LightningModule.validation_step
    trainer.fit(module, DataLoader(data(), batch_size=None), DataLoader(data(), batch_size=None) if validates else None)
    return trainer


def everything(*callbacks, **trainer):
    """All that is left after a run, by name."""
    seed_everything(1, verbose=False)
    module, book = Validated(), Book()
    trainer = fit(module, *callbacks, logger=book, val_check_interval=2, num_sanity_val_steps=1, **trainer)
    return {
        "weights and buffers": module.state_dict(),
        "random numbers": [random.random(), np.random.rand(), torch.rand(3)],
        "logged": book.rows,
        "metrics": module.seen,
        "metric states": [dict(metric.metric_state) for metric in module.modules() if hasattr(metric, "metric_state")],
        "updates": [metric.update_count for metric in module.modules() if hasattr(metric, "update_count")],
        "callback metrics": {n: v for n, v in trainer.callback_metrics.items() if not n.startswith("igr/")},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "steps": trainer.global_step,
        "gradients": [param.grad for param in module.parameters()],
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


WAYS = {
    "forward": {},
    "central": {"difference": "central"},
    "exact": {"engine": "exact"},
    "of micro-batches": {"scope": "microbatch", "norm": "norm"},
    "exact, of micro-batches": {"scope": "microbatch", "engine": "exact"},
    "auto, unchecked": {"engine": "auto", "check": "off"},
}


@pytest.mark.parametrize("k", [1, 2])
def test_no_trace(k):
    without = everything(accumulate_grad_batches=k)
    for arguments in WAYS.values():
        assert_same(everything(GradientPenalty(NOTHING, **arguments), accumulate_grad_batches=k), without)


def test_the_comparison_sees_a_penalty():
    with pytest.raises(AssertionError, match="weights and buffers"):
        assert_same(everything(GradientPenalty(0.1)), everything())


@pytest.mark.parametrize(
    "arguments",
    [
        {"coefficient": 0.0},
        {"coefficient": 0.0, "engine": "exact"},
        {"coefficient": 1.0, "schedule": [[0, 0.0]]},
    ],
    ids=str,
)
def test_no_coefficient_no_difference(arguments):
    assert_same(everything(GradientPenalty(**arguments)), everything())


def test_no_difference_between_every_n_steps():
    """Up to the second penalised step, the run is that from the first one's end."""

    def weights(every_n_steps, steps):
        seed_everything(1, verbose=False)
        module = Everything()
        fit(module, GradientPenalty(0.1, every_n_steps=every_n_steps), max_steps=steps)
        return module.state_dict()

    torch.testing.assert_close(weights(5, 5), weights(1000, 5), rtol=0, atol=0)
    assert not torch.equal(weights(5, 6)["last.weight"], weights(1000, 6)["last.weight"])


# Training steps that cannot be repeated


class Diary(Dataset):
    """What no replay looks into: a data set."""

    def __init__(self):
        self.flags, self.calls = [], 0


class Plain(Classifier):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 3))
        self.gradients, self.diary = [], Diary()

    @property
    def flags(self):
        return self.diary.flags

    def training_step(self, batch, batch_idx):
        self.flags.append(is_replaying())
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer):
        grads = [param.grad for param in self.parameters()]
        self.gradients.append(None if grads[0] is None else torch.cat([grad.flatten() for grad in grads]))


class EditsItsBatch(Plain):
    def loss(self, batch):
        batch[0].mul_(0.5)
        return super().loss(batch)


class Counts(Plain):
    def loss(self, batch):
        self.diary.calls += 1
        return super().loss(batch) * (1 + 0.1 * self.diary.calls)


class Anneals(Plain):
    """Counts in attributes of its own and of a part, collects, and writes to a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.calls, self.losses, self.last, self.center = 0, [], {}, torch.zeros(3)
        self.net.calls = 0

    def loss(self, batch):
        self.calls += 1
        self.net.calls += 1
        logits = self.net(batch[0])
        self.center.mul_(0.9).add_(logits.detach().mean(0))
        loss = F.cross_entropy(logits - self.center, batch[1]) * (1 + 0.1 * self.calls + 0.1 * self.net.calls)
        self.losses.append(loss.detach())
        self.last[self.calls] = loss.detach()
        self.made_in_step = self.calls
        return loss


class DrawsFromItsOwn(Plain):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, batch):
        x, y = batch
        return super().loss((x + 0.1 * torch.randn(x.shape, generator=self.generator), y))


class Iterates(Plain):
    def __init__(self):
        super().__init__()
        self.noise = iter(torch.linspace(0, 1, 100).tolist())

    def loss(self, batch):
        return super().loss((batch[0] + next(self.noise), batch[1]))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", [EditsItsBatch, DrawsFromItsOwn])
def test_batches_that_are_edited_and_generators_are_repeated_and_left_alone(kind, k):
    watched, plain = kind(), kind()
    fit(watched, GradientPenalty(NOTHING), max_epochs=1, accumulate_grad_batches=k)
    fit(plain, max_epochs=1, accumulate_grad_batches=k)
    torch.testing.assert_close(watched.gradients, plain.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", [Counts, Iterates])
def test_the_first_step_shows_what_cannot_be_repeated(kind, k):
    module = kind()
    sentence = f"training_step of {kind.__name__} again on the same batch gives another gradient .* nobody else sees"
    with pytest.raises(RuntimeError, match=sentence):
        fit(module, GradientPenalty(0.1), accumulate_grad_batches=k)
    assert "training_step" not in module.__dict__
    assert not is_replaying()
    fit(kind(), GradientPenalty(0.1, check="off"), accumulate_grad_batches=k)
    fit(kind(), GradientPenalty(0.1, engine="exact", scope="microbatch"), accumulate_grad_batches=k)  # runs none twice


@pytest.mark.parametrize("k", [1, 2])
def test_state_in_attributes_is_repeated_and_left_alone(k):
    watched, plain = Anneals(), Anneals()
    fit(watched, GradientPenalty(NOTHING), max_epochs=1, accumulate_grad_batches=k)
    fit(plain, max_epochs=1, accumulate_grad_batches=k)
    assert (watched.calls, watched.net.calls, watched.made_in_step) == (
        plain.calls,
        plain.net.calls,
        plain.made_in_step,
    )
    for name in ("losses", "last", "center", "gradients"):
        torch.testing.assert_close(getattr(watched, name), getattr(plain, name), rtol=0, atol=0)


def test_a_penalty_that_begins_late_is_checked_then():
    with pytest.raises(RuntimeError, match="gives another gradient"):
        fit(Counts(), GradientPenalty(0.1, warmup_steps=3))


def test_is_replaying():
    module = Plain()
    fit(module, GradientPenalty(0.1), max_epochs=1)
    checked, other = [False] + 5 * [True], [False, True]
    assert module.flags == 2 * checked + other + checked + 2 * other  # steps 1, 2 and 4
    assert not is_replaying()


# Unusual runs


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")  # said once in a process
def test_batches_without_a_loss_are_left_out():
    class NowAndThen(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 4, 5) else self.loss(batch)

    module = NowAndThen()
    fit(module, GradientPenalty(0.5, difference="central"), max_epochs=1, accumulate_grad_batches=2)
    reference, batches = Plain(), data()
    for gradient, window in zip(module.gradients, [[0], [2, 3]], strict=False):
        params = list(reference.parameters())
        loss = sum(reference.loss(batches[i]) for i in window) / len(window)
        first = torch.autograd.grad(loss, params, create_graph=True)
        total = torch.autograd.grad(loss + 0.5 * sum((grad**2).sum() for grad in first), params)
        expected = torch.cat([grad.flatten() for grad in total]) * len(window) / 2
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for param, grad in zip(params, total, strict=True):
                param -= 0.1 * grad * len(window) / 2
    assert module.gradients[2] is None


def test_an_epoch_that_is_broken_off():
    """``on_train_batch_start`` may end an epoch within a window; Lightning drops the gradients of its begin."""

    class Breaks(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    class Starts(Breaks):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 2 else None

    broken, whole = Breaks(), Starts()
    for module in (broken, whole):
        fit(module, GradientPenalty(0.1), accumulate_grad_batches=2)
    torch.testing.assert_close(broken.gradients, whole.gradients, rtol=0, atol=0)


def test_validation_may_use_the_training_step():
    class Shared(Plain):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    shared, plain = Shared(), Plain()
    fit(shared, GradientPenalty(0.1), accumulate_grad_batches=2, val_check_interval=1, limit_val_batches=2)
    fit(plain, GradientPenalty(0.1), accumulate_grad_batches=2)
    torch.testing.assert_close(shared.gradients, plain.gradients, rtol=0, atol=0)


class Stops(Callback):
    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise self.exception


@pytest.mark.parametrize(("raised", "seen"), [(ValueError("stop"), ValueError), (KeyboardInterrupt(), SystemExit)])
def test_training_step_is_given_back(raised, seen):
    module, penalty = Plain(), GradientPenalty(0.1)
    with pytest.raises(seen):
        fit(module, penalty, Stops(raised))
    assert "training_step" not in module.__dict__
    fit(module, penalty)
    assert "training_step" not in module.__dict__
    fit(copy.deepcopy(module), copy.deepcopy(penalty))
    fit(pickle.loads(pickle.dumps(module)), pickle.loads(pickle.dumps(penalty)))


def test_one_callback_for_two_runs_begins_afresh():
    penalty = GradientPenalty(0.1)
    first, second = Plain(), Plain()
    fit(first, penalty)
    fit(second, penalty)
    assert first.flags == second.flags
    torch.testing.assert_close(first.gradients, second.gradients, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="gives another gradient"):
        fit(Counts(), penalty)


def test_a_module_copied_or_pickled_while_it_trains_has_its_own_training_step():
    class Copies(Callback):
        copies = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not self.copies:
                self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]

    module, copies = Plain(), Copies()
    fit(module, GradientPenalty(0.1), copies, max_epochs=1)
    counted = len(module.flags)
    for twin in copies.copies:
        twin.flags.clear()
        twin.training_step(data(1)[0], 0)
        assert twin.flags == [False]
        assert twin.training_step.__self__ is twin
    assert len(module.flags) == counted


def test_fast_dev_run():
    module = Plain()
    fit(module, GradientPenalty(0.1), fast_dev_run=True)
    assert module.flags == [False] + 5 * [True]
