"""Setups in which GradientPenalty would train something else, each with its sentence."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_plugins.callbacks.requirements import (
    require_automatic_optimization,
    require_plain_optimizers,
    require_strategy,
)
from lightning_plugins.core.schedules import check_points

if TYPE_CHECKING:
    from lightning_plugins.callbacks.gradient_penalty import GradientPenalty

_NAME = "GradientPenalty"
_CHOICES = {
    "norm": ("squared", "norm"),
    "engine": ("finite_difference", "exact", "auto"),
    "scope": ("step", "microbatch"),
    "difference": ("forward", "central"),
    "check": ("first_step", "off"),
}
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


def check_choices(**arguments: str) -> None:
    """Raise ``ValueError`` for a word that is none of an argument's choices."""
    for name, value in arguments.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}.")


def check_arguments(penalty: "GradientPenalty") -> None:
    """Raise ``ValueError`` for an argument out of range."""
    check_choices(**{name: getattr(penalty, name) for name in _CHOICES})
    if (penalty.coefficient is None) == (penalty.match_lr is None):
        raise ValueError(
            f"give either coefficient or match_lr, got coefficient={penalty.coefficient} and "
            f"match_lr={penalty.match_lr}."
        )
    if penalty.match_lr is not None and penalty.norm == "norm":
        raise ValueError("match_lr belongs to norm='squared', the form that learning rates imply, got norm='norm'.")
    for name in ("coefficient", "match_lr"):
        value = getattr(penalty, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    if penalty.relative_step != "auto" and not 0 < penalty.relative_step < 1:
        raise ValueError(f"relative_step must be 'auto' or between 0 and 1, got {penalty.relative_step!r}.")
    for name, least in (("every_n_steps", 1), ("warmup_steps", 0)):
        if getattr(penalty, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(penalty, name)}.")
    check_points("schedule", penalty.schedule)
    if penalty.schedule is not None and any(factor < 0 for _, factor in penalty.schedule):
        raise ValueError(f"schedule must have factors of at least 0, got {penalty.schedule}.")


def refuse_setup(penalty: "GradientPenalty", trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise ``MisconfigurationException`` for a run in which the penalty would be wrong."""
    if sum(isinstance(callback, type(penalty)) for callback in trainer.callbacks) > 1:
        raise MisconfigurationException(f"Only one {_NAME} in a trainer: add their coefficients up in one.")
    cure = "call gradient_penalty_backward(...) in training_step instead of manual_backward"
    require_automatic_optimization(_NAME, pl_module, cure)
    require_strategy(_NAME, trainer)
    require_plain_optimizers(_NAME, trainer)
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{_NAME} runs a training_step again on the same batch, and one that draws batches from dataloader_iter "
            "gets others: let training_step take (batch, batch_idx)."
        )
    _refuse_precision(trainer)
    if penalty.scope == "microbatch" and _shards(trainer):
        raise MisconfigurationException(
            f"{_NAME}(scope='microbatch') needs each rank's own gradient, which FSDP2 never forms: use scope='step'."
        )
    if penalty.engine == "exact" and (reason := why_not_exact(trainer, pl_module)):
        raise MisconfigurationException(f"{_NAME}(engine='exact') is not possible: {reason}.")


def _refuse_precision(trainer: Trainer) -> None:
    if str(trainer.precision) not in _PRECISIONS:
        raise MisconfigurationException(
            f"{_NAME} moves parameters by steps far below the resolution of precision={trainer.precision!r}: use one "
            f"of {', '.join(_PRECISIONS)}."
        )
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if any(p.dtype in (torch.float16, torch.bfloat16) for group in groups for p in group["params"] if p.requires_grad):
        raise MisconfigurationException(
            f"{_NAME} moves parameters by steps far below the resolution of half precision, and some trained "
            "parameters are half: keep them in fp32 and use precision='bf16-mixed'."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None and any(
        getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers
    ):
        raise MisconfigurationException(
            f"{_NAME} needs unscaled gradients before the step, and a fused optimizer unscales within it "
            f"(precision={trainer.precision!r}): give fused=False or use precision='bf16-mixed'."
        )


def why_not_exact(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why differentiating twice would fail or be wrong, as far as it can be told before training."""
    strategy = trainer.strategy
    cure = "use engine='finite_difference'"
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        return f"DDP(static_graph=True) counts each gradient hook of its first step; {cure} or static_graph=False"
    if _shards(trainer):
        return f"FSDP2 differentiates once only; {cure}"
    compiled = getattr(pl_module, "_compiler_ctx", None) is not None or any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in pl_module.modules()
    )
    if compiled:
        return f"torch.compile does not differentiate twice; {cure} or leave the module uncompiled"
    return None


def explain(error: RuntimeError) -> str:
    """What an error of a second differentiation means, with a cure."""
    text = str(error)
    cure = "use engine='finite_difference'"
    if "is not implemented" in text:
        kernel = text.split("derivative for")[-1].split("is not implemented")[0].strip()
        return f"{kernel} has no second derivative; {cure} (for attention also the MATH backend of sdpa_kernel)"
    if "checkpoint" in text or "use_reentrant" in text or "not have been used in the graph" in text:
        return f"reentrant gradient checkpointing differentiates once only; {cure} or use_reentrant=False"
    if "double backward" in text:
        return f"torch.compile does not differentiate twice; {cure} or leave the module uncompiled"
    return f"the second differentiation failed ({text}); {cure}"


def _shards(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, ModelParallelStrategy)
