"""Differentiating a loss twice: the second derivative, and why it would fail or be wrong."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_plugins.core.lightning_internals import ddp_option, is_compiled
from lightning_plugins.replay.graph import operations


def second_derivative(
    first: Sequence[Tensor | None],
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """``d/dtheta <first, direction>``; ``None`` where there is no dependence.

    Args:
        first: the loss's first derivatives, with their graph; ``None`` where there is no dependence.
        params: the parameters ``theta``.
        direction: tensors shaped like the parameters, held constant.
        retain_graph: whether to keep the graph for another backward pass.

    Raises:
        RuntimeError: there is no second derivative.
    """
    if "torch::autograd::Error" in operations(first):  # autograd.grad would pass it by, as if it were constant
        raise RuntimeError("a torch.autograd.Function of the module is marked once_differentiable")
    pairs = [(g, v) for g, v in zip(first, direction, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [None] * len(params)
    grads, vectors = zip(*pairs, strict=True)
    return list(torch.autograd.grad(grads, params, vectors, retain_graph=retain_graph, allow_unused=True))


def why_not_exact(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why differentiating twice would fail or be wrong, as far as it can be told before training."""
    strategy = trainer.strategy
    cure = "use engine='finite_difference'"
    if isinstance(strategy, DDPStrategy) and ddp_option(strategy, "static_graph"):
        return f"DDP(static_graph=True) counts each gradient hook of its first step; {cure} or static_graph=False"
    if isinstance(strategy, ModelParallelStrategy):
        return f"FSDP2 differentiates once only; {cure}"
    compiled = is_compiled(pl_module) or any(
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
