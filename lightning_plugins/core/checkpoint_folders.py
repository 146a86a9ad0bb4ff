"""Folders that several processes write as one checkpoint: replaced as a whole, read whole or not at all."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy

from lightning_plugins.core.checkpoint_damage import refuse_damage
from lightning_plugins.core.checkpoint_shards import checksum, kept_checksums, refuse_objects
from lightning_plugins.core.replacing import is_address, is_sharded, replacing, write_error
from lightning_plugins.core.shard_index import CHECKSUMS, read_index


def replace_folders(strategy: ParallelStrategy) -> None:
    """Let a strategy write folders beside their place, with checksums, and read none that is damaged or no data.

    All processes write, rank zero puts the whole there. A file (of a checkpoint that is not sharded) fares as well.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    save, load = strategy.save_checkpoint, strategy.load_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if is_address(filepath):
            return save(checkpoint, filepath, storage_options)
        target = Path(os.path.abspath(strategy.broadcast(filepath)))
        try:
            with ExitStack() as stack:
                partial = target  # rank zero's counts
                if strategy.is_global_zero:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    partial = stack.enter_context(replacing(target))
                partial = strategy.broadcast(partial)
                save(checkpoint, partial, storage_options)
                strategy.barrier()
                _add_checksums(strategy, partial)
        except (OSError, CheckpointException) as error:
            raise write_error(error, filepath) from error

    def load_checkpoint(checkpoint_path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        refuse_damage(checkpoint_path)
        folder = Path(strategy.broadcast(checkpoint_path))
        if is_sharded(folder):  # torch reads its index, and what is no tensor, by pickle
            refuse_objects(folder, read_index(folder))
        elif isinstance(strategy, ModelParallelStrategy) and folder.is_file():
            refuse_numbers(strategy, folder)
        _compare_checksums(strategy, folder)
        return load(checkpoint_path, *arguments, **options)

    strategy.save_checkpoint, strategy.load_checkpoint = save_checkpoint, load_checkpoint


def refuse_numbers(strategy: ModelParallelStrategy, file: Path) -> None:
    """A file of one process or DDP numbers the states of its optimizers' parameters, by the order of their groups.

    Lightning takes the numbers for places among all of the module's parameters, and several optimizers' for those of
    one: another parameter gets the state, without a word where shapes are alike.

    Raises:
        ValueError: the numbers would mean others.
    """
    module = strategy.lightning_module
    if module is None or not strategy.optimizers:  # nothing is trained on
        return
    numbered = [parameter for group in strategy.optimizers[0].param_groups for parameter in group["params"]]
    if len(strategy.optimizers) == 1 and [*map(id, numbered)] == [*map(id, module.parameters())]:
        return
    states = torch.load(file, weights_only=True, mmap=True, map_location="cpu").get("optimizer_states", [])
    if any(isinstance(number, int) for state in states for number in state.get("state", {})):
        name = type(module).__name__.removeprefix("FSDP")
        raise ValueError(
            f"{str(file)!r} numbers the states of its optimizers, which FSDP2 would give to other parameters of "
            f"{name}: go on without FSDP2, or begin anew from its weights (load_from_checkpoint)."
        )


def _add_checksums(strategy: ParallelStrategy, folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*")) if strategy.is_global_zero else []
    sums = _checksums(strategy, folder, strategy.broadcast(names))
    if strategy.is_global_zero and folder.is_dir():
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def _compare_checksums(strategy: ParallelStrategy, folder: Path) -> None:
    path = folder / CHECKSUMS
    if not strategy.broadcast(path.is_file()):  # a file, an address, or written by Lightning alone
        return
    kept = kept_checksums(folder)
    found = _checksums(strategy, folder, sorted(kept))
    if wrong := [name for name in sorted(kept) if kept[name] != found[name]]:
        raise OSError(
            f"checkpoint {str(folder)!r} is damaged (the checksum of {wrong[0]!r} is wrong). Use an earlier one."
        )


def _checksums(strategy: ParallelStrategy, folder: Path, names: Sequence[str]) -> dict[str, int | None]:
    """Of all files by name; each process reads its share of them."""
    mine = {name: checksum(folder / name) for name in names[strategy.global_rank :: strategy.world_size]}
    shares = [mine] * strategy.world_size
    if strategy.world_size > 1:
        torch.distributed.all_gather_object(shares, mine)
    return {name: value for share in shares for name, value in share.items()}
