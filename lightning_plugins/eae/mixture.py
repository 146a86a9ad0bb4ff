"""A mixture of Gaussians fitted to codes by expectation and maximisation, in plain torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Added to every variance, as a share of the codes' mean variance: scikit-learn's 1e-6 for codes of any scale.
_FLOOR = 1e-6
_Mixture = tuple[Tensor, Tensor, Tensor]


def fit_mixture(
    z: Tensor,
    num_components: int,
    *,
    num_starts: int = 4,
    num_steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Fit a mixture of Gaussians with full covariances by expectation and maximisation.

    .. math::
        r_{ik} = \frac{w_k N(z_i; \mu_k, \Sigma_k)}{\sum_j w_j N(z_i; \mu_j, \Sigma_j)}, \quad
        w_k = \frac{1}{N} \sum_i r_{ik}, \quad \mu_k = \frac{\sum_i r_{ik} z_i}{N w_k}, \quad
        \Sigma_k = \frac{\sum_i r_{ik} (z_i - \mu_k)(z_i - \mu_k)^T}{N w_k} + \epsilon I

    Several starts, each from k-means, take ten steps; the likeliest goes on until a step gains less than
    ``tolerance``. :math:`\epsilon` is 1e-6 of the codes' mean variance. 10,000 codes and ten components take about
    one CPU second at d = 16; the time grows with N K d².

    Args:
        z: ``(N, d)`` float64 with N >= K.
        num_components: number of Gaussians K, 1 or more.
        num_starts: starts that are tried; one alone may miss a cluster.
        num_steps: most steps of the likeliest; scikit-learn's default.
        tolerance: nats per code; scikit-learn's default.
        seed: number that the random numbers of the starts follow from.

    Returns:
        Weights ``(K,)``, means ``(K, d)`` and the covariances' lower Cholesky factors ``(K, d, d)``.

    Source:
        Dempster, Laird, Rubin 1977; k-means++: Arthur, Vassilvitskii 2007.
    """
    centre = z.mean(0)
    z = z - centre  # second moments lose no digits then
    generator = torch.Generator().manual_seed(seed)
    starts = [_maximise(z, _kmeans(z, num_components, generator)) for _ in range(num_starts)]
    _, best = max((_climb(z, start, 10, tolerance) for start in starts), key=lambda climb: climb[0])
    _, (weights, means, factors) = _climb(z, best, num_steps, tolerance)
    return weights, means + centre, factors


def _climb(z: Tensor, mixture: _Mixture, num_steps: int, tolerance: float) -> tuple[float, _Mixture]:
    """Steps of expectation and maximisation: the mean log likelihood before the last one, and the mixture."""
    likelihood = -math.inf
    for _ in range(num_steps):
        weights, means, factors = mixture
        joint = log_densities(z, means, factors) + weights.log()
        total = torch.logsumexp(joint, 1, keepdim=True)
        before, likelihood = likelihood, total.mean().item()
        if likelihood - before < tolerance:
            break
        mixture = _maximise(z, (joint - total).exp())
    return likelihood, mixture


def _maximise(z: Tensor, responsibilities: Tensor) -> _Mixture:
    """The likeliest mixture if component k has had the share r[i, k] of code i."""
    counts = responsibilities.sum(0).clamp_min(torch.finfo(z.dtype).eps)  # a component may lose every code
    means = responsibilities.mT @ z / counts[:, None]
    moments = torch.stack([(z * r[:, None]).mT @ z for r in responsibilities.unbind(1)]) / counts[:, None, None]
    covariances = moments - means[:, :, None] * means[:, None, :]
    return counts / counts.sum(), means, torch.linalg.cholesky(covariances + variance_floor(z))


def log_densities(z: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Log densities of codes under each of several Gaussians.

    Args:
        z: ``(n, d)`` codes, of any number.
        means: ``(K, d)`` means of the Gaussians.
        factors: ``(K, d, d)`` lower Cholesky factors of their covariances.

    Returns:
        ``(n, K)`` nats.
    """
    d = z.shape[1]
    whiten = torch.linalg.solve_triangular(factors, torch.eye(d, dtype=z.dtype, device=z.device), upper=False)
    squares = torch.stack([((z - m) @ w.mT).square().sum(1) for m, w in zip(means, whiten, strict=True)], 1)
    log_volumes = factors.diagonal(dim1=1, dim2=2).log().sum(1)
    return -0.5 * (squares + d * math.log(2 * math.pi)) - log_volumes


def _kmeans(z: Tensor, num_components: int, generator: torch.Generator) -> Tensor:
    """Each code's cluster, as responsibilities ``(N, K)`` of 0 and 1.

    The first centres are codes, drawn in proportion to their squared distance from the centres before; of a few draws
    the one that brings all codes nearest to a centre is taken (greedy k-means++).
    """
    num_draws = 2 + int(math.log(num_components))
    centres = z[torch.randint(len(z), (1,), generator=generator)]
    distances = torch.cdist(z, centres).square()[:, 0]
    while len(centres) < num_components:
        chances = distances.clamp_min(torch.finfo(z.dtype).tiny)  # all zero if there are fewer distinct codes than K
        drawn = z[torch.multinomial(chances, num_draws, replacement=True, generator=generator)]
        after = torch.minimum(distances[:, None], torch.cdist(z, drawn).square())
        best = after.sum(0).argmin()
        centres, distances = torch.cat([centres, drawn[best, None]]), after[:, best]
    for _ in range(10):
        clusters = F.one_hot(torch.cdist(z, centres).argmin(1), num_components).to(z.dtype)
        centres = clusters.mT @ z / clusters.sum(0).clamp_min(1)[:, None]
    return clusters


def variance_floor(centred: Tensor) -> Tensor:
    """What is added to covariances ``(d, d)`` of codes whose mean is zero; not nothing even if all are the same."""
    return torch.eye(centred.shape[1], dtype=centred.dtype) * (_FLOOR * centred.square().mean()).clamp_min(1e-12)
