"""``consolidate``: the folder of a sharded checkpoint as one file. Imports nothing heavy before it is wanted."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from shtab import DIRECTORY, FILE

from lightning_plugins.cli.load import checkpoint_file
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.core.replacing import is_sharded, replacing

EXAMPLES = """\
A run under FSDP2 (ModelParallelStrategy with save_distributed_checkpoint) writes folders. All commands read them as
they are; a file is for other programs, and for load_from_checkpoint of classes that are not this package's.

  lightning-plugins consolidate lightning_logs/version_0/checkpoints/last.ckpt whole.ckpt
  lightning-plugins consolidate last whole.ckpt              of the newest run below the current folder
  lightning-plugins fit --config mine.yaml --ckpt_path whole.ckpt    goes on from it, on one process or on several

Nothing is left out: weights, optimizers, schedules, loops, callbacks and hyperparameters. States of optimizers are by
parameters' names. Memory for all of it is needed.
"""
_SOON = 2.0  # seconds that nobody minds


def add_consolidate_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``consolidate``."""
    add: Callable[..., Any] = parser.add_argument
    folder = "Folder of a sharded checkpoint, or `last`: the newest run's below the current folder."
    add("folder", type=str, help=folder).complete = DIRECTORY
    file = "File to write, whole or not at all; an existing one is never replaced."
    add("file", type=str, help=file).complete = FILE


def consolidate(options: Namespace) -> None:
    """Write the file, and tell what it holds.

    Raises:
        UsageError: the folder is no sharded checkpoint or is damaged, or the file is there or cannot be written.
    """
    target = Path(options.file)
    if os.path.lexists(target):
        raise UsageError(f"{str(target)!r} exists and is not overwritten; choose another name.")
    if os.path.isdir(options.folder) and not is_sharded(options.folder):
        raise UsageError(f"{options.folder!r} is a folder without a sharded checkpoint: it has no .metadata.")
    folder = checkpoint_file(options.folder)
    if not is_sharded(folder):
        what = "is one file already" if folder.is_file() else "does not exist"
        raise UsageError(f"checkpoint {str(folder)!r} {what}; give the folder of a sharded checkpoint.")
    from lightning_plugins.cli.checkpoint import read_hyperparameters

    read_hyperparameters(folder)  # that it is a whole checkpoint of Lightning's
    content = _read(folder)
    _write(content, target)
    from lightning_plugins.cli.outputs import shorten

    print(f"Checkpoint: {shorten(target)} ({_holds(content)})")


def _read(folder: Path) -> dict[str, Any]:
    from lightning_plugins.core.checkpoint_shards import read_sharded

    progress = _Progress()
    try:
        return read_sharded(folder, progress=progress)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise UsageError(f"{str(folder)!r} needs more memory than there is: {str(error).splitlines()[0]}") from error
    finally:
        progress.end()


def _write(content: dict[str, Any], target: Path) -> None:
    from lightning_plugins.core.checkpoint_io import write_torch_file

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            write_torch_file(content, partial)
    except OSError as error:
        raise UsageError(f"{str(target)!r} cannot be written: {error.strerror or error}.") from error


def _holds(content: dict[str, Any]) -> str:
    """What a checkpoint is of, in a few words."""
    count = len(content.get("optimizer_states", ()))
    optimizers = f"{count} optimizer{'s' if count > 1 else ''}" if count else "no optimizer"
    step = f"step {content['global_step']}, " if "global_step" in content else ""
    return f"{step}{len(content['state_dict'])} weights, {optimizers}"


class _Progress:
    """What share has been read, on a terminal, once it takes long."""

    def __init__(self) -> None:
        self._began, self._told = time.monotonic(), ""

    def __call__(self, share: float) -> None:
        told = f"\rReading: {share:4.0%}"
        if told != self._told and sys.stderr.isatty() and time.monotonic() - self._began > _SOON:
            self._told = told
            sys.stderr.write(told)
            sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        sys.stderr.write("\n" if self._told else "")
