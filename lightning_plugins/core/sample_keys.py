"""What names a sample among those of all processes, so that noise can hang on it: the batch's keys, or its place."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_plugins.core.lightning_internals import trainer_of


def row_keys(module: LightningModule, rows: int, batch: Any = None, before: int = 0) -> Tensor:
    """What names each row of a batch, for a ``RowGenerator``: ``(B,)`` int64 on the module's device.

    The batch's own ``"key"`` ``(B,)`` int64, else the row's place among those of all processes, which take turns: so do
    this package's data and the samplers that Lightning puts into a torch ``DataLoader``. Place n is then sample n of a
    data set in order, on any number of processes.

    Args:
        module: whose run it is; without a trainer, of one process.
        rows: B, of this process.
        batch: where keys may stand; None for places.
        before: rows of this process that came before.
    """
    key = batch.get("key") if isinstance(batch, Mapping) else None
    if isinstance(key, Tensor) and key.dtype == torch.int64 and key.shape == (rows,):
        return key
    trainer = trainer_of(module)
    place = before + torch.arange(rows, device=module.device)
    return place * (1 if trainer is None else trainer.world_size) + module.global_rank


class SampleKeys:
    """:func:`row_keys` of the batches of a pass through a data set in order, such as a validation.

    All batches of a process but the last have as many rows as its first one.
    """

    def __init__(self) -> None:
        self._rows = 0  # of the first batch

    def __call__(self, module: LightningModule, rows: int, batch: Any, batch_idx: int) -> Tensor:
        """``(B,)`` int64 of the batch ``batch_idx``."""
        if batch_idx == 0:
            self._rows = rows
        return row_keys(module, rows, batch, batch_idx * self._rows)
