"""The entropy of all codes of an epoch, as a metric."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_plugins.eae.entropy import entropy_gap, knn_entropy


class KNNEntropy(Metric):
    """:func:`knn_entropy` of the codes of all updates and processes, or its gap to Gaussian codes.

    Of more than ``max_samples`` codes a random subset is kept, each code with the same chance, whatever the order and
    the number of updates on each process; what is drawn depends on nothing but their order. Processes may hold
    different numbers of codes, or none.

    Args:
        k: which neighbour, or several: the mean of their estimates.
        gap: subtract the entropy of as many Gaussian codes (:func:`entropy_gap`), which takes the estimator's bias out.
            It suits codes normalised per dimension.
        max_samples: how many codes are compared, above k; time grows with its square.

    Example:
        >>> codes = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> entropy, gap = KNNEntropy(), KNNEntropy(gap=True)
        >>> for batch in codes.split(100):
        ...     entropy.update(batch)
        ...     gap.update(batch)
        >>> entropy.compute().round().item(), gap.compute().abs().round().item()
        (23.0, 0.0)
    """

    is_differentiable, higher_is_better, full_state_update = False, True, True
    codes: list[Tensor]
    keys: list[Tensor]

    def __init__(self, k: int | Sequence[int] = 1, gap: bool = False, max_samples: int = 4096) -> None:
        super().__init__()
        if max_samples <= (k if isinstance(k, int) else max(k)):
            raise ValueError(f"max_samples must be above k={k}, got {max_samples}; 4096 takes a fraction of a second.")
        self.k, self.gap, self.max_samples = k, gap, max_samples
        self.add_state("codes", [], dist_reduce_fx="cat")  # flat: a process without codes could not know their size
        self.add_state("keys", [], dist_reduce_fx="cat")  # random numbers: the codes with the smallest are kept
        self.add_state("num_seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Take more codes ``(n, d)``."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator().manual_seed(int(self.num_seen) * 65_537 + rank)
        keys = torch.rand(len(z), generator=generator, device="cpu")
        self.num_seen += len(z)
        self.codes.append(z.detach().to(self.dtype).flatten())
        self.keys.append(keys.to(z.device, self.dtype))
        if sum(map(len, self.keys)) > 2 * self.max_samples:
            codes, keys = self._smallest_keys()
            self.codes, self.keys = [codes.flatten()], [keys]

    def compute(self) -> Tensor:
        """Scalar in nats.

        Raises:
            ValueError: not more codes than k.
        """
        return (entropy_gap if self.gap else knn_entropy)(self._smallest_keys()[0], self.k)

    def _smallest_keys(self) -> tuple[Tensor, Tensor]:
        keys = dim_zero_cat(self.keys)
        codes = dim_zero_cat(self.codes).view(len(keys), -1)
        kept = keys.argsort()[: self.max_samples]
        return codes[kept], keys[kept]
