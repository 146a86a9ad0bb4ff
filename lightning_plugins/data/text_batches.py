"""Which samples of a text share a batch: alike in length, packed into rows, or neither; shuffled anew each epoch.

Shapes: N samples, R rows (R = N unless packed), K batches of all processes together.
"""

import math
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_plugins.data.loading import Batches, epoch_generator

_SPREAD = 0.1  # lengths are taken up to a tenth longer, at random, before samples are sorted by them


def pack_lengths(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put samples into as few rows as a greedy rule can: the longest first, each where the least space is left over.

    Args:
        lengths: tokens of each sample, 1 to ``row_length``.
        row_length: tokens that fit in a row.

    Returns:
        The indices of the samples of each row; every sample is in one row.

    Source: best-fit decreasing, Johnson et al. 1974: at most 11/9 of the fewest possible rows, plus 4. For text: Krell
    et al. 2021, arXiv 2107.02027.

    Example:
        >>> pack_lengths([3, 8, 5, 2, 2], row_length=10)
        [[1, 4], [2, 0, 3]]
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # the keys of by_space that have rows, sorted
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(spaces, lengths[sample])
        if place < len(spaces):
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del spaces[place]
        else:
            space, row = row_length, []
            rows.append(row)
        row.append(sample)
        left = space - lengths[sample]
        if not by_space.setdefault(left, []):
            insort(spaces, left)
        by_space[left].append(row)
    return rows


class TextBatches(Batches):
    """Batches for one process of several; a batch is a list of rows, a row a list of keys.

    Every sample is in one batch of an epoch. The K batches of all processes together have the same number of rows, or
    differ by one, so that none is nearly empty; every process has K batches. Batch k of all processes together is batch
    k of one process with ``world_size`` times the batch size, if ``batch_size`` is 2 or more; with 1, where the rows do
    not come out even, some processes have two rows in a batch.

    Training orders are drawn anew in every epoch:

    - grouped by length: each length is taken up to a tenth longer, at random; samples are sorted by that and cut into
      batches, and the batches are shuffled;
    - packed: which lengths share a row is decided once (:func:`pack_lengths`), so that every epoch has as many rows;
      which of the samples of a length go there, and which rows share a batch, is drawn;
    - neither: samples are shuffled.

    Args:
        lengths: ``(N,)`` int64 tokens of each sample.
        batch_size: rows in a batch of one process.
        train: whether each epoch has an order of its own; else the longest come first, or, without
            ``length_grouping``, samples come in order.
        length_grouping: whether samples of a batch are alike in length; no effect on packed rows.
        row_length: most tokens of a row into which samples are packed; ``None`` for one sample a row.
        seed: seed of the order.
        world_size: number of processes that share an epoch.
        rank: number of this process, from 0.

    Raises:
        ValueError: fewer rows than processes.
    """

    def __init__(
        self,
        lengths: Tensor,
        batch_size: int,
        train: bool,
        length_grouping: bool = True,
        row_length: int | None = None,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(train, world_size, rank)
        self.lengths, self.batch_size, self.length_grouping, self.row_length = (
            lengths,
            batch_size,
            length_grouping,
            row_length,
        )
        self.seed = seed
        # rows of places in the list of samples sorted by length
        self._packed = None if row_length is None else pack_lengths(lengths.sort().values.tolist(), row_length)
        self.num_rows = len(lengths) if self._packed is None else len(self._packed)
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` if there is not a row for each process."""
        if self.num_rows < self.world_size:
            what = "samples" if self._packed is None else f"packed rows (packing=True, {len(self.lengths)} samples)"
            raise ValueError(f"{self.num_rows} {what} are too few for {self.world_size} processes: use fewer devices.")

    @property
    def identity(self) -> dict[str, int]:
        """Samples, rows in a batch of all processes, seed, and a checksum of what else decides the order."""
        content = self.lengths.numpy().tobytes() + repr((self.length_grouping, self.row_length)).encode()
        return {
            "number of training samples": len(self.lengths),
            "batch_size times processes": self.batch_size * self.world_size,
            "seed of the data": self.seed,
            "checksum of packing, length_grouping and the lengths in tokens": zlib.crc32(content),
        }

    def __len__(self) -> int:
        return min(math.ceil(self.num_rows / (self.batch_size * self.world_size)), self.num_rows // self.world_size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        generator = epoch_generator(self.epoch, self.seed)
        rows, count = self._rows(generator), len(self)
        grouped = self.train and self._packed is None and self.length_grouping
        order = torch.randperm(count, generator=generator) if grouped else torch.arange(count)
        for k in order[self.start :].tolist():
            begin, end = (self.num_rows * edge // count for edge in (k, k + 1))
            yield rows[begin + self.rank : end : self.world_size]

    def _rows(self, generator: torch.Generator) -> list[list[int]]:
        """All rows of the epoch, in the order in which they are cut into batches."""
        num_samples = len(self.lengths)
        if self._packed is not None:
            shuffled = torch.randperm(num_samples, generator=generator)
            by_length = self._keys(shuffled[self.lengths[shuffled].argsort(stable=True)])
            order = torch.randperm(self.num_rows, generator=generator).tolist()
            return [[by_length[place] for place in self._packed[row]] for row in order]
        if self.length_grouping:
            noise = torch.rand(num_samples, generator=generator, dtype=torch.float64) if self.train else 0.0
            order = (self.lengths * (1 + _SPREAD * noise)).argsort(descending=True, stable=True)
        elif self.train:
            order = torch.randperm(num_samples, generator=generator)
        else:
            order = torch.arange(num_samples)
        return [[key] for key in self._keys(order)]

    def _keys(self, samples: Tensor) -> list[int]:
        return (samples + self.epoch * len(self.lengths)).tolist()
