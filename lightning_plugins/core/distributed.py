"""Several processes: sharding a module's parts (FSDP2), and a clean end."""

import atexit

import torch.distributed
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


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
    if (size := module.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"{type(module).__name__} has no tensor parallelism, got tensor_parallel_size={size}: shard it over "
            "data-parallel processes, ModelParallelStrategy(data_parallel_size=<processes>, tensor_parallel_size=1)."
        )
    mesh = module.device_mesh["data_parallel"]
    for part in parts:
        if part is not None:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)  # parameters outside the parts, such as a subclass's
    return True


def largest_over_ranks(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers, so that all decide alike."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def close_process_group_at_exit() -> None:
    """End this process's communication threads before Python ends, whatever the backend.

    Lightning does so for NCCL alone. A gloo thread that is still alive then may abort the process ("terminate called
    without an active exception"), and with it a run that was finished.
    """
    atexit.unregister(_close_process_group)
    atexit.register(_close_process_group)


def _close_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
