"""NonFiniteGuard against runs that never saw the bad batch: what is kept, what is said, and when it ends."""

from functools import partial

import pytest
import torch
import trainers
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins import Flooding, GradientPenalty, NonFiniteGuard, ODEDiagnostics

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.training_step. returned .None.",
    "ignore:The .train_dataloader. does not have",
    "ignore:NonFiniteGuard has left out",
)


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    torch.set_num_threads(1)  # small tensors


def said():
    return pytest.warns(UserWarning, match="NonFiniteGuard: in step")


class Net(LightningModule):
    """A classifier with all that a step may move: batch norm, metrics, an attribute, averaged logs, momentum."""

    def __init__(self, optimizer=torch.optim.AdamW, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.accuracy, self.mean = MulticlassAccuracy(3), MeanMetric(nan_strategy="disable")
        self.register_buffer("latest", torch.zeros(2))  # replaced, not written to
        self.seen = []
        self.means = []
        self.make = lambda params: optimizer(params, **({"lr": 0.05, "weight_decay": 0.1} | options))

    def training_step(self, batch, batch_idx):
        logits = self.net(batch["x"])
        loss = F.cross_entropy(logits, batch["label"])
        self.accuracy.update(logits, batch["label"])
        self.mean.update(loss.detach())
        self.latest = logits.detach().mean(0)[:2]
        self.seen.append(len(logits))
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(logits))
        self.log("train/error", loss, on_step=False, on_epoch=True, batch_size=len(logits))
        self.log("train/largest", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=len(logits))
        return loss

    def on_train_epoch_end(self):
        logged = self.trainer.callback_metrics
        self.means.append([self.accuracy.compute(), self.mean.compute(), self.accuracy._update_count])
        self.means.append([logged.get(f"train/{name}") for name in ("loss_epoch", "error", "largest")])
        self.accuracy.reset()
        self.mean.reset()

    def configure_optimizers(self):
        return self.make(self.parameters())


fit = partial(trainers.fit, max_epochs=2, log_every_n_steps=1)


def batches(bad=(), count=8, value=float("nan")):
    """Batches of four; of those in ``bad`` one entry is ``value``."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        x, label = torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)
        if index in bad:
            x[2, 3] = value
        made.append({"x": x, "label": label})
    return made


def state_of(model, trainer):
    """Everything a later step depends on, and every mean that is told."""
    (optimizer,) = trainer.optimizers
    return {
        "weights and buffers": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "attributes": model.seen,
        "means": model.means,
    }


def assert_same(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, expected, **tolerance)


def scaled(scale=2.0**10):
    """16-mixed with a real scaler; "16-mixed" on a CPU becomes bf16."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


