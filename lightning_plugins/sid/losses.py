r"""Score identity distillation: its two losses, the weight and the figure that belong to them, and a relative.

A generator's images :math:`x_g` are noised as in EDM, :math:`x_t = x_g + \sigma n`. The frozen teacher gives
:math:`f_\phi(x_t)`, the mean of clean images behind :math:`x_t`; the fake score network learns the same of the
generator's images, :math:`f_\psi(x_t)`. Both are images, not scores: :math:`S = (f - x_t) / \sigma^2`.

Shapes: B samples, ``...`` their dimensions, ``(C, H, W)`` for images. Every loss returns ``(B,)``, summed over a
sample's dimensions, so that a caller can weight, drop and average samples.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must

Weighting = Literal["l1", "none"]

_WEIGHTING, _TENSOR = must.one_of(Weighting), must.tensor(dtype="any")
_SIGMA_DATA = must.number(1e-6, why="its inverse square is a factor of the weight, which overflows in fp32")

_LEAST_ERROR = 1e-5  # of mean|x_g - f_phi|, as in the authors' code


def fake_score_loss(d_fake: Tensor, x_g: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    r"""Teach the fake score network to denoise generated images.

    .. math:: L_\psi = \lambda(\sigma) |f_\psi(x_t) - x_g|^2, \quad
        \lambda = \frac{\sigma^2 + \sigma_d^2}{(\sigma \sigma_d)^2}

    Args:
        d_fake: ``(B, ...)`` denoised by the fake score network.
        x_g: ``(B, ...)`` generated under ``torch.no_grad()``.
        sigma: ``(B,)`` noise levels.
        sigma_data: standard deviation of the images; 0.5 in EDM.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: shapes that differ, half precision, or images with a gradient.

    Source: Zhou et al. 2024 (arXiv 2404.04057), algorithm 1; weight of EDM (arXiv 2206.00364).
    """
    _check_images(d_fake=d_fake, x_g=x_g)
    if x_g.requires_grad:
        raise ValueError("fake_score_loss: x_g carries a gradient, which would train the generator; use no_grad there.")
    error = d_fake - x_g
    return edm_weight(sigma, sigma_data) * _dot(error, error)


def generator_loss(
    x_g: Tensor, d_teacher: Tensor, d_fake: Tensor, alpha: float = 1.2, weighting: Weighting = "l1"
) -> Tensor:
    r"""Pull the generator towards the teacher's distribution: SiD's L2 - alpha L1.

    .. math::
        L_\alpha = \omega \left[ (1 - \alpha) |\delta|^2 + \langle \delta, f_\psi - x_g \rangle \right], \quad
        \delta = f_\phi(x_t) - f_\psi(x_t)

    Gradients must flow through ``x_g`` *and* through both networks' input; freeze the networks' parameters. (With
    both scores cut, the gradient is that of :func:`reverse_kl_loss`.)

    Which alpha, where F is the Fisher divergence E|S_phi - S_psi|^2 and the weight depends on the noise level alone:
    the value is (1 - alpha) F, so that at alpha = 1 it swings around 0 and says nothing of progress (watch
    :func:`fisher_divergence`), and 2 grad L = grad F - (2 alpha - 1) grad E|S_phi - S_psi|^2 with the fake score cut.

    - 0.5: grad F itself, if the fake score is exact: the unbiased choice.
    - 1: the gradient of F with its sampling distribution cut (only the scores are compared, where the images lie now).
    - 1.2: the paper's; it pushes beyond. It asks for a fake score that keeps up (small rates, a warm start, or several
      fake steps): with one that lags, the gradient turns away from grad F the more the larger alpha is.

    All agree to first order near the optimum, where the gradient is 0 for every alpha.

    Args:
        x_g: ``(B, ...)`` generated, float32 or wider.
        d_teacher: ``(B, ...)`` denoised by the teacher.
        d_fake: ``(B, ...)`` denoised by the fake score network.
        alpha: 1.2 in the paper (1 for AFHQv2), 1 in SiDA and SiD-LSG; 1.5 diverges there.
        weighting: ``"l1"`` multiplies by :func:`l1_weight`; ``"none"`` leaves 1, for a weight of one's own.

    Returns:
        ``(B,)``. The authors train with 100 times its mean; under Adam that matters for eps and clipping only.

    Raises:
        ValueError: shapes that differ, half precision, a score that was cut off from its input, unknown weighting.

    Source: Zhou et al. 2024 (arXiv 2404.04057), algorithm 1; alpha = 0.5: kexue.fm/archives/10567.
    """
    _check_images(x_g=x_g, d_teacher=d_teacher, d_fake=d_fake)
    must.finite("alpha", alpha)
    if torch.is_grad_enabled() and x_g.requires_grad and not (d_teacher.requires_grad and d_fake.requires_grad):
        raise ValueError(
            "generator_loss: d_teacher and d_fake must keep their gradient with respect to x_t, else another loss is "
            "trained; freeze the networks' parameters instead of using no_grad or detach."
        )
    delta = d_teacher - d_fake
    loss = (1 - alpha) * _dot(delta, delta) + _dot(delta, d_fake - x_g)
    return loss * l1_weight(x_g, d_teacher) if _weighted(weighting) else loss


def l1_weight(x_g: Tensor, d_teacher: Tensor) -> Tensor:
    r"""The paper's weight, :math:`\omega = 1 / \mathrm{mean}|x_g - f_\phi|`: ``(B,)``, constant, at most 1e5.

    It depends on the noise behind :math:`x_t` and not on its level alone, so that no member of the family is exactly
    unbiased with it; where both scores agree the loss is at rest all the same.

    Args:
        x_g: ``(B, ...)`` generated.
        d_teacher: ``(B, ...)`` denoised by the teacher.

    Source: Zhou et al. 2024 (arXiv 2404.04057); DMD (arXiv 2311.18828).
    """
    with torch.no_grad():
        return 1 / (x_g - d_teacher).abs().flatten(1).mean(1).clamp(min=_LEAST_ERROR)


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    r"""EDM's weight of noise levels, :math:`\lambda = (\sigma^2 + \sigma_d^2) / (\sigma \sigma_d)^2`: ``(B,)``.

    Args:
        sigma: ``(B,)`` noise levels.
        sigma_data: standard deviation of the images; 0.5 in EDM.

    Raises:
        ValueError: levels of another shape, or a deviation that is not positive.

    Source: Karras et al. 2022 (arXiv 2206.00364) table 1.
    """
    _SIGMA_DATA("sigma_data", sigma_data)
    _TENSOR("sigma", sigma)
    if sigma.ndim != 1:
        raise ValueError(f"sigma must hold one noise level a sample, (B,), got {tuple(sigma.shape)}.")
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def fisher_divergence(d_teacher: Tensor, d_fake: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""How far the two denoisers are apart, :math:`\omega |\delta|^2`: the figure that shows progress.

    It is 0 at the optimum and falls towards it, which the generator's loss does not. Do not train on it: its gradient
    with the fake score held constant (the naive L1) collapses onto few modes.

    Args:
        d_teacher: ``(B, ...)`` denoised by the teacher.
        d_fake: ``(B, ...)`` denoised by the fake score network.
        weight: ``(B,)``, such as :func:`l1_weight`; ``sigma ** -4`` makes it the divergence of scores. None: 1.

    Returns:
        ``(B,)``, at least 0.

    Raises:
        ValueError: shapes that differ, or half precision.
    """
    _check_images(d_teacher=d_teacher, d_fake=d_fake)
    must.optional(_TENSOR)("weight", weight)
    delta = d_teacher - d_fake
    return _dot(delta, delta) if weight is None else weight * _dot(delta, delta)


