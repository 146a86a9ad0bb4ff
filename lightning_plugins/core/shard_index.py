"""The index of a sharded checkpoint: what its folder holds, and where. It is a pickle, and read as data.

Stand-ins take the place of torch's classes; then names, sizes and places are compared with each other and the files.
"""

import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

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


@dataclass(frozen=True)
class Place:
    """Bytes of a file in the folder."""

    file: str
    start: int
    length: int


@dataclass
class Entry:
    """A tensor in chunks by their offsets, or (``dtype`` is ``None``) an object in one place."""

    path: tuple[str | int, ...]
    size: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    chunks: dict[tuple[int, ...] | None, tuple[tuple[int, ...], Place]] = field(default_factory=dict)


def places_of(entries: Mapping[str, Entry]) -> Iterator[Place]:
    """All of them."""
    for entry in entries.values():
        yield from (place for _, place in entry.chunks.values())


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


def read_index(folder: Path) -> dict[str, Entry]:
    """What a folder holds, by name. Every place lies in one of the folder's own files, and no tensor is larger than it.

    Raises:
        ValueError: the index holds other things than an index does, or names places elsewhere.
        OSError: the folder cannot be read.
    """
    if _leads_out(folder, INDEX) or _leads_out(folder, DESCRIPTION) or _leads_out(folder, CHECKSUMS):
        refuse(folder, "holds a link that leads out of it")
    try:
        with (folder / INDEX).open("rb") as file:
            metadata = _Index(file).load()
        entries = _entries(metadata)
    except pickle.UnpicklingError as error:
        raise ValueError(sentence(folder, f"holds {no_data(error)}; it is not opened")) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(sentence(folder, "holds no index of what is there; it is not opened")) from error
    for place in places_of(entries):
        if not is_plain(place.file) or _leads_out(folder, place.file):
            refuse(folder, f"names {place.file!r}, which is no file in it")
    taken: dict[str, int] = {}
    for place in places_of(entries):
        taken[place.file] = taken.get(place.file, 0) + place.length
    for name, length in taken.items():  # places that share bytes would ask for more memory than the files have
        if (folder / name).is_file() and length > max((folder / name).stat().st_size, _end(entries, name)):
            refuse(folder, f"names the same bytes of {name!r} twice")
    return entries


def _end(entries: Mapping[str, Entry], name: str) -> int:
    return max(place.start + place.length for place in places_of(entries) if place.file == name)


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a name is a link out of the folder, or of something that is no file."""
    path = folder / name
    if not os.path.lexists(path):
        return False
    return not (path.is_file() and path.resolve().parent == folder.resolve())


def is_plain(name: Any) -> bool:
    """Whether it is the name of a file in the folder itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", ":", "\0"}


def _entries(metadata: Any) -> dict[str, Entry]:
    """The index in plain values; anything else in it raises whatever it raises."""
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, info in _of(metadata, "Metadata")["storage_data"].items():
        key, where = _of(index, "MetadataIndex"), _of(info, "_StorageInfo")
        offset = key.get("offset")
        at = (_text(key["fqn"]), None if offset is None else _size(offset))
        if at in places or where.get("transform_descriptors") is not None:
            raise ValueError("twice, or packed")
        places[at] = Place(_text(where["relative_path"]), _count(where["offset"]), _count(where["length"]))
    paths = metadata.state["planner_data"] or {}
    entries = {}
    for name, stored in metadata.state["state_dict_metadata"].items():
        entry = entries[_text(name)] = Entry(_path(paths.get(name, (name,))))
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


def _check_sizes(entry: Entry) -> None:
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


# Sentences


def no_data(error: BaseException) -> str:
    """What is no data: torch tells it in a page, among other things."""
    found = re.search(r"GLOBAL (\S+)", text) if "\n" in (text := str(error)) else re.fullmatch(r"(\S+)", text)
    return f"an object of {found[1]}" if found else "an object that is no plain value"


def sentence(folder: Path, what: str) -> str:
    """What is said of a folder."""
    return f"sharded checkpoint {str(folder)!r} {what}."


def refuse(folder: Path, what: str) -> NoReturn:
    """Say that a folder is not opened, and why.

    Raises:
        ValueError: always.
    """
    raise ValueError(sentence(folder, f"{what}; it is not opened"))
