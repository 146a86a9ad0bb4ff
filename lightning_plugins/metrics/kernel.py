"""Kernel distance of the features of real and generated images (KID with any extractor)."""

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import poly_mmd

from lightning_plugins.core import arguments as must
from lightning_plugins.metrics.features import FeatureMetric, FeatureRows


class KernelDistance(FeatureMetric, FeatureRows):
    r"""Squared maximum mean discrepancy of features under a cubic kernel, without bias.

    .. math::
        k(x, y) = \Big(\frac{x^\top y}{F} + 1\Big)^3, \qquad
        \frac{\sum_{i \ne j} k(x_i, x_j) + k(y_i, y_j)}{m (m - 1)} - \frac{2 \sum_{i, j} k(x_i, y_j)}{m^2},

    the mean over subsets of m real and m generated rows. Unlike the Fréchet distance it does not depend on how many
    images there are, in expectation; it may be below 0. The subsets are drawn from ``seed``, the same ones on all
    ranks, and the global random state is left alone.

    Args:
        feature: what images are compared by: digits (a small classifier in the package), inception (which needs
            torch-fidelity), or a module with the attribute num_features. None takes features (B, F) in place of images.
        num_subsets: number of subsets whose mean is taken; 100 as in the paper and torchmetrics.
        subset_size: most images of each kind in a subset, 2 or more; 1000 as in the paper. All images of the smaller
            set if there are fewer.
        reset_real_features: whether a reset forgets the real images, too.
        seed: seed of the choice of subsets.

    Raises:
        ValueError: ``num_subsets`` below 1, ``subset_size`` below 2, or another argument that is none of its values.

    Example:
        >>> distance = KernelDistance(feature=None)
        >>> distance.update(torch.tensor([[0.0], [1.0]]), real=True)
        >>> distance.update(torch.tensor([[0.0], [1.0]]), real=False)
        >>> distance.compute()
        tensor(-3.5000)

    Source: Bińkowski et al. 2018, arXiv 1801.01401, section 4 and appendix D.
    """

    plot_lower_bound = 0.0

    def __init__(
        self,
        feature: str | nn.Module | None = "digits",
        num_subsets: int = 100,
        subset_size: int = 1000,
        reset_real_features: bool = False,
        seed: int = 0,
    ) -> None:
        must.check(locals(), num_subsets=must.count, subset_size=must.whole(2), seed=must.seed)
        super().__init__(feature, reset_real_features=reset_real_features)
        self.num_subsets, self.subset_size, self.seed = num_subsets, subset_size, seed

    def compute(self) -> Tensor:
        """The mean over subsets, a float32 scalar.

        Raises:
            ValueError: fewer than two real or generated images.
        """
        real, fake = self.rows()
        size = min(self.subset_size, len(real), len(fake))
        if size < 2:
            raise ValueError(
                f"KernelDistance needs two images or more of each kind, got {len(real)} real and {len(fake)} "
                "generated: call update first."
            )
        all_rows = size == len(real) == len(fake)  # then every subset is the same
        generator = torch.Generator().manual_seed(self.seed)
        total = real.new_zeros(())
        for _ in range(subsets := 1 if all_rows else self.num_subsets):
            first, second = (
                rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)] for rows in (real, fake)
            )
            total += poly_mmd(first, second)
        return (total / subsets).float()