def reverse_kl_loss(x_g: Tensor, d_teacher: Tensor, d_fake: Tensor, weighting: Weighting = "l1") -> Tensor:
    r"""Distribution matching by the reverse KL divergence (Diff-Instruct, DMD), for comparison.

    .. math:: L = \omega \langle [f_\psi - f_\phi], x_g \rangle

    with the brackets constant. Only the gradient means something, the value does not.

    Args:
        x_g: ``(B, ...)`` generated.
        d_teacher: ``(B, ...)`` denoised by the teacher; ``torch.no_grad()`` saves its backward.
        d_fake: ``(B, ...)`` denoised by the fake score network; ``torch.no_grad()`` saves its backward.
        weighting: ``"l1"`` is DMD's; ``"none"`` leaves 1: times ``sigma ** -2`` it is the gradient of the divergence.

    Returns:
        ``(B,)``.

    Source: Luo et al. 2023 (arXiv 2305.18455); Yin et al. 2024 (DMD, arXiv 2311.18828).
    """
    _check_images(x_g=x_g, d_teacher=d_teacher, d_fake=d_fake)
    loss = _dot((d_fake - d_teacher).detach(), x_g)
    return loss * l1_weight(x_g, d_teacher) if _weighted(weighting) else loss


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample: ``(B,)``."""
    return (a * b).flatten(1).sum(1)


def _weighted(weighting: str) -> bool:
    _WEIGHTING("weighting", weighting)
    return weighting == "l1"


def _check_images(**images: Tensor) -> None:
    """All of one shape, and precise enough to be subtracted."""
    must.check(images, **dict.fromkeys(images, _TENSOR))
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) < 2:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"The images must have one shape (B, ...), got {told}.")
    for name, image in images.items():
        if image.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {image.dtype}: differences of denoised images drown in its rounding; let only the network "
                "run in lower precision, and widen its output."
            )
