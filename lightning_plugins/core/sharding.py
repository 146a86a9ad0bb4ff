"""Sharding over the data-parallel processes (FSDP2): a module's parts, networks one by one, when gradients meet."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def gradient_sync(module: LightningModule, now: bool) -> Iterator[None]:
    """Whether backward passes in here average gradients over the processes, or keep them to be added to."""
    strategy = module.trainer.strategy
    if now:
        yield
    elif isinstance(strategy, DDPStrategy):
        with cast(DistributedDataParallel, strategy.model).no_sync():
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


def shard_parts(module: LightningModule, *parts: nn.Module | None) -> bool:
    """Shard each part, and the module around them, over the data-parallel processes; call it in ``configure_model``.

    Args:
        module: under ``ModelParallelStrategy``; under any other strategy nothing happens.
        parts: sub-modules that are called as a whole; ``None`` is passed over.

    Returns:
        Whether the module is sharded now (also when an earlier call did it).

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    if isinstance(module, FSDPModule):
        return True
    if module.device_mesh is None:
        return False
    mesh = data_parallel_mesh(module)
    for part in parts:
        if part is not None:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)  # parameters outside the parts, such as a subclass's
    return True


def gather_for(module: nn.Module, *names: str) -> None:
    """Methods beside ``forward`` that run the parameters of a sharded module itself; their signature stays as it is.

    torch's own wrapper binds the method twice, so that ``inspect`` tells the second argument for the first.
    """
    for name in names:
        signature = inspect.signature(getattr(type(module), name))
        register_fsdp_forward_method(module, name)
        getattr(module, name).__func__.__signature__ = signature


def data_parallel_mesh(module: LightningModule) -> DeviceMesh:
    """The mesh over which a module under ``ModelParallelStrategy`` is sharded.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    mesh = module.device_mesh
    assert mesh is not None  # ModelParallelStrategy's
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"{type(module).__name__} has no tensor parallelism, got tensor_parallel_size={size}: shard it over "
            "data-parallel processes, ModelParallelStrategy(data_parallel_size=<processes>, tensor_parallel_size=1)."
        )
    return mesh["data_parallel"]
