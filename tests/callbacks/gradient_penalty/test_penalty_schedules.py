"""The coefficient of each step, resumed runs, what is logged and what memory it takes, against closed forms."""

import warnings
import weakref
from functools import partial

import pytest
import torch
import trainers
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import ImageClassifier, Squares, mlp

from lightning_plugins.callbacks import GradientPenalty, RandomState
from lightning_plugins.callbacks.implicit_regularization import implicit_coefficient
from lightning_plugins.data import Digits

CURVATURES = torch.tensor([0.5, 1.0, 3.0]).double()


class Quadratic(LightningModule):
    """``L = <theta - b, A (theta - b)> / 2 + 1`` with a diagonal A, ``b`` the batch: ``H grad L = A^2 (theta - b)``."""

    def __init__(self, optimizer=torch.optim.SGD, decay=1.0, **settings):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).double())
        self.optimizer, self.decay, self.settings = optimizer, decay, {"lr": 0.01} | settings
        self.thetas, self.gradients = [], []

    def training_step(self, batch, batch_idx):
        away = self.theta - batch
        return 0.5 * (CURVATURES * away**2).sum() + 1

    def on_before_optimizer_step(self, optimizer):
        self.thetas.append(self.theta.detach().clone())
        self.gradients.append(self.theta.grad.clone())

    def configure_optimizers(self):
        optimizer = self.optimizer([self.theta], **self.settings)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def coefficients(self):
        """``c`` of each step, from ``A theta + 2 c A^2 theta``."""
        for theta, gradient in zip(self.thetas, self.gradients, strict=True):
            plain = CURVATURES * theta
            yield ((gradient - plain) / (2 * CURVATURES * plain)).mean().item()


