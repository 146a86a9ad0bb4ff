"""``metrics.json`` beside a run's config: what was run and from what, how it ended, and what it measured."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_plugins
from lightning_plugins.cli.last_checkpoint import model_checkpoints
from lightning_plugins.core.logging import leaves_no_logs, log_dir
from lightning_plugins.core.new_file import new_file
from lightning_plugins.core.replacing import is_address

FILE = "metrics.json"
_MOST_BYTES = 2**24  # of a file that is read, which may be anyone's
_REMOTE = re.compile(r"[\w+.-]{2,}:/")  # a logger's folder on another machine
_LIBRARIES = ("lightning", "torch", "transformers", "diffusers", "datasets")


class RunRecord(Callback):
    """Writes ``metrics.json`` when a run begins, and again when each of its stages ends or it is stopped.

    The file holds the newest run of the folder, and under ``earlier`` those before it: the ones that this one goes on
    from, or that had the same folder. ``status`` is ``running`` also of a run that was killed without a word. Nothing
    is written under ``fast_dev_run``.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        model: the model's class path.
        data: the data's class path, or ``None`` where the model has its own.
        checkpoint: what the command was given by ``--ckpt_path``.
        root: where runs lie, to find the one that a checkpoint is of.
    """

    def __init__(self, command: str, model: str, data: str | None, checkpoint: str | None, root: Path) -> None:
        self.command, self.model, self.data, self.checkpoint, self.root = command, model, data, checkpoint, root
        self._began: float | None = None
        self._content: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say that a run has begun."""
        if self._began is not None:  # the test after a fit
            return
        self._began = time.monotonic()
        self._content = {
            "command": self.command,
            "status": "running",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": self.model,
            "data": self.data,
            "checkpoint": self.checkpoint,
        }
        if trainer.is_global_zero:
            self._content["earlier"] = self._earlier(log_dir(trainer))
            self._write(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add what a stage has measured."""
        if trainer.state.fn is None or not trainer.is_global_zero:
            return
        metrics = self._content.setdefault("metrics", {})
        metrics[str(trainer.state.fn.value)] = {
            name: _number(value) for name, value in sorted(trainer.callback_metrics.items())
        }
        self._content["status"] = "finished"
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what stopped the run."""
        if self._began is None or not trainer.is_global_zero:
            return
        lines = str(exception).strip().splitlines()
        self._content["status"] = f"stopped: {type(exception).__name__}" + (f": {lines[0]}" if lines else "")
        with suppress(OSError):  # a full disk may be what stopped it, and must not hide it
            self._write(trainer)

    def _earlier(self, folder: Path) -> list[dict[str, Any]]:
        """What stands in the folder already, else what the run tells of itself that a resumed one goes on from."""
        records = [read_record(folder)]
        if self.command == "fit" and self.checkpoint:
            records.append(record_of(Path(self.checkpoint), [self.root]))
        record = next((record for record in records if record), None)
        if record is None:
            return []
        elsewhere = {} if _same(record.folder, folder) else {"folder": str(record.folder)}
        return [*record.content["earlier"], {**record.content, **elsewhere}]

    def _write(self, trainer: Trainer) -> None:
        folder = log_dir(trainer)
        if leaves_no_logs(trainer) or _REMOTE.match(str(folder)):
            return
        assert self._began is not None  # setup comes first
        content = self._content
        content["seconds"] = round(time.monotonic() - self._began, 3)
        earlier = [{key: value for key, value in run.items() if key != "earlier"} for run in content["earlier"]]
        total = content["seconds"] + sum(_seconds(run) for run in earlier if run.get("command") == content["command"])
        content |= _progress(trainer, folder) if self.command == "fit" else {}
        order = {key: value for key, value in content.items() if key != "earlier"}
        order |= {"total_seconds": round(total, 3), "versions": _versions(), "earlier": earlier}
        with new_file(folder / FILE) as file:
            file.write((json.dumps(order, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _progress(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """How far a fit has come, and its checkpoints: their paths are from the run's folder if they lie below it."""
    callbacks = model_checkpoints(trainer)
    best = next((c for c in callbacks if c.monitor and c.best_model_path), None)
    last = next((c.last_model_path for c in callbacks if c.last_model_path), None)
    place = next((c.dirpath for c in callbacks if c.dirpath), None)
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "best_checkpoint": None
        if best is None
        else {
            "path": _relative(best.best_model_path, folder),
            "monitor": best.monitor,
            "score": None if best.best_model_score is None else _number(best.best_model_score),
        },
        "last_checkpoint": last and _relative(last, folder),
        "checkpoints": place and _relative(place, folder),
    }


def _relative(path: str | os.PathLike, folder: Path) -> str:
    if is_address(str(path)):
        return str(path)
    relative = os.path.relpath(path, folder)
    return os.path.abspath(path) if relative.startswith("..") else relative


def _number(value: Any) -> float | str:
    """A figure as JSON has it: what is not finite as a word."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _versions() -> dict[str, str]:
    versions = {"lightning_plugins": lightning_plugins.__version__, "python": sys.version.split()[0]}
    for name in _LIBRARIES:
        if name in sys.modules:
            with suppress(PackageNotFoundError):
                versions[name] = version(name)
    return versions


def _seconds(run: Mapping[str, Any]) -> float:
    seconds = run.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0


# Reading: a record may have come with a folder from elsewhere.


@dataclass(frozen=True)
class Record:
    """What a run's folder says of itself."""

    folder: Path
    content: dict[str, Any]

    @property
    def age(self) -> float:
        """When it was written, in seconds since the epoch."""
        return (self.folder / FILE).lstat().st_mtime

    @property
    def fit(self) -> dict[str, Any] | None:
        """The newest training in this folder."""
        return next(
            (run for run in [self.content, *self.content["earlier"][::-1]] if run.get("command") == "fit"), None
        )

    @property
    def checkpoints(self) -> Path | None:
        """The folder of the training's checkpoints."""
        place = (self.fit or {}).get("checkpoints")
        return self.folder / place if isinstance(place, str) and place and not is_address(place) else None

    @property
    def start(self) -> Path | None:
        """The checkpoint that the training went on from."""
        path = (self.fit or {}).get("checkpoint")
        return Path(path) if isinstance(path, str) and path and not is_address(path) else None


def read_record(folder: Path) -> Record | None:
    """The record in a run's folder; ``None`` where there is none, or none of this form."""
    path = folder / FILE
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):  # another program's, or damaged: it is only asked for what it tells
        return None
    if not isinstance(content, dict) or not isinstance(content.get("command"), str):
        return None
    earlier = content.get("earlier")
    kept = [run for run in earlier if isinstance(run, dict)] if isinstance(earlier, list) else []
    return Record(folder, {**content, "earlier": kept})


def records_below(roots: Iterable[Path]) -> list[Record]:
    """The records of runs below these folders, by Lightning's own rules for where a run lies."""
    folders = dict.fromkeys(folder for root in roots for folder in (root, *root.glob("*/*")))
    return [record for record in map(read_record, folders) if record is not None]


def record_of(checkpoint: Path, roots: Iterable[Path]) -> Record | None:
    """The record of the run whose checkpoint this is."""
    folder = checkpoint.parent
    beside = read_record(folder.parent) if folder.name == "checkpoints" else None
    if beside is not None:
        return beside
    same = [r for r in records_below(roots) if r.checkpoints is not None and _same(r.checkpoints, folder)]
    return max(same, key=lambda record: record.age, default=None)


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
