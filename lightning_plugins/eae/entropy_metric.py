"""The entropy of all codes of an epoch, as a metric."""

from collections.abc import Sequence

from torch import Tensor

from lightning_plugins.eae.entropy import entropy_gap, knn_entropy
from lightning_plugins.eae.kept_codes import KeptCodes


class KNNEntropy(KeptCodes):
    """:func:`knn_entropy` of the codes of all updates and processes, or its gap to Gaussian codes.

    Of more than ``max_codes`` codes a random subset is kept, see :class:`~lightning_plugins.eae.kept_codes.KeptCodes`.

    Args:
        k: which neighbour, or several: the mean of their estimates.
        gap: subtract the entropy of as many Gaussian codes (:func:`entropy_gap`), which takes the estimator's bias out.
            It suits codes normalised per dimension.
        max_codes: how many codes are compared, above k; time grows with its square.

    Raises:
        ValueError: ``max_codes`` is too small; codes of another shape in ``update``; k codes or fewer in ``compute``.

    Example:
        >>> import torch
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
        super().__init__(k, max_codes)
        self.gap = gap

    def compute(self) -> Tensor:
        """Scalar in nats, the same on all processes."""
        return (entropy_gap if self.gap else knn_entropy)(self.codes_here(), self.k)
