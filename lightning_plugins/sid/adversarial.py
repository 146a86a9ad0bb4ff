"""SiDA: the fake score's encoder also tells real images from generated ones, and the generator learns from that.

Source: Zhou et al. 2024 (SiDA, arXiv 2410.14919) and the authors' code for EDM's teachers. There the binary
cross-entropy is averaged over the part of a batch that a process has at once before the weights of its samples multiply
it; here each sample's own is weighed, so that no number hangs on how a batch is cut. For one sample both are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_plugins.sid.losses import edm_weight

Logits = Callable[[], Tensor]
"""What the discriminator says of the network's latest call, ``(n, h, w)``."""

_LOGIT_LIMIT = 10.0
_SHARE = 1e-4  # of the adversarial term beside the distillation's: 0.01 to 100 in its code


class Schedule(NamedTuple):
    """What SiDA does when, in images seen, and how it clips; 0 is for at once, or not at all."""

    generator_after_images: int
    adversarial_after_images: int
    fake_clip_value: float


_AUTHORS = Schedule(100_000, 200_000, 1.0)


def schedule(
    adversarial: bool,
    generator_after_images: int | None,
    adversarial_after_images: int | None,
    fake_clip_value: float | None,
) -> Schedule:
    """SiD's arguments with the authors' values where none is given; nothing of it if it is not adversarial."""
    authors = _AUTHORS if adversarial else Schedule(0, 0, 0.0)
    return Schedule(
        authors.generator_after_images if generator_after_images is None else generator_after_images,
        authors.adversarial_after_images if adversarial_after_images is None else adversarial_after_images,
        authors.fake_clip_value if fake_clip_value is None else fake_clip_value,
    )


@contextmanager
def encoder_logits(network: nn.Module) -> Iterator[Logits]:
    """The discriminator: what a U-Net's encoder says of its input, averaged over channels.

    The encoder ends where the middle block begins, which in the authors' networks is a part of the decoder.

    Args:
        network: a U-Net of diffusers.

    Yields:
        A function that returns the logits ``(n, h, w)`` of the network's latest call.

    Raises:
        ValueError: the network is no U-Net of diffusers.
    """
    if not isinstance(middle := getattr(network, "mid_block", None), nn.Module):
        raise ValueError(f"adversarial=True reads a U-Net's mid_block, which {type(network).__name__} has not.")
    seen: list[Tensor] = []
    hook = middle.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield lambda: _wide(seen[-1]).mean(1)
    finally:
        hook.remove()


def generator_loss(logits: Tensor, weight: Tensor, size: int) -> Tensor:
    r"""The generator's second term: its noised images shall look real.

    .. math:: L = \omega \; C H W \; \mathrm{mean}\, \mathrm{BCE}(\mathrm{clamp}(D(x_t), -10, 10), 1)

    Args:
        logits: ``(B,)`` or ``(B, ...)`` of generated images, with gradient, which ends at +-10.
        weight: ``(B,)``, the :func:`~lightning_plugins.sid.losses.l1_weight` of the same samples.
        size: values of an image, C H W: the distillation's loss is a sum over them.

    Returns:
        ``(B,)``, the mean over a sample's logits times the size.
    """
    return weight * size * _mean(softplus(-_wide(logits).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)))


def mixed(distillation: Tensor, logits: Tensor, weight: Tensor, size: int) -> Tensor:
    r"""Half and half: SiDA minimises 50 times the mean of the distillation's loss and 0.005 times that of the other.

    .. math:: 50 \; \omega \sum_{CHW} \delta (f_\psi - x_g) \; + \; 0.005 \; \omega \; C H W \; \mathrm{mean}\,
              \mathrm{BCE}(D(x_t), 1)

    Both grow with an image's values, so that their ratio does not hang on its size: for each value of an image the
    cross-entropy has 1e-4 of the weight of the distillation's product.

    Args:
        distillation: ``(B,)`` losses of the distillation, sums over C, H, W; alpha is 1 in SiDA.
        logits: ``(B,)`` or ``(B, ...)`` of generated images at the same noise.
        weight: ``(B,)``, the :func:`~lightning_plugins.sid.losses.l1_weight` of the same samples.
        size: values of an image, C H W.

    Returns:
        ``(B,)``, by the hundredth part.
    """
    return (distillation + _SHARE * generator_loss(logits, weight, size)) / 2


def fake_loss(real_logits: Tensor, fake_logits: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    r"""The fake score's second term, to be added as it is: its encoder tells real images from generated ones.

    .. math:: L = \tfrac12 \lambda(\sigma) \left[\mathrm{BCE}(D(y_t), 1) + \mathrm{BCE}(D(x_t), 0)\right]

    with the weight of :func:`~lightning_plugins.sid.losses.fake_score_loss`, beside whose sum over C, H, W it stands as
    a mean: unlike the generator's, the authors do not multiply it by an image's size.

    Args:
        real_logits: ``(B,)`` or ``(B, ...)`` of real images with noise of the same levels.
        fake_logits: ``(B,)`` or ``(B, ...)`` of generated images.
        sigma: ``(B,)`` noise levels.
        sigma_data: standard deviation of the images; 0.5 in EDM.

    Returns:
        ``(B,)``, the mean over a sample's logits.
    """
    error = _mean(softplus(-_wide(real_logits))) + _mean(softplus(_wide(fake_logits)))
    return edm_weight(sigma, sigma_data) * error / 2


def _wide(logits: Tensor) -> Tensor:
    """In single precision at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(logits: Tensor) -> Tensor:
    """Of each sample, which may have one alone: ``(B,)``."""
    return logits.reshape(len(logits), -1).mean(1)
