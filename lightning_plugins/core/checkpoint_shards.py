"""Sharded checkpoints: folders that FSDP2 writes, a part from each process. They are read as data, and as one whole.

The index of such a folder is a pickle, which torch reads without asking, as it does all parts that are no tensor. Here
both are read as data, the index by ``shard_index.py``. What has passed may also be given to torch.
"""

import io
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.checkpoint_damage import refuse_damage, remembered
from lightning_plugins.core.shard_index import (
    CHECKSUMS,
    DESCRIPTION,
    Entry,
    Place,
    is_plain,
    no_data,
    places_of,
    read_index,
    refuse,
    sentence,
)

_WEIGHTS = ("state_dict", "model")  # as FSDP2 and FSDP1 call them
_OPTIMIZER = re.compile(r"optimizer_(0|[1-9]\d{0,3})")


# The whole of a folder


def read_sharded(
    folder: Path, optimizers: bool = True, progress: Callable[[float], object] = lambda share: None
) -> dict[str, Any]:
    """A folder's content as that of one checkpoint file, on the CPU: weights whole, states of optimizers in a list.

    Parameters stand in the states of optimizers by their names, in the optimizer's order: ``load_state_dict`` goes by
    the order, FSDP2 by the names. Beside what is returned, memory for two of the largest shards is needed.

    Args:
        folder: the checkpoint.
        optimizers: whether their states are read.
        progress: is told what share of the bytes has been read, after each value.

    Raises:
        ValueError: it holds what is no data, or what is no part of a checkpoint.
        OSError: a file is missing, truncated or damaged.
    """
    entries = read_index(folder)
    refuse_damaged_folder(folder, entries)
    _refuse_others(folder, entries)
    content = _description(folder)
    wanted = {name: entry for name, entry in entries.items() if optimizers or entry.path[0] in _WEIGHTS}
    total, done = sum(place.length for place in places_of(wanted)), 0
    whole: dict[str | int, Any] = {}
    for name, entry in wanted.items():
        _put(whole, entry.path, _value(folder, name, entry))
        done += sum(place.length for _, place in entry.chunks.values())
        progress(done / total)
    content["state_dict"] = _plain(next((whole.pop(key) for key in _WEIGHTS if key in whole), {}))
    if optimizers and (whole or "lr_schedulers" in content):  # else of weights alone
        states = [whole[f"optimizer_{number}"] for number in range(len(whole))]
        content["optimizer_states"] = [{"state": {}, **_plain(state)} for state in states]
    return content


def describe_sharded(folder: Path) -> dict[str, Any]:
    """A folder's content without its numbers: all that is no weight or state of an optimizer, and weights of no memory.

    All of the folder is checked, so that torch may read it, too.

    Raises:
        ValueError: it holds what is no data, or what is no part of a checkpoint.
        OSError: a file is missing, truncated or damaged.
    """
    entries = read_index(folder)
    refuse_damaged_folder(folder, entries)
    refuse_objects(folder, entries)
    _refuse_others(folder, entries)
    weights = {entry.path[1:]: entry for entry in entries.values() if entry.path[0] in _WEIGHTS}
    names = {".".join(map(str, path)): entry for path, entry in weights.items()}
    state = {name: torch.empty(entry.size, dtype=entry.dtype, device="meta") for name, entry in names.items()}
    return {**_description(folder), "state_dict": state}


