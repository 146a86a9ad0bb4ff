"""The published networks: what turns an image into input capsules, and each preset's constants.

Every feature network maps images ``(B, C, H, W)`` to capsules ``(B, N, D)`` and has ``grid``, the ``(T, H', W')`` whose
product is N, so that couplings can be drawn over the image plane.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins.capsnet.layers import (
    CapsuleDecoder,
    PrimaryCapsules,
    exponential_squash,
    group_channels,
    keras_normal_,
)
from lightning_plugins.capsnet.routing import RoutingKind
from lightning_plugins.core import arguments as must

PresetName = Literal["sabour2017_paper", "sabour2017_official", "su2018", "efficient"]


@dataclass(frozen=True)
class Preset:
    """The constants of one published CapsNet.

    ``network`` chooses the features and ``official_init`` the released code's start; the other fields are arguments of
    :class:`~lightning_plugins.CapsNet`, where each is explained.
    """

    network: Literal["sabour", "su", "efficient"] = "sabour"
    channels: int = 256
    kernel_size: int = 9
    num_types: int = 32
    primary_dim: int = 8
    capsule_dim: int = 16
    routing: RoutingKind | Literal["self_attention"] = "dynamic"
    iterations: int = 3
    squash_scale: float = 1.0
    share_weights: bool = False
    leaky: bool = False
    downweight: float = 0.5
    margin_weight: float = 1.0
    reconstruction_weight: float = 0.0005
    lr: float = 1e-3
    lr_decay: float = 0.96
    lr_decay_steps: int = 2000
    lr_min: float = 0.0
    official_init: bool = False


PRESETS: dict[str, Preset] = {
    # Sabour et al. 2017, section 4: 8,215,568 parameters on 28 x 28 x 1. The decay is the released code's.
    "sabour2017_paper": Preset(),
    # The released code: margin loss halved and averaged over the ten classes, primary layer divided by the number of
    # types, biases of 0.1 everywhere, truncated normal weights, lowest rate 1e-6.
    "sabour2017_official": Preset(margin_weight=0.05, lr_min=1e-6, official_init=True),
    # kexue.fm/archives/4819 and 5112: four convolutions, shared transforms, k-means routing, no decoder.
    "su2018": Preset(
        network="su",
        channels=64,
        kernel_size=3,
        num_types=1,
        primary_dim=128,
        routing="kmeans",
        squash_scale=0.5,
        share_weights=True,
        downweight=0.25,
        reconstruction_weight=0.0,
        lr_decay=1.0,
    ),
    # Mazzia et al. 2021: 161,824 parameters without the decoder; rate 5e-4, decayed by 0.97 per epoch of MNIST; lowest
    # rate and start by the released code.
    "efficient": Preset(
        network="efficient",
        channels=32,
        kernel_size=9,
        num_types=16,
        primary_dim=8,
        routing="self_attention",
        iterations=1,
        lr=5e-4,
        lr_decay=0.97,
        lr_decay_steps=3750,
        lr_min=5e-5,
    ),
}


def resolve_preset(name: str, *, gradient: str = "full", **overrides: Any) -> Preset:
    """The preset called ``name`` with every override that is not ``None``.

    An iterated routing in ``efficient`` gets the paper's three iterations if none are given.

    Args:
        name: one of the names in ``PRESETS``.
        gradient: what CapsNet was given, ``full`` or ``last``; only looked at.
        **overrides: values of the preset's fields; None keeps the preset's.

    Raises:
        ValueError: no such preset, or the overrides are out of range or contradict its routing.
    """
    must.one_of(PresetName)("preset", name)
    given = {key: value for key, value in overrides.items() if value is not None}
    preset = replace(PRESETS[name], **given)
    if preset.routing == "self_attention":
        if preset.network != "efficient":
            raise ValueError(f"routing='self_attention' needs preset='efficient', got preset={name!r}.")
        idle = given.keys() & {"squash_scale", "leaky", "share_weights"}
        if idle := idle | ({"gradient"} if gradient != "full" else set()):
            raise ValueError(f"{', '.join(sorted(idle))} has no meaning with routing='self_attention'; leave it out.")
        if preset.iterations != 1:
            raise ValueError(f"iterations={preset.iterations} with routing='self_attention', a single pass; use 1.")
    elif PRESETS[name].routing == "self_attention" and "iterations" not in given:
        preset = replace(preset, iterations=Preset.iterations)
    _check_ranges(preset)
    return preset


def _check_ranges(preset: Preset) -> None:
    sizes = ("iterations", "channels", "kernel_size", "num_types", "primary_dim", "capsule_dim", "lr_decay_steps")
    weights = ("downweight", "margin_weight", "reconstruction_weight", "lr_min")
    must.check(
        vars(preset),
        **dict.fromkeys(sizes, must.count),
        **dict.fromkeys(weights, must.non_negative),
        **dict.fromkeys(("lr", "squash_scale"), must.positive),
        **dict.fromkeys(("share_weights", "leaky"), must.flag),
        routing=must.one_of([*get_args(RoutingKind), "self_attention"]),
        lr_decay=must.number(above=0, most=1, why="1 keeps the rate constant"),
    )


class SabourFeatures(nn.Module):
    """One convolution with ReLU, then primary capsules of stride 2 (Sabour et al. 2017, section 4)."""

    def __init__(self, image_shape: Sequence[int], preset: Preset) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], preset.channels, preset.kernel_size)
        self.primary = PrimaryCapsules(
            preset.channels,
            preset.num_types,
            preset.primary_dim,
            preset.kernel_size,
            squash_scale=preset.squash_scale,
            divide_by_types=preset.official_init,
        )
        k = preset.kernel_size
        self.grid = (preset.num_types, *((size - 2 * k + 1) // 2 + 1 for size in image_shape[1:]))
        _check_grid(self.grid, image_shape, "kernel_size", k)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to capsules ``(B, N, D)``."""
        return self.primary(_channels_last(self.conv(x)).relu())


