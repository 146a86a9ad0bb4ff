"""How far codes are from N(0, I), in a few numbers. Shapes: N codes, d latent dimensions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.eae.entropy import (
    NEIGHBOURS,
    count_duplicates,
    gaussian_reference_entropy,
    knn_entropy,
    more_than,
)
from lightning_plugins.eae.kept_codes import KeptCodes

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, section 5.2
_CONSTANT = 1e-5  # a standard deviation below this share of the root mean square is rounding


def latent_diagnostics(z: Tensor, k: int | Sequence[int] = 1) -> dict[str, Tensor]:
    r"""Compare codes with draws from N(0, I).

    - ``entropy``: estimate in nats of :func:`~lightning_plugins.eae.entropy.knn_entropy`. Its bias grows with d, so
      that only the gap can be read:
    - ``entropy_gap``: the entropy less the same estimate for as many Gaussian codes; 0 for a Gaussian, -5 and less for
      clusters or collapsed dimensions. Above 0 the codes are spread more evenly than draws would be.
    - ``radius_mean``, ``radius_std`` of :math:`\|z_i\|`, and ``radius_mean_ratio``, ``radius_std_ratio``: the same by
      :math:`\chi_d`'s (:func:`chi_moments`), 1 for a Gaussian. Codes on a thin shell have a ratio of the standard
      deviations near 0.
    - ``correlation``: mean :math:`|\rho|` of all pairs of dimensions, without those that are constant; 0 for fewer
      than two. Independent Gaussian dimensions have :math:`\sqrt{2 / (\pi N)}`: 0.05 for 256 codes, 0.012 for 4,096.
    - ``active_dims``: dimensions with a variance above 0.01, as Burda et al. 2016 count them (of a VAE, the means are
      the codes).
    - ``duplicates``: copies of earlier codes (:func:`~lightning_plugins.eae.entropy.count_duplicates`).

    Args:
        z: ``(N, d)`` codes as they are decoded, N > k. No gradient is kept.
        k: which nearest neighbour the entropy's estimate takes, or several whose estimates are averaged.

    Returns:
        The nine values as scalars of z's type, float32 if that is narrower.

    Raises:
        ValueError: N is k or less, or z has another shape.

    Example:
        >>> z = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> values = latent_diagnostics(z)
        >>> {name: round(values[name].item(), 1) for name in ("radius_mean_ratio", "active_dims", "duplicates")}
        {'radius_mean_ratio': 1.0, 'active_dims': 8.0, 'duplicates': 0.0}

    Source:
        Ghose, Rashwan, Poupart 2020 (entropy); Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders"
        (ICLR 2016), section 5.2 (active dimensions).
    """
    must.tensor()("z", z)
    if z.ndim != 2:
        raise ValueError(f"z must hold one code in each row, (N, d), got {tuple(z.shape)}.")
    z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    N, d = z.shape
    entropy = knn_entropy(z, k)
    radius, (mean, std) = z.norm(dim=1), chi_moments(d)
    values = {
        "entropy": entropy,
        "entropy_gap": entropy - gaussian_reference_entropy(N, d, k),
        "radius_mean": radius.mean(),
        "radius_std": radius.std(),
        "radius_mean_ratio": radius.mean() / mean,
        "radius_std_ratio": radius.std() / std,
        "correlation": mean_correlation(correlation_matrix(z)),
        "active_dims": (z.var(0) > ACTIVE_VARIANCE).sum(),
        "duplicates": count_duplicates(z),
    }
    return {name: value.to(z.dtype) for name, value in values.items()}


def chi_moments(d: int) -> tuple[float, float]:
    r"""Mean and standard deviation of the norm of N(0, I).

    .. math:: \mu = \sqrt2 \, \Gamma((d + 1) / 2) \, / \, \Gamma(d / 2), \qquad \sigma^2 = d - \mu^2

    Args:
        d: number of dimensions, 1 or more.

    >>> chi_moments(2)[0] == math.sqrt(math.pi / 2)
    True
    """
    mean = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return mean, math.sqrt(d - mean * mean)


def chi_density(radius: Tensor, d: int) -> Tensor:
    r"""Density of the norm of N(0, I) in d dimensions, at each positive radius.

    .. math:: p(r) = r^{d - 1} e^{-r^2 / 2} \, / \, (2^{d / 2 - 1} \, \Gamma(d / 2))

    Args:
        radius: positive numbers, of any shape.
        d: number of dimensions, 1 or more.
    """
    constant = (d / 2 - 1) * math.log(2) + math.lgamma(d / 2)
    return ((d - 1) * radius.log() - radius.square() / 2 - constant).exp()


def correlation_matrix(z: Tensor) -> Tensor:
    """Correlation ``(d, d)`` of every two dimensions of codes ``(N, d)``; NaN where one is constant."""
    centred = z - z.mean(0)
    norms = centred.norm(dim=0)
    norms = torch.where(norms > _CONSTANT * z.norm(dim=0), norms, torch.nan)
    return (centred / norms).T @ (centred / norms)


def mean_correlation(matrix: Tensor) -> Tensor:
    """Mean absolute value off the diagonal ``(d, d)``, without the constant dimensions (NaN); 0 if nothing is left."""
    off_diagonal = matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)].abs()
    return off_diagonal.nanmean().nan_to_num(0.0)


class LatentDiagnostics(KeptCodes):
    """:func:`latent_diagnostics` of the codes of all updates and processes.

    Of more than ``max_codes`` codes a random subset is kept
    (:class:`~lightning_plugins.eae.kept_codes.KeptCodes`); all values are then those of it, ``duplicates`` too.

    Args:
        latent_dim: dimensions d of a code.
        k: which nearest neighbour the entropy's estimate takes, or several whose estimates are averaged.
        max_codes: how many codes are kept, more than k; time and memory grow with the square of their number.

    Raises:
        ValueError: an argument is out of range, or ``max_codes`` too small for k; codes of another shape in
            ``update``; k codes or fewer in ``compute``.

    Example:
        >>> diagnostics = LatentDiagnostics(latent_dim=2)
        >>> for _ in range(4):
        ...     diagnostics.update(torch.ones(64, 2))
        >>> diagnostics.compute()["duplicates"]
        tensor(255.)
    """

    def __init__(self, latent_dim: int, k: int | Sequence[int] = 1, max_codes: int = 4096) -> None:
        must.check(locals(), latent_dim=must.count, k=NEIGHBOURS)
        more_than(k)("max_codes", max_codes)
        super().__init__(max_codes, latent_dim)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """The values of :func:`latent_diagnostics`, the same on all processes."""
        return latent_diagnostics(self.codes_here(), self.k)
