"""Which samples share a batch: exactness over ranks and epochs, padding, packing, resuming."""

import math
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.data.text_batches import TextBatches, pack_lengths

KINDS = {"grouped": {}, "shuffled": {"length_grouping": False}, "packed": {"row_length": 60}}


def make(lengths, kind, *, batch_size=4, train=True, epoch=0, **arguments):
    batches = TextBatches(torch.as_tensor(lengths), batch_size, train, **KINDS[kind], **arguments)
    batches.set_epoch(epoch)
    return batches


def docstring_like(count=2000, longest=96):
    """Log-normal lengths, cut at the longest, as those of docstrings are."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (45 * (0.9 * normal).exp()).clamp(4, longest).long()


def padding(batches, lengths):
    """Tokens of the padded batches, over real ones."""
    rows = [[sum(int(lengths[key % len(lengths)]) for key in row) for row in batch] for batch in batches]
    return sum(max(batch) * len(batch) for batch in rows) / sum(map(sum, rows))


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    kind=st.sampled_from(list(KINDS)),
    train=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batches_of_all_processes_are_those_of_one(lengths, batch_size, world_size, kind, train, epoch):
    one = make(lengths, kind, batch_size=batch_size * world_size, train=train, epoch=epoch)
    if one.num_rows < world_size:
        return
    ranks = [
        make(lengths, kind, batch_size=batch_size, train=train, epoch=epoch, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    parts = [list(batches) for batches in ranks]
    assert {len(part) for part in parts} == {len(ranks[0])}  # no process waits for another
    union = [list(chain(*batch)) for batch in zip(*parts, strict=True)]
    first = epoch * len(lengths) * train
    keys = list(chain(*chain(*union)))
    assert sorted(keys) == list(range(first, first + len(lengths)))  # every sample once
    assert all(0 < len(batch) <= batch_size + (batch_size == 1) for part in parts for batch in part)
    sizes = [len(batch) for batch in union]
    assert max(sizes) - min(sizes) <= 1
    if batch_size > 1:
        assert [sorted(batch) for batch in union] == [sorted(batch) for batch in one]
        assert len(one) == math.ceil(one.num_rows / (batch_size * world_size))


@given(
    lengths=st.lists(st.integers(1, 30), max_size=80),
    room=st.integers(30, 50),
)
def test_packing_keeps_the_bound_of_best_fit_decreasing(lengths, room):
    rows = pack_lengths(lengths, room)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= room for row in rows)
    assert len(rows) <= 11 / 9 * max(math.ceil(sum(lengths) / room), sum(n > room // 2 for n in lengths)) + 4


def test_packing_finds_the_best_where_it_is_plain():
    assert pack_lengths([10] * 10, 100) == [list(range(10))]
    assert sorted(map(sorted, pack_lengths([7, 3, 6, 4, 5, 5], 10))) == [[0, 1], [2, 3], [4, 5]]
    assert pack_lengths([], 10) == []


def test_padding():
    """Random batches compute 1.7 times the tokens there are and more; grouped and packed ones at most a tenth more."""
    lengths = docstring_like()
    waste = {kind: padding(make(lengths, kind, batch_size=32), lengths) for kind in ("grouped", "shuffled")}
    packed = TextBatches(lengths, 8, train=True, row_length=128)
    assert waste["grouped"] < 1.08 and waste["shuffled"] > 1.7
    assert padding(packed, lengths) < 1.02
    whole = docstring_like(longest=512)
    assert padding(make(whole, "grouped", batch_size=32), whole) < 1.1
    assert padding(make(whole, "shuffled", batch_size=32), whole) > 2.4


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_have_their_own_batches_and_the_seed_decides_them(kind):
    lengths = docstring_like(400, longest=60)

    def batches(epoch, seed=0):
        keys = make(lengths, kind, epoch=epoch, seed=seed)
        return [[key % 400 for key in chain(*rows)] for rows in keys]

    assert batches(1) == batches(1)
    for other in (batches(2), batches(1, seed=1)):
        mates = {frozenset(pair) for batch in batches(1) for pair in pairwise(batch)}
        again = {frozenset(pair) for batch in other for pair in pairwise(batch)}
        assert len(mates & again) < 0.2 * len(mates)  # other samples come together
        assert len(other) == len(batches(1))  # a schedule counts on it
        assert other != batches(1)


def test_grouped_batches_come_in_random_order():
    lengths = docstring_like()
    means = torch.tensor(
        [lengths[torch.tensor(rows)[:, 0]].double().mean() for rows in make(lengths, "grouped", batch_size=32)]
    )
    place = torch.arange(len(means), dtype=torch.double)
    assert abs(torch.corrcoef(torch.stack([means, place]))[0, 1]) < 0.3


def test_evaluation_is_sorted_or_in_order():
    lengths = [3, 9, 5, 9, 1]
    assert list(make(lengths, "grouped", batch_size=2, train=False, epoch=7)) == [[[1]], [[3], [2]], [[0], [4]]]
    assert list(make(lengths, "shuffled", batch_size=2, train=False)) == [[[0]], [[1], [2]], [[3], [4]]]


@pytest.mark.parametrize("kind", KINDS)
def test_starting_later_gives_the_rest(kind):
    lengths = docstring_like(100, longest=60)
    whole = list(make(lengths, kind, epoch=3))
    later = make(lengths, kind, epoch=3)
    later.start = 5
    assert list(later) == whole[5:]


def test_what_decides_the_order_is_in_the_identity():
    lengths = torch.tensor([5, 6, 7, 8])
    same = TextBatches(lengths, 2, True).identity
    assert TextBatches(lengths, 1, True, world_size=2, rank=1).identity == same
    others = [
        TextBatches(lengths + 1, 2, True),
        TextBatches(lengths, 2, True, length_grouping=False),
        TextBatches(lengths, 2, True, row_length=16),
        TextBatches(lengths, 2, True, row_length=17),
        TextBatches(lengths, 2, True, seed=1),
    ]
    assert len({tuple(batches.identity.values()) for batches in others} | {tuple(same.values())}) == 6


def test_too_few_rows_in_one_sentence():
    with pytest.raises(ValueError) as error:
        TextBatches(torch.tensor([3, 3, 3]), 2, True, row_length=10, world_size=2)
    assert str(error.value) == (
        "1 packed rows (packing=True, 3 samples) are too few for 2 processes: use fewer devices."
    )