def refuse_objects(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Read as data, each by itself, what torch would unpickle without asking: all that is no tensor.

    Raises:
        ValueError: it is no data.
        OSError: it cannot be read.
    """
    for name, entry in entries.items():
        if entry.dtype is None:
            _value(folder, name, entry)


def _refuse_others(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse what Lightning puts into no folder."""
    roots = {str(entry.path[0]) for entry in entries.values()}
    optimizers = [root for root in roots if _OPTIMIZER.fullmatch(root)]
    known = {*_WEIGHTS[:1], *(f"optimizer_{number}" for number in range(len(optimizers)))}
    known |= set() if _WEIGHTS[0] in roots else set(_WEIGHTS)
    for name, entry in entries.items():
        if entry.path[0] not in known or not isinstance((*entry.path, None)[1], str):
            refuse(folder, f"holds {name!r}, which is no part of a checkpoint")


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    refuse_damage(path)
    with _data(folder):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        refuse(folder, f"has a {DESCRIPTION} that is no description of a checkpoint")
    return content


def _put(whole: dict[str | int, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Numbers in a path are places in a list."""
    for key in path[:-1]:
        whole = whole.setdefault(key, {})
    whole[path[-1]] = value


def _plain(whole: Any) -> Any:
    if not isinstance(whole, dict):
        return whole
    values = {key: _plain(value) for key, value in whole.items()}
    is_list = values and all(isinstance(key, int) for key in values)
    return [values[key] for key in sorted(values)] if is_list else values


def _value(folder: Path, name: str, entry: Entry) -> Any:
    """What an entry says, from all its chunks."""
    if entry.dtype is None:
        return _part(folder, entry.chunks[None][1])
    whole = torch.empty(entry.size, dtype=entry.dtype)
    several = len(entry.chunks) > 1
    covered = torch.zeros(entry.size, dtype=torch.bool) if several else None
    for offsets, (sizes, place) in entry.chunks.items():
        part = _part(folder, place)
        if not isinstance(part, Tensor) or (part.shape, part.dtype, part.device.type) != (sizes, entry.dtype, "cpu"):
            refuse(folder, f"has other numbers in {place.file!r} than its index says of {name!r}")
        where = tuple(slice(first, first + count) for first, count in zip(offsets or (), sizes, strict=True))
        whole[where] = part.detach()
        if covered is not None:
            covered[where] = True
    if covered is not None and not covered.all():
        refuse(folder, f"has chunks of {name!r} that do not make it whole")
    return whole


def _part(folder: Path, place: Place) -> Any:
    """One part of a file, which is a file of ``torch.save`` itself."""
    with _data(folder):
        return torch.load(_bytes(folder, place), map_location="cpu", weights_only=True)


def _bytes(folder: Path, place: Place) -> io.BytesIO:
    with (folder / place.file).open("rb") as file:
        file.seek(place.start)
        return io.BytesIO(file.read(place.length))


def _is_whole(content: io.BytesIO) -> bool:
    """By the checksums of the part's own records."""
    try:
        with zipfile.ZipFile(content) as archive:
            return archive.testzip() is None
    except Exception:  # a wrong header may lead to anything
        return False


@contextmanager
def _data(folder: Path) -> Iterator[None]:
    """What torch refuses to read as data is told in a sentence."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(sentence(folder, f"holds {no_data(error)}; it is not opened")) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(_damaged(folder, "a part of it cannot be read")) from error


def _damaged(folder: Path, why: str) -> str:
    return f"checkpoint {str(folder)!r} is damaged ({why}). Use an earlier one."


# Damage


def refuse_damaged_folder(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Raise if files are missing or short, or are not as they were written, by the checksums in or beside them.

    Raises:
        OSError: in that case.
    """
    for place in places_of(entries):
        path = folder / place.file
        if not path.is_file():
            raise OSError(_damaged(folder, f"it lacks {place.file!r}"))
        if place.start + place.length > path.stat().st_size:
            raise OSError(_damaged(folder, f"{place.file!r} is truncated"))
    if not (folder / DESCRIPTION).is_file():
        raise OSError(_damaged(folder, f"it lacks {DESCRIPTION!r}"))
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if why := remembered(files, lambda: _wrong_checksum(folder, entries)):
        raise OSError(_damaged(folder, why))


def _wrong_checksum(folder: Path, entries: Mapping[str, Entry]) -> str | None:
    if kept := kept_checksums(folder):
        wrong = [name for name, value in kept.items() if checksum(folder / name) != value]
    else:
        wrong = [place.file for place in places_of(entries) if not _is_whole(_bytes(folder, place))]
    return f"the checksum of {wrong[0]!r} is wrong" if wrong else None


def kept_checksums(folder: Path) -> dict[str, int | None]:
    """Those that were written with a folder; none if it was written by Lightning alone.

    Raises:
        OSError: their file is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict) or not all(is_plain(name) for name in kept):
        raise OSError(_damaged(folder, f"{CHECKSUMS!r} holds no checksums"))
    return kept


def checksum(path: Path) -> int | None:
    """Of a file's content, CRC-32; ``None`` if there is no such file."""
    if not path.is_file():
        return None
    value = 0
    with path.open("rb") as file:
        while data := file.read(2**20):
            value = zlib.crc32(data, value)
    return value
