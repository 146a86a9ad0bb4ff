"""The two updates of score identity distillation: what each network is trained on, for one batch.

Shapes: n samples, ``(n, C, H, W)`` images or latents, ``(n,)`` noise levels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_plugins.sid import losses, noise_levels
from lightning_plugins.sid.denoiser import Denoiser

Loss = Literal["sid", "reverse_kl"]
Levels = Literal["edm", "grid"]
Score = Callable[[Tensor, Tensor], Tensor]
"""From noisy images and their levels to denoised images."""
Logits = Callable[[], Tensor]

_ADVERSARIAL = 1e-4  # of SiDA's term beside the distillation's: 0.01 to 100 in its code


class Draws(NamedTuple):
    """Random numbers of an update.

    ``latent`` and ``noise`` ``(n, C, H, W)``, ``sigma`` ``(n,)``, and whose condition is ``dropped`` ``(n,)``.
    """

    latent: Tensor
    noise: Tensor
    sigma: Tensor
    dropped: Tensor


class GeneratorTerms(NamedTuple):
    """What a generated batch is told: ``gradient`` like the images; per sample ``loss``, ``divergence``, ``finite``."""

    gradient: Tensor
    loss: Tensor
    divergence: Tensor
    finite: Tensor


def draw_levels(
    denoiser: Denoiser, n: int, kind: Levels, generator: torch.Generator, *, fake: bool, t_min: float, t_max: float
) -> Tensor:
    """Noise levels ``(n,)`` of an update, each one of the teacher's.

    Args:
        denoiser: of the teacher's grid.
        n: samples.
        kind: ``edm``: the paper's distributions, moved to the teacher's nearest levels; ``grid``: its own timesteps,
            each as likely.
        generator: of the draws.
        fake: for the fake score, whose levels are log-normal, or all of the grid's.
        t_min: thousandths that the generator's levels begin at.
        t_max: and end at.

    Raises:
        ValueError: ``grid`` for a teacher of continuous levels.
    """
    if kind == "grid":
        if denoiser.sigmas is None:
            raise ValueError("noise_levels='grid' needs timesteps, and this teacher's levels have none: use 'edm'.")
        first, last = (0.0, 1000.0) if fake else (t_min, t_max)
        return noise_levels.grid_sigmas(n, denoiser.sigmas, generator=generator, t_min=first, t_max=last)
    device = generator.device
    if fake:
        return denoiser.nearest(noise_levels.fake_score_sigmas(n, generator=generator, device=device))
    sigmas = noise_levels.generator_sigmas(n, generator=generator, t_min=t_min, t_max=t_max, device=device)
    return denoiser.nearest(sigmas)


def fake_score_terms(
    images: Tensor,
    draws: Draws,
    fake: Score,
    kind: Levels,
    sigma_data: float,
    real: Tensor | None = None,
    logits: Logits | None = None,
) -> Tensor:
    """The fake score's loss of each generated image, ``(n,)``; images that are not finite count nothing.

    Args:
        images: ``(n, C, H, W)`` generated, without gradient.
        draws: of this update.
        fake: the fake score in training.
        kind: ``edm`` weighs as EDM does; ``grid`` is plain noise prediction.
        sigma_data: of EDM's weight.
        real: ``(n, C, H, W)`` images of the data, for SiDA.
        logits: SiDA's of the fake score's latest call.
    """
    finite = images.flatten(1).isfinite().all(1)
    images = torch.where(_column(finite, images), images, 0.0)
    denoised = fake(add_noise(images, draws), draws.sigma)
    if kind == "edm":
        loss = losses.fake_score_loss(denoised, images, draws.sigma, sigma_data)
    else:
        loss = (denoised - images).square().flatten(1).sum(1) / draws.sigma**2
    if logits is not None and real is not None:
        of_generated = logits()
        fake(add_noise(real, draws), draws.sigma)
        loss = loss + losses.adversarial_fake_loss(logits(), of_generated, draws.sigma, sigma_data)
    return torch.where(finite, loss, 0.0)


def generator_terms(
    images: Tensor,
    draws: Draws,
    teacher: Score,
    fake: Score,
    *,
    alpha: float,
    kind: Loss = "sid",
    weighting: losses.Weighting = "l1",
    logits: Logits | None = None,
    scale: Tensor | float = 1.0,
) -> GeneratorTerms:
    r"""The generator's loss and its gradient with respect to the images, through both scores' inputs.

    Only that gradient is computed: no parameter of either score gets one, and none is allocated. It is to be handed on
    to the generator as ``(images * gradient).sum()``.

    Args:
        images: ``(n, C, H, W)`` generated; their own graph is left alone.
        draws: of this update.
        teacher: the teacher's denoised images of noisy ones, with its guidance.
        fake: the fake score's.
        alpha: of :func:`~lightning_plugins.sid.losses.generator_loss`.
        kind: ``sid`` or ``reverse_kl``.
        weighting: :math:`\omega`.
        logits: SiDA's of the fake score's latest call; its term is added with SiDA's weights.
        scale: of the loss in this backward pass, as half precision needs; the gradient returned is without it. A tensor
            is a GradScaler's.

    Returns:
        Zero gradients for samples where anything is not finite, so that no process waits for another. With a GradScaler
        a finite loss may have an infinite gradient, which it must see to lower its scale.
    """
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        # Noised twice, so that each score's gradient is summed up by itself: where both agree they cancel exactly.
        ours, theirs = (score(add_noise(leaf, draws), draws.sigma) for score in (teacher, fake))
        if kind == "sid":
            loss = losses.generator_loss(leaf, ours, theirs, alpha, weighting)
        else:
            loss = losses.reverse_kl_loss(leaf, ours, theirs, weighting)
        objective = loss
        if logits is not None:
            weight = losses.l1_weight(leaf.detach(), ours.detach())
            objective = (loss + _ADVERSARIAL * losses.adversarial_generator_loss(logits(), weight)) / 2
        (gradient,) = torch.autograd.grad((objective * scale).sum(), leaf)
    gradient = gradient / scale
    loss, ours, theirs = loss.detach(), ours.detach(), theirs.detach()
    weight = losses.l1_weight(leaf.detach(), ours) if weighting == "l1" else None
    divergence = losses.fisher_divergence(ours, theirs, weight)
    finite = loss.isfinite()
    if not isinstance(scale, Tensor):
        finite = finite & gradient.flatten(1).isfinite().all(1)
    gradient = torch.where(_column(finite, gradient), gradient, 0.0)
    return GeneratorTerms(gradient, loss, divergence, finite)


@contextmanager
def encoder_logits(network: nn.Module) -> Iterator[Logits]:
    """SiDA's discriminator: what the middle of a network says of its latest input, averaged over channels.

    Yields:
        A function that returns the logits ``(n, h, w)`` of the network's latest call.

    Raises:
        ValueError: the network is no U-Net of diffusers.
    """
    if not isinstance(middle := getattr(network, "mid_block", None), nn.Module):
        raise ValueError(f"adversarial=True reads a U-Net's mid_block, which {type(network).__name__} has not.")
    seen: list[Tensor] = []
    hook = middle.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield lambda: seen[-1].float().mean(1)
    finally:
        hook.remove()


def add_noise(images: Tensor, draws: Draws) -> Tensor:
    """``images + sigma noise``, in EDM scaling and float32."""
    return images + _column(draws.sigma, images) * draws.noise


def _column(value: Tensor, images: Tensor) -> Tensor:
    return value.view(-1, *[1] * (images.ndim - 1))
