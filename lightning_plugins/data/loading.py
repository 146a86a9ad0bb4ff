"""Loaders that stop and resume exactly, because one integer names a sample of an epoch and everything random about it.

A loader draws integer keys, ``key = epoch * N + i`` with ``N`` samples and ``i`` the sample. All randomness of a sample
(its shift, its partner) is a hash of (seed, key), so it depends neither on workers, nor on how keys are arranged in
batches, nor on the number of processes, nor on torch's global random state; and a run that stops after any batch
resumes at the next one by naming an epoch and a batch.

From keys to a data module: :class:`KeyBatches` cuts an epoch's keys into batches for one process, :class:`KeyLoader`
turns them into finished batches and counts those handed out, :class:`SplitLoaders` has a loader for each split. Last,
how validation samples are held out.
"""

import copy
import math
import numbers
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import hash_keys


class Batches(Sampler[list]):
    """Base of the batches of keys for one process of several: what :class:`KeyLoader` needs of them.

    Args:
        train: whether each epoch has an order of its own.
        world_size: number of processes that share an epoch.
        rank: number of this process, from 0.
    """

    def __init__(self, train: bool, world_size: int, rank: int) -> None:
        self.train, self.world_size, self.rank = train, world_size, rank
        self.epoch = 0
        self.start = 0  # batches to skip

    def share(self, world_size: int, rank: int) -> None:
        """Leave this process its part of what so many processes draw together."""
        self.world_size, self.rank = world_size, rank
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` if there are too few samples for the processes."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, int]:
        """What must be equal for batch k of an epoch to hold the same keys, by its name in a sentence."""
        raise NotImplementedError

    @property
    def sampler(self) -> "Batches":
        """Itself: Lightning calls ``loader.batch_sampler.sampler.set_epoch`` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the keys of the next epoch; no effect on an evaluation loader."""
        self.epoch = epoch if self.train else 0

    def __len__(self) -> int:
        raise NotImplementedError


class KeyBatches(Batches):
    """Batches of keys for one process of several.

    Batch k of all processes together is batch k of one process with ``world_size`` times the batch size.

    Args:
        num_samples: N, samples in the data set.
        batch_size: samples in a batch of one process.
        train: whether every epoch has a new order and new keys; the last incomplete batch is then dropped, because it
            would hold other samples each time, and shapes stay fixed. Else keys are 0..N-1 in order, every one exactly
            once over all processes; the last batch is smaller, or larger by one sample where a process would otherwise
            run out of batches before the others.
        seed: seed of the order.
        world_size: number of processes that share an epoch.
        rank: number of this process, from 0.

    Raises:
        ValueError: no full batch (training), or fewer samples than processes.
    """

    def __init__(
        self, num_samples: int, batch_size: int, train: bool, seed: int = 0, world_size: int = 1, rank: int = 0
    ) -> None:
        super().__init__(train, world_size, rank)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` if there is no full batch (training), or not a sample for each process."""
        least, what = self.world_size, "every process"
        if self.train:
            least, what = self.batch_size * self.world_size, "one training batch"
        if self.num_samples < least:
            where = f" on {self.world_size} processes" if self.world_size > 1 else ""
            cure = "a smaller batch_size" + (" or fewer devices" if self.world_size > 1 else "")
            raise ValueError(
                f"{self.num_samples} images are too few for {what}: batch_size={self.batch_size}{where} needs at least "
                f"{least}. Use {cure}."
            )

    @property
    def identity(self) -> dict[str, int]:
        """Images, images in a batch of all processes, seed."""
        return {
            "number of training images": self.num_samples,
            "batch_size times processes": self.batch_size * self.world_size,
            "seed of the data": self.seed,
        }

    def __len__(self) -> int:
        share = self.num_samples // self.world_size
        return share // self.batch_size if self.train else math.ceil(share / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        keys = torch.arange(self.num_samples)
        if self.train:
            order = epoch_generator(self.epoch, self.seed)
            keys = torch.randperm(self.num_samples, generator=order) + self.epoch * self.num_samples
        step = self.batch_size * self.world_size
        for k in range(self.start, len(self)):
            end = (k + 1) * step if self.train or k + 1 < len(self) else self.num_samples
            yield keys[k * step + self.rank : end : self.world_size].tolist()


def epoch_generator(epoch: int, seed: int) -> torch.Generator:
    """The random numbers that order an epoch."""
    return torch.Generator().manual_seed(int(hash_keys(torch.tensor(epoch), seed, stream=-1)))


class KeyLoader:
    """An iterable over finished batches that stops and resumes exactly, in Lightning or by hand.

    ``state_dict`` counts the batches handed out, not those that workers have prepared; Lightning stores it in every
    checkpoint and gives it back before a resumed epoch. It is not a torch ``DataLoader`` but holds one: Lightning
    rebuilds a ``DataLoader`` in several modes, which would lose the state, and advises workers that in-memory data
    does not need.

    Args:
        dataset: data set with ``__getitems__(keys) -> batch``.
        batches: keys of each batch.
        num_workers: processes that prepare batches; 0 for none.
        trainer: that of the data module, which has said how the processes share an epoch. Without one, as of a loader
            that is handed to ``Trainer.fit`` itself, they share by the running process group.
    """

    def __init__(
        self, dataset: Dataset, batches: Batches, num_workers: int = 0, trainer: Trainer | None = None
    ) -> None:
        self.dataset = dataset
        self._batches = batches
        self._undecided = trainer is None
        self._resume: dict[str, int] | None = None
        self._done = 0
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_is,
            num_workers=num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else each epoch draws a number from torch's global random state
        )

    @property
    def batch_sampler(self) -> Batches:
        """The keys of this process's batches."""
        if self._undecided:
            running = dist.is_available() and dist.is_initialized()
            share = (dist.get_world_size(), dist.get_rank()) if running else (1, 0)
            if share != (self._batches.world_size, self._batches.rank):
                self._batches.share(*share)
        return self._batches

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens before the first next(). Lightning calls iter() first and set_epoch() second.
        self.batch_sampler.start = self._done = self._first_batch()
        self._resume = None
        for batch in self._loader:
            self._done += 1
            yield batch

    def _first_batch(self) -> int:
        if self._resume is None or self._resume["epoch"] != self.batch_sampler.epoch:
            return 0  # the checkpoint was the end of an epoch
        for name, value in self.batch_sampler.identity.items():
            if self._resume.get(name) != value:
                raise ValueError(
                    f"Cannot resume in mid-epoch: the {name} was {self._resume.get(name)} and is now {value}. "
                    f"Set it back, or resume from a checkpoint written at the end of an epoch."
                )
        return self._resume["batches"]

    def keys_of(self, batch_idx: int) -> list:
        """The keys in a batch of the epoch under way."""
        batches = copy.copy(self.batch_sampler)
        batches.start = batch_idx
        return next(iter(batches), [])

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches handed out, and what must be equal for them to mean the same."""
        if self._resume is not None:  # a run that has nothing left to do is where it was
            return dict(self._resume)
        return {"epoch": self.batch_sampler.epoch, "batches": self._done, **self.batch_sampler.identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch of ``state`` if the next iteration is of the same epoch."""
        self._resume = dict(state)

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator  # through this name Lightning stops the workers at the end of a run

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value


