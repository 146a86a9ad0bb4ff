"""SiDA: the fake score's encoder also tells real images from generated ones, and the generator learns from that.

Source: Zhou et al. 2024 (SiDA, arXiv 2410.14919) and the authors' code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_plugins.sid.losses import edm_weight

Logits = Callable[[], Tensor]
"""What the discriminator says of the network's latest call, ``(n, h, w)``."""

_LOGIT_LIMIT = 10.0
_SHARE = 1e-4  # of the adversarial term beside the distillation's: 0.01 to 100 in its code


@contextmanager
def encoder_logits(network: nn.Module) -> Iterator[Logits]:
    """The discriminator: what the middle of a U-Net says of its input, averaged over channels.

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
    hook = middle.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield lambda: seen[-1].float().mean(1)
    finally:
        hook.remove()


def generator_loss(logits: Tensor, weight: Tensor) -> Tensor:
    r"""The generator's second term: its noised images shall look real.

    .. math:: L = \omega \; \mathrm{mean}\, \mathrm{BCE}(\mathrm{clamp}(D(x_t), -10, 10), 1)

    Args:
        logits: ``(B,)`` or ``(B, ...)`` of generated images, with gradient, which ends at +-10.
        weight: ``(B,)``, the :func:`~lightning_plugins.sid.losses.l1_weight` of the same samples.

    Returns:
        ``(B,)``, the mean over a sample's logits.
    """
    return weight * _mean(softplus(-logits.float().clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)))


def mixed(distillation: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """Half and half: SiDA minimises 50 times the mean of the distillation's loss and 0.005 times that of the other.

    Args:
        distillation: ``(B,)`` losses of the distillation; alpha is 1 in SiDA.
        logits: ``(B,)`` or ``(B, ...)`` of generated images at the same noise.
        weight: ``(B,)``, the :func:`~lightning_plugins.sid.losses.l1_weight` of the same samples.

    Returns:
        ``(B,)``, by the hundredth part.
    """
    return (distillation + _SHARE * generator_loss(logits, weight)) / 2


def fake_loss(real_logits: Tensor, fake_logits: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    r"""The fake score's second term, to be added as it is: its encoder tells real images from generated ones.

    .. math:: L = \tfrac12 \lambda(\sigma) \left[\mathrm{BCE}(D(y_t), 1) + \mathrm{BCE}(D(x_t), 0)\right]

    with the weight of :func:`~lightning_plugins.sid.losses.fake_score_loss`.

    Args:
        real_logits: ``(B,)`` or ``(B, ...)`` of real images with noise of the same levels.
        fake_logits: ``(B,)`` or ``(B, ...)`` of generated images.
        sigma: ``(B,)`` noise levels.
        sigma_data: standard deviation of the images; 0.5 in EDM.

    Returns:
        ``(B,)``, the mean over a sample's logits.
    """
    error = _mean(softplus(-real_logits.float())) + _mean(softplus(fake_logits.float()))
    return edm_weight(sigma, sigma_data) * error / 2


def _mean(logits: Tensor) -> Tensor:
    """Of each sample, which may have one alone: ``(B,)``."""
    return logits.reshape(len(logits), -1).mean(1)
