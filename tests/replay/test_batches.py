"""Copies of batches: nothing shared that a step could edit, everything else as it was."""

import itertools
import threading
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.replay.batches import copied


class Tagged(torch.Tensor):
    """A tensor of a class of its own."""


def edited(thing):
    """Every tensor and array within containers is overwritten, every container emptied."""
    if isinstance(thing, torch.Tensor):
        with torch.no_grad():
            thing.zero_()
    elif isinstance(thing, np.ndarray):
        thing[...] = 0
    elif isinstance(thing, (dict, list, set, deque)):
        for entry in list(thing.values() if isinstance(thing, dict) else thing):
            edited(entry)
        thing.clear()
    elif isinstance(thing, tuple):
        for entry in thing:
            edited(entry)


Pair = namedtuple("Pair", ["x", "y"])


def x():
    return torch.arange(6.0).view(2, 3)


BATCHES = {
    "dict": lambda: {"x": x(), "y": torch.ones(2, dtype=torch.long)},
    "nested": lambda: {"a": [x(), (x(), {"b": deque([x()], maxlen=3)})]},
    "ordered": lambda: OrderedDict(b=x(), a=x()),
    "default": lambda: defaultdict(list, a=[x()]),
    "counter": lambda: Counter("aab"),
    "named tuple": lambda: Pair(x(), [x()]),
    "packed": lambda: pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]),
    "array": lambda: [np.arange(4.0), np.array([np.ones(2), None], dtype=object)],
    "set": lambda: {1, "a"},
    "sparse": lambda: [x().to_sparse()],
    "of a class of its own": lambda: [x().as_subclass(Tagged)],
    "return type": lambda: [x().max(0)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_an_edited_copy_leaves_the_batch_alone(name):
    batch, expected = BATCHES[name](), BATCHES[name]()
    again = copied(batch)
    assert type(again) is type(batch)
    edited(again)
    assert_equal(batch, expected)


@pytest.mark.parametrize("name", BATCHES)
def test_an_edited_batch_leaves_the_copy_alone(name):
    batch = BATCHES[name]()
    again = copied(batch)
    edited(batch)
    assert_equal(again, BATCHES[name]())


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.to_dense(), other.to_dense())
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert all(map(np.array_equal, one, other))
    elif isinstance(one, (list, tuple, deque)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_equal(list(one.values()), list(other.values()))
    else:
        assert one == other


def test_containers_keep_what_they_are():
    many = copied({"d": defaultdict(list), "q": deque([1], maxlen=2), "p": pack_sequence([torch.ones(2, 1)])})
    assert many["d"]["new"] == []
    assert many["q"].maxlen == 2
    assert isinstance(many["p"], PackedSequence)
    assert many["p"].batch_sizes.tolist() == [1, 1]


def test_what_was_one_stays_one():
    shared, circle = x(), []
    circle.append(circle)
    again = copied({"a": shared, "b": (shared, [shared]), "circle": circle})
    assert again["a"] is again["b"][0] is again["b"][1][0]
    assert again["circle"][0] is again["circle"] is not circle
    holder = SimpleNamespace()
    holder.back = (holder, 1)
    made = copied(holder)
    assert made.back[0] is made is not holder


@pytest.mark.parametrize("order", [("whole", "row", "bits"), ("row", "bits", "whole")])
def test_parts_of_one_memory_stay_parts_of_it(order):
    whole = torch.arange(12.0).view(3, 4)[:, 1:]
    parts = {"whole": whole, "row": whole[1], "bits": whole.view(torch.int32)}
    again = copied({name: parts[name] for name in order})
    again["row"].zero_()
    assert again["whole"][1].tolist() == again["bits"][1].tolist() == [0, 0, 0]
    assert whole[1].tolist() == [5, 6, 7]
    assert again["whole"].stride() == whole.stride()
    assert again["whole"][2].tolist() == [9, 10, 11]


def test_a_small_part_of_a_large_memory_is_copied_alone():
    rows = torch.zeros(1000, 8)
    again = copied([rows[:2], rows[500:502], rows[:, 0]])
    assert again[0].untyped_storage().nbytes() <= 16 * 4 + 32 * 1000
    column = copied([rows[:, 0]])[0]
    assert column.untyped_storage().nbytes() == 4000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3.0).expand(4, 3),
        torch.arange(12.0).view(3, 4).T,
        torch.arange(12.0).view(3, 4)[:, ::2],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.tensor(1.0),
        torch.empty(0, 3),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.bfloat16),
    ],
)
def test_tensors_keep_their_form(tensor):
    again = copied([tensor])[0]
    assert again is not tensor
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert tensor.is_conj() or again.stride() == tensor.stride()
    assert torch.equal(again, tensor)
    assert again.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_gradients():
    leaf = torch.ones(2, requires_grad=True)
    again = copied([leaf, leaf * 2])
    assert again[0].requires_grad
    assert again[0].is_leaf
    again[1].sum().backward()
    assert leaf.grad.tolist() == [2, 2]  # a graph leads to where it came from


class Slots:
    __slots__ = ("left", "x")

    def __init__(self):
        self.x = x()


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Store(UserDict):
    """As PyG's stores, it knows the object that holds it by a weak reference."""

    def __init__(self, parent):
        super().__init__()
        self._parent = weakref.ref(parent)


class Graph:
    def __init__(self):
        self.__dict__["_store"] = Store(self)

    def __getattr__(self, name):
        return self._store[name]

    def __setattr__(self, name, value):
        self._store[name] = value


def test_objects_of_ones_own():
    slots = copied(Slots())
    assert slots.x.tolist() == x().tolist()
    assert not hasattr(slots, "left")
    frozen = Frozen(x())
    assert copied(frozen).x is not frozen.x
    graph = Graph()
    graph.x = x()
    again = copied(graph)
    again.x.zero_()
    again.y = 1
    assert again._store._parent() is again
    assert graph.x.tolist() == x().tolist()
    assert "y" not in graph._store


def test_batches_of_transformers():
    from transformers import BatchEncoding

    batch = BatchEncoding({"input_ids": torch.ones(2, 3, dtype=torch.long)})
    again = copied(batch)
    again.pop("input_ids").zero_()
    assert type(again) is BatchEncoding
    assert batch["input_ids"].tolist() == [[1] * 3] * 2


class Colour(Enum):
    RED = 1


class HoldsAThread:
    def __init__(self):
        self.thread, self.x = threading.Thread(), x()


@pytest.mark.parametrize(
    "thing",
    [
        nn.Linear(1, 1), nn.Parameter(torch.zeros(1)), itertools.count(), threading.Lock(), len, int, "text", 1.5, None,
        Colour.RED, torch.float32, torch.Size([1]), HoldsAThread(), (n for n in range(2)), DataLoader([1]),
        TensorDataset(torch.zeros(1)), np, ValueError("a"), (1, "b", (2.0, None)), b"bytes", range(3),
    ],
    ids=lambda thing: type(thing).__name__,
)  # fmt: skip
def test_what_cannot_be_copied_or_need_not_is_handed_over(thing):
    assert copied({"it": thing})["it"] is thing


def test_generators_draw_the_same_again():
    batch = [torch.Generator().manual_seed(0), np.random.default_rng(0)]
    again = copied(batch)
    assert torch.equal(torch.rand(2, generator=batch[0]), torch.rand(2, generator=again[0]))
    assert batch[1].random() == again[1].random()
