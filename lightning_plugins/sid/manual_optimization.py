"""What manual optimization of several networks needs under Lightning's strategies."""

from collections.abc import Iterable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn


@torch.no_grad()
def finite_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients without NaN and infinities, in place: 0, and at most 1e5 in size, as in the paper's code."""
    for parameter in parameters:
        gradient = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)


def refuse_setup(module: LightningModule, trainer: Trainer) -> None:
    """Refuse what cannot train two networks in turn, by small steps.

    Raises:
        MisconfigurationException: DDP without ``find_unused_parameters``, the first FSDP, or the module compiled whole.
        ValueError: weights in half precision.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise MisconfigurationException(
            "SiD has two optimizers, each of which trains a part of the parameters: under DDP use "
            "strategy='ddp_find_unused_parameters_true'."
        )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise MisconfigurationException(
            "SiD steps two optimizers and cannot be compiled whole: in place of torch.compile(module) let "
            "build_network call network.compile() before it returns the network."
        )
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            "SiD shards its networks one by one, as FSDP2 can: in place of FSDPStrategy use "
            "ModelParallelStrategy(data_parallel_size=<processes>, tensor_parallel_size=1)."
        )
    if precision in ("16-true", "bf16-true"):
        raise ValueError(
            f"precision={precision!r} keeps the weights in half precision, where the small steps of score distillation "
            f"and of a running mean round to no change: use {precision.replace('true', 'mixed')!r}."
        )
