"""A fair sample of an epoch's codes with their classes, and the entropy of such a sample as a metric."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_plugins.core import arguments as must
from lightning_plugins.core.distributed import rank_of_process
from lightning_plugins.core.full_precision import FullPrecision
from lightning_plugins.core.random_numbers import RowGenerator, generator, rand
from lightning_plugins.eae.entropy import NEIGHBOURS, entropy_gap, knn_entropy, more_than


class KeptCodes(FullPrecision):
    """Keeps the codes of all updates and processes with their classes, or a random subset of them.

    Of more than ``max_codes`` every code is equally likely to stay, whatever its update or process: each gets a random
    number, and the smallest numbers stay. They are seeded, so that a run can be repeated, and the global random state
    is left alone. With keys the same codes stay on any number of processes. Processes may differ in their updates, or
    have none.

    Args:
        max_codes: how many codes are kept, 1 or more; 4,096 are compared in seconds.
        latent_dim: dimensions d of a code; 0 takes those of the first one.

    Raises:
        ValueError: an argument is out of range.
    """

    is_differentiable, higher_is_better, full_state_update = False, None, True
    kept: list[Tensor]
    numbers: list[Tensor]
    num_seen: Tensor
    dim: Tensor

    def __init__(self, max_codes: int = 4096, latent_dim: int = 0) -> None:
        super().__init__()
        must.check(locals(), max_codes=must.count, latent_dim=must.whole(0))
        self.max_codes = max_codes
        # Rows of a code and its class, flat: a process without codes cannot know their size.
        self.add_state("kept", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")
        self.add_state("num_seen", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("dim", torch.tensor(latent_dim), dist_reduce_fx="max")

    def update(self, z: Tensor, labels: Tensor | None = None, keys: Tensor | None = None) -> None:
        """Take more codes.

        Args:
            z: ``(n, d)`` codes of any type.
            labels: ``(n,)`` int64 classes below 2^24, which stay beside their codes; 0 for all by default.
            keys: ``(n,)`` int64, what names each code among all of them, by which its random number is drawn; by
                default it is drawn by process and place.

        Raises:
            ValueError: codes of another shape, or not a class for each.
        """
        must.tensor(dtype="any")("z", z)
        if z.ndim != 2 or self.dim not in (0, z.shape[1]):
            size = f"{int(self.dim)}" if self.dim else "d"
            raise ValueError(f"z must be (n, {size}), one code in each row, got {tuple(z.shape)}.")
        if labels is not None and (labels.shape != z.shape[:1] or labels.is_floating_point()):
            raise ValueError(f"labels must be ({len(z)},) integers, a class for each code, got {must.told(labels)}.")
        self.dim = torch.full_like(self.dim, z.shape[1])
        if keys is None:
            source = generator("cpu", int(self.num_seen), rank_of_process())
            numbers = torch.rand(len(z), generator=source, device="cpu")
        else:
            numbers = rand((len(z),), RowGenerator(keys))
        self.num_seen = self.num_seen + len(z)  # not in place: see FullPrecisionMean
        classes = z.new_zeros(len(z)) if labels is None else labels
        self.kept.append(torch.cat([z.detach().to(self.dtype), classes.to(self.dtype)[:, None]], 1).flatten())
        self.numbers.append(numbers.to(z.device, self.dtype))
        if sum(map(len, self.numbers)) > 2 * self.max_codes:
            rows, numbers = self._smallest()
            self.kept, self.numbers = [rows.flatten()], [numbers]

    def codes(self) -> Tensor:
        """The kept codes ``(N, d)`` of all processes, N at most ``max_codes``; every process has to ask."""
        return self.labelled_codes()[0]

    def labelled_codes(self) -> tuple[Tensor, Tensor]:
        """The kept codes ``(N, d)`` of all processes and their classes ``(N,)`` int64; every process has to ask."""
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self.codes_here(), self._smallest()[0][:, -1].long()

    def codes_here(self) -> Tensor:
        """The kept codes ``(N, d)`` of this process; in ``compute``, of all."""
        return self._smallest()[0][:, :-1].contiguous()

    def compute(self) -> Tensor:
        """The kept codes ``(N, d)`` of all processes."""
        return self.codes_here()

    def _smallest(self) -> tuple[Tensor, Tensor]:
        """The rows whose numbers are the smallest, and these numbers."""
        numbers, kept = (
            dim_zero_cat(parts) if len(parts) else torch.zeros(0, dtype=self.dtype, device=self.device)
            for parts in (self.numbers, self.kept)
        )
        order = numbers.argsort(stable=True)[: self.max_codes]
        return kept.view(len(numbers), int(self.dim) + 1)[order], numbers[order]


class KNNEntropy(KeptCodes):
    """:func:`knn_entropy` of the codes of all updates and processes, or its gap to Gaussian codes.

    Of more than ``max_codes`` codes a random subset is kept, see :class:`KeptCodes`.

    Args:
        k: which nearest neighbour the estimate takes, or several whose estimates are averaged; 1 in the EAE paper.
        gap: subtract the entropy of as many Gaussian codes, which takes the estimator's bias out. It suits codes
            normalised per dimension.
        max_codes: how many codes are compared, more than k; time grows with the square of their number.

    Raises:
        ValueError: an argument is out of range, or ``max_codes`` too small for k; codes of another shape in
            ``update``; k codes or fewer in ``compute``.

    Example:
        >>> codes = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> entropy, gap = KNNEntropy(), KNNEntropy(gap=True)
        >>> for batch in codes.split(100):
        ...     entropy.update(batch)
        ...     gap.update(batch)
        >>> entropy.compute().round().item(), gap.compute().abs().round().item()
        (23.0, 0.0)
    """

    higher_is_better = True

    def __init__(self, k: int | Sequence[int] = 1, gap: bool = False, max_codes: int = 4096) -> None:
        must.check(locals(), k=NEIGHBOURS, gap=must.flag)
        more_than(k)("max_codes", max_codes)
        super().__init__(max_codes)
        self.k, self.gap = k, gap

    def compute(self) -> Tensor:
        """Scalar in nats, the same on all processes."""
        return (entropy_gap if self.gap else knn_entropy)(self.codes_here(), self.k)