class Book(DummyLogger):
    """Writes down what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)


fit = partial(trainers.fit, log_every_n_steps=1)
ZEROS = [torch.zeros(3).double()] * 12


def measured(penalty, **options):
    module = Quadratic()
    fit(module, ZEROS, penalty, **options)
    return list(module.coefficients())


# Schedules


@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, lambda step: 0.2),
        ({"warmup_steps": 4}, lambda step: 0.2 * min(1, step / 4)),
        ({"every_n_steps": 3}, lambda step: 0.2 * (step % 3 == 0)),
        ({"schedule": [[2, 0.0], [6, 2.0], [8, 1.0]]}, lambda s: 0.2 * [0, 0, 0, 0.5, 1, 1.5, 2, 1.5, 1, 1, 1, 1][s]),
        ({"schedule": [[0, 2.0]], "warmup_steps": 5, "every_n_steps": 2}, lambda s: 0.4 * min(1, s / 5) * (1 - s % 2)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "expected",
)
def test_coefficient_of_each_step(arguments, expected, engine):
    found = measured(GradientPenalty(0.2, engine=engine, **arguments))
    assert found == pytest.approx([expected(step) for step in range(12)], rel=1e-5, abs=1e-9)


def test_steps_are_the_optimizers_whatever_the_accumulation():
    found = measured(GradientPenalty(0.2, warmup_steps=4), accumulate_grad_batches=3)
    assert found == pytest.approx([0, 0.05, 0.1, 0.15], rel=1e-5, abs=1e-9)


class Noisy(ImageClassifier):
    def __init__(self):
        layers = [nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 10)]
        super().__init__(nn.Sequential(nn.Flatten(), *layers))

    def validation_step(self, batch, batch_idx):
        pass  # the data have some

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"coefficient": 0.1, "warmup_steps": 20},
        {"coefficient": 0.1, "warmup_steps": 20, "engine": "exact"},
        {"coefficient": 0.1, "schedule": [[0, 0.0], [20, 1.0]], "every_n_steps": 2, "engine": "auto"},
        {"match_lr": 0.1, "warmup_steps": 20},
    ],
    ids=str,
)
def test_resumed_is_uninterrupted(arguments, tmp_path):
    def run(seed, ckpt_path=None):
        seed_everything(seed, verbose=False)
        module = Noisy()
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
        callbacks = [GradientPenalty(**arguments), RandomState(), saving]
        options = {"max_epochs": None, "max_steps": 12, "accumulate_grad_batches": 2, "limit_val_batches": 0}
        fit(module, Digits(image_size=8, batch_size=100, shift=1), *callbacks, ckpt_path=ckpt_path, **options)
        return module.state_dict()

    whole = run(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        resumed = run(99, tmp_path / "step=5.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


# Matching a learning rate


@pytest.mark.parametrize("kind", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}], ids=str)
def test_match_lr_follows_the_scheduled_rate(kind):
    module = Quadratic(lr=0.04, decay=0.8, **kind)
    fit(module, ZEROS, GradientPenalty(match_lr=0.1, difference="central"))
    found = list(module.coefficients())
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0, **kind)
    expected = [
        implicit_coefficient(optimizer, 0.1) - implicit_coefficient(optimizer, 0.04 * 0.8**i) for i in range(12)
    ]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("engine", [{"difference": "central"}, {"engine": "exact"}], ids=str)
def test_match_lr_is_zero_while_the_rate_is_higher_and_says_so_once(engine):
    module = Quadratic(lr=0.2, decay=0.8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, ZEROS, GradientPenalty(match_lr=0.1, **engine))
    ours = [str(warning.message) for warning in caught if "match_lr" in str(warning.message)]
    assert len(ours) == 1
    assert "the learning rate is higher" in ours[0]
    expected = [max(0.0, (0.1 - 0.2 * 0.8**i) / 4) for i in range(12)]
    assert list(module.coefficients()) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert expected[3] == 0 < expected[4]


def test_match_lr_refuses_adaptive_optimizers_before_training():
    module = Quadratic(torch.optim.Adam)
    with pytest.raises(MisconfigurationException, match=r"needs torch\.optim\.SGD, got Adam"):
        fit(module, ZEROS, GradientPenalty(match_lr=0.1))
    assert module.thetas == []
    assert "training_step" not in module.__dict__


# Logs


@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("k", [1, 2])
def test_logs(k, scope, norm, engine):
    torch.manual_seed(0)
    data = list(torch.randn(4 * k, 3).double())
    module, book = Quadratic(), Book()
    penalty = GradientPenalty(0.2, scope=scope, norm=norm, engine=engine, relative_step=1e-5)
    fit(module, data, penalty, logger=book, log_every_n_steps=2, accumulate_grad_batches=k)
    logged = {step: row for step, row in book.rows.items() if "igr/penalty" in row}
    assert list(logged) == [1, 3]
    for step, row in logged.items():
        away = module.thetas[step] - torch.stack(data[step * k : (step + 1) * k])
        loss = (0.5 * (CURVATURES * away**2).sum(1) + 1).mean()
        gradients = CURVATURES * away
        squares = (gradients.mean(0, keepdim=True) if scope == "step" else gradients).square().sum(1)
        penalty = 0.2 * (squares if norm == "squared" else squares.sqrt()).mean()
        expected = {
            "igr/coefficient": 0.2,
            "igr/grad_norm_sq": squares.mean().item(),
            "igr/penalty": penalty.item(),
            "igr/penalty_ratio": (penalty / loss).item(),
        }
        if engine == "finite_difference":
            expected["igr/relative_step"] = 1e-5
        assert {name: value for name, value in row.items() if name.startswith("igr/")} == pytest.approx(expected, 1e-6)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("n", [0, 100])
def test_nothing_is_logged_unless_asked_for(n):
    book = Book()
    trainer = fit(Quadratic(), ZEROS, GradientPenalty(0.2), logger=book, log_every_n_steps=n)
    assert not any("igr/" in name for row in book.rows.values() for name in row)
    assert not any("igr/" in name for name in trainer.callback_metrics)


# Memory


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still there."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def free(self, size):
        self.now -= size


def peak_copies(k, *callbacks):
    """The most memory alive at any time of a run beside the parameters, in copies of them."""
    module, data = Squares(mlp(*[256] * 9)), [torch.randn(1, 256) for _ in range(3 * k)]
    with Alive() as alive:
        fit(module, data, *callbacks, accumulate_grad_batches=k)
    assert alive.now >= 0
    return alive.most / sum(param.nbytes for param in module.parameters())


@pytest.mark.parametrize(
    ("k", "arguments", "copies"),
    [
        (1, {}, 2),
        (2, {}, 2),
        (1, {"difference": "central"}, 2),
        (2, {"scope": "microbatch"}, 4),
        (1, {"engine": "exact"}, 2),
    ],
    ids=str,
)
def test_memory(k, arguments, copies):
    """Two copies of the parameters beside the gradients; an eighth of one is the largest parameter."""
    extra = peak_copies(k, GradientPenalty(0.1, **arguments)) - peak_copies(k)
    assert copies - 0.2 < extra < copies + 0.2
