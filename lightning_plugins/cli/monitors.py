"""Monitors of EarlyStopping and ModelCheckpoint that nobody logs: told with the nearest names, and no work is lost."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_plugins.callbacks import ExactResume, NonFiniteGuard, SaveOnSigterm
from lightning_plugins.cli.last_checkpoint import SaveLast, model_checkpoints
from lightning_plugins.cli.messages import closest, did_you_mean
from lightning_plugins.core.lightning_internals import last_step_saved, save_last
from lightning_plugins.core.logging import leaves_no_logs

_LIGHTNINGS = re.compile(r"`ModelCheckpoint\(monitor='(?P<checkpoint>.*?)'\)` could|"
                         r"Early stopping conditioned on metric `(?P<stopping>.*?)` which")  # fmt: skip
_MOST_NAMES, _MOST_FILES = 12, 2000
_LIBRARIES = {"lightning", "pytorch_lightning", "torch", "builtins", "abc", "typing"}
_LOG_NOTHING = (ExactResume, NonFiniteGuard, SaveOnSigterm, SaveLast, EarlyStopping, ModelCheckpoint)


class _SlipError(MisconfigurationException):
    """Told when there is no work yet that could be lost."""


class MonitorCheck(Callback):
    """Refuses a monitor that nobody logs: before training where that can be told, else when it is first looked at.

    After the sanity check the names of a validation are known, after one batch those of a training step. A monitor that
    is none of them, but nearly one, and whose name the code of module and callbacks does not hold, is a slip. What may
    be logged later, at an epoch's end or every n-th epoch, is left to Lightning, which looks when it is due; the run is
    saved then, so that the epoch is not lost.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The names of a validation, from the sanity check."""
        if trainer.sanity_checking:
            self._refuse_slips(trainer, trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The names of a training step, from the first one of an epoch."""
        if batch_idx == 0:
            self._refuse_slips(trainer, trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a validation Lightning says nothing of a checkpoint's monitor, and may never look at the other's."""
        if trainer.enable_validation or leaves_no_logs(trainer):
            return
        for callback, name in _monitors(trainer):
            every = callback.every_n_epochs if isinstance(callback, ModelCheckpoint) else 1
            due = (trainer.current_epoch + 1) % (every or 1) == 0
            if due and name not in trainer.callback_metrics:
                raise MisconfigurationException(_told(type(callback).__name__, name, trainer.callback_metrics))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the run that is stopped by a monitor at a validation's or an epoch's end, between two steps."""
        if isinstance(exception, _SlipError) or leaves_no_logs(trainer) or explain_monitor(exception, trainer) is None:
            return
        for checkpoint in model_checkpoints(trainer)[:1]:
            if last_step_saved(checkpoint) != trainer.global_step:
                checkpoint.save_last = True
                save_last(checkpoint, trainer)

    def _refuse_slips(self, trainer: Trainer, logged: Iterable[str]) -> None:
        names = sorted(logged)
        for callback, name in _monitors(trainer):
            near = [other for other in closest(name, names) if _stage(other) == _stage(name)]
            if name not in names and near and not _stands_in_code(name, trainer):
                raise _SlipError(_told(type(callback).__name__, name, names))


def _monitors(trainer: Any) -> Iterator[tuple[Callback, str]]:
    """Callbacks that a missing monitor would stop, or leave without effect."""
    for callback in trainer.callbacks:
        strict = isinstance(callback, EarlyStopping) and callback.strict
        saves = isinstance(callback, ModelCheckpoint) and callback.save_top_k != 0
        if (strict or saves) and callback.monitor is not None:
            yield callback, callback.monitor


def _stage(name: str) -> str:
    return re.split(r"[/_]", name)[0]


def _told(callback: str, name: str, logged: Iterable[str]) -> str:
    """The sentence, and which names there are."""
    names = sorted(logged)
    shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if names[_MOST_NAMES:] else "")
    known = f"Logged: {shown}" if names else "Nothing is logged."
    lines = [f"{callback}(monitor={name!r}): nothing is logged by that name.", did_you_mean(name, names), known]
    return "\n".join(line for line in lines if line)


def explain_monitor(error: BaseException, trainer: Trainer) -> str | None:
    """What Lightning or the callback above says of a monitor, with the nearest names; ``None`` for other errors."""
    if isinstance(error, MisconfigurationException) and "nothing is logged by that name" in str(error):
        return str(error)
    if not (found := _LIGHTNINGS.match(str(error))):
        return None
    name = found["checkpoint"] or found["stopping"]
    return _told("ModelCheckpoint" if found["checkpoint"] else "EarlyStopping", name, trainer.callback_metrics)


# Whether code may come to log a name


def _stands_in_code(name: str, trainer: Any) -> bool:
    """Whether the last part of a name is a word in the code of the module or of a callback, or that cannot be read."""
    word = re.compile(rf"(?<!\w){re.escape(name.rpartition('/')[2])}(?!\w)")
    parts = [trainer.lightning_module, *(c for c in trainer.callbacks if not isinstance(c, _LOG_NOTHING))]
    classes = {cls for part in parts for cls in type(part).__mro__}
    for module in {cls.__module__ for cls in classes if cls.__module__.split(".")[0] not in _LIBRARIES}:
        files = _files(module)
        if files is None or any(word.search(path.read_text("utf-8", errors="replace")) for path in files):
            return True
    return False


def _files(module: str) -> list[Path] | None:
    """The source of a module, with all of its package; ``None`` where it cannot be told."""
    top = sys.modules.get(module.split(".")[0])
    if top is None or top.__file__ is None:
        return None
    file = Path(top.__file__)
    files = [*file.parent.rglob("*.py")] if file.name == "__init__.py" else [file]
    return files if len(files) <= _MOST_FILES and file.suffix == ".py" else None
