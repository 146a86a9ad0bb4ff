"""Several fits with one callback or trainer, several optimizers in one module, and optimizers that are not torch's."""

import csv
import functools
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from ode_names import names
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader
from toys import Classifier, mlp
from trainers import fit, quiet_trainer

from lightning_plugins import ODEDiagnostics
from lightning_plugins.callbacks.ode_diagnostics.figure import plot_ode_diagnostics
from lightning_plugins.callbacks.ode_diagnostics.read_log import read_columns

FIRST_ORDER = {
    "grad_norm", "update_norm", "rel_update", "cos_descent", "effective_lr", "predicted_dloss", "skipped_steps",
}  # fmt: skip


class Net(Classifier):
    def __init__(self, optimizer):
        super().__init__(mlp(6, 8, 3, seed=1), optimizer)

    def test_step(self, batch, batch_idx):
        pass


class Pair(LightningModule):
    """Two nets, each with an optimizer of its own, stepped by hand."""

    def __init__(self, *optimizers, clip=None, past_lightning=False):
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.nets = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.kinds, self.clip, self.past_lightning = optimizers, clip, past_lightning

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip(self.nets, self.optimizers(not self.past_lightning), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            if self.clip:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [kind(net.parameters()) for kind, net in zip(self.kinds, self.nets, strict=True)]


def sgd(params):
    return SGD(params, lr=0.1)


def adam(params):
    return Adam(params, lr=0.01)


def batches(n=8):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(n)]


def loader():
    return DataLoader(batches(), batch_size=None)


def course(callback):
    return [(row["step"], row["ode/time"]) for row in callback.history]


@pytest.fixture(autouse=True)
def only_our_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ODEDiagnostics: Pair has automatic_optimization=False")
        yield


# Nothing to draw


def test_a_run_in_which_nothing_can_be_drawn_ends_well(tmp_path):
    """By hand without a probe; not a number from the start."""

    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    for number, (module, every) in enumerate([(Pair(adam, adam), 1000), (Broken(adam), 2), (Broken(sgd), 2)]):
        callback = ODEDiagnostics(every)
        fit(module, batches(), callback, logger=CSVLogger(tmp_path, name=str(number)), log_every_n_steps=2)
        assert len(callback.history) == 4
    assert not list(tmp_path.rglob("*.png"))


# Several fits


def test_a_callback_in_a_second_trainer_begins_anew(tmp_path):
    """Nothing is left of the first run, nor of the checkpoint that a test has read in between."""
    callback = ODEDiagnostics(2, tol=0.1)
    expected = [(1, pytest.approx(0.2)), (3, pytest.approx(0.4)), (5, pytest.approx(0.6)), (7, pytest.approx(0.8))]
    for fold in range(2):
        options = {"logger": CSVLogger(tmp_path, version=fold), "default_root_dir": tmp_path, "log_every_n_steps": 8}
        trainer = fit(Net(sgd), batches(), callback, enable_checkpointing=True, **options)
        assert course(callback) == expected
        trainer.test(ckpt_path="best", dataloaders=loader(), verbose=False, weights_only=False)
        assert len(callback.history) == 4  # to be looked at
    rate = callback.suggest_lr()
    fit(Net(functools.partial(SGD, lr=0.001)), batches(), callback)
    assert course(callback)[-1] == (7, pytest.approx(0.008))
    other = ODEDiagnostics(2, tol=0.1)
    fit(Net(functools.partial(SGD, lr=0.001)), batches(), other)
    assert callback.suggest_lr() == other.suggest_lr() != rate


