"""Whole runs: they do not notice, resume, log, and need not be of modules made for it."""

import csv
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from ode_names import ANY_KNOWN, EULER, FIRST_ORDER, IGR, names
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from toys import Bert, LeastSquares, Squares, rows
from trainers import fit, quiet_trainer

from lightning_plugins import Flooding, GradientPenalty, NormRMSprop, ODEDiagnostics

# Training is not changed


class Everything(LightningModule):
    """Batch norm, dropout, a metric and logs."""

    def __init__(self, optimizer):
        super().__init__()
        seed_everything(0, verbose=False)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.unused = nn.Parameter(torch.ones(2))
        self.seen = MeanMetric()
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.seen(loss)
        self.log("train/loss", loss)
        self.log("train/seen", self.seen, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def classes(n, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=generator), torch.arange(size) % 3) for _ in range(n)]


def scaler(growth_interval=2000, init_scale=2.0**10):
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", "cpu", scaler=grad_scaler)


ALL = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adam": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "norm-rmsprop": lambda p: NormRMSprop(p, lr=0.1),
    "unknown": lambda p: NAdam(p, lr=0.01),
}
MODES = {
    "plain": {},
    "accumulate-clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "clip-value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {},
    "64-true": {"precision": "64-true"},
}
PAIRS = [(name, "plain") for name in ALL] + [(name, mode) for name in ("momentum", "adam") for mode in MODES][1:]


def whole_state(module, trainer):
    """All that training leaves behind."""
    tensors = dict(module.state_dict())
    for group in trainer.optimizers[0].state_dict()["state"].items():
        tensors |= {f"{group[0]}/{key}": value for key, value in group[1].items()}
    return tensors | {"random": torch.get_rng_state(), "epoch": trainer.callback_metrics["train/seen_epoch"]}


@pytest.mark.filterwarnings("ignore:ODEDiagnostics. NAdam is none of")
@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_a_run_does_not_notice(name, mode):
    """Weights, buffers, optimizer, metrics and random numbers, bit for bit, probing in every step."""
    states, histories = [], []
    for watched in (False, True):
        options = MODES[mode] | ({"plugins": [scaler()]} if mode == "16-mixed" else {})
        module = Everything(ALL[name])
        callback = ODEDiagnostics(1, sharpness_every_n_steps=3, sharpness_max_products=3, tol=0.1)
        batches = [(x.double() if mode == "64-true" else x, y) for x, y in classes(7)]
        trainer = fit(module, batches, *([callback] if watched else []), log_every_n_steps=1, **options)
        states.append(whole_state(module, trainer))
        histories.append(callback.history)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert len(histories[1]) == (4 if mode.startswith("accumulate") else 7)
    assert all(math.isfinite(value) for row in histories[1] for value in row.values())
    if name != "unknown":
        assert names(histories[1][2]) >= ANY_KNOWN
    assert "training_step" not in module.__dict__
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_accumulated_batches_are_one_batch():
    """Two halves give the rows of the whole; a window that the epoch cuts short counts by its share."""
    x, y = rows(12)
    halves = [(x[:6], y[:6]), (x[6:], y[6:])]
    found = []
    for batches, k in (([(x, y)] * 3, 1), (halves * 3, 2)):
        callback = ODEDiagnostics(1, sharpness_every_n_steps=1, tol=0.1, sharpness_rtol=1e-12)
        fit(LeastSquares(lambda p: SGD(p, lr=0.05)), batches, callback, accumulate_grad_batches=k)
        found.append(callback.history)
    for whole, split in zip(*found, strict=True):
        assert whole.keys() == split.keys()
        for name, value in whole.items():
            assert split[name] == pytest.approx(value, rel=1e-7), name
    callback = ODEDiagnostics(1)
    fit(LeastSquares(lambda p: SGD(p, lr=0.05)), halves[:1], callback, accumulate_grad_batches=2)
    (row,) = callback.history
    assert row["ode/actual_dloss"] == pytest.approx(row["ode/predicted2_dloss"])
    assert row["ode/dloss_ratio"] == pytest.approx(1, abs=0.2)


def test_both_with_both_in_any_order():
    """The same rows in every order of the callbacks, and the same weights without the diagnostics."""
    found, weights = [], []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 1)):
        diagnostics = ODEDiagnostics(1)
        callbacks = [Flooding(0.8), GradientPenalty(0.02), diagnostics]
        module = Everything(ALL["momentum"])
        fit(module, classes(8), *[callbacks[i] for i in order])
        found.append(diagnostics.history)
        weights.append(nn.utils.parameters_to_vector(module.parameters()))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 8
    for other in weights[1:]:
        assert torch.equal(weights[0], other)


