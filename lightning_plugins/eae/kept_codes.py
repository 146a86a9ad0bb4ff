"""The entropy of an epoch's codes as a metric, and the fair sample of them that it takes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_plugins.core import arguments as must
from lightning_plugins.core.full_precision import FullPrecision
from lightning_plugins.eae.entropy import NEIGHBOURS, entropy_gap, knn_entropy, several


class KeptCodes(FullPrecision):
    """Keeps the codes of all updates and processes, or a random subset of them.

    Of more than ``max_codes`` every code is equally likely to stay, whatever its update or process: each gets a random
    number, and the smallest numbers stay. They are seeded, so that a run can be repeated, and the global random state
    is left alone. Processes may differ in their updates, or have none.

    Args:
        k: which neighbour a subclass's entropy takes, or several.
        max_codes: codes kept, more than k.
        latent_dim: d; 0: that of the first code.

    Raises:
        ValueError: an argument is out of range, or ``max_codes`` is too small for k.
    """

    is_differentiable, higher_is_better, full_state_update = False, None, True
    kept: list[Tensor]
    numbers: list[Tensor]
    num_seen: Tensor
    dim: Tensor

    def __init__(self, k: int | Sequence[int] = 1, max_codes: int = 4096, latent_dim: int = 0) -> None:
        super().__init__()
        must.check(locals(), k=NEIGHBOURS, latent_dim=must.whole(0))
        largest = max(several(k))
        must.whole(largest + 1, why=f"k={largest} neighbours need more than {largest} codes")("max_codes", max_codes)
        self.k, self.max_codes = k, max_codes
        self.add_state("kept", [], dist_reduce_fx="cat")  # flat: a process without codes cannot know their size
        self.add_state("numbers", [], dist_reduce_fx="cat")
        self.add_state("num_seen", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("dim", torch.tensor(latent_dim), dist_reduce_fx="max")

    def update(self, z: Tensor) -> None:
        """Take more codes ``(n, d)``."""
        must.tensor(dtype="any")("z", z)  # labels are kept, too
        if z.ndim != 2 or self.dim not in (0, z.shape[1]):
            size = f"{int(self.dim)}" if self.dim else "d"
            raise ValueError(f"z must be (n, {size}), one code in each row, got {tuple(z.shape)}.")
        self.dim = torch.full_like(self.dim, z.shape[1])
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        generator = torch.Generator().manual_seed(int(self.num_seen) * 65_537 + rank)
        self.num_seen = self.num_seen + len(z)  # not in place: see FullPrecisionMean
        self.kept.append(z.detach().to(self.dtype).flatten())
        self.numbers.append(torch.rand(len(z), generator=generator, device="cpu").to(z.device, self.dtype))
        if sum(map(len, self.numbers)) > 2 * self.max_codes:
            codes, numbers = self._smallest()
            self.kept, self.numbers = [codes.flatten()], [numbers]

    def codes(self) -> Tensor:
        """The kept codes ``(N, d)`` of all processes, N at most ``max_codes``; every process has to ask."""
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self.codes_here()

    def codes_here(self) -> Tensor:
        """The kept codes ``(N, d)`` of this process; in ``compute``, of all."""
        return self._smallest()[0]

    def compute(self) -> Tensor:
        """The kept codes ``(N, d)`` of all processes."""
        return self.codes_here()

    def _smallest(self) -> tuple[Tensor, Tensor]:
        numbers, kept = (
            dim_zero_cat(parts) if len(parts) else torch.zeros(0, dtype=self.dtype, device=self.device)
            for parts in (self.numbers, self.kept)
        )
        order = numbers.argsort(stable=True)[: self.max_codes]
        return kept.view(len(numbers), int(self.dim))[order], numbers[order]


class KNNEntropy(KeptCodes):
    """:func:`knn_entropy` of the codes of all updates and processes, or its gap to Gaussian codes.

    Of more than ``max_codes`` codes a random subset is kept, see :class:`KeptCodes`.

    Args:
        k: which neighbour, or several: the mean of their estimates.
        gap: subtract the entropy of as many Gaussian codes (:func:`entropy_gap`), which takes the estimator's bias out.
            It suits codes normalised per dimension.
        max_codes: how many codes are compared, above k; time grows with its square.

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
        must.flag("gap", gap)
        super().__init__(k, max_codes)
        self.gap = gap

    def compute(self) -> Tensor:
        """Scalar in nats, the same on all processes."""
        return (entropy_gap if self.gap else knn_entropy)(self.codes_here(), self.k)
