"""``predict``: a table that people read, of all processes and in the order of the input, with the tensors beside it."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.cli.outputs import shorten
from lightning_plugins.core.checkpoint_io import write_torch_file
from lightning_plugins.core.logging import leaves_no_logs, log_dir
from lightning_plugins.core.new_file import new_file
from lightning_plugins.core.replacing import replacing
from lightning_plugins.data import ImageData, TextData
from lightning_plugins.data.loading import KeyLoader

_FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # by which a spreadsheet knows one
_SEVERAL = ("prediction", "score", "label")  # of which a sample may have several


class Batch(NamedTuple):
    """Predictions of a batch, on the CPU."""

    rows: list[int]  # the samples' places in the input; empty if unknown
    output: Any
    labels: Tensor | None


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returned into the run's folder, once, in the order of the input.

    - Batches of records (lists of dicts of plain values) become ``predictions.jsonl``, an object a line.
    - Of dicts of tensors what holds a number for each sample becomes a column of ``predictions.csv``, beside the
      sample's file or row and its label. ``logits`` ``(B, K)`` are a ``prediction`` and its ``score``, too.
    - All tensors, joined, are in ``predictions.pt``; anything else is there as it is.

    With several dataloaders ``predictions.pt`` holds a list with one entry for each, and the tables have a column
    ``dataloader``. Nothing is written under ``fast_dev_run``.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._batches: dict[int, list[Batch]] = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep a batch, with its places and labels."""
        loaders = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list) else loaders
        rows = _rows(loader, batch_idx) if isinstance(loader, KeyLoader) else list(batch_indices or [])
        kept = Batch(rows, _on_cpu(prediction), _on_cpu(_labels(batch)))
        self._batches.setdefault(dataloader_idx, []).append(kept)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the batches of all processes, write them on rank zero, and tell where."""
        batches, self._batches = self._batches, {}
        if leaves_no_logs(trainer):
            return
        ranks = _gathered(trainer, batches)
        if not any(ranks):
            return
        numbers = sorted({number for rank in ranks for number in rank})
        merged = {number: _merged([rank.get(number, []) for rank in ranks]) for number in numbers}
        several = isinstance(trainer.predict_dataloaders, list) and len(trainer.predict_dataloaders) > 1
        files = write_predictions(log_dir(trainer), merged, several, getattr(trainer, "datamodule", None))
        print("Predictions:", ", ".join(map(shorten, files)))


def _rows(loader: KeyLoader, batch_idx: int) -> list[int]:
    keys = loader.keys_of(batch_idx)
    return [key for row in keys for key in (row if isinstance(row, list) else [row])]


def _labels(batch: Any) -> Any:
    """The labels of a batch, as a dict or a pair has them."""
    label = batch.get("label") if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        label = batch[1]
    whole = isinstance(label, Tensor) and label.ndim > 0 and not label.is_floating_point()
    return label if whole else None


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def _gathered(trainer: Trainer, batches: dict[int, list[Batch]]) -> list[dict[int, list[Batch]]]:
    """What each process has predicted, on rank zero; nothing on the others."""
    if trainer.world_size == 1:
        return [batches]
    found: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(batches, found)
    return found or []


def _merged(ranks: Sequence[list[Batch]]) -> list[Batch]:
    """Samples in the order of the input, in one batch where their outputs can be joined."""
    batches = [rank[k] for k in range(max(map(len, ranks))) for rank in ranks if k < len(rank)]
    rows = [row for batch in batches for row in batch.rows]
    if rows == sorted(rows) and all(batch.rows for batch in batches):
        return batches
    order = torch.tensor(rows).argsort()
    outputs, labels = [batch.output for batch in batches], join_batches([batch.labels for batch in batches])
    records = all(map(_is_records, outputs))
    joined = [record for output in outputs for record in output] if records else join_batches(outputs)
    if not all(batch.rows for batch in batches) or (isinstance(joined, list) and not records):
        if len(ranks) > 1:
            rank_zero_warn("The order of the input is not known: predictions stand by batch, and then by process.")
        return [batch._replace(rows=[]) for batch in batches]
    sorted_labels = labels[order] if isinstance(labels, Tensor) else None
    output = [joined[i] for i in order.tolist()] if records else _permuted(joined, order)
    return [Batch(sorted(rows), output, sorted_labels)]


def _permuted(joined: Any, order: Tensor) -> Any:
    """Rows of tensors that have one for each sample; others, such as a number of each batch, as they are."""
    if isinstance(joined, dict):
        return {key: _permuted(value, order) for key, value in joined.items()}
    return joined[order] if isinstance(joined, Tensor) and joined.ndim and len(joined) == len(order) else joined


# Files


def write_predictions(
    folder: Path, parts: Mapping[int, Sequence[Batch]], several: bool, data: LightningDataModule | None = None
) -> list[Path]:
    """Write the predictions of each dataloader.

    Args:
        folder: the run's.
        parts: what was predicted for each dataloader, by its number.
        several: whether there are several dataloaders.
        data: the data module, which may know files, places and names of classes.

    Returns:
        The files, the one to read first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if all(_is_records(batch.output) for part in parts.values() for batch in part):
        path = folder / "predictions.jsonl"
        lines = (_told(number, record, several) for number, part in parts.items() for record in _records(part, data))
        with new_file(path) as file:
            file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        return [path]
    path = folder / "predictions.pt"
    joined = [join_batches([batch.output for batch in part]) for part in parts.values()]
    with replacing(path) as partial:
        write_torch_file(joined if several else joined[0], partial)
    tables = [_table(part, output, data) for part, output in zip(parts.values(), joined, strict=True)]
    if not all(tables):
        return [path]
    rows = [_told(number, row, several) for number, table in zip(parts, tables, strict=True) for row in table]
    with new_file(folder / "predictions.csv") as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return [folder / "predictions.csv", path]


