"""The real images that generated ones are compared with: this process's share of a split, whatever the loaders."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_plugins.core.distributed import sum_over_ranks

_STAGES = {"train": "fit", "val": "validate", "test": "test"}
_PREPARED = {  # splits whose stage Lightning has set up
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
}


def reference_images(trainer: Trainer, split: str) -> Iterator[Tensor]:
    """Batches ``(B, C, H, W)`` of a split's images, each image on one process.

    A data module's loader is made anew, since going through the running one would lose its place. It is the whole split
    whatever ``limit_val_batches``; ``"train"`` in the order, with the augmentation and without the incomplete batch of
    the loader's first epoch. Without a data module the trainer's validation or test loaders serve.

    Args:
        trainer: the running trainer, in validation or test between two batches.
        split: the split's name, ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        MisconfigurationException: no such loader.
    """
    rank, world_size = trainer.global_rank, trainer.world_size
    for loader in CombinedLoader(_loaders(trainer, split), "sequential").flattened:
        shares = world_size > 1 and isinstance(loader, DataLoader) and not _is_distributed(loader)
        seen = 0
        for batch in loader:
            images = images_of(batch)
            yield images[(rank - seen) % world_size :: world_size] if shares else images
            seen += len(images)


def images_of(batch: Any) -> Tensor:
    """The images of a batch: those of the key ``"image"``, the first of a pair, or the batch itself."""
    images = batch.get("image") if isinstance(batch, dict) else batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(images, Tensor):
        found = f"a dict with {', '.join(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise MisconfigurationException(
            f'Images are looked for in a batch {{"image": ...}}, (images, labels) or images, got {found}.'
        )
    return images


def _loaders(trainer: Trainer, split: str) -> Any:
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        if split not in _PREPARED.get(trainer.state.fn, ()):
            datamodule.setup(_STAGES[split])
        return getattr(datamodule, f"{split}_dataloader")()
    if split == "train":
        raise MisconfigurationException(
            'reference="train" needs a data module, whose loader can be made anew: the running one would lose its '
            'place. Give the trainer a LightningDataModule, or reference="val".'
        )
    loaders = getattr(trainer, f"{split}_dataloaders")
    if loaders is None:
        raise MisconfigurationException(
            f"reference={split!r} needs a {split} loader, and this run has none: give the trainer a "
            'LightningDataModule, or another reference ("val" in fit and validate, "test" in test).'
        )
    return loaders


def _is_distributed(loader: DataLoader) -> bool:
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def share(num: int, rank: int, world_size: int) -> tuple[int, int]:
    """How many of ``num`` rows a process has, and how many come before its own; the first ones may have one more.

    >>> [share(10, rank, 4) for rank in range(4)]
    [(3, 0), (3, 3), (2, 6), (2, 8)]
    """
    least, rest = divmod(num, world_size)
    return least + (rank < rest), rank * least + min(rank, rest)


def gather_chosen(images: Tensor, first: int, chosen: Tensor, device: torch.device) -> Tensor:
    """Some rows of all processes, on every process.

    Args:
        images: this process's rows ``(n, C, H, W)``.
        first: the number of rows of processes before it.
        chosen: numbers of the wanted rows ``(K,)`` int64, counted over all processes.
        device: the device to communicate on.

    Returns:
        Float32 ``(K, C, H, W)`` on ``device``.
    """
    own = (chosen >= first) & (chosen < first + len(images))
    rows = torch.zeros(len(chosen), *images.shape[1:], device=device)
    rows[own] = images[(chosen[own] - first).to(images.device)].to(device).float()
    return sum_over_ranks(rows)
