"""Checkpoints are written beside their place, flushed, and put there in one step; they are read whole or not at all."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_plugins.core.checkpoint_damage import refuse_damage
from lightning_plugins.core.replacing import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that survive: whenever a run is killed or a disk full, a file is the old one or the new one, whole.

    Lightning writes to ``TMPDIR`` and moves the file; when that is another disk, an interrupted move leaves half a
    checkpoint in the place of a good one. Here a file is written beside its place under a hidden name, flushed to the
    disk, and put there in one step; what an interrupted run left is removed at the next save into that folder.

    A file that is empty, truncated or damaged is refused when it is read, by the checksums that ``torch.save`` keeps
    and ``torch.load`` ignores. Files are those of ``torch.save``. Addresses such as ``s3://...`` are read and written
    as Lightning does. The command line uses this class unless another ``CheckpointIO`` is named.

    - ``AsyncCheckpointIO(AtomicCheckpointIO())`` writes in the background. ``ModelCheckpoint`` then removes the last
      file before the new one is there: keep two (``save_top_k=2``) or ``save_last=True``.
    - Folders of sharded checkpoints (FSDP) are written by the strategy: see :func:`keep_checkpoints_whole`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what is kept of the run.
            path: the file, or an address.
            storage_options: must be ``None``.

        Raises:
            OSError: the file cannot be written; what had its name is as it was.
            TypeError: storage options were given.
        """
        if storage_options is not None or _is_address(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(os.path.abspath(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                write_torch_file(checkpoint, partial)
        except OSError as error:
            raise _explained(error, path) from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, after its checksums have been compared.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the file is empty, truncated or damaged.
        """
        refuse_damage(path)
        try:
            return super().load_checkpoint(path, *arguments, **options)
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error):
                raise
            raise OSError(f"checkpoint {str(path)!r} is damaged. Use an earlier one.") from error


def write_torch_file(content: Any, path: Path) -> None:
    """``torch.save`` to a new file, with its checksums.

    Raises:
        OSError: the file cannot be written; torch alone tells only that its own writer has failed.
    """
    keeps = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with path.open("xb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # of torch's writer, when the file could not be written
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        torch.serialization.set_crc32_options(keeps)


def _explained(error: BaseException, path: Any) -> OSError:
    for failure, _ in getattr(error, "failures", {}).values():  # of some processes, told to all
        error = failure
    error = error.__cause__ if isinstance(error.__cause__, OSError) else error
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(f"checkpoint {str(path)!r} cannot be written: {reason}. What had its name before is as it was.")


def _is_address(path: Any) -> bool:
    return "://" in str(path)


def keep_checkpoints_whole(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints by :class:`AtomicCheckpointIO`, and folders of sharded ones as safely.

    A ``CheckpointIO`` that the trainer was given stays; one that writes in the background gets this one to write with.

    Args:
        trainer: before it is run.
    """
    strategy = trainer.strategy
    given = strategy._checkpoint_io
    if isinstance(given, AsyncCheckpointIO) and given.checkpoint_io is None:
        given.checkpoint_io = AtomicCheckpointIO()
    elif given is None and type(strategy.checkpoint_io) is TorchCheckpointIO:  # a TPU's strategy has its own
        strategy.checkpoint_io = AtomicCheckpointIO()
    if isinstance(strategy, (ModelParallelStrategy, FSDPStrategy)):
        _replace_folders(strategy)


def _replace_folders(strategy: Strategy) -> None:
    """Let a strategy write folders beside their place; all processes write, rank zero puts the whole there."""
    from torch.distributed.checkpoint.api import CheckpointException

    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if _is_address(filepath):
            return save(checkpoint, filepath, storage_options)
        target = Path(os.path.abspath(strategy.broadcast(filepath)))
        try:
            with ExitStack() as stack:
                partial = None
                if strategy.is_global_zero:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    partial = stack.enter_context(replacing(target))
                save(checkpoint, strategy.broadcast(partial), storage_options)
                strategy.barrier()
        except (OSError, CheckpointException) as error:
            raise _explained(error, filepath) from error

    strategy.save_checkpoint = save_checkpoint
