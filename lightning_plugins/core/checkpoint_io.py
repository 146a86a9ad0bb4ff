"""Checkpoints are written beside their place, flushed, and put there in one step; they are read whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_plugins.core import arguments as must
from lightning_plugins.core.checkpoint_damage import refuse_damage
from lightning_plugins.core.checkpoint_folders import replace_folders
from lightning_plugins.core.checkpoint_shards import read_sharded
from lightning_plugins.core.lightning_internals import given_checkpoint_io
from lightning_plugins.core.replacing import is_address, is_sharded, replacing, write_error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that survive: whenever a run is killed or a disk full, a file is the old one or the new one, whole.

    Lightning writes to ``TMPDIR`` and moves the file; when that is another disk, an interrupted move leaves half a
    checkpoint in the place of a good one. Here a file is written beside its place under a hidden name, flushed to the
    disk, and put there in one step; what an interrupted run left is removed at the next save into that folder.

    A file that is empty, truncated or damaged is refused when it is read, by the checksums that ``torch.save`` keeps
    and ``torch.load`` ignores. Files are those of ``torch.save``. Addresses such as ``s3://...`` are read and written
    as Lightning does. The command line uses this class unless another ``CheckpointIO`` is named.

    - ``AsyncCheckpointIO(AtomicCheckpointIO())`` writes in the background. ``ModelCheckpoint`` then removes the last
      file before the new one is there: keep two (``save_top_k=2``) or ``save_last=True``. On a slow disk a file may be
      left that was to be removed before it was written.
    - Folders of sharded checkpoints (FSDP) are written by the strategy: see :func:`keep_checkpoints_whole`. Runs on one
      process, or under DDP, read them by this class, and go on from them.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what is kept of the run, as Lightning has gathered it.
            path: the file to write, or an address.
            storage_options: nothing but ``None``, as for files of torch.

        Raises:
            OSError: the file cannot be written; what had its name is as it was.
            TypeError: storage options were given.
        """
        if storage_options is not None or is_address(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(os.path.abspath(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                write_torch_file(checkpoint, partial)
        except OSError as error:
            raise write_error(error, path) from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, after its checksums have been compared; of a sharded one's folder, the whole on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the file is empty, truncated or damaged.
            ValueError: a folder holds what is no data.
        """
        if is_sharded(path):
            return read_sharded(Path(path))
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


def keep_checkpoints_whole(trainer: Trainer) -> None:
    """Let a trainer write each checkpoint whole or not at all, also the folders of sharded ones.

    Files are written by :class:`AtomicCheckpointIO`. A ``CheckpointIO`` that the trainer was given stays; one that
    writes in the background gets this one to write with.

    Folders get a file of checksums, ``checksums.json``, which is compared when they are read.

    Args:
        trainer: the trainer, before it runs.

    Raises:
        ValueError: it is no trainer.
    """
    must.instance(Trainer, "a Trainer")("trainer", trainer)
    strategy = trainer.strategy
    given = given_checkpoint_io(strategy)
    if isinstance(given, AsyncCheckpointIO) and given.checkpoint_io is None:
        given.checkpoint_io = AtomicCheckpointIO()
    elif given is None and type(strategy.checkpoint_io) is TorchCheckpointIO:  # a TPU's strategy has its own
        strategy.checkpoint_io = AtomicCheckpointIO()
    if isinstance(strategy, (ModelParallelStrategy, FSDPStrategy)):
        replace_folders(strategy)
