"""Finite differences of gradients: how far to move the parameters, for each precision of the forward pass."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.vectors import norm

Difference = Literal["forward", "central"]

# Displacement over the norm of the parameters that was measured best for each precision of the forward pass: about
# the square root (forward) and the cube root (central) of its unit roundoff.
_RELATIVE_STEPS: dict[str, dict[Difference, float]] = {
    "float64": {"forward": 1e-7, "central": 1e-5},
    "float32": {"forward": 1e-4, "central": 1e-3},
    "float16": {"forward": 1e-2, "central": 3e-2},
    "bfloat16": {"forward": 3e-2, "central": 1e-1},
}

# The least for losses with kinks, by the figures of benchmarks/relative_step.py in benchmarks/RESULTS.md.
_KINKED_STEPS: dict[Difference, float] = {"forward": 3e-2, "central": 1e-2}


def step_along(params: Sequence[Tensor], direction: Sequence[Tensor], relative_step: float) -> float | None:
    """The step ``h`` with ``|h v| = relative_step * |theta|`` (parameters that are all zero count as of norm one).

    Returns:
        ``None`` if there is no direction: its norm is zero or not finite.
    """
    length = norm(direction).item()
    if length == 0 or not torch.isfinite(torch.tensor(length)):
        return None
    return relative_step * (norm(params).item() or 1.0) / length


def relative_step(
    trainer: Trainer,
    module: nn.Module,
    difference: Difference,
    kinked: bool | None = False,
    half: torch.dtype | None = None,
) -> float:
    """The best relative displacement for finite differences at the precision of the forward pass.

    With kinks (:func:`~lightning_plugins.replay.graph.has_kinks`) larger ones, over which their jumps are averaged.

    TF32, which is what GPUs use for convolutions in fp32 unless told otherwise, counts as fp16: its mantissa is as
    short. Every rank must call it, and gets the largest step that one of them needs.

    Args:
        trainer: the running trainer, whose precision counts.
        module: the module that is trained; the precision of its parameters counts.
        difference: ``"forward"`` or ``"central"``.
        kinked: whether this rank's loss has kinks; ``None``, where that is not known, counts as no.
        half: the half precision found in the loss's graph, :func:`~lightning_plugins.replay.graph.half_precision`.
    """
    precision, device = str(trainer.precision), trainer.strategy.root_device
    kinds = list(_RELATIVE_STEPS)  # from fine to coarse
    if precision.startswith("bf16") or half == torch.bfloat16:
        kind = "bfloat16"
    elif precision.startswith("16") or half == torch.float16 or _uses_tf32(module, device):
        kind = "float16"
    else:
        dtypes = {param.dtype.to_real() for param in module.parameters() if param.requires_grad}
        kind = "float64" if dtypes == {torch.float64} else "float32"
    kind = kinds[largest_over_ranks(kinds.index(kind), device)]
    kinked_anywhere = largest_over_ranks(int(bool(kinked)), device)
    return max(_RELATIVE_STEPS[kind][difference], _KINKED_STEPS[difference] if kinked_anywhere else 0.0)


def _uses_tf32(module: nn.Module, device: torch.device) -> bool:
    """Whether the GPU rounds what it multiplies in fp32 to ten bits."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    return torch.get_float32_matmul_precision() != "highest" or (convolves and torch.backends.cudnn.allow_tf32)
