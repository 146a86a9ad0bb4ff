"""Keys, batches over processes, and the loader's state."""

from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.core.random_numbers import hash_keys
from lightning_plugins.data.digits import Digits
from lightning_plugins.data.loading import KeyBatches, random_split


@given(
    num_samples=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 5),
    train=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batches_of_all_processes_are_those_of_one(num_samples, batch_size, world_size, train, epoch):
    if num_samples < (batch_size * world_size if train else world_size):
        return
    ranks = [KeyBatches(num_samples, batch_size, train, 7, world_size, rank) for rank in range(world_size)]
    one = KeyBatches(num_samples, batch_size * world_size, train, 7)
    for batches in (*ranks, one):
        batches.set_epoch(epoch)
    parts = [list(batches) for batches in ranks]
    assert all(len(part) == len(ranks[0]) for part in parts)  # no process waits for another
    union = [sorted(chain(*batch)) for batch in zip(*parts, strict=True)]
    if train:
        assert union == [sorted(batch) for batch in one]
        assert all(key // num_samples == epoch for batch in union for key in batch)
    else:
        assert list(chain(*union)) == list(range(num_samples))  # in order, each exactly once
        assert all(0 < len(batch) <= batch_size + 1 for part in parts for batch in part)


def test_epochs_have_their_own_order_and_the_seed_decides_it():
    def order(epoch, seed):
        batches = KeyBatches(100, 10, train=True, seed=seed)
        batches.set_epoch(epoch)
        return [key % 100 for batch in batches for key in batch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert sorted(order(1, 0)) == list(range(100))


def test_too_few_images_in_one_sentence():
    with pytest.raises(ValueError) as error:
        KeyBatches(50, 32, train=True, world_size=2)
    assert str(error.value) == (
        "50 images are too few for one training batch: batch_size=32 on 2 processes needs at least 64. "
        "Use a smaller batch_size or fewer devices."
    )
    with pytest.raises(ValueError, match=r"batch_size=64 needs at least 64\. Use a smaller batch_size\.$"):
        KeyBatches(50, 64, train=True)


@pytest.mark.parametrize("size", [0, 30, 0.25])
def test_random_split_is_a_partition(size):
    first, second = random_split(100, size, seed=5)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(100))
    assert len(second) == {0: 0, 30: 30, 0.25: 25}[size]
    again, _ = random_split(100, size, seed=5)
    assert torch.equal(first, again)


@pytest.mark.parametrize("size", [np.float32(0.25), np.float64(0.25), Fraction(1, 4), np.int64(25)])
def test_numbers_of_other_libraries(size):
    kept, split = random_split(100, size, seed=np.int64(3))
    assert torch.equal(split, random_split(100, 25, seed=3)[1]) and len(kept) == 75
    seed = np.int64(2**62)  # times anything, it is too large for numpy
    assert torch.equal(hash_keys(torch.arange(9), seed), hash_keys(torch.arange(9), int(seed)))


def test_random_split_refuses_to_leave_nothing():
    with pytest.raises(ValueError) as error:
        random_split(100, 100, seed=0)
    assert str(error.value) == (
        "val_size=100 must leave training samples: give a count below 100 or a fraction below 1."
    )


def _drain(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return [batch["image"] for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_by_hand(num_workers):
    data = Digits(image_size=8, batch_size=100, num_workers=num_workers, shift=1)
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(2)
    batches = iter(loader)
    seen = [next(batches)["image"] for _ in range(5)]
    state = loader.state_dict()
    rest = [batch["image"] for batch in batches]
    assert len(seen) + len(rest) == len(loader) == 12

    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    for x, y in zip(rest, _drain(resumed, 2), strict=True):
        assert torch.equal(x, y)
    assert len(_drain(resumed, 2)) == 12  # the state is used once
    resumed.load_state_dict(state)
    assert len(_drain(resumed, 3)) == 12  # another epoch starts at its start


def test_workers_and_global_random_state_change_nothing():
    runs = []
    for num_workers in (0, 1):
        torch.manual_seed(num_workers)
        before = torch.get_rng_state()
        runs.append(torch.cat(_drain(Digits(batch_size=256, num_workers=num_workers, shift=2).train_dataloader(), 1)))
        assert torch.equal(before, torch.get_rng_state())  # nothing is drawn from the global generator
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"batch_size": 64}, "the batch_size times processes was 100 and is now 64"),
        ({"seed": 1}, "the seed of the data was 0 and is now 1"),
    ],
)
def test_resuming_other_batches_is_refused(changed, sentence):
    loader = Digits(batch_size=100).train_dataloader()
    next(iter(loader))
    other = Digits(**{"batch_size": 100, **changed}).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError) as error:
        next(iter(other))
    assert str(error.value) == (
        f"Cannot resume in mid-epoch: {sentence}. "
        "Set it back, or resume from a checkpoint written at the end of an epoch."
    )
