"""What Python objects hold that a training_step could change, and which objects are left as they are."""

import argparse
import array
import concurrent.futures
import functools
import random
import socket
import subprocess
import sys
import threading
import types
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Iterable
from enum import Enum
from operator import is_
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset, Sampler

Kind = Literal[
    "tensor",
    "array",
    "generator",
    "module",
    "dict",
    "list",
    "tuple",
    "set",
    "deque",
    "bytes",
    "bound",
    "object",
    "busy",
]

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
# They belong to a run, not to a module, or may be large: their contents are never state.
_INFRASTRUCTURE = (
    Trainer, Strategy, Precision, Logger, Callback, LightningDataModule, LightningOptimizer, Dataset, DataLoader,
    CombinedLoader, Sampler, DeviceMesh, torch.device, torch.Size, Enum, BaseException, np.memmap,
    random.SystemRandom, np.random.SeedSequence,
)  # fmt: skip
# Whoever holds one of these shares his attributes with it.
_BUSY = (threading.Thread, concurrent.futures.Executor, concurrent.futures.Future, subprocess.Popen, socket.socket)
# The parts of torch whose objects, if they are no modules, hold what a training step goes by.
_TORCH = ("torch.optim.", "torch.amp.", "torch.cuda.amp.", "torch.distributions.", "torch.nn.", "torch.quasirandom")
_KINDS: tuple[tuple[Any, Kind], ...] = (
    (Tensor, "tensor"),
    (np.ndarray, "array"),
    (_GENERATORS, "generator"),
    (nn.Module, "module"),
    (dict, "dict"), (list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "set"), (deque, "deque"),
    (bytearray, "bytes"), (array.array, "bytes"),
)  # fmt: skip
_FROM_PYTHON = (UserDict, UserList, ChainMap, types.SimpleNamespace, argparse.Namespace)
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE


@functools.lru_cache(maxsize=2**14)
def kind_of(cls: type) -> Kind | None:
    """How objects of a class hold what can change; ``None`` if nothing in them can, or none of it is state.

    Example:
        >>> kind_of(float), kind_of(OrderedDict), kind_of(nn.Linear)
        (None, 'dict', 'module')
    """
    if issubclass(cls, type) or issubclass(cls, _INFRASTRUCTURE):
        return None
    if issubclass(cls, _BUSY):
        return "busy"
    for parents, kind in _KINDS:
        if issubclass(cls, parents):
            return kind
    if issubclass(cls, (functools.partial, types.MethodType)):
        return "bound"
    if cls.__module__.partition(".")[0] in sys.stdlib_module_names:
        return "object" if issubclass(cls, _FROM_PYTHON) else None
    if cls.__module__.startswith("torch.") and not cls.__module__.startswith(_TORCH):
        return None
    made_in_python = cls.__flags__ & _MADE_IN_PYTHON
    return "object" if made_in_python and (cls.__dictoffset__ or slots_of(cls)) else None


@functools.lru_cache(maxsize=2**14)
def slots_of(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    """The places that ``__slots__`` of a class and its parents gives its objects."""
    parents = [parent for parent in cls.__mro__ if "__slots__" in vars(parent)]
    return tuple(
        place for parent in parents for place in vars(parent).values() if isinstance(place, types.MemberDescriptorType)
    )


def attributes_of(thing: object) -> dict[str, Any]:
    """An object's own namespace, past whatever its class makes of attributes; empty for one without."""
    return object.__getattribute__(thing, "__dict__") if type(thing).__dictoffset__ else {}


def filled_slots(thing: object) -> list[tuple[types.MemberDescriptorType, Any]]:
    """An object's slots that have a value, with it."""
    cls, found = type(thing), []
    for place in slots_of(cls):
        try:
            found.append((place, place.__get__(thing, cls)))
        except AttributeError:  # an empty one
            continue
    return found


def is_busy(values: Iterable[Any]) -> bool:
    """Whether one of an object's values is a lock, a thread, a file or the like."""
    return any(kind_of(type(value)) == "busy" for value in values)


def children_of(thing: Any, kind: Kind | None) -> list[Any]:
    """The objects right within a container or an object of one's own; keys of dicts are not counted."""
    if kind == "bound":
        parts = (thing.func, thing.args, thing.keywords) if isinstance(thing, functools.partial) else (thing.__self__,)
        return list(parts)
    found: list[Any] = []
    if kind == "dict":
        found += entries_of(thing, kind).values()
    elif kind in ("list", "tuple", "set", "deque") or (kind == "array" and thing.dtype == object):
        found += thing.flat if kind == "array" else thing
    if kind in ("object", "dict", "list", "tuple", "set", "deque") and (attributes := attributes_of(thing)):
        found += attributes.values()
    if kind == "object":
        found += (value for _, value in filled_slots(thing))
    return found


def entries_of(container: Any, kind: Kind) -> Any:
    """A container's entries in a plain one, whatever its class makes of its methods."""
    if kind == "dict":
        return dict(OrderedDict.items(container)) if isinstance(container, OrderedDict) else dict(dict.items(container))
    if kind == "set":
        return set(container)
    return container[:] if kind == "bytes" else list(container)


def set_entries(container: Any, kind: Kind, entries: Any) -> None:
    """Give a container that can change the entries that :func:`entries_of` found."""
    if kind == "bytes":
        container[:] = entries
        return
    base: Any = {"dict": dict, "set": set, "deque": deque}.get(kind, list)
    base = OrderedDict if isinstance(container, OrderedDict) else base
    base.clear(container)
    if kind == "dict":
        for key, value in entries.items():
            base.__setitem__(container, key, value)
    else:
        (base.update if kind == "set" else base.extend)(container, entries)


def has_entries(container: Any, kind: Kind, entries: Any) -> bool:
    """Whether a container holds the very objects of ``entries`` still, in their order."""
    if len(container) != len(entries):
        return False
    if kind in ("bytes", "set"):
        return container == entries
    if kind != "dict":
        return all(map(is_, list.__iter__(container) if kind == "list" else iter(container), entries))
    now = container if type(container) is dict else entries_of(container, kind)
    return all(map(is_, now, entries)) and all(map(is_, now.values(), entries.values()))


def get_state(generator: Any) -> Any:
    """The state of a random generator of torch, NumPy or Python, which its next numbers do not change."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state(legacy=False)


def set_state(generator: Any, state: Any) -> None:
    """Undo what was drawn since :func:`get_state`."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
