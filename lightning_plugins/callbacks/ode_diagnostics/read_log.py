"""What ODEDiagnostics has logged, read from a run's CSV or TensorBoard files: one table with a row for each step."""

import csv
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

LOSS = re.compile(r"(train|training|val|valid|validation)[/_.]loss(_epoch|_step)?")
_OF_INDEX = re.compile(r"ode/(\d+)/")


def find_log(run: Path) -> Path:
    """The CSV or events file itself, or what a folder holds: ``metrics.csv``, or itself as a folder of events."""
    if run.is_file():
        if run.suffix == ".csv" or "tfevents" in run.name:
            return run
        raise ValueError(f"{str(run)!r} is no log: give a metrics.csv, an events.out.tfevents file or a run's folder.")
    if not run.is_dir():
        raise FileNotFoundError(f"no run is called {str(run)!r}: give a run's folder, its metrics.csv or events file.")
    if log := _log_in(run):
        return log
    versions: dict[Path, tuple[int, Path]] = {}  # the highest of each folder of runs
    for path in run.rglob("version_*"):
        number = path.name.removeprefix("version_")
        if number.isdigit() and (log := _log_in(path)):
            versions[path.parent] = max(versions.get(path.parent, (-1, log)), (int(number), log))
    if not versions:
        cure = "train with CSVLogger or TensorBoardLogger"
        raise FileNotFoundError(f"{str(run)!r} and its version_N hold neither metrics.csv nor events files: {cure}.")
    return max((log for _, log in versions.values()), key=lambda log: log.stat().st_mtime)


def _log_in(folder: Path) -> Path | None:
    if (folder / "metrics.csv").is_file():
        return folder / "metrics.csv"
    return folder if any(folder.glob("events.out.tfevents.*")) else None


def read_columns(log: Path, optimizer_index: int = 0) -> dict[str, np.ndarray]:
    """The columns that a page of panels draws, from a CSV, an events file or a folder of events files.

    Rows of the optimizer of that index are called ``ode/...``, also where they were logged as ``ode/1/...``; those of
    others are left out.

    Returns:
        Table with one row for each step at which any of them was logged; NaN in between. Of several values for one
        step, as a resumed run writes them, the last counts.
    """
    series: dict[str, dict[int, float]] = {}
    for name, step, value in _read_csv(log) if log.suffix == ".csv" else _read_events(log):
        if of_another := _OF_INDEX.match(name):
            if int(of_another[1]) != optimizer_index:
                continue
            name = name.replace(of_another[0], "ode/", 1)
        elif name.startswith("ode/") and optimizer_index:
            continue
        series.setdefault(name, {})[step] = value
    steps = sorted({step for values in series.values() for step in values})
    table = {name: np.array([values.get(step, np.nan) for step in steps]) for name, values in sorted(series.items())}
    return {"step": np.array(steps, dtype=float), **table}


def _wanted(name: str) -> bool:
    return name.startswith(("ode/", "lr-")) or LOSS.fullmatch(name) is not None


def _read_csv(path: Path) -> Iterable[tuple[str, int, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            what = "has no column 'step'" if reader.fieldnames else "is empty"
            raise ValueError(
                f"{path} {what}; give the metrics.csv that Lightning's CSVLogger wrote after a first step."
            )
        for row in reader:
            for name in filter(_wanted, filter(None, row)):
                if row["step"] and row[name]:  # the last row may be cut off
                    yield name, int(_number(path, reader, row["step"])), _number(path, reader, row[name])


def _number(path: Path, reader: csv.DictReader, cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"{path}, line {reader.line_num}: {cell!r} is not a number.") from error


def _read_events(path: Path) -> Iterable[tuple[str, int, float]]:
    if find_spec("tensorboard") is None:
        cure = "pip install tensorboard, or train with CSVLogger"
        raise ModuleNotFoundError(f"{path} is a log of TensorBoard, which is not installed: {cure}.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)  # 0: all of them
    events.Reload()
    for name in filter(_wanted, events.Tags()["scalars"]):
        for event in events.Scalars(name):
            yield name, event.step, event.value