def test_each_optimizer_has_its_rows_and_no_others():
    expected = {
        "sgd": ANY_KNOWN | EULER | IGR,
        "momentum": ANY_KNOWN | IGR | {"damping_ratio"},
        "nesterov": ANY_KNOWN | IGR,
        "rmsprop": ANY_KNOWN,
        "adam": ANY_KNOWN,
        "adamw": ANY_KNOWN,
        "norm-rmsprop": ANY_KNOWN | EULER,
    }
    for name, wanted in expected.items():
        callback = ODEDiagnostics(1, sharpness_every_n_steps=1, tol=0.1, sharpness_max_products=3)
        fit(Everything(ALL[name]), classes(2), callback)
        assert names(callback.history[-1]) == wanted, name


def test_skipped_steps_are_counted_and_do_not_pass_time():
    """Overflows at first: the scale is far too large."""
    module = Everything(ALL["sgd"])
    callback = ODEDiagnostics(1)
    trainer = fit(module, classes(30), callback, plugins=[scaler(init_scale=2.0**40)])
    skipped = callback.history[-1]["ode/skipped_steps"]
    assert 10 < skipped < 30
    assert skipped == math.log2(2.0**40 / trainer.precision_plugin.scaler.get_scale())
    assert callback.history[-1]["ode/time"] == pytest.approx(0.1 * (30 - skipped))
    first = callback.history[0]
    assert names(first) == {"time", "skipped_steps"}
    assert (first["ode/time"], first["ode/skipped_steps"]) == (0, 1)


def test_fused_optimizer_under_a_scaler_is_omitted():
    callback = ODEDiagnostics(1)
    with pytest.warns(UserWarning, match="nothing is logged: a fused optimizer under a GradScaler .* use fused=False"):
        fit(Everything(lambda p: Adam(p, lr=0.01, fused=True)), classes(3), callback, plugins=[scaler()])
    assert callback.history == []


# State, logs, cadence


@pytest.mark.parametrize("name", ["momentum", "adam", "sgd"])
def test_a_resumed_run_goes_on(name, tmp_path):
    """With its flow time, from the middle of an epoch; the optimizer's momentum is not filled twice."""
    runs = []
    for part in ("whole", "first", "second"):
        callback = ODEDiagnostics(2)
        saves = [SaveAt(5, tmp_path / "step=5.ckpt")] if part == "first" else []
        trainer = quiet_trainer(callback, *saves, max_epochs=2, max_steps=5 if part == "first" else -1)
        path = tmp_path / "step=5.ckpt" if part == "second" else None
        trainer.fit(Everything(ALL[name]), Loader(classes(8)), ckpt_path=path)
        runs.append(callback)
    whole, first, second = runs
    assert len(whole.history) == 8
    times = [row["ode/time"] for row in whole.history]
    assert [row["ode/time"] for row in first.history + second.history] == pytest.approx(times, rel=1e-14)
    assert second.state_dict() == whole.state_dict()


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Loader(DataLoader):
    """Whose place is in the checkpoint."""

    def __init__(self, batches):
        super().__init__(batches, batch_size=None)
        self.place = 0

    def __iter__(self):
        for i in range(self.place, len(self.dataset)):
            self.place = (i + 1) % len(self.dataset)
            yield self.dataset[i]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def read_csv(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_logs_and_cadence(tmp_path):
    """Probes on their own cadence; rows without a second gradient where the trainer logs; the step is Lightning's."""
    callback = ODEDiagnostics(4, sharpness_every_n_steps=8)
    module = Everything(ALL["sgd"])
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 3}
    trainer = fit(module, classes(12), callback, **options)
    found = {}
    for row in read_csv(tmp_path):
        found.setdefault(int(row["step"]), {}).update({k: float(v) for k, v in row.items() if v})
    light = {"time", "grad_norm", "clip_factor", "skipped_steps", "loss"} | IGR
    whole = {step: names(row) for step, row in found.items() if names(row)}
    assert whole == {
        2: light,
        5: light,
        8: light,
        3: ANY_KNOWN - {"sharpness", "edge_ratio", "stiffness"} | {"local_error", "rel_local_error"} | IGR,
        7: ANY_KNOWN | {"local_error", "rel_local_error"} | IGR,
        11: ANY_KNOWN - {"sharpness", "edge_ratio", "stiffness"} | {"local_error", "rel_local_error"} | IGR,
    }
    for step in (2, 5, 8, 11):
        assert found[step]["ode/loss"] == pytest.approx(found[step]["train/loss"])
    assert trainer.callback_metrics["ode/time"] == pytest.approx(1.2)
    (picture,) = (tmp_path).rglob("*.png")
    assert picture.parts[-3:] == ("ode", "diagnostics", "000012.png")


