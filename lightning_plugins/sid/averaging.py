"""A running mean of a network's weights, whose memory is measured in images."""

import torch
from torch import nn


def half_life_decay(batch_images: int, images_seen: int, half_life: float, ramp_up: float = 0.05) -> float:
    r"""Share of the old mean that stays after a batch.

    .. math:: \beta = 2^{-b / \min(h, r n)}

    Args:
        batch_images: b, images in the batch of all processes.
        images_seen: n, images before it.
        half_life: h, images after which weights count half; 0 keeps no mean.
        ramp_up: r, so that the first images are soon forgotten; 0.05 in the code of SiD and EDM.

    Returns:
        In [0, 1): 0 at the first batch.

    Example:
        >>> round(half_life_decay(256, 10_000_000, 500_000) ** (500_000 / 256), 6)
        0.5
    """
    memory = min(half_life, ramp_up * images_seen)
    return 0.5 ** (batch_images / memory) if memory > 0 else 0.0


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the trained parameters of ``average`` towards those of ``network``; its buffers become the network's.

    Args:
        average: a copy of ``network``; sharded alike if that is sharded (FSDP2).
        network: the network in training; frozen parameters are left alone.
        decay: share of the old values, from :func:`half_life_decay`.
    """
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    old, new = dict(average.named_parameters()), dict(network.named_parameters())
    torch._foreach_lerp_([old[name] for name in names], [new[name].detach() for name in names], 1 - decay)
    for ours, theirs in zip(average.buffers(), network.buffers(), strict=True):
        ours.copy_(theirs)
