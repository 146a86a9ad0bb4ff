"""Where new codes are drawn from: N(0, I), or a Gaussian or a mixture of Gaussians fitted to the training codes."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PriorKind = Literal["normal", "gaussian", "mixture"]

# Added to every variance, as a share of the codes' mean variance: scikit-learn's 1e-6 for codes of any scale.
_FLOOR = 1e-6
_MEMORY_NUMBERS = 2**22


class LatentPrior(nn.Module):
    r"""Distributions of codes to sample from: ``normal``, ``gaussian`` and ``mixture``.

    .. math:: p(z) = N(0, I), \qquad N(\mu, \Sigma), \qquad \sum_k w_k N(\mu_k, \Sigma_k)

    with full covariances. ``remember`` keeps the newest training codes; Gaussian and mixture are fitted to them by
    ``fit``, or by the first use after training went on. Everything stands in buffers, so that a checkpoint carries the
    fitted prior and a resumed run its memory.

    Args:
        latent_dim: dimensions d of a code.
        num_components: Gaussians K of the mixture; 10 in Ghosh et al. 2020 and Ghose et al. 2020.
        capacity: codes that are remembered. By default 10,000, or for d > 419 as many as fit in 16 MiB of float32
            (4 d bytes each). The fitted prior takes another 4 d² (K + 1) bytes.

    Example:
        >>> prior = LatentPrior(2, num_components=3)
        >>> prior.remember(torch.randn(500, 2, generator=torch.Generator().manual_seed(0)))
        >>> prior.sample(4, "mixture").shape
        torch.Size([4, 2])
    """

    memory: Tensor
    num_seen: Tensor
    fitted: Tensor
    mean: Tensor
    factor: Tensor
    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, latent_dim: int, num_components: int = 10, capacity: int | None = None) -> None:
        super().__init__()
        if capacity is None:
            capacity = max(1, min(10_000, _MEMORY_NUMBERS // max(latent_dim, 1)))
        sizes = {"latent_dim": latent_dim, "num_components": num_components, "capacity": capacity}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be 1 or more.")
        self.latent_dim, self.num_components, self.capacity = latent_dim, num_components, capacity
        K, d = num_components, latent_dim
        self.register_buffer("memory", torch.zeros(capacity, d))
        self.register_buffer("num_seen", torch.tensor(0))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(d))
        # Lower Cholesky factors L, S = L Lᵀ: still of a covariance after rounding to half precision.
        self.register_buffer("factor", torch.eye(d))
        self.register_buffer("weights", torch.full((K,), 1 / K))
        self.register_buffer("means", torch.zeros(K, d))
        self.register_buffer("factors", torch.eye(d).repeat(K, 1, 1))

    @property
    def is_fitted(self) -> bool:
        """Whether Gaussian and mixture are fitted, and no codes have been remembered since."""
        return bool(self.fitted)

    @property
    def can_be_fitted(self) -> bool:
        """Whether enough codes are remembered, all of them finite."""
        return self.num_remembered >= self.num_needed and bool(self.memory.isfinite().all())

    @property
    def num_needed(self) -> int:
        """How few codes can be fitted."""
        return max(2, self.num_components)

    @property
    def num_remembered(self) -> int:
        """How many codes ``fit()`` would use."""
        return min(int(self.num_seen), self.capacity)

    @torch.no_grad()
    def remember(self, z: Tensor) -> None:
        """Put codes ``(n, d)`` in the memory, over the oldest ones if it is full; an earlier fit is then out of date.

        Over several processes give all of them the same codes (:meth:`LatentBatchNorm.all_rows`), so that
        all fit the same.
        """
        self._check_codes(z)
        newest = z[-self.capacity :].to(self.memory)
        # Places are computed on the device: reading the count would make every training step wait for it.
        places = self.num_seen + torch.arange(len(z) - len(newest), len(z), device=self.num_seen.device)
        self.memory.index_copy_(0, places % self.capacity, newest)
        self.num_seen += len(z)
        self.fitted.fill_(False)

    @torch.no_grad()
    def fit(self, z: Tensor | None = None) -> None:
        """Fit Gaussian and mixture, on the CPU in float64 and from a seed of its own: the same on every process.

        The Gaussian has the codes' mean and (unbiased) covariance, the mixture is fitted by :func:`fit_mixture`. Both
        have 1e-6 of the codes' mean variance added to every variance, so that a collapsed dimension does no harm.

        Args:
            z: ``(N, d)`` codes; all processes must give the same. The memory by default.

        Raises:
            ValueError: fewer than two codes or than components, codes of another shape, or codes that are not finite.
        """
        z = self.memory[: self.num_remembered] if z is None else z
        self._check_codes(z)
        z = z.detach().to("cpu", torch.float64)
        if len(z) < self.num_needed:
            raise ValueError(
                f"num_components={self.num_components} needs {self.num_needed} codes or more, got {len(z)}: give more "
                "codes, or lower it."
            )
        if not z.isfinite().all():
            raise ValueError("z has codes that are not finite, to which no prior can be fitted: has training diverged?")
        mean, centred = z.mean(0), z - z.mean(0)
        factor = torch.linalg.cholesky(centred.mT @ centred / (len(z) - 1) + _floor(centred))
        weights, means, factors = fit_mixture(z, self.num_components)
        fit = {"mean": mean, "factor": factor, "weights": weights, "means": means, "factors": factors}
        for name, value in fit.items():
            getattr(self, name).copy_(value)
        self.fitted.fill_(True)

    @torch.no_grad()
    def sample(
        self, n: int, kind: PriorKind = "normal", temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw codes.

        Args:
            n: how many.
            kind: the distribution; fitted to the memory first if it is not, or codes have been remembered since.
            temperature: factor, 0 or more, on the standard deviation. In the mixture it is every component's own, about
                the component's mean; which components are drawn does not change.
            generator: on any device, where the numbers are then drawn; torch's own of this module's device by default.

        Returns:
            ``(n, d)`` on this module's device.

        Raises:
            ValueError: unknown kind, a negative temperature, or too few codes remembered for a fit.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be 0 or more.")
        self._prepare(kind)
        device = self.mean.device
        source = {"generator": generator, "device": device if generator is None else generator.device}
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        if kind == "mixture":
            weights = self.weights.to(source["device"], dtype)
            chosen = torch.multinomial(weights, n, replacement=True, generator=generator).to(device)
        noise = torch.randn(n, self.latent_dim, dtype=dtype, **source).to(device) * temperature
        if kind == "normal":
            return noise.to(self.mean.dtype)
        with torch.autocast(device.type, enabled=False):
            if kind == "gaussian":
                return (self.mean + noise @ self.factor.to(dtype).mT).to(self.mean.dtype)
            z = self.means.to(dtype)[chosen]
            for k, factor in enumerate(self.factors.to(dtype)):
                z[chosen == k] += noise[chosen == k] @ factor.mT
            return z.to(self.mean.dtype)

    def log_prob(self, z: Tensor, kind: PriorKind = "normal") -> Tensor:
        """The log density of codes, with gradient.

        Args:
            z: ``(n, d)``; half precision is widened to float32.
            kind: the distribution, fitted first as by :meth:`sample`.

        Returns:
            ``(n,)`` nats.

        Raises:
            ValueError: unknown kind, codes of another shape, or too few codes remembered for a fit.
        """
        self._check_codes(z)
        self._prepare(kind)
        dtype = torch.promote_types(torch.promote_types(z.dtype, self.mean.dtype), torch.float32)
        z = z.to(dtype)
        with torch.autocast(z.device.type, enabled=False):
            if kind == "normal":
                return -0.5 * (z.square().sum(1) + self.latent_dim * math.log(2 * math.pi))
            if kind == "gaussian":
                return _log_densities(z, self.mean[None].to(dtype), self.factor[None].to(dtype))[:, 0]
            densities = _log_densities(z, self.means.to(dtype), self.factors.to(dtype))
            return torch.logsumexp(densities + self.weights.to(dtype).log(), 1)

    def _check_codes(self, z: Tensor) -> None:
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape (codes, {self.latent_dim}), got {tuple(z.shape)}.")

    def _prepare(self, kind: str) -> None:
        """Fit what is to be fitted before use: here, so that no training step waits for it."""
        if kind not in get_args(PriorKind):
            raise ValueError(f"prior={kind!r} is unknown; choose one of {', '.join(get_args(PriorKind))}.")
        if kind == "normal" or self.is_fitted:
            return
        if self.num_remembered < self.num_needed:
            raise ValueError(
                f"prior={kind!r} is fitted to {self.num_needed} codes or more, and training has left "
                f"{self.num_remembered}: train longer, or call fit_prior(dataloader) first."
            )
        self.fit()


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
        num_components: Gaussians K.
        num_starts: starts that are tried; one alone may miss a cluster.
        num_steps: most steps of the likeliest; scikit-learn's default.
        tolerance: nats per code; scikit-learn's default.
        seed: of the starts' random numbers.

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


_Mixture = tuple[Tensor, Tensor, Tensor]


def _climb(z: Tensor, mixture: _Mixture, num_steps: int, tolerance: float) -> tuple[float, _Mixture]:
    """Steps of expectation and maximisation: the mean log likelihood before the last one, and the mixture."""
    likelihood = -math.inf
    for _ in range(num_steps):
        weights, means, factors = mixture
        joint = _log_densities(z, means, factors) + weights.log()
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
    return counts / counts.sum(), means, torch.linalg.cholesky(covariances + _floor(z))


def _log_densities(z: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Log densities ``(n, K)`` of K Gaussians with means ``(K, d)`` and lower Cholesky factors ``(K, d, d)``."""
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


def _floor(centred: Tensor) -> Tensor:
    """What is added to covariances ``(d, d)`` of codes whose mean is zero; not nothing even if all are the same."""
    return torch.eye(centred.shape[1], dtype=centred.dtype) * (_FLOOR * centred.square().mean()).clamp_min(1e-12)
