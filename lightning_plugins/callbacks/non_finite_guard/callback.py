"""Losses and gradients that are not finite: the run ends, stops or leaves the step out before any weight is NaN."""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.non_finite_guard.report import report
from lightning_plugins.callbacks.non_finite_guard.undo import StateOfRun
from lightning_plugins.callbacks.non_finite_guard.verdict import Row, Start, Verdict, Window
from lightning_plugins.callbacks.run_checks import NeedsTrainer, put_in_order, require_plain_optimizers
from lightning_plugins.core import arguments as must
from lightning_plugins.core.lightning_internals import skips_backward
from lightning_plugins.replay.recorder import is_replaying

Policy = Literal["raise", "skip", "stop"]

_LOST = "no single sample is at fault then. Look at the weights and the data, or begin with a lower learning rate."
_CURES = {
    "raise": "No weight was changed by it. Mend or leave out that sample, lower the rate, clip gradients, or give "
    "NonFiniteGuard(policy='skip').",
    "late": "Go on from the last checkpoint. Mend or leave out that sample, lower the rate, clip gradients, or give "
    "NonFiniteGuard(policy='skip').",
    "loss": "Its gradients are finite, as where every label is to be ignored, so that no weight can become NaN by it: "
    "training goes on. This is said once.",
    "skip": "The step was left out. This is said once; guard/skipped_steps counts them.",
    "stop": "The step was left out and training stops, as policy='stop' says.",
}


