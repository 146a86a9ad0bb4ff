"""Sharded checkpoints: folders that FSDP2 writes, a part from each process. They are read as data, and as one whole.

The index of such a folder is a pickle, which torch reads without asking, as it does all parts that are no tensor. Here
the index is read with stand-ins for torch's classes, so that nothing in it has a meaning of its own; then its names,
sizes and places are compared with the files. What has passed may also be given to torch.
"""

import io
import json
import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_plugins.core.checkpoint_damage import refuse_damage, remembered

INDEX, DESCRIPTION = ".metadata", "meta.pt"
CHECKSUMS = "checksums.json"  # of all other files in the folder, CRC-32
_OF_TORCH = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},  # Python 3.13
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_WEIGHTS = ("state_dict", "model")  # as FSDP2 and FSDP1 call them
_OPTIMIZER = re.compile(r"optimizer_(0|[1-9]\d{0,3})")


@dataclass(frozen=True)
class _Place:
    """Bytes of a file in the folder."""

    file: str
    start: int
    length: int


@dataclass
class _Entry:
    """A tensor in chunks by their offsets, or (``dtype`` is ``None``) an object in one place."""

    path: tuple[str | int, ...]
    size: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    chunks: dict[tuple[int, ...] | None, tuple[tuple[int, ...], _Place]] = field(default_factory=dict)


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
    total, done = sum(place.length for place in _places(wanted)), 0
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


def refuse_objects(folder: Path, entries: "Mapping[str, _Entry]") -> None:
    """Read as data, each by itself, what torch would unpickle without asking: all that is no tensor.

    Raises:
        ValueError: it is no data.
        OSError: it cannot be read.
    """
    for name, entry in entries.items():
        if entry.dtype is None:
            _value(folder, name, entry)


def _refuse_others(folder: Path, entries: "Mapping[str, _Entry]") -> None:
    """Refuse what Lightning puts into no folder."""
    roots = {str(entry.path[0]) for entry in entries.values()}
    optimizers = [root for root in roots if _OPTIMIZER.fullmatch(root)]
    known = {*_WEIGHTS[:1], *(f"optimizer_{number}" for number in range(len(optimizers)))}
    known |= set() if _WEIGHTS[0] in roots else set(_WEIGHTS)
    for name, entry in entries.items():
        if entry.path[0] not in known or not isinstance((*entry.path, None)[1], str):
            _refuse(folder, f"holds {name!r}, which is no part of a checkpoint")


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    refuse_damage(path)
    with _data(folder):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        _refuse(folder, f"has a {DESCRIPTION} that is no description of a checkpoint")
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


def _value(folder: Path, name: str, entry: _Entry) -> Any:
    """What an entry says, from all its chunks."""
    if entry.dtype is None:
        return _part(folder, entry.chunks[None][1])
    whole = torch.empty(entry.size, dtype=entry.dtype)
    several = len(entry.chunks) > 1
    covered = torch.zeros(entry.size, dtype=torch.bool) if several else None
    for offsets, (sizes, place) in entry.chunks.items():
        part = _part(folder, place)
        if not isinstance(part, Tensor) or (part.shape, part.dtype, part.device.type) != (sizes, entry.dtype, "cpu"):
            _refuse(folder, f"has other numbers in {place.file!r} than its index says of {name!r}")
        where = tuple(slice(first, first + count) for first, count in zip(offsets or (), sizes, strict=True))
        whole[where] = part.detach()
        if covered is not None:
            covered[where] = True
    if covered is not None and not covered.all():
        _refuse(folder, f"has chunks of {name!r} that do not make it whole")
    return whole


def _part(folder: Path, place: _Place) -> Any:
    """One part of a file, which is a file of ``torch.save`` itself."""
    with _data(folder):
        return torch.load(_bytes(folder, place), map_location="cpu", weights_only=True)


def _bytes(folder: Path, place: _Place) -> io.BytesIO:
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
        raise ValueError(_sentence(folder, f"holds {_no_data(error)}; it is not opened")) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(_damaged(folder, "a part of it cannot be read")) from error


def _no_data(error: BaseException) -> str:
    """What is no data: torch tells it in a page, among other things."""
    found = re.search(r"GLOBAL (\S+)", text) if "\n" in (text := str(error)) else re.fullmatch(r"(\S+)", text)
    return f"an object of {found[1]}" if found else "an object that is no plain value"


def _sentence(folder: Path, what: str) -> str:
    return f"sharded checkpoint {str(folder)!r} {what}."


def _damaged(folder: Path, why: str) -> str:
    return f"checkpoint {str(folder)!r} is damaged ({why}). Use an earlier one."


def _refuse(folder: Path, what: str) -> NoReturn:
    raise ValueError(_sentence(folder, f"{what}; it is not opened"))


# Damage


def refuse_damaged_folder(folder: Path, entries: "Mapping[str, _Entry]") -> None:
    """Raise if files are missing or short, or are not as they were written, by the checksums in or beside them.

    Raises:
        OSError: in that case.
    """
    for place in _places(entries):
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


def _wrong_checksum(folder: Path, entries: "Mapping[str, _Entry]") -> str | None:
    if kept := kept_checksums(folder):
        wrong = [name for name, value in kept.items() if checksum(folder / name) != value]
    else:
        wrong = [place.file for place in _places(entries) if not _is_whole(_bytes(folder, place))]
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
    if not isinstance(kept, dict) or not all(_is_plain(name) for name in kept):
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


