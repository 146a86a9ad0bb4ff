"""Setups in which GradientPenalty would train something else, each with its sentence."""

import math
from typing import Literal, Protocol

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_plugins.callbacks.checked_steps import Check
from lightning_plugins.callbacks.gradient_penalty.term import PenaltyNorm
from lightning_plugins.callbacks.piecewise import Points, check_points
from lightning_plugins.callbacks.run_checks import (
    require_automatic_optimization,
    require_plain_optimizers,
    require_strategy,
)
from lightning_plugins.core import arguments as must
from lightning_plugins.core.lightning_internals import compresses_gradients
from lightning_plugins.replay.differences import Difference
from lightning_plugins.replay.twice import why_not_exact

Engine = Literal["finite_difference", "exact", "auto"]
Scope = Literal["step", "microbatch"]

_NAME = "GradientPenalty"
CURE = "call gradient_penalty_backward(...) in training_step instead of manual_backward"
_CHOICES = {
    "norm": PenaltyNorm,
    "engine": Engine,
    "scope": Scope,
    "difference": Literal["auto", Difference],
    "check": Check,
}
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


class Arguments(Protocol):
    """What is asked of a penalty here: the arguments of its constructor, as attributes."""

    coefficient: float | None
    match_lr: float | None
    norm: PenaltyNorm
    engine: Engine
    scope: Scope
    difference: Difference | Literal["auto"]
    relative_step: float | Literal["auto"]
    every_n_steps: int
    warmup_steps: int
    schedule: Points | None
    check: Check


def check_arguments(penalty: Arguments) -> None:
    """Raise ``ValueError`` for an argument out of range."""
    for name, choices in _CHOICES.items():
        must.one_of(choices)(name, getattr(penalty, name))
    if (penalty.coefficient is None) == (penalty.match_lr is None):
        raise ValueError(
            f"give either coefficient or match_lr, got coefficient={must.told(penalty.coefficient)} and "
            f"match_lr={must.told(penalty.match_lr)}."
        )
    if penalty.match_lr is not None and penalty.norm == "norm":
        raise ValueError("match_lr belongs to norm='squared', the form that learning rates imply, got norm='norm'.")
    for name in ("coefficient", "match_lr"):
        if (value := getattr(penalty, name)) is not None:
            must.non_negative(name, value)
    check_relative_step(penalty.relative_step)
    must.count("every_n_steps", penalty.every_n_steps)
    must.whole(0)("warmup_steps", penalty.warmup_steps)
    check_points("schedule", penalty.schedule)
    if penalty.schedule is not None and not all(0 <= factor < math.inf for _, factor in penalty.schedule):
        raise ValueError(f"schedule={must.told(penalty.schedule)} must have finite factors of 0 or more.")


def check_relative_step(value: float | str) -> None:
    """Raise ``ValueError`` unless it is a fraction of the parameters' norm."""
    if not (isinstance(value, str) and value == "auto"):
        must.number(above=0, below=1, why="'auto' takes the best known")("relative_step", value)


def refuse_setup(penalty: Arguments, trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise ``MisconfigurationException`` for a run in which the penalty would be wrong."""
    if sum(isinstance(callback, type(penalty)) for callback in trainer.callbacks) > 1:
        raise MisconfigurationException(f"Only one {_NAME} in a trainer: add their coefficients up in one.")
    require_automatic_optimization(_NAME, pl_module, CURE)
    require_strategy(_NAME, trainer)
    require_plain_optimizers(_NAME, trainer)
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{_NAME} runs a training_step again on the same batch, and one that draws batches from dataloader_iter "
            "gets others: let training_step take (batch, batch_idx)."
        )
    require_full_precision(_NAME, trainer)
    _refuse_fused_scaling(trainer)
    require_plain_gradients(_NAME, trainer, pl_module)
    if penalty.scope == "microbatch":
        _refuse_micro_batches(trainer, pl_module)
    if penalty.engine == "exact" and (reason := why_not_exact(trainer, pl_module)):
        raise MisconfigurationException(f"{_NAME}(engine='exact') is not possible: {reason}.")


def require_full_precision(name: str, trainer: Trainer) -> None:
    """Refuse parameters whose resolution is coarser than the displacements."""
    if str(trainer.precision) not in _PRECISIONS:
        raise MisconfigurationException(
            f"{name} moves parameters by steps far below the resolution of precision={trainer.precision!r}: use one "
            f"of {', '.join(_PRECISIONS)}."
        )
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if any(p.dtype in (torch.float16, torch.bfloat16) for group in groups for p in group["params"] if p.requires_grad):
        raise MisconfigurationException(
            f"{name} moves parameters by steps far below the resolution of half precision, and some trained "
            "parameters are half: keep them in fp32 and use precision='bf16-mixed'."
        )


def require_plain_gradients(name: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse gradients that are sparse, or that DDP compresses or does not average at each step."""
    embeddings = (part for part in pl_module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag))
    if any(part.sparse and part.weight.requires_grad for part in embeddings):
        raise MisconfigurationException(
            f"{name} needs the curvature of all parameters, and an embedding has sparse gradients: give sparse=False."
        )
    if isinstance(trainer.strategy, DDPStrategy) and compresses_gradients(trainer.strategy):
        raise MisconfigurationException(
            f"{name} needs the mean of all ranks' gradients, and a ddp_comm_hook compresses or delays it: leave it out."
        )


def _refuse_fused_scaling(trainer: Trainer) -> None:
    if getattr(trainer.precision_plugin, "scaler", None) is not None and any(
        getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers
    ):
        raise MisconfigurationException(
            f"{_NAME} needs unscaled gradients before the step, and a fused optimizer unscales within it "
            f"(precision={trainer.precision!r}): give fused=False or use precision='bf16-mixed'."
        )


def _refuse_micro_batches(trainer: Trainer, pl_module: LightningModule) -> None:
    reason = None
    if isinstance(trainer.strategy, ModelParallelStrategy):
        reason = "FSDP2 never forms"
    elif trainer.world_size > 1 and any(isinstance(part, nn.SyncBatchNorm) for part in pl_module.modules()):
        reason = "SyncBatchNorm never forms, as each loss depends on all ranks' batches"
    if reason:
        raise MisconfigurationException(
            f"{_NAME}(scope='microbatch') needs the gradient of each rank's own loss, which {reason}: use scope='step'."
        )
