"""Precision, recall, density and coverage of generated images, by nearest neighbours among features."""

import torch
from torch import Tensor, nn

from lightning_plugins.core import arguments as must
from lightning_plugins.metrics.features import FeatureMetric, FeatureRows

_CHUNK = 512  # rows whose distances to all others are in memory at a time


class PrecisionRecallDensityCoverage(FeatureMetric, FeatureRows):
    r"""How good and how diverse generated images are, as four numbers.

    With real features :math:`x_i` and generated ones :math:`y_j`, and r the distance of a point to its k-th nearest
    neighbour of its own set:

    .. math::
        \mathrm{precision} &= \tfrac1M \textstyle\sum_j \mathbf 1[\exists i: \|x_i - y_j\| < r(x_i)] &
        \mathrm{recall} &= \tfrac1N \textstyle\sum_i \mathbf 1[\exists j: \|x_i - y_j\| < r(y_j)] \\
        \mathrm{density} &= \tfrac1{kM} \textstyle\sum_{i, j} \mathbf 1[\|x_i - y_j\| < r(x_i)] &
        \mathrm{coverage} &= \tfrac1N \textstyle\sum_i \mathbf 1[\min_j \|x_i - y_j\| < r(x_i)]

    Precision and density say how many images look real; recall and coverage how much of the real images is met. Density
    and coverage bear outliers; density may exceed 1. Coverage of perfect samples is :math:`1 - 2^{-k}` at N = M, more
    for more samples: compare at equal numbers. Distances are exact, in double precision, 512 rows at a time.

    Args:
        feature: what images are compared by: digits (a small classifier in the package), inception (which needs
            torch-fidelity), or a module with the attribute num_features. None takes features (B, F) in place of images.
        k: which nearest neighbour's distance is the radius, 1 or more; 5 as in Naeem et al. 2020, 3 for precision and
            recall in Kynkäänniemi et al. 2019.
        reset_real_features: whether a reset forgets the real images, too.

    Raises:
        ValueError: ``k`` below 1, or another argument that is none of its values.

    Example:
        >>> metric = PrecisionRecallDensityCoverage(feature=None, k=1)
        >>> metric.update(torch.tensor([[0.0], [1.0], [5.0]]), real=True)
        >>> metric.update(torch.tensor([[0.5], [0.6]]), real=False)
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'precision': 1.0, 'recall': 0.0, 'density': 2.0, 'coverage': 0.67}

    Source: Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2; Naeem et al. 2020, arXiv 2002.09797, eq. 2 to 5,
    with their code's strict inequality.
    """

    higher_is_better = True

    def __init__(
        self, feature: str | nn.Module | None = "digits", k: int = 5, reset_real_features: bool = False
    ) -> None:
        must.whole(1, why="which neighbour's distance is the radius")("k", k)
        super().__init__(feature, reset_real_features=reset_real_features)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``density`` and ``coverage``, float32 scalars.

        Raises:
            ValueError: not more than k real or generated images.
        """
        real, fake = self.rows()
        if min(len(real), len(fake)) <= self.k:
            raise ValueError(
                f"k={self.k} neighbours need more than {self.k} images of each kind, got {len(real)} real and "
                f"{len(fake)} generated: call update with more, or lower k."
            )
        real_radius, fake_radius = _radius(real, self.k), _radius(fake, self.k)
        num_around_fake = torch.zeros(len(fake), device=fake.device)  # real balls that hold each generated point
        recalled, covered = [], []
        for rows, radius in zip(real.split(_CHUNK), real_radius.split(_CHUNK), strict=True):
            distance = _distance(rows, fake)
            num_around_fake += (distance < radius[:, None]).sum(0)
            recalled.append((distance < fake_radius).any(1))
            covered.append(distance.amin(1) < radius)
        return {
            "precision": (num_around_fake > 0).float().mean(),
            "recall": torch.cat(recalled).float().mean(),
            "density": num_around_fake.mean() / self.k,
            "coverage": torch.cat(covered).float().mean(),
        }


def _radius(rows: Tensor, k: int) -> Tensor:
    """Distance ``(N,)`` of each row to its k-th nearest other one."""
    radius = []
    for start, chunk in zip(range(0, len(rows), _CHUNK), rows.split(_CHUNK), strict=True):
        distance = _distance(chunk, rows)
        distance[torch.arange(len(chunk)), torch.arange(start, start + len(chunk))] = float("inf")  # itself
        radius.append(distance.topk(k, largest=False).values[:, -1])
    return torch.cat(radius)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Without the matrix product, whose rounding would set equal points apart."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
