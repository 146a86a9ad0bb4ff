"""Any chain of stops and resumes trains the batches of a run that was never stopped, each once."""

from typing import Any

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_plugins.core.full_precision import widen
from lightning_plugins.core.lightning_internals import (
    Place,
    between_steps,
    fit_progress,
    read_place,
    start_at,
    train_loaders,
    write_place,
)

_GRADIENTS = "accumulated_gradients"


class ExactResume(Callback):
    """Go on at the very place where a checkpoint was written, whatever wrote it; random numbers are RandomState's.

    Lightning 2.6 loses count in several ways: an epoch that follows a resume from the last batch before it is never
    counted as begun, and the next resume trains it twice; one that was cut by ``max_steps`` counts as finished; a
    validation that was due or broken off is left out or done in part; an epoch's last hooks are not called; gradients
    that were being accumulated are lost. Here the counters of the checkpoint are put right when it is loaded.

    - What had not happened when the checkpoint was written happens now: the validation that was due, the hooks of the
      epoch's end, the rest of the accumulated batches (one process).
    - Not exact, and said: a checkpoint written in the middle of a step (by an exception), or of accumulated batches
      that several processes or another callback keep count of; an epoch's rest from a loader without ``state_dict``.

    The command line adds this callback to every run, and ``RandomState`` contains it.
    """

    def __init__(self) -> None:
        self._place: Place | None = None
        self._gradients: dict[str, torch.Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the trainer's precision before a checkpoint is read."""
        widen(pl_module, trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the gradients of accumulated batches, if there are any."""
        if self._acts(trainer) and trainer.world_size == 1 and not between_steps(trainer):
            named = pl_module.named_parameters()
            checkpoint[_GRADIENTS] = {name: p.grad.detach() for name, p in named if p.grad is not None}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the counters right."""
        self._place, self._gradients = None, {}
        progress = fit_progress(checkpoint)
        if trainer.state.fn != TrainerFn.FITTING or progress is None or not self._acts(trainer):
            return
        self._place = read_place(progress)
        self._gradients = checkpoint.get(_GRADIENTS, {})
        write_place(progress, self._place)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the place, and say what cannot be as it was."""
        if self._place is None:
            return
        start_at(trainer, self._place)
        self._warn(trainer, self._place)
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter)
        self._place, self._gradients = None, {}

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
        if place.batches and not place.is_last:
            for loader in train_loaders(trainer):
                if not isinstance(loader, _Stateful):
                    rank_zero_warn(
                        f"{where}, and a {type(loader).__name__} cannot go on there: the rest of the epoch is "
                        f"{trainer.num_training_batches - place.batches} batches of a new order. Resume from an "
                        "epoch's end, or give a loader with state_dict and load_state_dict."
                    )

    def _lost_window(self, trainer: Trainer) -> str | None:
        if not self._gradients:
            return "without their gradients"
        keeps = [type(c).__name__ for c in trainer.callbacks if hasattr(c, "gradient_order")]
        return f"which {' and '.join(keeps)} must see together" if keeps else None