def _as_is(batch: Any) -> Any:
    return batch


class SplitLoaders(LightningDataModule):
    """A data module whose loaders differ by the name of their split alone; a subclass writes :meth:`_loader`."""

    predict_split = "predict"
    """Split that is predicted."""

    def _loader(self, split: str) -> KeyLoader:
        """The loader of a split, ``train``, ``val``, ``test`` or ``predict_split``, with this process's share."""
        raise NotImplementedError(f"{type(self).__name__} must write _loader(split).")

    def __str__(self) -> str:
        """The class's name: Lightning's own text goes through all batches, and the command line asks for it."""
        return type(self).__name__

    def train_dataloader(self) -> KeyLoader:
        """The training batches, in an order that is new in each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> KeyLoader:
        """The validation batches, always the same."""
        return self._loader("val")

    def test_dataloader(self) -> KeyLoader:
        """The test batches, always the same."""
        return self._loader("test")

    def predict_dataloader(self) -> KeyLoader:
        """The batches to predict, in their order."""
        return self._loader(self.predict_split)


def share_of_run(trainer: Trainer | None, split: str) -> dict[str, Any]:
    """``train``, ``world_size`` and ``rank`` for the batches of a split in a trainer's run, or without a trainer."""
    share: dict[str, Any] = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
    # overfitting repeats the same batches; Lightning sets the attribute without declaring it
    repeats = bool(trainer and cast(Any, trainer).overfit_batches)
    return {"train": split == "train" and not repeats, "world_size": share["num_replicas"], "rank": share["rank"]}


