"""What manual optimization of several networks needs under Lightning's strategies."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_plugins.core.distributed import data_parallel_mesh


def count_no_step(optimizer: LightningOptimizer) -> None:
    """Keep an optimizer's steps out of Lightning's ``global_step``; call it in ``training_step``.

    Lightning counts every optimizer's step in manual optimization: ``max_steps`` and checkpoints would come at half of
    the updates asked for. It sets these two hooks anew before each ``training_step``.
    """
    optimizer._on_before_step = do_nothing_closure
    optimizer._on_after_step = do_nothing_closure


@contextmanager
def gradient_sync(module: LightningModule, now: bool) -> Iterator[None]:
    """Whether backward passes in here average gradients over the processes, or keep them to be added to."""
    strategy = module.trainer.strategy
    if now:
        yield
    elif isinstance(strategy, DDPStrategy):
        with strategy.model.no_sync():
            yield
    else:
        parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        yield
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def shard_networks(module: LightningModule, *networks: nn.Module) -> None:
    """Shard networks over the data-parallel processes (FSDP2), each by itself; call it in ``configure_model``.

    Not the module around them: FSDP2 then wants every call to come through it, but here each network is called alone.

    Args:
        module: under ``ModelParallelStrategy``.
        networks: called as a whole; ones that are sharded already are left alone.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    mesh = data_parallel_mesh(module)
    for network in networks:
        if not isinstance(network, FSDPModule):
            # True, since by default the outermost stays whole after a call without a backward pass, such as sampling.
            fully_shard(network, mesh=mesh, reshard_after_forward=True)


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
