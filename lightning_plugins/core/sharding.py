"""Sharding over the data-parallel processes (FSDP2): a module's parts, networks one by one, when gradients meet."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
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
    """Shard networks block by block over the data-parallel processes (FSDP2); call it in ``configure_model``.

    Not the module around them: FSDP2 then wants every call to come through it, but here each network is called alone.
    Frozen parameters that several of the networks share, as those under adapters, stay shared.

    Args:
        module: under ``ModelParallelStrategy``.
        networks: called as a whole; ones that are sharded already are left alone.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    options = _options(module)
    places = _shared_places(networks)
    for network in networks:
        if not isinstance(network, FSDPModule):
            for layer in blocks(network):
                fully_shard(layer, **options)
            fully_shard(network, **options)
    for (first, own), *others in places:
        for part, name in others:  # else each network would hold a shard of its own
            setattr(part, name, getattr(first, own))


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
    options = _options(module)
    for part in parts:
        if part is not None:
            fully_shard(part, **options)
    fully_shard(module, **options)  # parameters outside the parts, such as a subclass's
    return True


def gather_for(module: nn.Module, *names: str) -> None:
    """Methods beside ``forward`` that run the parameters of a sharded module itself; their signature stays as it is.

    torch's own wrapper binds the method twice, so that ``inspect`` tells the second argument for the first.
    """
    for name in names:
        signature = inspect.signature(getattr(type(module), name))
        register_fsdp_forward_method(module, name)
        getattr(module, name).__func__.__signature__ = signature


def blocks(network: nn.Module) -> list[nn.Module]:
    """The layers of a network of transformers or diffusers: what gathers its weights at a time, and frees them again.

    They are the entries of its outermost module lists, and a U-Net's middle. Any other network has none: nobody knows
    which of its parts are called as a whole.

    Args:
        network: the network, or a module around it.
    """
    found: list[nn.Module] = []
    for part in network.modules():
        if hasattr(part, "_no_split_modules"):  # of the base classes of both libraries
            _add_layers(part, found)
            return found
    return found


def _add_layers(part: nn.Module, found: list[nn.Module]) -> None:
    for name, child in part.named_children():
        if isinstance(child, nn.ModuleList):
            found += [layer for k, layer in enumerate(child) if layer is not None and not _is_used_outside(layer, k)]
        elif name == "mid_block":
            found.append(child)
        else:
            _add_layers(child, found)


def _is_used_outside(layer: nn.Module, place: int) -> bool:
    """Whether a layer's weights are needed beyond its calls, so that they stay with the network's rest.

    transformers calls SqueezeBERT's layers by ``forward()``, past the hooks that gather weights; the output of a DiT
    embeds the class by the first layer's own embedding, long after that layer's call.
    """
    embeds = place == 0 and isinstance(getattr(getattr(layer, "norm1", None), "emb", None), nn.Module)
    return embeds or type(layer).__name__ == "SqueezeBertModule"


def _options(module: LightningModule) -> dict[str, Any]:
    """How everything is sharded.

    Weights are freed after each call: by default the outermost ones stay whole after a call without a backward pass,
    such as validation, and ``module.zero_grad()`` then clears gradients of the whole ones alone.

    Gradients are averaged in float32 where weights are narrower; all else is autocast's, as in one process. Gathering
    in bfloat16 under ``bf16-mixed`` would halve the traffic, but autocast leaves norms in float32, which take no
    narrower weights on a CPU; and FSDP2's cast of all inputs would round timesteps, and masks to -inf.
    """
    mesh = data_parallel_mesh(module)
    low = str(module.trainer.precision) in ("bf16-true", "16-true")
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    return {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}


def _shared_places(networks: tuple[nn.Module, ...]) -> list[list[tuple[nn.Module, str]]]:
    """Where each frozen parameter of several networks stands: the modules that hold it, and its name there."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        for part in network.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    places.setdefault(parameter, []).append((part, name))
    return [held for held in places.values() if len(held) > 1]


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
