"""Finite differences of gradients: how far to move the parameters, for each precision of the forward pass."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.vectors import norm

Difference = Literal["forward", "central"]
Precision = Literal["float64", "float32", "float16", "bfloat16"]


class Displacement(NamedTuple):
    """How far parameters are moved: by ``|h v| = relative * |theta|``, within ``shortest`` and ``longest``.

    Attributes:
        difference: ``"forward"`` or ``"central"``.
        relative: length over the norm of the parameters.
        longest: a length.
        shortest: a length, not above ``longest``.
        least_change: of the gradient, over its norm: the difference of smaller ones is mostly rounding.
    """

    difference: Difference
    relative: float
    longest: float = math.inf
    shortest: float = 0.0
    least_change: float = 0.0


class Step(NamedTuple):
    """A displacement made for a direction ``v``.

    Attributes:
        size: ``h > 0``.
        length: ``|h v|``.
        relative: ``|h v|`` over the norm of the parameters.
    """

    size: float
    length: float
    relative: float


# What was measured best, benchmarks/finite_differences.py: relative * |theta| for small networks, and a length for
# others, since the change of a gradient goes with the length and knows nothing of |theta|.
_BEST: dict[Precision, dict[Difference, tuple[float, float]]] = {
    "float64": {"forward": (1e-7, math.inf), "central": (1e-5, math.inf)},  # parts may be fp32, such as T5's norms
    "float32": {"forward": (1e-4, 3e-3), "central": (1e-3, 5e-3)},
    "float16": {"forward": (1e-2, 1e-2), "central": (3e-2, 2e-2)},
    "bfloat16": {"forward": (3e-2, 3e-2), "central": (1e-1, 3e-2)},
}
# The least for losses with kinks, over which their jumps are averaged: 0.05 is the usual radius of SAM, and what small
# networks of ReLU still train with; forward differences of them need more.
_KINKED: dict[Difference, tuple[float, float]] = {"forward": (3e-2, 0.1), "central": (3e-2, 0.05)}
LONGEST = 0.2  # of displacements that are lengthened because their differences are rounding
# Relative changes of a gradient of which rounding is about a hundredth (fp64, fp32) or a twentieth (half): it is
# four units in the last place of fp32, half of one in half precision, where sums are fp32.
_LEAST_CHANGES: dict[Precision, float] = {"float64": 1e-13, "float32": 5e-5, "float16": 1e-2, "bfloat16": 1e-1}


def step_along(params: Sequence[Tensor], direction: Sequence[Tensor], displacement: Displacement) -> Step | None:
    """The step for a direction; parameters that are all zero count as of norm one.

    Returns:
        ``None`` if there is no direction: its norm is zero or not finite.
    """
    speed = norm(direction).item()
    if not 0 < speed < math.inf:
        return None
    theta = norm(params).item() or 1.0
    length = max(min(displacement.relative * theta, displacement.longest), displacement.shortest)
    return Step(length / speed, length, length / theta)


def best_displacement(
    trainer: Trainer,
    module: nn.Module,
    difference: Difference | Literal["auto"] = "auto",
    kinked: bool | None = False,
    half: torch.dtype | None = None,
) -> Displacement:
    """What was measured best for the precision of the forward pass, and for losses with kinks.

    TF32, which is what GPUs use for convolutions in fp32 unless told otherwise, counts as fp16: its mantissa is as
    short. Every rank must call it, and gets the largest displacement that one of them needs.

    Args:
        trainer: the running trainer, whose precision counts.
        module: the module that is trained; the precision of its parameters counts.
        difference: ``"auto"`` is central where there are kinks or half precision, else forward.
        kinked: whether this rank's loss has kinks (:func:`~lightning_plugins.replay.graph.has_kinks`); ``None``, where
            that is not known, counts as no.
        half: the half precision found in the loss's graph, :func:`~lightning_plugins.replay.graph.half_precision`.
    """
    precision, device = str(trainer.precision), trainer.strategy.root_device
    kinds = list(_BEST)  # from fine to coarse
    if precision.startswith("bf16") or half == torch.bfloat16:
        kind: Precision = "bfloat16"
    elif precision.startswith("16") or half == torch.float16 or _uses_tf32(module, device):
        kind = "float16"
    else:
        dtypes = {param.dtype.to_real() for param in module.parameters() if param.requires_grad}
        kind = "float64" if dtypes == {torch.float64} else "float32"
    kind = kinds[largest_over_ranks(kinds.index(kind), device)]
    kinked_anywhere = bool(largest_over_ranks(int(bool(kinked)), device))
    if difference == "auto":
        difference = "central" if kinked_anywhere or kind in ("float16", "bfloat16") else "forward"
    relative, longest = _BEST[kind][difference]
    if kinked_anywhere:
        relative, longest = max(relative, _KINKED[difference][0]), _KINKED[difference][1]
    return Displacement(difference, relative, longest, least_change=_LEAST_CHANGES[kind])


def _uses_tf32(module: nn.Module, device: torch.device) -> bool:
    """Whether the GPU rounds what it multiplies in fp32 to ten bits."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    return torch.get_float32_matmul_precision() != "highest" or (convolves and torch.backends.cudnn.allow_tf32)
