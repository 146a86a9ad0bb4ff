"""Random states in the checkpoint, so that a resumed run draws the numbers that the interrupted one would have."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_plugins.callbacks.exact_resume import ExactResume
from lightning_plugins.core.lightning_internals import around_validation, train_loaders
from lightning_plugins.core.random_state import get_random_state, set_random_state, state_for_rank

_KEY, _LOADERS = "random_state", "loaders"


class RandomState(ExactResume):
    """Save and restore the random states of Python, NumPy and torch (CPU and the process's GPU), of every process.

    With this callback, and data that resume exactly (all data modules of this package do), a run with dropout or noise
    that is stopped after any checkpoint and resumed ends with the same weights, bit for bit on the same hardware. The
    place in the run is put right too, as ``ExactResume`` does.

    - States are restored when training starts, after the data are set up and before the first batch is drawn.
    - Validation inside training leaves the states as it found them, so that one more of them (at a stop) or one less
      does not move those of training. So does the end of an epoch that a stop has cut.
    - Numbers that a module draws in ``on_train_start`` come after the restoring, so that they move those of an epoch
      resumed in its middle: draw them from a ``torch.Generator`` of their own.
    - A torch ``DataLoader`` goes on at an epoch's end as if nothing had happened, also one with a ``generator``.
    - On another number of processes the run draws other numbers than it would have, and that is said: each process
      goes on with its state if there was one, a new one gets a state derived from all of them, and no two the same.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomState()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        super().__init__()
        self._to_restore: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._at_end: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the precision, and forget the checkpoint before."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._to_restore = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the states of all processes, as plain data and tensors."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if trainer.world_size > 1 and not torch.distributed.is_initialized():
            return  # after a fit by ddp_spawn or ddp_fork: the states of the run went with its processes
        state = self._to_restore or self._at_end or self._before_validation or _states(trainer)
        states = [state] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember this process's state until training starts."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get(_KEY)
        if states is None:
            rank_zero_warn("The checkpoint was written without RandomState: random numbers start afresh.")
            return
        if len(states) == trainer.world_size:
            self._to_restore = states[trainer.global_rank]
            return
        rank_zero_warn(
            f"RandomState: the checkpoint holds the random states of {len(states)} process(es) and this run has "
            f"{trainer.world_size}, so that it does not draw what the interrupted one would have: processes go on with "
            "their states where there are any, and no two draw the same."
        )
        self._to_restore = state_for_rank(states, trainer.global_rank, trainer.strategy.root_device)
        self._to_restore.setdefault(_LOADERS, states[0].get(_LOADERS, ()))  # one order of the samples for all

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore."""
        super().on_train_start(trainer, pl_module)
        self._before_validation = self._at_end = None
        self._restore(trainer)
        around_validation(trainer, partial(self._put_aside, trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore again in an epoch that begins: other ``on_train_start`` hooks may have drawn."""
        super().on_train_epoch_start(trainer, pl_module)
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._to_restore is not None:
            set_random_state(self._to_restore, trainer.strategy.root_device)
            for generator, state in zip(_generators(trainer), self._to_restore.get(_LOADERS, ()), strict=False):
                generator.set_state(state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the run has its own states."""
        self._to_restore = self._at_end = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for a batch; and an epoch that was cut has no end: what other hooks draw now is not of the whole run."""
        self._to_restore = None
        if not trainer.is_last_batch:
            self._at_end = _states(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is drawn from here on belongs to no run that goes on."""
        self._at_end = self._at_end or _states(trainer)

    @contextmanager
    def _put_aside(self, trainer: Trainer) -> Iterator[None]:
        """The states of training during a validation; an error leaves them here, for the checkpoint it may cause."""
        self._before_validation = _states(trainer)
        yield
        set_random_state(self._before_validation, trainer.strategy.root_device)
        self._before_validation = None


def _states(trainer: Trainer) -> dict[str, Any]:
    state = get_random_state(trainer.strategy.root_device)
    if generators := _generators(trainer):
        state[_LOADERS] = [generator.get_state() for generator in generators]
    return state


def _generators(trainer: Trainer) -> list[torch.Generator]:
    """Those that the training loaders and their samplers were given."""
    owners = [part for loader in train_loaders(trainer) for part in (loader, getattr(loader, "sampler", None))]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