def _is_val_size(value: Any) -> bool:
    return must.whole(0).holds(value) or (must.is_number(value) and 0 <= value < 1)


VAL_SIZE = must.Rule(_is_val_size, "a count of 0 or more, or a fraction in [0, 1) if a float")


def random_split(num_samples: int, size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``range(num_samples)`` at random, the same way on every machine and for every version of torch.

    Args:
        num_samples: N, samples in all.
        size: length of the second part; an integer counts samples, a float in [0, 1) is a fraction of N.
        seed: seed of the choice.

    Returns:
        Sorted int64 indices of the first and of the second part.

    Raises:
        ValueError: the first part would be empty, or ``size`` is negative.
    """
    VAL_SIZE("val_size", size)
    count = int(size) if isinstance(size, numbers.Integral) else round(float(size) * num_samples)
    if not 0 <= count < num_samples:
        raise ValueError(
            f"val_size={size} must leave training samples: give a count below {num_samples} or a fraction below 1."
        )
    order = hash_keys(torch.arange(num_samples), seed, stream=-2).argsort()
    return order[count:].sort().values, order[:count].sort().values


def stratified_split(labels: Tensor, sizes: dict[str, int | float], seed: int) -> dict[str, Tensor]:
    """Hold out parts of a set so that each has as much of every class as the whole, to within a sample.

    Samples are laid out class by class, at random within one, and every so-manieth is held out: which ones depends on
    seed and labels alone. The last sample of a class is never held out. A fraction above 0 is one sample at least.

    Args:
        labels: ``(N,)`` int64 class of each sample.
        sizes: length of each part by its name; an integer counts samples, a float in [0, 1) is a fraction of N.
        seed: seed of the choice.

    Returns:
        Sorted int64 indices of each part, and under ``train`` of what is left.

    Raises:
        ValueError: nothing would be left to train.

    Example:
        >>> parts = stratified_split(torch.tensor([0] * 20 + [1] * 10), {"val": 0.1, "test": 6}, seed=0)
        >>> {name: [len(index), int((index < 20).sum())] for name, index in parts.items()}
        {'val': [3, 2], 'test': [6, 4], 'train': [21, 14]}
    """
    N = len(labels)
    counts = {}
    for name, size in sizes.items():
        VAL_SIZE(f"{name}_size", size)
        whole = isinstance(size, numbers.Integral)
        counts[name] = int(size) if whole else min(N, math.ceil(size)) if size * N < 1 else round(float(size) * N)
    held = sum(counts.values())
    if held >= N:
        told = " and ".join(f"{name}_size={size}" for name, size in sizes.items())
        raise ValueError(f"{told} must leave training samples of {N}: give less, such as 0.1.")
    order = hash_keys(torch.arange(N), seed, stream=-2).argsort()
    order = order[labels[order].argsort(stable=True)]
    rest = torch.ones(N, dtype=torch.bool)
    rest[_every(order, held)] = False
    for label in labels.unique():
        own = order[labels[order] == label]
        if not rest[own].any():
            rest[own[0]] = True
    held_out, parts = order[~rest[order]], {}
    for name, count in counts.items():
        chosen = _every(held_out, min(count, len(held_out)))
        parts[name] = chosen.sort().values
        held_out = held_out[~torch.isin(held_out, chosen)]
    return {**parts, "train": rest.nonzero()[:, 0]}


def _every(order: Tensor, count: int) -> Tensor:
    """So many of a list, at even distances."""
    steps = torch.arange(len(order) + 1) * count // max(len(order), 1)
    return order[steps.diff() > 0]
