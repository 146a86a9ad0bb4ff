"""Encoders and decoders: a small one for images of any size, and the convolutional one of the RAE experiments.

An encoder maps images ``(B, C, H, W)`` in [0, 1] to ``(B, num_outputs)``, the last layer linear: what comes after it
(a batch norm, a mean and a log variance) decides the codes' range. A decoder maps ``(B, num_inputs)``, a code and, if
class-conditional, the label's one-hot vector behind it, to images in [0, 1] by a sigmoid, as the RAE code does.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_plugins.core import arguments as must

Network = Literal["mlp", "rae"]

WIDTHS: dict[str, int] = {"mlp": 256, "rae": 128}
_CANVAS = {28: 32, 32: 32, 64: 64}  # image side -> side the convolutions see
_KERNEL = {32: 4, 64: 5}
_START = 8  # side of the decoder's first map


class ChannelsLast(nn.Module):
    """The layout in which convolutions are faster, on activations only: sharded parameters must stay contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)``, the same numbers."""
        return x.contiguous(memory_format=torch.channels_last)


def build_encoder(
    network: Network, image_shape: Sequence[int], num_outputs: int, width: int | None = None
) -> nn.Module:
    """An encoder without a nonlinearity at its end.

    Args:
        network: ``mlp`` has two hidden layers with ReLU. ``rae`` has four convolutions of stride 2 with ``width``
            times 1, 2, 4, 8 channels, batch norm and ReLU, then a linear layer; kernels of 4 for images of 28 (with
            a border of zeros to 32) and 32, and of 5 for 64.
        image_shape: ``(C, H, W)``; ``rae`` takes H = W of 28, 32 or 64.
        num_outputs: d, or 2d for a mean and a log variance.
        width: hidden units (256 by default) or the first layer's channels (128 in the RAE code; any less for tests
            and small machines).

    Returns:
        A module from ``(B, C, H, W)`` to ``(B, num_outputs)``.

    Raises:
        ValueError: unknown network, a size out of range, or images that ``rae`` does not take.

    Source:
        Ghosh et al., "From variational to deterministic autoencoders" (ICLR 2020), the released code. Our
        convolutions before a batch norm have no bias, and images are not moved to [-1, 1]: the norm undoes both.
    """
    width = _checked_width(network, image_shape, width, num_outputs=num_outputs)
    if network == "mlp":
        return nn.Sequential(nn.Flatten(), *_mlp(math.prod(image_shape), width, num_outputs))
    side = _CANVAS[image_shape[1]]
    kernel = _KERNEL[side]
    channels = [image_shape[0], width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = [nn.ZeroPad2d((side - image_shape[1]) // 2), ChannelsLast()]
    for before, after in pairwise(channels):
        conv = nn.Conv2d(before, after, kernel, stride=2, padding=(kernel - 1) // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width * (side // 16) ** 2, num_outputs))


def build_decoder(network: Network, image_shape: Sequence[int], num_inputs: int, width: int | None = None) -> nn.Module:
    """A decoder whose images lie in [0, 1].

    Args:
        network: ``mlp`` mirrors the encoder. ``rae`` has a linear layer to ``8 width`` channels of 8 x 8, transposed
            convolutions of stride 2 with ``width`` times 4, 2 (and 1 for images of 64) channels, batch norm and ReLU,
            and one of stride 1 to the image; the border that the encoder adds to images of 28 is cut off.
        image_shape: ``(C, H, W)``; ``rae`` takes H = W of 28, 32 or 64.
        num_inputs: d, plus the number of classes if class-conditional.
        width: hidden units (256 by default) or the first layer's channels (128 in the RAE code; any less for tests
            and small machines), the same number as the encoder's.

    Returns:
        A module from ``(B, num_inputs)`` to ``(B, C, H, W)``.

    Raises:
        ValueError: unknown network, a size out of range, or images that ``rae`` does not take.

    Source:
        Ghosh et al. 2020, the released code; there is no nonlinearity behind its first layer.
    """
    width = _checked_width(network, image_shape, width, num_inputs=num_inputs)
    if network == "mlp":
        hidden = _mlp(num_inputs, width, math.prod(image_shape))
        return nn.Sequential(*hidden, nn.Unflatten(1, tuple(image_shape)), nn.Sigmoid())  # FSDP2 warns of views
    side = _CANVAS[image_shape[1]]
    kernel = _KERNEL[side]
    padding, odd = (kernel - 1) // 2, kernel % 2
    doublings = round(math.log2(side // _START))
    channels = [8 * width, 4 * width, 2 * width, width][: doublings + 1]
    first = nn.Linear(num_inputs, channels[0] * _START**2)
    layers: list[nn.Module] = [first, nn.Unflatten(1, (channels[0], _START, _START)), ChannelsLast()]
    for before, after in pairwise(channels):
        conv = nn.ConvTranspose2d(before, after, kernel, 2, padding, output_padding=odd, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    border = (side - image_shape[1]) // 2
    crop = (-border, -border - (1 - odd))  # an even kernel of stride 1 leaves one row and column too many
    layers += [nn.ConvTranspose2d(channels[-1], image_shape[0], kernel, 1, padding), nn.ZeroPad2d((*crop, *crop))]
    return nn.Sequential(*layers, nn.Sigmoid())


def decayed_weights(decoder: nn.Module) -> list[Tensor]:
    """What RAE-L2 decays: kernels of transposed convolutions, as its code; without any, of linear layers; no bias."""
    for kind in (nn.ConvTranspose2d, nn.Linear):
        weights = [layer.weight for layer in decoder.modules() if isinstance(layer, kind)]
        if weights:
            return list(dict.fromkeys(weights))  # a shared one is decayed once
    return [*decoder.parameters()]


def _mlp(num_inputs: int, width: int, num_outputs: int) -> list[nn.Module]:
    first, second, last = nn.Linear(num_inputs, width), nn.Linear(width, width), nn.Linear(width, num_outputs)
    return [first, nn.ReLU(), second, nn.ReLU(), last]


def _checked_width(network: str, image_shape: Sequence[int], width: int | None, **sizes: int) -> int:
    must.one_of(Network)("network", network)
    must.image_shape("image_shape", image_shape)
    if network == "rae" and (image_shape[1] != image_shape[2] or image_shape[1] not in _CANVAS):
        raise ValueError(
            f"network='rae' takes images of 28 x 28, 32 x 32 or 64 x 64, got image_shape={tuple(image_shape)}: "
            "resize them, such as by the data's image_size=32, or choose network='mlp'."
        )
    must.optional(must.count)("width", width)
    must.check(sizes, **dict.fromkeys(sizes, must.count))
    return WIDTHS[network] if width is None else width
