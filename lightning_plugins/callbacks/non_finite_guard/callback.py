"""Losses and gradients that are not finite: the run ends, stops or leaves the step out before any weight is NaN."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plugins.callbacks.non_finite_guard.report import Step, logged_losses, report
from lightning_plugins.callbacks.non_finite_guard.undo import StateOfRun
from lightning_plugins.callbacks.non_finite_guard.verdict import (
    Row,
    Verdict,
    flags_of,
    nan_buffers,
    norms_of,
    not_finite,
    over_ranks,
    spoilt,
)
from lightning_plugins.callbacks.run_checks import put_in_order, require_plain_optimizers, skips_backward
from lightning_plugins.core import arguments as must
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


class NonFiniteGuard(Callback):
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
        policy: ``raise`` ends the run with a FloatingPointError, but for a loss whose gradients are finite, which is
            told once and counts towards ``patience``; ``skip`` leaves the step out and goes on, ``stop`` leaves it out
            and ends training as early stopping does.
        patience: most steps in a row that may be left out, by this callback, by a GradScaler or by the module; one more
            raises under every policy. The default of 16 is how often a GradScaler halves its first scale, 2^16, until
            there is nothing left to halve; a defect of single samples does not come that often in a row.

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
        self.skipped = 0
        self._row = Row()
        self._forget()
        self._nan_at_start: set[str] | None = None
        self._told = False  # of a loss without consequence

    def _forget(self) -> None:
        self._open = False  # a window has begun
        self._losses: list[Tensor] = []
        self._suspect: tuple[int, Any] | None = None
        self._before: StateOfRun | None = None
        self._pending: Verdict | None = None
        self._undo_at_end = False
        self._evaluated: tuple[int, int] | None = None
        self._alone = True  # until training starts, and from an exception on

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
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is not finite by intention is asked for when the first batch comes: on_train_start may fill buffers."""
        self._nan_at_start, self._alone = None, False

    # During training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins with the first batch of an accumulation window."""
        if self._nan_at_start is None:
            self._nan_at_start = nan_buffers(pl_module) | not_finite(pl_module)
        self._batch = batch_idx, batch
        if self._open and pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches:
            return
        self._open, self._losses, self._suspect = True, [], None
        if self.policy != "raise":
            self._before = StateOfRun(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss of each micro-batch."""
        if is_replaying():
            return
        loss = loss.detach()
        if self._scaler is not None:  # it is scaled: an infinity may be the scale's, and shows in the gradients
            loss = torch.where(loss.isinf(), 0.0, loss)
        self._losses.append(loss)
        if self._suspect is None and loss.device.type == "cpu" and not loss.isfinite().all():
            self._suspect = self._batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the window's losses and gradients, and keep the optimizer from a step that is not finite."""
        self._settle(trainer, pl_module)
        if skips_backward(trainer) or hasattr(pl_module, "left_out_all"):
            return
        if isinstance(optimizer, torch.optim.LBFGS):  # its line search may try what is not finite
            key = trainer.global_step, self._batch[0]
            if self._evaluated == key:
                self._losses = []
                return
            self._evaluated = key
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params and not self._losses:  # training_step returned None
            return
        norms = norms_of([param.grad for param in params])
        flags = over_ranks(trainer, flags_of(self._losses, norms, trainer.strategy.root_device))
        verdict = Verdict(self._step(trainer, params, norms), flags, self._late)
        self._open = False
        if not pl_module.automatic_optimization:  # each optimizer's step has losses of its own
            self._losses = []
        if self._late:
            self._pending = verdict
        elif self._act(trainer, pl_module, verdict):
            self._leave_out(trainer, pl_module, params, verdict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put buffers back after a manual step; ask a module that leaves samples out by itself whether any was left."""
        if self._undo_at_end:
            self._before.restore()
            self._undo_at_end = False
        all_lost = getattr(pl_module, "left_out_all", None)
        if all_lost is not None:
            self._ask_module(trainer, pl_module, all_lost)
        self._batch = batch_idx, None  # else a batch stays on the device beside the next one

    def _ask_module(self, trainer: Trainer, pl_module: LightningModule, all_lost: Tensor) -> None:
        self._settle(trainer, pl_module)
        lost = over_ranks(trainer, all_lost.float().reshape(1), everywhere=True)
        verdict = Verdict(self._step(trainer, [], []), torch.cat([lost, torch.zeros_like(lost)]), self._late, own=True)
        if self._late:
            self._pending = verdict
        else:
            self._act(trainer, pl_module, verdict)

    def _step(self, trainer: Trainer, params: list[nn.Parameter], norms: list[Tensor]) -> Step:
        batch_idx, batch = self._suspect or self._batch
        at = trainer.global_step, trainer.current_epoch, batch_idx, trainer.global_rank
        return Step(*at, batch, list(self._losses), logged_losses(trainer), params, norms)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a verdict that was not waited for."""
        verdict, self._pending = self._pending, None
        if verdict is not None:
            self._act(trainer, pl_module, verdict)

    def _act(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> bool:
        """Count, raise or warn; returns whether this callback has to leave the step out."""
        loss_is_bad, gradient_is_bad = verdict.read()
        self._row.add((verdict.step.epoch, verdict.step.batch_idx), loss_is_bad or gradient_is_bad)
        if not (loss_is_bad or gradient_is_bad):
            return False
        harmless = self.policy == "raise" and not gradient_is_bad  # no weight can become NaN by it
        counts = self.policy != "raise" or harmless or verdict.own or self._scaler is not None
        if self._row.length > self.patience and counts:
            cure = f"It is step {self._row.length} in a row to be left out, more than patience={self.patience}: "
            raise FloatingPointError(report(trainer, pl_module, verdict.step, cure + _LOST, verdict.own))
        if verdict.own or (self._scaler is not None and not loss_is_bad):
            return False  # the module's or the scaler's matter
        if harmless:
            if not self._told:
                rank_zero_warn(report(trainer, pl_module, verdict.step, _CURES["loss"]))
            self._told = True
            return False
        if self.policy == "raise":
            raise FloatingPointError(
                report(trainer, pl_module, verdict.step, _CURES["late" if self._late else "raise"])
            )
        return True

    def _leave_out(
        self, trainer: Trainer, pl_module: LightningModule, params: list[nn.Parameter], verdict: Verdict
    ) -> None:
        """Optimizers pass over parameters without gradient: no weight, moment or count of steps moves."""
        self.skipped += 1
        if self.skipped == 1 or self.policy == "stop":
            rank_zero_warn(report(trainer, pl_module, verdict.step, _CURES[self.policy]))
        if self._scaler is None or not verdict.read()[1]:  # else the scaler has found it, and skips
            for param in params:
                param.grad = None
        if pl_module.automatic_optimization:
            self._before.restore()
        self._undo_at_end = not pl_module.automatic_optimization  # the rest of training_step may write more
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
        if trainer.state.fn != TrainerFn.FITTING or self._nan_at_start is None:
            return
        if name := spoilt(trainer, pl_module, self._nan_at_start, self._alone):
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