def _told(number: int, row: dict[str, Any], several: bool) -> dict[str, Any]:
    return {**row, "dataloader": number} if several else row


def join_batches(batches: Sequence[Any]) -> Any:
    """Predictions of all batches as one: dicts of tensors key by key, tensors along the first dimension.

    Anything else stays a list with one entry for each batch. Scalars are stacked.

    >>> join_batches([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(1, 3)}])["x"].shape
    torch.Size([3, 3])
    """
    first = batches[0] if batches else None
    if isinstance(first, dict) and all(isinstance(b, dict) and b.keys() == first.keys() for b in batches):
        return {key: join_batches([batch[key] for batch in batches]) for key in first}
    if isinstance(first, Tensor) and all(isinstance(b, Tensor) and b.shape[1:] == first.shape[1:] for b in batches):
        return (torch.cat if first.ndim else torch.stack)(list(batches))
    return list(batches)


def _is_records(batch: Any) -> bool:
    return isinstance(batch, list) and all(isinstance(record, dict) and _is_plain(record) for record in batch)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _records(part: Sequence[Batch], data: Any) -> Iterator[dict[str, Any]]:
    """Each record behind its row, and its file and line where the data know it."""
    records = [record for batch in part for record in batch.output]
    rows = [row for batch in part for row in batch.rows]
    known = len(rows) == len(records)
    places = data.places(data.predict_split) if isinstance(data, TextData) and known else None
    for row, record in zip(rows if known else range(len(records)), records, strict=True):
        yield {"row": row} | ({} if places is None else {"place": places[row]}) | record


def _table(part: Sequence[Batch], joined: Any, data: Any) -> list[dict[str, Any]]:
    """A row for each sample; none where the output has nothing that fits into a cell."""
    rows, labels = [row for batch in part for row in batch.rows], join_batches([batch.labels for batch in part])
    labels = labels if isinstance(labels, Tensor) else None
    count = len(rows) or (0 if labels is None else len(labels))
    columns = _columns(joined, count) if isinstance(joined, dict) else {}
    if not columns.keys() - {"label"}:
        return []
    images = data if isinstance(data, ImageData) else None
    files = images.files(images.predict_split) if images is not None and rows else None
    table = [{"row": n} if files is None else {"file": _harmless(files[n])} for n in rows or range(count)]
    if labels is not None and len(labels) == count and (images is None or images.labelled):
        columns = {"label": labels, **{name: values for name, values in columns.items() if name != "label"}}
    names = {} if images is None else {"label": images.class_names, "prediction": images.trained_names}
    for name, values in columns.items():
        for row, value in zip(table, values, strict=True):
            row[name] = _cell(value, names.get(name))
    return table


def _columns(joined: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """What has one number for each sample, or, as a prediction, a few; logits as prediction and score."""
    fits = {1}, {1, 2}
    tensors = {name: value for name, value in joined.items() if isinstance(value, Tensor) and value.ndim}
    flat = {n: v for n, v in tensors.items() if v.ndim in fits[n in _SEVERAL] and len(v) == count}
    logits = tensors.get("logits")
    if "prediction" not in flat and logits is not None and logits.ndim == 2 and len(logits) == count:
        score, prediction = logits.float().softmax(1).max(1)
        flat = {"prediction": prediction, "score": score, **flat}
    first = [name for name in ("prediction", "score") if name in flat]
    return {name: flat[name] for name in [*first, *(name for name in flat if name not in first)]}


def _cell(value: Tensor, names: Sequence[str] | None) -> Any:
    """A number or a name; several in one cell."""
    if value.ndim:
        return " ".join(str(_cell(item, names)) for item in value)
    number = value.item()
    if names is not None and isinstance(number, int) and 0 <= number < len(names):
        return _harmless(names[number])
    return float(f"{number:.6g}") if isinstance(number, float) else number


def _harmless(text: str) -> str:
    """A name that no spreadsheet takes for a formula; as a path it means the same."""
    return f"./{text}" if text.startswith(_FORMULAS) else text
