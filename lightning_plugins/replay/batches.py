"""Copies of a training_step's arguments: nothing is shared with them that a step could edit."""

import copy
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_plugins.replay.objects import (
    attributes_of,
    children_of,
    entries_of,
    filled_slots,
    is_busy,
    kind_of,
    set_entries,
)

_ALIGNED = 16  # bytes; memory is copied from such a place on, for numbers of any type
_MOST_GAPS = 4  # times a tensor's own size, that memory may be copied for the sake of its strides


def copied(batch: Any) -> Any:
    """A batch of any structure again, of which a step may edit whatever it likes.

    Containers and objects of one's own are made anew, level by level, tensors and NumPy arrays cloned with their type,
    strides and ``requires_grad``. What was one object stays one, also in circles; tensors that overlap in memory do so
    again. What cannot be copied is handed over as it is: modules and their parameters, functions, iterators, files,
    locks and whoever holds one, objects made outside of Python.

    Example:
        >>> x = torch.zeros(2)
        >>> again = copied({"x": x, "also": [x]})
        >>> again["x"] is again["also"][0], again["x"] is x
        (True, False)
    """
    return _Copier(batch).copy(batch)


class _Copier:
    """Makes one copy; remembers by identity what it has made."""

    def __init__(self, batch: Any) -> None:
        self._made: dict[int, Any] = {}
        self._sources: list[Any] = []  # kept alive, as identities are of living objects only
        for group in _in_one_memory(batch):
            self._copy_together(group)

    def copy(self, thing: Any) -> Any:
        """One object's copy, the same each time."""
        cls = type(thing)
        if id(thing) in self._made:
            return self._made[id(thing)]
        if cls is weakref.ReferenceType:
            return self._reference(thing)
        copy_of_kind: Callable[[Any], Any] | None = getattr(self, f"_{kind_of(cls)}", None)
        return thing if copy_of_kind is None else copy_of_kind(thing)

    def _all(self, things: Iterable[Any]) -> list[Any]:
        things = list(things)
        return things if _are_plain(things) else [self.copy(thing) for thing in things]

    def _remember(self, thing: Any, made: Any) -> Any:
        self._made[id(thing)] = made
        self._sources.append(thing)
        return made

    def _reference(self, thing: Any) -> Any:
        """An object's weak reference to its parent leads to the parent's copy."""
        made = self._made.get(id(thing()))
        return thing if made is None else weakref.ref(made)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        made = self._remember(tensor, _cloned(tensor))
        if is_traceable_wrapper_subclass(tensor):  # its parts are its own, as the offsets of a jagged one
            return made
        return self._with_attributes(tensor, made)

    def _copy_together(self, group: list[Tensor]) -> None:
        start = min(_span(tensor)[0] for tensor in group) // _ALIGNED * _ALIGNED
        end = max(_span(tensor)[1] for tensor in group)
        device = group[0].device
        memory = torch.empty(0, dtype=torch.uint8, device=device)
        memory = memory.set_(group[0].untyped_storage(), start, (end - start,), (1,)).clone().untyped_storage()
        for tensor in group:
            offset = (_span(tensor)[0] - start) // tensor.element_size()
            made = torch.empty(0, dtype=tensor.dtype, device=device).set_(memory, offset, tensor.shape, tensor.stride())
            self._remember(tensor, _like(tensor, made))
        for tensor in group:
            self._with_attributes(tensor, self._made[id(tensor)])

    def _array(self, array: np.ndarray) -> np.ndarray:
        made = self._remember(array, array.copy(order="K"))
        if array.dtype == object:
            made.flat[:] = self._all(array.flat) if made.size else []
        return self._with_attributes(array, made)

    def _generator(self, generator: Any) -> Any:
        is_torch = isinstance(generator, torch.Generator)
        return self._remember(generator, generator.clone_state() if is_torch else copy.deepcopy(generator))

    def _dict(self, thing: dict[Any, Any]) -> dict[Any, Any]:
        made = self._remember(thing, type(thing).__new__(type(thing)))
        if isinstance(thing, defaultdict):
            made.default_factory = thing.default_factory
        entries = entries_of(thing, "dict")
        set_entries(made, "dict", dict(zip(entries, self._all(entries.values()), strict=True)))
        return self._with_attributes(thing, made)

    def _list(self, thing: list[Any]) -> list[Any]:
        made = self._remember(thing, type(thing).__new__(type(thing)))
        list.extend(made, self._all(list.__iter__(thing)))
        return self._with_attributes(thing, made)

    def _deque(self, thing: deque[Any]) -> deque[Any]:
        made = self._remember(thing, type(thing).__new__(type(thing)))
        deque.__init__(made, (), thing.maxlen)
        deque.extend(made, self._all(thing))
        return self._with_attributes(thing, made)

    def _tuple(self, thing: tuple[Any, ...]) -> tuple[Any, ...]:
        """Also named tuples, packed sequences and torch's return types."""
        cls, entries = type(thing), self._all(tuple.__iter__(thing))
        if id(thing) in self._made:  # it holds something that holds it
            return self._made[id(thing)]
        if all(map(is_, entries, thing)) and not attributes_of(thing):
            return thing
        made = cls(entries) if hasattr(cls, "n_sequence_fields") else tuple.__new__(cls, entries)
        return self._with_attributes(thing, self._remember(thing, made))

    def _set(self, thing: Any) -> Any:
        base: Any = set if isinstance(thing, set) else frozenset
        entries = self._all(thing)
        made = base.__new__(type(thing), entries)
        if base is set:
            set.update(made, entries)
        return self._with_attributes(thing, self._remember(thing, made))

    def _bytes(self, thing: Any) -> Any:
        return self._remember(thing, thing[:])

    def _object(self, thing: Any) -> Any:
        made = None if is_busy(children_of(thing, "object")) else _empty(type(thing))
        if made is None:
            return thing
        self._remember(thing, made)
        for place, value in filled_slots(thing):
            place.__set__(made, self.copy(value))
        return self._with_attributes(thing, made)

    def _with_attributes(self, thing: Any, made: Any) -> Any:
        if attributes := attributes_of(thing):
            attributes_of(made).update({name: self.copy(value) for name, value in attributes.items()})
        return made