def _places(entries: Mapping[str, _Entry]) -> Iterator[_Place]:
    for entry in entries.values():
        yield from (place for _, place in entry.chunks.values())


# The index


class _Frozen(type):
    """Nothing in a pickle changes a class."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(cls.__name__)


class _Record(metaclass=_Frozen):
    """Stands for an object of torch's: what it is made of."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Index(pickle.Unpickler):
    """Knows nothing but types of numbers and names of torch's own classes, and gives stand-ins for these."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A type of numbers, or a stand-in."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name not in _OF_TORCH.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self._classes.setdefault(name, _Frozen(name, (_Record,), {}))


def read_index(folder: Path) -> dict[str, _Entry]:
    """What a folder holds, by name. Every place lies in one of the folder's own files, and no tensor is larger than it.

    Raises:
        ValueError: the index holds other things than an index does, or names places elsewhere.
        OSError: the folder cannot be read.
    """
    if _leads_out(folder, INDEX) or _leads_out(folder, DESCRIPTION) or _leads_out(folder, CHECKSUMS):
        _refuse(folder, "holds a link that leads out of it")
    try:
        with (folder / INDEX).open("rb") as file:
            metadata = _Index(file).load()
        entries = _entries(metadata)
    except pickle.UnpicklingError as error:
        raise ValueError(_sentence(folder, f"holds {_no_data(error)}; it is not opened")) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(_sentence(folder, "holds no index of what is there; it is not opened")) from error
    for place in _places(entries):
        if not _is_plain(place.file) or _leads_out(folder, place.file):
            _refuse(folder, f"names {place.file!r}, which is no file in it")
    taken: dict[str, int] = {}
    for place in _places(entries):
        taken[place.file] = taken.get(place.file, 0) + place.length
    for name, length in taken.items():  # places that share bytes would ask for more memory than the files have
        if (folder / name).is_file() and length > max((folder / name).stat().st_size, _end(entries, name)):
            _refuse(folder, f"names the same bytes of {name!r} twice")
    return entries


def _end(entries: Mapping[str, _Entry], name: str) -> int:
    return max(place.start + place.length for place in _places(entries) if place.file == name)


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a name is a link out of the folder, or of something that is no file."""
    path = folder / name
    if not os.path.lexists(path):
        return False
    return not (path.is_file() and path.resolve().parent == folder.resolve())


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", ":", "\0"}


def _entries(metadata: Any) -> dict[str, _Entry]:
    """The index in plain values; anything else in it raises whatever it raises."""
    places: dict[tuple[str, tuple[int, ...] | None], _Place] = {}
    for index, info in _of(metadata, "Metadata")["storage_data"].items():
        key, where = _of(index, "MetadataIndex"), _of(info, "_StorageInfo")
        offset = key.get("offset")
        at = (_text(key["fqn"]), None if offset is None else _size(offset))
        if at in places or where.get("transform_descriptors") is not None:
            raise ValueError("twice, or packed")
        places[at] = _Place(_text(where["relative_path"]), _count(where["offset"]), _count(where["length"]))
    paths = metadata.state["planner_data"] or {}
    entries = {}
    for name, stored in metadata.state["state_dict_metadata"].items():
        entry = entries[_text(name)] = _Entry(_path(paths.get(name, (name,))))
        if type(stored).__name__ == "BytesStorageMetadata":
            entry.chunks[None] = ((), places.pop((name, None)))
            continue
        tensor = _of(stored, "TensorStorageMetadata")
        entry.size, (entry.dtype, *_) = _size(tensor["size"]), tensor["properties"].state
        if not isinstance(entry.dtype, torch.dtype):
            raise TypeError("no type of numbers")
        for chunk in tensor["chunks"]:
            offsets, sizes = (_size(_of(chunk, "ChunkStorageMetadata")[key]) for key in ("offsets", "sizes"))
            entry.chunks[offsets] = (sizes, places.pop((name, offsets)))
        _check_sizes(entry)
    taken = {entry.path for entry in entries.values()}
    inner = any(path[:length] in taken for path in taken for length in range(1, len(path)))
    if places or inner or len(taken) != len(entries):
        raise ValueError("places of nothing, or two things by one name")
    return entries


def _check_sizes(entry: _Entry) -> None:
    """The chunks lie in their tensor, are as many numbers together, and no more than their places hold."""
    assert entry.dtype is not None
    numbers = 0
    for offsets, (sizes, place) in entry.chunks.items():
        assert offsets is not None
        ends = [first + count for first, count in zip(offsets, sizes, strict=True)]
        inside = all(end <= whole for end, whole in zip(ends, entry.size, strict=True))
        if not inside or math.prod(sizes) * entry.dtype.itemsize > place.length:
            raise ValueError("a chunk beyond its tensor or its file")
        numbers += math.prod(sizes)
    if numbers != math.prod(entry.size):
        raise ValueError("chunks that are not the tensor")


def _of(record: Any, name: str) -> dict[str, Any]:
    """What a stand-in holds, by name."""
    if type(record).__name__ != name or not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise TypeError(name)
    return record.state


def _size(record: Any) -> tuple[int, ...]:
    """A ``torch.Size``, whose memory a few small numbers cannot ask for."""
    (values,) = record.args
    return tuple(map(_count, values))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError("no count")
    return value


def _path(values: Any) -> tuple[str | int, ...]:
    if not isinstance(values, tuple) or not values:
        raise TypeError("no path")
    return tuple(_count(value) if isinstance(value, int) else _text(value) for value in values)