SGD = {"optimizer": torch.optim.SGD, "momentum": 0.9}
# name: arguments of the module, other callbacks, arguments of the Trainer
SETUPS = {
    "plain": ({}, list, {}),
    "momentum": (SGD, list, {}),
    "fused": ({"fused": True}, list, {}),
    "clipping": ({}, list, {"gradient_clip_val": 0.1}),
    "accumulation": ({}, list, {"accumulate_grad_batches": 2}),
    "flooding": (SGD, lambda: [Flooding(0.9)], {}),
    "flooding of windows": (SGD, lambda: [Flooding(0.9)], {"accumulate_grad_batches": 2}),
    "flooding of micro-batches": (SGD, lambda: [Flooding(0.9, "microbatch")], {}),
    "penalty": (SGD, lambda: [GradientPenalty(0.05)], {}),
    "exact penalty": (SGD, lambda: [GradientPenalty(0.05, engine="exact")], {}),
    "penalty and flooding": (SGD, lambda: [GradientPenalty(0.05), Flooding(0.9)], {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("name, value", [("plain", float("inf")), *((name, float("nan")) for name in SETUPS)])
def test_a_step_left_out_leaves_nothing_behind(name, value):
    """Bit for bit the run without its batches: weights, moments, statistics, metrics, attributes, means."""
    arguments, others, options = SETUPS[name]
    window = options.get("accumulate_grad_batches", 1)
    bad = {0, 5}
    left_out = {index for b in bad for index in range(b - b % window, b - b % window + window)}
    model = Net(**arguments)
    with said():
        run = fit(model, batches(bad, value=value), NonFiniteGuard("skip"), *others(), **options)
    reference = Net(**arguments)
    kept = [batch for index, batch in enumerate(batches()) if index not in left_out]
    expected = fit(reference, kept, *others(), **options)
    assert len(kept) < 8 and run.global_step == 2 * 8 // window  # the schedule goes on
    first_differs = {"rtol": 1e-5, "atol": 1e-6} if name == "exact penalty" else {}  # sums up its first step otherwise
    assert_same(state_of(model, run), state_of(reference, expected), **first_differs)
    assert run.callback_metrics["guard/skipped_steps"] == 4


def test_half_precision_with_a_scaler():
    """The same up to the scale that it halves, which is a power of two: to the last bits of small fp16 gradients."""
    model, reference = Net(**SGD), Net(**SGD)
    with said():
        run = fit(model, batches({3}), NonFiniteGuard("skip"), plugins=[scaled()], max_epochs=1)
    expected = fit(reference, [b for i, b in enumerate(batches()) if i != 3], plugins=[scaled()], max_epochs=1)
    assert_same(state_of(model, run), state_of(reference, expected), rtol=1e-3, atol=1e-5)
    assert run.precision_plugin.scaler.get_scale() == 2.0**9


def test_a_scaler_may_overflow():
    """Too high a scale is no fault: it is halved until it fits; but not for ever."""
    guard = NonFiniteGuard()
    run = fit(Net(**SGD), batches(count=12), guard, plugins=[scaled(2.0**24)], max_epochs=1)
    assert 2.0**12 <= run.precision_plugin.scaler.get_scale() <= 2.0**22 and guard.skipped == 0
    with pytest.raises(FloatingPointError, match="step 3 in a row to be left out, more than patience=2"):
        fit(Net(**SGD), batches(), NonFiniteGuard(patience=2), plugins=[scaled(2.0**40)])
    with pytest.raises(FloatingPointError, match=r"step 1 .*\n.*\n.*\n.*not finite in row 2"):
        fit(Net(**SGD), batches({1}), NonFiniteGuard(), plugins=[scaled()])


@pytest.mark.parametrize("name", ["plain", "accumulation", "exact penalty", "penalty and flooding"])
def test_raise_ends_before_the_weights_change(name):
    arguments, others, options = SETUPS[name]
    window = options.get("accumulate_grad_batches", 1)
    model = Net(**arguments)
    with pytest.raises(FloatingPointError) as raised:
        fit(model, batches({4}), NonFiniteGuard(), *others(), **options)
    reference = Net(**arguments)
    fit(reference, batches()[:4], *others(), max_epochs=1, **options)
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    assert lines[0] == f"NonFiniteGuard: in step {4 // window} (epoch 0, batch 4, rank 0) the loss is not finite."
    assert lines[1].startswith("Loss before the backward pass: nan") and "train/error (mean) nan" in lines[1]
    assert lines[2].startswith("Gradients: 6 of 6 not finite (net.0.weight")
    assert lines[3] == "Batch: x (4, 6), label (4,); x is not finite in row 2."
    assert "policy='skip'" in lines[4]


def test_stop_ends_training_with_good_weights():
    model, ends = Net(), []

    class AtEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            ends.append(trainer.global_step)

    with said() as warned:
        fit(model, batches({3}), NonFiniteGuard("stop"), AtEnd())
    assert any("training stops" in str(warning.message) for warning in warned)
    reference = Net()
    fit(reference, batches()[:3], max_epochs=1)
    assert ends == [4]
    assert_same(model.state_dict(), reference.state_dict())


class Poisoned(Net):
    """The loss is finite, and one gradient is not."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            loss = loss + (self.net[3].bias[0] * 0).sqrt()
        return loss


def test_a_gradient_alone():
    model = Poisoned()
    with pytest.raises(FloatingPointError, match="the loss is finite, but gradients are not") as raised:
        fit(model, batches(), NonFiniteGuard())
    assert "Gradients: 1 of 6 not finite (net.3.bias), largest norm of the others" in str(raised.value)
    with said():
        fit(model := Poisoned(), batches(), NonFiniteGuard("skip"))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_large_is_finite():
    """fp16 gradients whose norm is beyond fp16, and fp32 losses beyond fp16."""
    model = nn.Linear(4, 4).half()
    model.weight.grad = torch.full_like(model.weight, 6e4)
    from lightning_plugins.callbacks.non_finite_guard.verdict import flags_of, norms_of

    sparse = torch.sparse_coo_tensor([[1]], [2.0], (3,), check_invariants=True)
    norms = norms_of([model.weight.grad, torch.full((3,), 1e15), sparse])
    assert flags_of([torch.tensor(1e30), torch.tensor([2.0])], norms, torch.device("cpu")).tolist() == [0, 0]
    model.weight.grad[1, 2] = float("inf")
    assert flags_of([], norms_of([model.weight.grad]), torch.device("cpu")).tolist() == [0, 1]
    assert flags_of([torch.tensor(float("nan"))], norms, torch.device("cpu")).tolist() == [1, 0]


def test_patience_counts_in_a_row(tmp_path):
    with said():
        fit(Net(), batches({1, 2, 4, 5}), NonFiniteGuard("skip", patience=2))
    with said(), pytest.raises(FloatingPointError, match="step 3 in a row to be left out, more than patience=2"):
        fit(Net(), batches({3, 4, 5}), NonFiniteGuard("skip", patience=2))
    saved = tmp_path / "last.ckpt"

    class SaveAfter(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(saved)
                trainer.should_stop = True

    with said():
        fit(Net(), batches({3, 4, 5}), NonFiniteGuard("skip", patience=2), SaveAfter())
    guard = NonFiniteGuard("skip", patience=2)
    guard.load_state_dict(torch.load(saved, weights_only=True)["callbacks"]["NonFiniteGuard"])
    assert guard.state_dict() == {"skipped": 2, "in_a_row": 2}
    with pytest.raises(FloatingPointError, match="step 3 in a row"):
        fit(Net(), batches({0}), guard)


class Two(Net):
    """Two networks in turn, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, loss in (
            (first, F.cross_entropy(self.net(batch["x"]), batch["label"])),
            (second, self.other(batch["y"]).square().mean()),
        ):
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self):
        """No means."""

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), 0.01) for net in (self.net, self.other)]