def _are_plain(things: Iterable[Any]) -> bool:
    """Whether none of them can change: thousands of numbers are looked at in one go."""
    return not any(kind_of(cls) or cls is weakref.ReferenceType for cls in set(map(type, things)))


def _empty(cls: type) -> Any:
    """A new object without attributes; ``None`` if only code outside of Python can make one."""
    try:
        return (SimpleNamespace if issubclass(cls, SimpleNamespace) else object).__new__(cls)
    except TypeError:
        return None


def _cloned(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None:
        return tensor.clone()  # its graph leads to where it came from
    if not _is_plain(tensor):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    with torch._C.DisableTorchFunctionSubclass():
        return _like(tensor, tensor.detach().clone())


def _like(tensor: Tensor, made: Tensor) -> Tensor:
    """A leaf of the same class."""
    made = made if type(made) is type(tensor) else made.as_subclass(type(tensor))
    return made.requires_grad_(tensor.requires_grad)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is numbers in memory and nothing else, whatever Python class it has."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not is_traceable_wrapper_subclass(tensor)
    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where it begins and ends in its memory, in bytes."""
    start = int(tensor.storage_offset())
    last = start + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (last + 1) * tensor.element_size()


def _in_one_memory(batch: Any) -> list[list[Tensor]]:
    """Tensors that overlap in memory, and such with gaps or repeats whose strides ``clone`` would not keep."""
    memories: dict[int, list[Tensor]] = {}
    for tensor in _tensors_in(batch):
        if tensor.numel() and tensor.grad_fn is None and _is_plain(tensor):
            memories.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    groups: list[list[Tensor]] = []
    for tensors in memories.values():
        end = -1
        for tensor in sorted(tensors, key=_span):
            start, stop = _span(tensor)
            if start < end:
                groups[-1].append(tensor)
            else:
                groups.append([tensor])
            end = max(end, stop)
    return [group for group in groups if len(group) > 1 or _has_gaps(group[0])]


def _has_gaps(tensor: Tensor) -> bool:
    """Whether memory and numbers differ in size; not if there are many gaps, of which a copy has none."""
    start, end = _span(tensor)
    size = tensor.numel() * tensor.element_size()
    return end - start != size and end - start <= _MOST_GAPS * size


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    seen, waiting = set[int](), [batch]
    while waiting:
        thing = waiting.pop()
        kind = kind_of(type(thing))
        if kind is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        if kind == "tensor" and not isinstance(thing, nn.Parameter):
            yield thing
        elif kind != "bound" and not _are_plain(children := children_of(thing, kind)):
            waiting += [] if kind == "object" and is_busy(children) else children
