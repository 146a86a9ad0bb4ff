"""What a run leaves behind, and where: predictions in one file, the paths of its pictures."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_plugins.core.checkpoint_io import write_torch_file
from lightning_plugins.core.logging import log_dir
from lightning_plugins.core.new_file import new_file
from lightning_plugins.core.replacing import replacing

MAX_PICTURES = 11


def join_batches(batches: Sequence[Any]) -> Any:
    """Predictions of all batches as one: dicts of tensors key by key, tensors along the first dimension.

    Anything else stays a list with one entry for each batch. Scalars are stacked.

    >>> join_batches([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(1, 3)}])["x"].shape
    torch.Size([3, 3])
    """
    first = batches[0] if batches else None
    if isinstance(first, dict) and all(isinstance(b, dict) and b.keys() == first.keys() for b in batches):
        return {key: join_batches([batch[key] for batch in batches]) for key in first}
    if isinstance(first, torch.Tensor) and all(b.shape[1:] == first.shape[1:] for b in batches):
        return (torch.cat if first.ndim else torch.stack)([batch.cpu() for batch in batches])
    return list(batches)


def save_predictions(trainer: Trainer, predictions: Sequence[Any]) -> Path:
    """Write what ``trainer.predict`` returned into the run's folder; several ranks write a file each.

    Batches of records (lists of dicts of plain values) go to ``predictions.jsonl``, an object a line; anything else,
    joined, to ``predictions.pt``. With several dataloaders the latter holds a list with one entry for each, and a
    line of the former tells its number as ``dataloader``.

    Returns:
        The file's path.
    """
    several = len(trainer.predict_dataloaders) > 1 if isinstance(trainer.predict_dataloaders, list) else False
    rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
    folder = Path(trainer.strategy.broadcast(str(log_dir(trainer))))  # rank zero's
    folder.mkdir(parents=True, exist_ok=True)
    loaders = predictions if several else [predictions]
    if all(_is_records(batch) for batches in loaders for batch in batches):
        path = folder / f"predictions{rank}.jsonl"
        _write_lines(path, ({**r, "dataloader": i} if several else r for i, r in _records(loaders)))
    else:
        path = folder / f"predictions{rank}.pt"
        joined = [join_batches(batches) for batches in loaders]
        with replacing(path) as partial:
            write_torch_file(joined if several else joined[0], partial)
    return path


def _records(loaders: Sequence[Sequence[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with its dataloader's number."""
    for number, batches in enumerate(loaders):
        for batch in batches:
            yield from ((number, record) for record in batch)


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with new_file(path) as file:
        file.writelines((json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records)


def _is_records(batch: Any) -> bool:
    return isinstance(batch, list) and all(isinstance(record, dict) and _is_plain(record) for record in batch)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def picture_lines(folder: Path, since: float) -> list[str]:
    """The newest picture of each kind below ``folder``, one line each, with the number of the others.

    Args:
        folder: ``<log_dir>/images``.
        since: seconds since the epoch; older files are another run's.
    """
    kinds: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        if path.stat().st_mtime >= since:
            kinds.setdefault(path.parent, []).append(path)
    lines = [
        shorten(paths[-1]) + (f"  (and {len(paths) - 1} earlier)" if paths[1:] else "") for paths in kinds.values()
    ]
    if len(lines) > MAX_PICTURES:
        lines = [*lines[: MAX_PICTURES - 1], f"and {len(lines) - MAX_PICTURES + 1} more kinds in {shorten(folder)}"]
    return lines


def shorten(path: str | os.PathLike) -> str:
    """The path from the current folder if it lies below it, else as it is."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith("..") else relative