class SuFeatures(nn.Module):
    """Four 3 x 3 convolutions with one pooling; each place of the last map is a capsule (kexue.fm/archives/4819)."""

    def __init__(self, image_shape: Sequence[int], preset: Preset) -> None:
        super().__init__()
        width, depth = preset.channels, preset.num_types * preset.primary_dim
        self.num_types = preset.num_types
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], width, preset.kernel_size),
            nn.ReLU(),
            nn.Conv2d(width, width, preset.kernel_size),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, depth, preset.kernel_size),
            nn.ReLU(),
            nn.Conv2d(depth, depth, preset.kernel_size),
            nn.ReLU(),
        )
        shrink = 2 * (preset.kernel_size - 1)
        self.grid = (preset.num_types, *((size - shrink) // 2 - shrink for size in image_shape[1:]))
        _check_grid(self.grid, image_shape, "kernel_size", preset.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to capsules ``(B, N, D)``."""
        return group_channels(self.layers(_channels_last(x)), self.num_types)


class EfficientFeatures(nn.Module):
    """Four convolutions with batch norm, then a depthwise one that leaves a capsule per group (Efficient-CapsNet)."""

    def __init__(self, image_shape: Sequence[int], preset: Preset) -> None:
        super().__init__()
        c, depth = preset.channels, preset.num_types * preset.primary_dim
        self.num_types = preset.num_types
        sizes = [(image_shape[0], c, 5, 1), (c, 2 * c, 3, 1), (2 * c, 2 * c, 3, 1), (2 * c, depth, 3, 2)]
        self.layers = nn.Sequential(*(_conv_relu_norm(*size) for size in sizes))
        self.primary = nn.Conv2d(depth, depth, preset.kernel_size, groups=depth)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            keras_normal_(conv.weight, 2 / conv.weight[0].numel())  # He normal
            nn.init.zeros_(conv.get_parameter("bias"))
        nn.init.xavier_uniform_(self.primary.weight)  # Keras' default, which the authors leave for this one
        self.grid = (preset.num_types, *((size - 9) // 2 + 1 - preset.kernel_size for size in image_shape[1:]))
        _check_grid(self.grid, image_shape, "kernel_size", preset.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to capsules ``(B, N, D)``."""
        return exponential_squash(group_channels(self.primary(self.layers(_channels_last(x))), self.num_types))


def _channels_last(x: Tensor) -> Tensor:
    """The layout in which convolutions are faster, on activations only: sharded parameters must stay contiguous."""
    return x.contiguous(memory_format=torch.channels_last)


def _conv_relu_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride)
    return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01))


def _check_grid(grid: Sequence[int], image_shape: Sequence[int], argument: str, value: int) -> None:
    if min(grid) < 1:
        C, H, W = image_shape
        raise ValueError(
            f"image_shape=({C}, {H}, {W}) is too small for {argument}={value}: no capsule is left; "
            "enlarge the images or lower it."
        )


@torch.no_grad()
def initialize_as_official(features: SabourFeatures | None, *others: nn.Module | None) -> None:
    """The released code's start: truncated normal weights (0.05 in the first convolution, else 0.1), biases 0.1.

    Args:
        features: the preset's network, whose first convolution has a start of its own; None where the user's stands.
        *others: further parts, or None for such as there are not.
    """
    first = None if features is None else features.conv
    for module in (m for root in (features, *others) if root is not None for m in root.modules()):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter):
            std = 0.05 if module is first else 0.1
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(bias, nn.Parameter):
            nn.init.constant_(bias, 0.1)


@torch.no_grad()
def initialize_as_efficient(decoder: CapsuleDecoder) -> None:
    """The start of Efficient-CapsNet's code: Keras' He normal, in the last layer Glorot normal; biases 0."""
    layers = [layer for layer in decoder.layers if isinstance(layer, nn.Linear)]
    for layer in layers:
        fan_in, fan_out = layer.in_features, layer.out_features
        keras_normal_(layer.weight, 2 / (fan_in + fan_out) if layer is layers[-1] else 2 / fan_in)
        nn.init.zeros_(layer.bias)
