"""Algorithm 1 of score identity distillation: what fake score and generator are trained on, for one batch.

In the paper's symbols, for n samples:

- z, eps ``(n, C, H, W)``: unit noise, of the generator and of the diffusion;
- sigma ``(n,)``: noise levels, from :mod:`~lightning_plugins.sid.noise_levels`; sigma_t the same as ``(n, 1, 1, 1)``;
- G: the generator, the network at the one level sigma_init, from z to images or latents x_g; the scale of z is in
  :meth:`StudentNetworks.generate <lightning_plugins.sid.networks.StudentNetworks.generate>`;
- f_phi, f_psi: teacher and fake score, from noisy images x_t and their levels to denoised ones d_phi and d_psi.

Source: Zhou et al. 2024 (arXiv 2404.04057), algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_plugins.sid import adversarial, losses
from lightning_plugins.sid.adversarial import Logits
from lightning_plugins.sid.noise_levels import Levels

Loss = Literal["sid", "reverse_kl"]
Generate = Callable[[Tensor], Tensor]
"""From unit noise to generated images."""
Score = Callable[[Tensor, Tensor], Tensor]
"""From noisy images and their levels to denoised images."""

_GENERATOR_SCALE = 100.0  # of the generator's loss in the paper's code; with Adam it matters through eps and clipping


@dataclass(frozen=True, kw_only=True)
class Distillation:
    r"""The two updates of a batch, in the paper's setting by default.

    Attributes:
        alpha: which member of the family; :func:`~lightning_plugins.sid.losses.generator_loss` says what it does.
        kind: ``sid``, or ``reverse_kl`` for comparison.
        weighting: ``l1``, the paper's :math:`\omega`, or ``none``.
        fake_levels: ``edm`` weighs the fake score's noise levels as EDM does; ``grid`` is plain noise prediction.
        sigma_data: standard deviation of the images in EDM's weight; 0.5 in EDM.
    """

    alpha: float = 1.2
    kind: Loss = "sid"
    weighting: losses.Weighting = "l1"
    fake_levels: Levels = "edm"
    sigma_data: float = 0.5

    def fake_score_loss(
        self, G: Generate, f_psi: Score, draws: "Draws", real: Tensor | None = None, logits: Logits | None = None
    ) -> Tensor:
        """Losses ``(n,)`` of the fake score, which learns to denoise what the generator makes; ``real`` for SiDA."""
        z, eps, sigma, sigma_t = draws.latent, draws.noise, draws.sigma, draws.sigma_t
        with torch.no_grad():
            x_g, finite = _finite_samples(G(z))
        x_t = x_g + sigma_t * eps
        if self.fake_levels == "edm":
            loss = losses.fake_score_loss(f_psi(x_t, sigma), x_g, sigma, self.sigma_data)
        else:
            loss = (f_psi(x_t, sigma) - x_g).square().flatten(1).sum(1) / sigma**2
        if logits is not None and real is not None:
            of_generated = logits()
            f_psi(real + sigma_t * eps, sigma)
            loss = loss + adversarial.fake_loss(logits(), of_generated, sigma, self.sigma_data)
        return torch.where(finite, loss, 0.0)

    def generator_terms(
        self,
        G: Generate,
        f_phi: Score,
        f_psi: Score,
        draws: "Draws",
        logits: Logits | None = None,
        scale: Tensor | float = 1.0,
    ) -> "GeneratorTerms":
        """The generator's loss, whose gradient goes through both scores' inputs; ``scale`` is a GradScaler's."""
        z, eps, sigma, sigma_t = draws.latent, draws.noise, draws.sigma, draws.sigma_t
        x_g = G(z)
        x = x_g.detach().requires_grad_()  # only the gradient by the images is computed: no parameter's of a score
        with torch.enable_grad():
            # Noised twice, so that each score's gradient is summed up by itself: where both agree they cancel exactly.
            d_phi, d_psi = f_phi(x + sigma_t * eps, sigma), f_psi(x + sigma_t * eps, sigma)
            if self.kind == "sid":
                loss = losses.generator_loss(x, d_phi, d_psi, self.alpha, self.weighting)
            else:
                loss = losses.reverse_kl_loss(x, d_phi, d_psi, self.weighting)
            if logits is None:
                total = loss
            else:
                total = adversarial.mixed(loss, logits(), losses.l1_weight(x, d_phi), x[0].numel())
            (gradient,) = torch.autograd.grad((total * scale).sum(), x)
        return _terms(x_g, gradient / scale, loss, d_phi, d_psi, self.weighting, scaled=isinstance(scale, Tensor))


class Draws(NamedTuple):
    """Random numbers of an update.

    ``latent`` and ``noise`` ``(n, C, H, W)``, ``sigma`` ``(n,)``, and whose condition is ``dropped`` ``(n,)``.
    """

    latent: Tensor
    noise: Tensor
    sigma: Tensor
    dropped: Tensor

    @property
    def sigma_t(self) -> Tensor:
        """The levels with the dimensions of images, ``(n, 1, 1, 1)``."""
        return _column(self.sigma, self.noise)


class GeneratorTerms(NamedTuple):
    """Of each sample ``(n,)``: what to differentiate by the generator's parameters, and without gradient what to log.

    ``objective`` has the gradient of 100 times the loss, the factor of the paper's code. Samples where anything is not
    ``finite`` have zeros, so that no process waits for another; with a GradScaler, which must see it to lower its
    scale, a finite loss may have an infinite gradient.
    """

    objective: Tensor
    loss: Tensor
    divergence: Tensor
    finite: Tensor


@torch.no_grad()
def _terms(
    x_g: Tensor, gradient: Tensor, loss: Tensor, d_phi: Tensor, d_psi: Tensor, weighting: losses.Weighting, scaled: bool
) -> GeneratorTerms:
    """What a generator's update needs of the gradient by its images, ``(n, C, H, W)`` as they are."""
    weight = losses.l1_weight(x_g, d_phi) if weighting == "l1" else None
    divergence = losses.fisher_divergence(d_phi, d_psi, weight)
    finite = loss.isfinite()
    if not scaled:
        finite = finite & gradient.flatten(1).isfinite().all(1)
    gradient = torch.where(_column(finite, gradient), gradient, 0.0)
    with torch.enable_grad():
        objective = _GENERATOR_SCALE * (x_g.nan_to_num() * gradient).flatten(1).sum(1)
    loss, divergence = (torch.where(finite, value, 0.0) for value in (loss, divergence))
    return GeneratorTerms(objective, loss, divergence, finite)


def _finite_samples(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images with zeros in place of samples that are not finite, and which are ``(n,)``."""
    finite = images.flatten(1).isfinite().all(1)
    return torch.where(_column(finite, images), images, 0.0), finite


def _column(value: Tensor, images: Tensor) -> Tensor:
    return value.view(-1, *[1] * (images.ndim - 1))