def test_a_trainer_that_is_fitted_twice_goes_on():
    """As the steps in its log do, so do flow time, counts and the table; momentum starts from zero again."""
    callback = ODEDiagnostics(3)
    module = Net(functools.partial(SGD, lr=0.1, momentum=0.5))
    trainer = fit(module, batches(), callback)
    after = callback.state_dict()["flow"]["time"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [row["step"] for row in callback.history] == [2, 5, 8, 11, 14]
    first = 0.1 + 0.15 + 0.175
    assert callback.history[0]["ode/time"] == pytest.approx(first)
    assert callback.history[2]["ode/time"] == pytest.approx(after + 0.1)
    assert callback.state_dict()["steps"] == 16


def test_resuming_what_was_not_watched_counts_the_optimizers_own_steps(tmp_path):
    """Not Lightning's ``global_step``, in which every optimizer counts."""
    fit(Pair(adam, sgd), batches(), max_steps=16).save_checkpoint(tmp_path / "pair.ckpt")
    callback = ODEDiagnostics(3, optimizer_index=1)
    trainer = quiet_trainer(callback, max_epochs=3)
    trainer.fit(Pair(adam, sgd), loader(), ckpt_path=tmp_path / "pair.ckpt", weights_only=False)
    assert [row["step"] for row in callback.history] == [8, 11, 14, 17, 20, 23]
    assert course(callback)[0] == (8, pytest.approx(0.1))


# Several optimizers


def test_two_optimizers_are_watched_by_one_callback_each(tmp_path):
    """Logged apart, drawn apart, in one checkpoint."""
    both = [ODEDiagnostics(2), ODEDiagnostics(2, optimizer_index=1)]
    trainer = fit(Pair(adam, sgd), batches(), *both, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.save_checkpoint(tmp_path / "pair.ckpt")
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        logged = {int(row["step"]): row for row in csv.DictReader(file) if row["ode/1/time"]}
    assert list(logged) == [1, 3, 5, 7]
    assert float(logged[7]["ode/1/time"]) == pytest.approx(0.8) == trainer.callback_metrics["ode/1/time"].item()
    assert trainer.callback_metrics["ode/time"].item() == pytest.approx(0.08)
    for index, callback in enumerate(both):
        columns = read_columns(path, index)
        assert columns["ode/update_norm"].tolist() == [row["ode/update_norm"] for row in callback.history]
        assert not any(name.startswith("ode/1") for name in columns)
        assert plot_ode_diagnostics(tmp_path, tmp_path / f"{index}.png", index).exists()
    pictures = {picture.parent.relative_to(path.parent).as_posix() for picture in path.parent.rglob("*.png")}
    assert {name[name.index("ode/") :] for name in pictures} == {"ode/diagnostics", "ode/1/diagnostics"}
    again = [ODEDiagnostics(2), ODEDiagnostics(2, optimizer_index=1)]
    quiet_trainer(*again, max_epochs=2).fit(
        Pair(adam, sgd), loader(), ckpt_path=tmp_path / "pair.ckpt", weights_only=False
    )
    assert [callback.history[-1]["ode/time"] for callback in again] == [pytest.approx(0.16), pytest.approx(1.6)]


def test_two_for_one_optimizer():
    trainer = quiet_trainer(ODEDiagnostics(), max_epochs=1)
    trainer.callbacks.append(ODEDiagnostics())
    with pytest.raises(ValueError, match="two ODEDiagnostics have optimizer_index=0: give each optimizer one"):
        trainer.fit(Net(sgd), loader())


def test_clipping_by_hand_is_not_seen():
    """The optimizer receives clipped gradients: no factor, and no implicit term that would be theirs."""
    callback = ODEDiagnostics(2)
    fit(Pair(sgd, sgd, clip=0.05), batches(), callback)
    assert names(callback.history[-1]) == FIRST_ORDER | {"time"}
    assert callback.history[-1]["ode/grad_norm"] == pytest.approx(0.05, rel=1e-4)


def test_an_optimizer_that_steps_past_lightning_is_told_of_once():
    callback = ODEDiagnostics(2)
    with pytest.warns(UserWarning, match=r"steps past Lightning.* take it from self.optimizers\(\)") as caught:
        fit(Pair(sgd, sgd, past_lightning=True), batches(), callback)
    assert len([w for w in caught if "past Lightning" in str(w.message)]) == 1
    assert callback.history == []


def test_no_optimizer():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = ODEDiagnostics(1)
        fit(Net(lambda params: None), batches(), callback)
    assert callback.history == []
    assert not [w for w in caught if "ODEDiagnostics" in str(w.message)]


# Optimizers of others


class Lookalike:
    """All that Lightning asks of an optimizer, and no more."""

    def __init__(self, params):
        self.inner = sgd(params)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, self.inner.defaults, self.inner.state

    def zero_grad(self, *args, **kwargs):
        self.inner.zero_grad()

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class Around(Lookalike, Optimizer):
    """An ``Optimizer`` whose own ``__init__`` never ran."""


class Writes(Optimizer):
    """Adds the weight decay to the gradients themselves."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.grad.add_(param, alpha=0.5)
                param.sub_(0.1 * param.grad)
        return loss


class Reversed(Adam):
    """Climbs, and keeps Adam's name for it."""

    @functools.wraps(Adam.step)
    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.add_(0.01 * param.grad)
        return loss


def reversed_instance(params):
    optimizer = adam(params)
    optimizer.step = functools.wraps(optimizer.step)(functools.partial(Reversed.step, optimizer))
    return optimizer


FOREIGN = {
    "lookalike": Lookalike,
    "around": Around,
    "writes": Writes,
    "reversed": Reversed,
    "instance": reversed_instance,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_optimizer_of_others_has_the_rows_for_all(name):
    callback, module = ODEDiagnostics(1), Net(FOREIGN[name])
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    with pytest.warns(UserWarning, match="is none of SGD, RMSprop, Adam"):
        fit(module, batches(1), callback)
    (row,) = callback.history
    assert names(row) == FIRST_ORDER | {"loss"}
    moved = nn.utils.parameters_to_vector(module.parameters()).detach() - start
    assert row["ode/update_norm"] == pytest.approx(moved.norm().item(), rel=1e-5)
    alone = Net(FOREIGN[name])
    fit(alone, batches(1))
    assert torch.equal(*(nn.utils.parameters_to_vector(net.parameters()) for net in (module, alone)))


@pytest.mark.filterwarnings("ignore:ODEDiagnostics. Around is none of")
def test_without_hooks_the_steps_that_a_scaler_skips_cannot_be_told():
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    callback = ODEDiagnostics(1)
    with pytest.warns(
        UserWarning, match="nothing is logged: Around calls no hooks, so that steps which the GradScaler"
    ):
        fit(Net(Around), batches(2), callback, plugins=[scaler])
    assert callback.history == []


def test_a_subclass_and_a_schedule_leave_the_step_known():
    """Of torch's: neither has a step of its own."""

    class Mine(Adam):
        pass

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = Mine(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    callback = ODEDiagnostics(2)
    fit(Scheduled(None), batches(), callback)
    assert "edge_ratio_step" in names(callback.history[0])


# Advice


def test_a_rate_is_not_suggested_from_what_does_not_tell():
    for kind in (adam, functools.partial(SGD, lr=0.01, momentum=0.9)):
        callback = ODEDiagnostics(2)
        fit(Net(kind), batches(), callback)
        with pytest.raises(RuntimeError, match=r"the edge along the step says too little for .*; give sharpness_every"):
            callback.suggest_lr()
    callback = ODEDiagnostics(2, sharpness_every_n_steps=2, tol=0.1)
    fit(Net(adam), batches(), callback)
    with pytest.warns(UserWarning, match="by stability, not by tol=0.1: steps with momentum have no local error"):
        assert callback.suggest_lr() > 0

    class Linear(Net):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0]).mean()

    for tol in (None, 0.1):
        callback = ODEDiagnostics(2, tol=tol)
        fit(Linear(sgd), batches(), callback)
        with pytest.raises(RuntimeError, match="most saw no positive curvature, so that nothing limits the rate"):
            callback.suggest_lr()
    with pytest.warns(UserWarning, match="none of SGD"):
        fit(Net(Writes), batches(), callback := ODEDiagnostics(2))
    with pytest.raises(RuntimeError, match=r"needs a probe .*Writes is none of SGD.* its edge is not known"):
        callback.suggest_lr()


def test_directions_of_negative_curvature_count_in_the_median():
    """The rate of the middle probe, of all five: those without a limit are the fastest."""
    callback = ODEDiagnostics(1)
    fit(Net(sgd), batches(5), callback)
    for row, ratio in zip(callback.history, (0.1, -0.3, 0.2, 0.4, -0.1), strict=True):
        row["ode/edge_ratio_step"] = ratio
    assert callback.suggest_lr() == pytest.approx(0.1 / 0.1 / 2)
    callback.history[0]["ode/edge_ratio_step"] = -0.2
    with pytest.raises(RuntimeError, match="most saw no positive curvature"):
        callback.suggest_lr()


def test_learning_rates_are_no_row(tmp_path):
    callback = ODEDiagnostics(2)
    trainer = fit(Net(sgd), batches(), callback, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    assert {row["lr-ODEDiagnostics"] for row in callback.history} == {0.1}
    assert not [name for name in trainer.callback_metrics if "lr-" in name or name == "ode/lr"]