def test_a_trainer_that_never_logs(tmp_path):
    callback = ODEDiagnostics(2, picture=False)
    fit(Everything(ALL["sgd"]), classes(3), callback, logger=CSVLogger(tmp_path), log_every_n_steps=0)
    assert len(callback.history) == 1
    assert not list(tmp_path.rglob("*.png"))


# Modules nobody here wrote


@pytest.mark.parametrize("index", [0, 1])
def test_manual_optimization_with_two_optimizers(index):
    """A GAN: rows of one optimizer's own steps, the same weights, and one warning of what is omitted."""

    class GAN(LightningModule):
        def __init__(self):
            super().__init__()
            seed_everything(0, verbose=False)
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))
            self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            generator, critic = self.optimizers()
            for step in range(3):
                optimizer, sign = (generator, 1) if step == 2 else (critic, -1)
                self.toggle_optimizer(optimizer)
                fake = self.generator(torch.randn(16, 2))
                loss = sign * F.softplus(-self.critic(fake)).mean()
                loss = loss + F.softplus(-self.critic(batch[0])).mean() if step < 2 else loss
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return SGD(self.generator.parameters(), lr=0.1), Adam(self.critic.parameters(), lr=0.01)

    weights = []
    for watched in (False, True):
        module, callback = GAN(), ODEDiagnostics(2, optimizer_index=index, sharpness_every_n_steps=4)
        if watched:
            with pytest.warns(UserWarning, match="GAN has automatic_optimization=False.* second gradient are omitted"):
                fit(module, classes(6), callback)
        else:
            fit(module, classes(6))
        weights.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*weights)
    rows = callback.history
    assert {frozenset(names(row)) for row in rows} == {frozenset(FIRST_ORDER - {"loss", "clip_factor"} | {"time"})}
    assert [row["ode/time"] for row in rows] == pytest.approx(
        [0.2, 0.4, 0.6] if index == 0 else np.arange(2, 14, 2) / 100
    )
    if index == 0:
        assert all(row["ode/effective_lr"] == pytest.approx(0.1, rel=1e-4) for row in rows)


def test_a_stock_transformer():
    """BERT of transformers with AdamW, decay groups and dropout, in bf16 and fp32; the edge by finite differences."""

    def adamw(params):
        params = list(params)
        decay, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
        return AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)

    batches = [{"input_ids": torch.arange(i, i + 48).view(4, 12) % 50, "labels": torch.arange(4) % 2} for i in range(4)]
    for precision in ("32-true", "bf16-mixed"):
        weights = []
        for watched in (False, True):
            seed_everything(0, verbose=False)
            module = Bert(adamw, vocab_size=50)
            search = {"sharpness_every_n_steps": 4, "sharpness_engine": "finite_difference"}
            callback = ODEDiagnostics(2, **search, sharpness_max_products=8)
            fit(module, batches, *[callback] * watched, precision=precision)
            weights.append(nn.utils.parameters_to_vector(module.parameters()))
        assert torch.equal(*weights)
        assert names(callback.history[-1]) == ANY_KNOWN
        assert callback.history[-1]["ode/time"] == pytest.approx(4e-3)


def test_where_differentiating_twice_is_impossible():
    """A kernel without a second derivative: finite differences with one warning, or no sharpness if exact was asked."""

    class Attends(Squares):
        def __init__(self):
            seed_everything(0, verbose=False)
            super().__init__(nn.Linear(8, 24))

        def loss(self, batch):
            q, k, v = self.net(batch).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).square().mean()

    batches = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))] * 2
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1)
    with pytest.warns(
        UserWarning, match="takes finite differences for the sharpness: .* has no second deriv"
    ) as caught:
        fit(Attends(), batches, callback)
    assert len([w for w in caught if "finite differences" in str(w.message)]) == 1
    assert callback.history[-1]["ode/sharpness"] > 0
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_engine="exact")
    sentence = r"search for the sharpness failed with RuntimeError: sharpness_engine='exact' is not .* no second deriv"
    with pytest.warns(UserWarning, match=sentence) as caught:
        fit(Attends(), batches, callback)
    assert len([w for w in caught if "ODEDiagnostics" in str(w.message)]) == 1
    assert [name in callback.history[-1] for name in ("ode/curvature_step", "ode/sharpness")] == [True, False]
