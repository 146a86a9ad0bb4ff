"""Random states in the checkpoint, so that a resumed run draws the numbers that the interrupted one would have."""

from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_plugins.core.random_state import get_random_state, set_random_state

_KEY = "random_state"


class RandomState(Callback):
    """Save and restore the random states of Python, NumPy and torch (CPU and the process's GPU), of every process.

    With this callback, and data that resume exactly (all data modules of this package do), a run with dropout or noise
    that is stopped after any checkpoint and resumed ends with the same weights, bit for bit on the same hardware.

    - States are restored when training starts, after the data are set up and before the first batch is drawn.
    - Validation inside training leaves the states as it found them: Lightning does not repeat a validation that came
      after the checkpoint, so that its random numbers must not move those of training.
    - Numbers that a module draws in ``on_train_start`` come after the restoring, so that they move those of an epoch
      resumed in its middle: draw them from a ``torch.Generator`` of their own.
    - From a checkpoint written at the last batch of an epoch (``every_n_train_steps``) Lightning resumes with the next
      epoch's first batch and calls no ``on_train_epoch_end`` and ``on_train_epoch_start`` in between: draw no numbers
      in them, or write checkpoints at the end of epochs.

    Raises:
        ValueError: on resuming with another number of processes.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomState()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the states of all processes, as plain data and tensors."""
        state = get_random_state(trainer.strategy.root_device)
        states = [state] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember this process's state until training starts."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get(_KEY)
        if states is None:
            rank_zero_warn("The checkpoint was written without RandomState: random numbers start afresh.")
            return
        if len(states) != trainer.world_size:
            raise ValueError(
                f"RandomState: the checkpoint holds the random states of {len(states)} process(es), this run has "
                f"{trainer.world_size}. Resume with {len(states)}, or leave RandomState out to draw other numbers."
            )
        self._to_restore = states[trainer.global_rank]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore."""
        if self._to_restore is not None:
            set_random_state(self._to_restore, trainer.strategy.root_device)

    # A checkpoint from the end of an epoch resumes here: restore again, other on_train_start hooks may have drawn.
    on_train_epoch_start = on_train_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the run has its own states."""
        self._to_restore = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for a batch: a checkpoint from an epoch's last validation resumes with the end of that epoch."""
        self._to_restore = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the states of training."""
        self._before_validation = get_random_state(trainer.strategy.root_device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give them back, before a checkpoint is written."""
        if self._before_validation is not None:
            set_random_state(self._before_validation, trainer.strategy.root_device)
            self._before_validation = None
