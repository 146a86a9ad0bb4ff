"""``--ckpt_path last``: the newest run, and its newest checkpoint that can be read. Files are only read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from lightning_plugins.cli.checkpoint import read_hyperparameters, tell
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.cli.run_record import Record, records_below


@dataclass
class _Run:
    """A training: the folder of its checkpoints, and what it says of itself, if anything."""

    checkpoints: Path | None
    record: Record | None = None

    @property
    def files(self) -> list[Path]:
        """What is called ``last`` before all others, the newest first."""
        paths = [] if self.checkpoints is None else [*self.checkpoints.glob("*.ckpt")]
        return sorted(paths, key=lambda path: (path.name.startswith("last"), _age(path)), reverse=True)

    @property
    def has_last(self) -> bool:
        """Whether it wrote a last checkpoint."""
        return any(path.name.startswith("last") for path in self.files)

    @property
    def age(self) -> float:
        """When it last wrote something, in seconds since the epoch."""
        ages = [*map(_age, self.files), 0.0 if self.record is None else self.record.age]
        return max(ages)

    @property
    def name(self) -> str:
        """The folder that a sentence names."""
        return str(self.record.folder if self.record else self.checkpoints)


def find_last(root: Path, trainer: Namespace | None = None) -> Path:
    """The last checkpoint of the newest run, told on stderr with what is passed over.

    A file that cannot be read is passed over: first for others of the same run, then for the run before it. A run that
    was stopped before it wrote a checkpoint stands where it began: at the checkpoint that it was resumed from.

    Args:
        root: the folder below which runs lie.
        trainer: the trainer's part of a config, which may name other folders of runs and checkpoints.

    Raises:
        UsageError: there is no run, the newest one has no last checkpoint, or none can be read.
    """
    runs = sorted(_runs(root, trainer), key=lambda run: run.age, reverse=True)
    if not runs:
        raise UsageError(
            f"--ckpt_path last: no run in {str(root.absolute())!r} has a checkpoint.",
            "Give its file, or the folder above lightning_logs: --trainer.default_root_dir FOLDER",
        )
    newest = runs[0]
    if not newest.has_last:
        return _taken(_start_of(newest, runs), [f"the newest run, {newest.name!r}, which has no checkpoint yet."])
    skipped = []
    for path in [path for run in runs if run.has_last for path in run.files]:
        if (what := _why_unreadable(path)) is None:
            return _taken(path, skipped)
        skipped.append(what)
    raise UsageError(f"--ckpt_path last: none of {len(skipped)} checkpoint(s) can be read.", *skipped)


def _runs(root: Path, trainer: Namespace | None) -> list[_Run]:
    """The trainings below the folders, each once."""
    roots, folders = [root], [root / "checkpoints", *root.glob("*/*/checkpoints")]
    for key, argument in (("logger", "save_dir"), ("callbacks", "dirpath")):
        parts = [] if trainer is None else trainer.get(key)
        for part in parts if isinstance(parts, list) else [parts]:
            if isinstance(part, Namespace) and (folder := part.get(f"init_args.{argument}")):
                roots.append(Path(folder))
                folders += [Path(folder), *Path(folder).glob("*/*/checkpoints")]
    runs = [_Run(folder) for folder in folders if any(folder.glob("*.ckpt"))]
    runs += [_Run(record.checkpoints, record) for record in records_below(roots) if record.fit is not None]
    found: dict[Path, _Run] = {}
    for run in runs:  # with what it says of itself, if that is there
        found[(run.checkpoints or Path(run.name)).resolve()] = run
    return list(found.values())


def _start_of(run: _Run, runs: Sequence[_Run]) -> Path:
    """Where a run without a last checkpoint began.

    Raises:
        UsageError: at the beginning.
    """
    start = run.record.start if run.record and not run.files else None
    if start is not None and start.exists():
        return start
    others = [path for each in runs for path in each.files[:1]]
    hints = [
        f"It has {str(run.files[0])!r}." if run.files else "It was stopped before it wrote one, or told to write none.",
        f"To take a file, name it, such as --ckpt_path {others[0]}" if others else "",
    ]
    raise UsageError(f"--ckpt_path last: the newest run, {run.name!r}, has no last.ckpt.", *hints)


def _age(path: Path) -> float:
    return path.lstat().st_mtime  # a link may lead nowhere


def _why_unreadable(path: Path) -> str | None:
    try:
        read_hyperparameters(path)
    except UsageError as error:
        return str(error)
    return None


def _taken(path: Path, skipped: Iterable[str]) -> Path:
    tell([*(f"--ckpt_path last passes over: {line}" for line in skipped), f"--ckpt_path last takes {str(path)!r}."])
    return path