def test_manual_optimization_leaves_out_one_optimizers_step():
    def data(bad=()):
        return [{**b, "y": other["x"]} for b, other in zip(batches(bad), batches(count=16)[8:], strict=True)]

    model, reference = Two(), Two()
    with said():
        run = fit(model, data({3}), NonFiniteGuard("skip"), max_epochs=1)
    expected = fit(reference, [b for i, b in enumerate(data()) if i != 3], max_epochs=1)
    first, of_reference = (r.optimizers[0].state_dict()["state"] for r in (run, expected))
    assert_same(first, of_reference)
    assert_same(model.net.state_dict(), reference.net.state_dict())
    assert run.optimizers[1].state_dict()["state"][0]["step"] == 8
    assert all(value.isfinite().all() for value in model.state_dict().values())
    with said(), pytest.raises(FloatingPointError, match="3 in a row"):  # though the other optimizer's steps are good
        fit(Two(), data({3, 4, 5}), NonFiniteGuard("skip", patience=2))


def test_steps_without_loss():
    class Absent(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    with said():
        run = fit(Absent(), batches({2}), NonFiniteGuard("skip"))
    assert run.callback_metrics["guard/skipped_steps"] == 2


class Spoil(Callback):
    """Not by a gradient: a weight or a buffer turns NaN after a step."""

    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 7:
            pl_module.state_dict()[self.name].view(-1)[0] = float("nan")


@pytest.mark.parametrize("name", ["net.0.weight", "net.1.running_mean"])
def test_no_checkpoint_of_what_is_spoilt(tmp_path, name):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    with pytest.raises(FloatingPointError, match=f"{name} is NaN or infinite, so that this checkpoint is not"):
        fit(Net(), batches(), Spoil(name), NonFiniteGuard(), saving, enable_checkpointing=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step=4.ckpt"]


def test_buffers_that_are_nan_by_intention(tmp_path):
    model = Net()
    model.register_buffer("unknown", torch.tensor([float("nan"), float("-inf")]))
    run = fit(model, batches(), NonFiniteGuard())
    run.save_checkpoint(tmp_path / "a.ckpt")


class Late(NonFiniteGuard):
    """As on a GPU: the verdict is read at the next step."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self._late = True


def test_verdicts_that_are_read_later(tmp_path):
    """One more forward and backward pass, then the same sentence; no checkpoint and no validation comes before it."""
    steps = []

    class Count(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            steps.append(trainer.global_step)

    with pytest.raises(FloatingPointError, match=r"in step 3 \(epoch 0, batch 3, rank 0\) the loss") as raised:
        fit(Net(), batches({3}), Late(), Count())
    assert steps == [0, 1, 2, 3, 4]
    assert "x is not finite in row 2" in str(raised.value) and "last checkpoint" in str(raised.value)
    for number in (3, 7):  # in the middle, and the last of all
        folder = tmp_path / str(number)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        with pytest.raises(FloatingPointError, match=f"in step {number} "):
            fit(Net(), batches({number}), Late(), saving, enable_checkpointing=True, max_epochs=1)
        assert {path.name for path in folder.iterdir()} == {f"step={n}.ckpt" for n in range(1, number + 1)}


def test_beside_diagnostics_in_any_order():
    """ODEDiagnostics logs nothing of a step that was left out, and nothing else changes."""
    results = []
    for callbacks in (
        [ODEDiagnostics(), NonFiniteGuard("skip"), GradientPenalty(0.05)],
        [GradientPenalty(0.05), NonFiniteGuard("skip")],
    ):
        model = Net(**SGD)
        with said():
            run = fit(model, batches({2}, count=4), *callbacks, max_epochs=1)
        results.append(state_of(model, run))
        assert [c.gradient_order for c in run.callbacks if hasattr(c, "gradient_order")] in ([1, 2, 3], [1, 2])
    assert_same(*results)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"policy": "ignore"}, "policy='ignore' must be one of raise, skip, stop"),
        ({"patience": -1}, "patience=-1 must be 0 or more"),
        ({"patience": 2.5}, "patience=2.5 must be a whole number"),
        ({"patience": float("nan")}, "patience=nan must be a whole number"),
        ({"patience": True}, "patience=True must be a whole number"),
    ],
)
def test_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        NonFiniteGuard(**arguments)


def test_setups_that_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `NonFiniteGuard`"):
        fit(Net(), batches(), NonFiniteGuard(), NonFiniteGuard("skip"))

    def lbfgs(params, weight_decay, **options):
        return torch.optim.LBFGS(params, max_iter=2, **options)

    with pytest.raises(MisconfigurationException, match=r"NonFiniteGuard\(policy='skip'\) needs one gradient"):
        fit(Net(lbfgs), batches(), NonFiniteGuard("skip"))
    with pytest.raises(FloatingPointError, match="in step 3 "):
        fit(Net(lbfgs), batches({3}), NonFiniteGuard())
