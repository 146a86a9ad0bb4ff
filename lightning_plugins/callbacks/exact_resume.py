"""Any chain of stops and resumes trains the batches of a run that was never stopped, each once."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_plugins.callbacks.run_checks import NeedsTrainer
from lightning_plugins.core.full_precision import widen
from lightning_plugins.core.lightning_internals import (
    Place,
    between_steps,
    fit_progress,
    has_state,
    is_cut,
    read_place,
    start_at,
    train_loaders,
    write_place,
)

_GRADIENTS, _MONITORED, _CUT = "accumulated_gradients", "monitored_metrics", "epoch_is_cut"
_WINDOW = "accumulated_batches"  # in a step


class ExactResume(NeedsTrainer):
    """Go on at the very place where a checkpoint was written, whatever wrote it; random numbers are RandomState's.

    Lightning 2.6 loses count in several ways: an epoch that follows a resume from the last batch before it is never
    counted as begun, and the next resume trains it twice; one that was cut by ``max_steps`` counts as finished; a
    validation that was due or broken off is left out or done in part; an epoch's last hooks are not called; gradients
    that were being accumulated are lost. Here the counters of the checkpoint are put right when it is loaded.

    - What had not happened when the checkpoint was written happens now: the validation that was due, the hooks of the
      epoch's end, the rest of the accumulated batches (one process).
    - Not exact, and said: a checkpoint written in the middle of a step (by an exception), or of accumulated batches
      that several processes or another callback keep count of; an epoch's rest from a loader without ``state_dict``;
      numbers drawn by persistent workers.

    The command line adds this callback to every run, and ``RandomState`` contains it.
    """

    _place: Place | None
    _gradients: dict[str, torch.Tensor]
    _monitored: dict[str, torch.Tensor]

    def __init__(self) -> None:
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the trainer's precision before a checkpoint is read, and forget the one before."""
        widen(pl_module, trainer)
        if stage == "fit":
            self._forget()

    def _forget(self) -> None:
        self._place, self._gradients, self._monitored = None, {}, {}
        self._lenient: list[Any] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the gradients of accumulated batches, and the metrics that schedulers are yet to look at, if any."""
        if not self._acts(trainer):
            return
        gradients, monitored = self._gradients, self._monitored
        if self._place is None:  # else the run had nothing left to do
            gradients, monitored = _accumulated(trainer, pl_module), _monitored(trainer)
        checkpoint |= {_GRADIENTS: gradients, _WINDOW: trainer.accumulate_grad_batches} if gradients else {}
        checkpoint |= {_MONITORED: monitored} if monitored else {}
        checkpoint[_CUT] = is_cut(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the counters right."""
        progress = fit_progress(checkpoint)
        if trainer.state.fn != TrainerFn.FITTING or progress is None or not self._acts(trainer):
            return
        self._place = read_place(progress, checkpoint.get(_CUT, True))
        same_window = checkpoint.get(_WINDOW) == trainer.accumulate_grad_batches  # else they are shares of another
        self._gradients = checkpoint.get(_GRADIENTS, {}) if same_window else {}
        self._monitored = checkpoint.get(_MONITORED, {})
        write_place(progress, self._place)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the place, and say what cannot be as it was."""
        if self._place is None:
            return
        trainer.callback_metrics.update(self._monitored)
        # A checkpoint of others has no metrics: that epoch's step is left out, as Lightning does.
        plateaus = [c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and c.strict]
        lenient = [c for c in plateaus if c.monitor not in self._monitored]
        for config in lenient:
            config.strict = False
        start_at(trainer, self._place)
        self._warn(trainer, self._place)
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter)
        self._forget()
        self._lenient = lenient

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A whole epoch has its metrics."""
        for config in self._lenient:
            config.strict = True
        self._lenient = []

    def _acts(self, trainer: Trainer) -> bool:
        """Whether this is the first of its kind: ``RandomState`` beside the command line's own does it alone."""
        return next(c for c in trainer.callbacks if isinstance(c, ExactResume)) is self

    def _warn(self, trainer: Trainer, place: Place) -> None:
        where = f"The checkpoint was written after batch {place.batches} of epoch {place.epochs}"
        if place.in_step:
            rank_zero_warn(
                f"{where}, in the middle of a training step that did not end: that batch is trained again, with other "
                "random numbers. For a run as if it had never stopped take a checkpoint from between two steps."
            )
        elif place.batches and not between_steps(trainer) and (reason := self._lost_window(trainer)):
            rank_zero_warn(
                f"{where}, in the middle of {trainer.accumulate_grad_batches} accumulated batches, {reason}: the next "
                "step is not that of a run that never stopped. For that take a checkpoint from between two steps."
            )
        for loader in train_loaders(trainer):
            if has_state(loader):
                continue
            if place.batches and not place.is_last:
                rank_zero_warn(
                    f"{where}, and a {type(loader).__name__} cannot go on there: the rest of the epoch is of a new "
                    "order. Resume from an epoch's end, or give a loader with state_dict and load_state_dict."
                )
            if getattr(loader, "persistent_workers", False):
                rank_zero_warn(
                    "The workers of a DataLoader(persistent_workers=True) carry random numbers from epoch to epoch, "
                    "which no checkpoint holds: what they draw differs from here on. Set persistent_workers=False."
                )

    def _lost_window(self, trainer: Trainer) -> str | None:
        if not self._gradients:
            return "without their gradients"
        readers = [c for c in trainer.callbacks if hasattr(c, "gradient_order") and not getattr(c, "any_scale", False)]
        keeps = [type(c).__name__ for c in readers]
        return f"which {' and '.join(keeps)} must see together" if keeps else None


def _accumulated(trainer: Trainer, module: LightningModule) -> dict[str, torch.Tensor]:
    """The gradients of batches whose step is yet to come."""
    if trainer.world_size > 1 or (module.automatic_optimization and between_steps(trainer)):
        return {}
    return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def _monitored(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The metrics that ``ReduceLROnPlateau`` looks at."""
    names = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    return {name: value for name, value in trainer.callback_metrics.items() if name in names}