class NonFiniteGuard(NeedsTrainer):
    r"""Notice a loss or a gradient that is NaN or infinite in the step in which it comes, before it is in the weights.

    One NaN in a batch otherwise turns every weight to NaN in one step, and the run goes on to its end. The command line
    adds this callback to every run that does not name one of its own.

    The loss of every micro-batch and the norm of every gradient are looked at before each optimizer step, after
    :class:`Flooding` and :class:`GradientPenalty` and before clipping. With several processes all decide alike in the
    same step. The sentence names the step, the batch with its shapes, the rows that are not finite and their keys (of
    this package's data), the losses that were logged and the gradients that are not finite.

    **What a step that is left out leaves behind.** Weights, optimizer states (moments, step counts), buffers such as
    batch-norm statistics, attributes of the module, states of torchmetrics and Lightning's means of logged values are
    those of a run that never saw the batches of that step, bit for bit; in its row of the log the losses are as they
    were. ``global_step``, the learning-rate schedule and random numbers go on, as after a step that a GradScaler skips;
    a GradScaler halves its scale. Callbacks see the batch in ``on_train_batch_end``.
    Under manual optimization only the one optimizer's step is left out; buffers and metrics are put back at the end of
    that batch, attributes of the module are not. Hooks of the module that read gradients find ``None`` in such a step.

    ``"raise"`` keeps no copies: weights and optimizer states are as before the step, buffers and metrics may hold NaN.

    **On a GPU** ``"raise"`` never waits: the verdict is read when the next step's gradients are there, so that the
    weights may hold NaN by then, but no checkpoint, no validation and no end of a run comes before it is read.
    ``"skip"`` and ``"stop"`` wait for it in every step, as a GradScaler does. On a CPU every verdict is immediate.
    Whatever the policy, no checkpoint is written whose trained weights, or buffers, have become NaN after the first
    batch came (with ``save_weights_only=True`` Lightning asks no callback). On a CPU a finite gradient of any size is
    taken for what it is; on a GPU one whose norm overflows its precision, 1e19 in fp32, counts as infinite.

    **Beside others.** With accumulation the verdict is that of the whole window. A GradScaler (``16-mixed``) skips
    overflows by itself: they count only towards ``patience``, unless the loss itself is not finite. A module that
    leaves out samples by itself (:class:`SiD`) is only asked whether one was left.

    Args:
        policy: what happens to a step that is not finite. The default of raise ends the run with a FloatingPointError,
            but for a loss whose gradients are finite, which is told once and counts towards patience. With skip the
            step is left out and training goes on, with stop it is left out and training ends as by early stopping.
        patience: most steps in a row that may be left out, 0 or more, by this callback, by a GradScaler or by the
            module; one more raises under every policy. The default of 16 is how often a GradScaler halves its first
            scale, 2^16, until there is nothing left to halve; a defect of single samples does not come that often in a
            row.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: before training, for an optimizer whose step cannot be left out.
        FloatingPointError: in training, as above.

    Source:
        optax.apply_if_finite, which leaves updates out in the same way up to a number in a row.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGuard(policy="skip")], logger=False, accelerator="cpu")
    """

    gradient_order = 2
    any_scale = True  # gradients are only asked whether they are finite

    def __init__(self, policy: Policy = "raise", patience: int = 16) -> None:
        must.check(locals(), policy=must.one_of(Policy), patience=must.whole(0, why="it is counted in steps"))
        self.policy, self.patience = policy, patience
        self.skipped, self._row = 0, Row()
        self._start: Start | None = None  # from the first batch on
        self._told = False  # of a loss without consequence
        self._forget()

    def _forget(self, scaled: bool = False) -> None:
        self._window = Window(scaled)
        self._before: StateOfRun | None = None
        self._pending: Verdict | None = None
        if self._start is not None:
            self._start.alone = True  # until training starts, and from an exception on

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place after GradientPenalty, whose gradients count too."""
        if stage == "fit":
            put_in_order(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse steps that cannot be left out."""
        if self.policy != "raise":
            require_plain_optimizers(f"NonFiniteGuard(policy={self.policy!r})", trainer)
        on_gpu = trainer.strategy.root_device.type == "cuda"
        unasked = any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks)
        self._late = self.policy == "raise" and on_gpu and not unasked
        self._forget(scaled=getattr(trainer.precision_plugin, "scaler", None) is not None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is not finite by intention is asked for when the first batch comes: on_train_start may fill buffers."""
        self._start = None

    # During training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins with the first batch of an accumulation window."""
        self._start = self._start or Start(pl_module)
        self._batch = batch_idx, batch
        goes_on = pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches
        if self._window.is_open and goes_on:
            return
        self._window.open()
        if self.policy != "raise":
            self._before = StateOfRun(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss of each micro-batch."""
        if not is_replaying():
            self._window.add(loss, self._batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the window's losses and gradients, and keep the optimizer from a step that is not finite."""
        self._settle(trainer, pl_module)
        if skips_backward(trainer) or hasattr(pl_module, "left_out_all"):
            return
        verdict = self._window.judge(trainer, optimizer, self._batch, self._late)
        if verdict is not None and self._act(trainer, pl_module, verdict):
            self._leave_out(trainer, pl_module, verdict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put buffers back after a manual step; ask a module that leaves samples out by itself whether any was left."""
        if self._before is not None and self._before.is_due:
            self._before.restore()
            self._before.is_due = False
        all_lost = getattr(pl_module, "left_out_all", None)
        if all_lost is not None:
            self._settle(trainer, pl_module)
            self._act(trainer, pl_module, self._window.judge_module(trainer, all_lost, self._batch, self._late))
        self._batch = batch_idx, None  # else a batch stays on the device beside the next one

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a verdict that was not waited for."""
        verdict, self._pending = self._pending, None
        if verdict is not None:
            self._act_now(trainer, pl_module, verdict)

    def _act(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> bool:
        """Act upon a verdict, or keep it to be read later; returns whether this callback has to leave the step out."""
        if self._late:
            self._pending = verdict
            return False
        return self._act_now(trainer, pl_module, verdict)

    def _act_now(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> bool:
        """Count, raise or warn."""
        self._row.add(verdict)
        if not verdict.is_bad:
            return False
        raises = self.policy == "raise" and not verdict.is_harmless
        if self._row.length > self.patience and (not raises or verdict.own or verdict.scaled):
            cure = f"It is step {self._row.length} in a row to be left out, more than patience={self.patience}: "
            raise FloatingPointError(report(trainer, pl_module, verdict.step, cure + _LOST, verdict.own))
        if verdict.is_anothers:
            return False
        if raises:
            cure = _CURES["late" if self._late else "raise"]
            raise FloatingPointError(report(trainer, pl_module, verdict.step, cure))
        if self.policy != "raise":
            return True
        if not self._told:
            rank_zero_warn(report(trainer, pl_module, verdict.step, _CURES["loss"]))
        self._told = True
        return False

    def _leave_out(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        """Optimizers pass over parameters without gradient: no weight, moment or count of steps moves."""
        self.skipped += 1
        if self.skipped == 1 or self.policy == "stop":
            rank_zero_warn(report(trainer, pl_module, verdict.step, _CURES[self.policy]))
        if not verdict.scaler_skips:
            for param in verdict.step.params:
                param.grad = None
        if pl_module.automatic_optimization:
            self._before.restore()
        else:
            self._before.is_due = True  # the rest of training_step may write more
        pl_module.log("guard/skipped_steps", float(self.skipped), batch_size=1)
        trainer.should_stop |= self.policy == "stop"

    # Nothing of a step that is not finite goes on

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last verdict before anything is measured."""
        self._settle(trainer, pl_module)

    on_train_epoch_end = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last verdict."""
        self._settle(trainer, pl_module)
        if self.skipped > 1:
            rank_zero_warn(f"NonFiniteGuard has left out {self.skipped} steps of this training.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of batches."""
        self._forget()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to write weights that are NaN; all processes do."""
        self._settle(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or self._start is None:
            return
        if name := self._start.spoilt(trainer, pl_module):
            raise FloatingPointError(
                f"NonFiniteGuard: {name} is NaN or infinite, so that this checkpoint is not written: go on from the "
                "last one."
            )

    def state_dict(self) -> dict[str, int]:
        """The steps left out, and how many of them came last in a row."""
        return {"skipped": self.skipped, "in_a_row": self._row.length if self._row.bad else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped, self._row = state["skipped"], Row(state["in_a_row"])
