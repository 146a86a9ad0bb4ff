"""Where new codes are drawn from: N(0, I), or a Gaussian or a mixture of Gaussians fitted to the training codes."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_plugins.core import arguments as must
from lightning_plugins.eae.mixture import fit_mixture, log_densities, variance_floor

PriorKind = Literal["normal", "gaussian", "mixture"]

_MEMORY_NUMBERS = 2**22


class LatentPrior(nn.Module):
    r"""Distributions of codes to sample from: ``normal``, ``gaussian`` and ``mixture``.

    .. math:: p(z) = N(0, I), \qquad N(\mu, \Sigma), \qquad \sum_k w_k N(\mu_k, \Sigma_k)

    with full covariances. ``remember`` keeps the newest training codes; Gaussian and mixture are fitted to them by
    ``fit``, or by the first use after training went on. Everything stands in buffers, so that a checkpoint carries the
    fitted prior and a resumed run its memory.

    Args:
        latent_dim: dimensions d of a code.
        num_components: number of Gaussians K in the mixture; 10 in Ghosh et al. 2020 and Ghose et al. 2020.
        capacity: how many codes are remembered. By default 10,000, or for d above 419 as many as fit in 16 MiB of
            float32 (4 d bytes each). The fitted prior takes another 4 d² (K + 1) bytes.

    Raises:
        ValueError: an argument is out of range.

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
        must.check(locals(), latent_dim=must.count, num_components=must.count, capacity=must.optional(must.count))
        if capacity is None:
            capacity = max(1, min(10_000, _MEMORY_NUMBERS // latent_dim))
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
        factor = torch.linalg.cholesky(centred.mT @ centred / (len(z) - 1) + variance_floor(centred))
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
            n: number of codes, 0 or more.
            kind: the distribution; fitted to the memory first if it is not, or codes have been remembered since.
            temperature: factor, 0 or more, on the standard deviation. In the mixture it is every component's own, about
                the component's mean; which components are drawn does not change.
            generator: on any device, where the numbers are then drawn; torch's own of this module's device by default.

        Returns:
            ``(n, d)`` on this module's device.

        Raises:
            ValueError: unknown kind, a negative temperature, or too few codes remembered for a fit.
        """
        must.check(locals(), n=must.whole(0), temperature=must.non_negative, generator=must.optional(must.generator))
        self._prepare(kind)
        device = self.mean.device
        source = {"generator": generator, "device": device if generator is None else generator.device}
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        if kind == "mixture":
            weights = self.weights.to(source["device"], dtype)
            # torch refuses to draw none
            chosen = torch.multinomial(weights, max(n, 1), replacement=True, generator=generator)[:n].to(device)
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
                return log_densities(z, self.mean[None].to(dtype), self.factor[None].to(dtype))[:, 0]
            densities = log_densities(z, self.means.to(dtype), self.factors.to(dtype))
            return torch.logsumexp(densities + self.weights.to(dtype).log(), 1)

    def _check_codes(self, z: Tensor) -> None:
        must.tensor()("z", z)
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape (codes, {self.latent_dim}), got {tuple(z.shape)}.")

    def _prepare(self, kind: str) -> None:
        """Fit what is to be fitted before use: here, so that no training step waits for it."""
        must.one_of(PriorKind)("prior", kind)
        if kind == "normal" or self.is_fitted:
            return
        if self.num_remembered < self.num_needed:
            raise ValueError(
                f"prior={kind!r} is fitted to {self.num_needed} codes or more, and training has left "
                f"{self.num_remembered}: train longer, or call fit_prior(dataloader) first."
            )
        self.fit()
