"""Whether losses, gradients, weights or buffers are finite: sums that nobody waits for, and a verdict that is read."""

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_plugins.callbacks.non_finite_guard.report import Step
from lightning_plugins.core.vectors import local


class Verdict:
    """Whether a step's losses and gradients are not finite: read at once, or on a GPU when they have been copied.

    Args:
        step: what it is about.
        flags: ``(2,)``, above 0 for losses and for gradients.
        late: whether the flags are read later, so that their copy may begin now.
        own: whether the module itself has dealt with it.
    """

    def __init__(self, step: Step, flags: Tensor, late: bool, own: bool = False) -> None:
        self.step, self.own, self._flags = step, own, flags
        self._copied: torch.cuda.Event | None = None
        if late and flags.is_cuda:
            self._flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[bool, bool]:
        """Of the losses and of the gradients; waits for the copy alone, not for what the device does after it."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, gradient = self._flags.tolist()
        return loss > 0, gradient > 0


class Row:
    """Batches in a row with a step that is not finite; several optimizers may step in one batch.

    Args:
        length: of the row that a resumed run is in.

    Attributes:
        length: so far.
        bad: whether the latest batch belongs to it.
    """

    def __init__(self, length: int = 0) -> None:
        self.length, self.bad = length, length > 0
        self._batch: tuple[int, int] | None = None

    def add(self, batch: tuple[int, int], bad: bool) -> None:
        """Count a step of a batch, which is named by epoch and number."""
        if batch != self._batch:
            self.length = self.length if self.bad else 0
            self._batch, self.bad = batch, False
        if bad and not self.bad:
            self.length, self.bad = self.length + 1, True


def flags_of(losses: list[Tensor], norms: list[Tensor], device: torch.device) -> Tensor:
    """``(2,)``: 1 where one of the losses, or of the norms, is NaN or infinite, else 0."""
    totals = [
        torch.stack([n.to(device) for n in numbers]).sum() if numbers else torch.zeros((), device=device)
        for numbers in ([loss.sum() for loss in losses], norms)
    ]
    return 1 - torch.stack(totals).isfinite().float()


def over_ranks(trainer: Trainer, flags: Tensor, everywhere: bool = False) -> Tensor:
    """Whether it is so on any process, or on every one; in place."""
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        op = torch.distributed.ReduceOp.MIN if everywhere else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(flags, op)
    return flags


def norms_of(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, of this process's shard: one fused pass, NaN or infinite if any entry is."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    dense = [t.coalesce().values() if t.is_sparse else t for t in local([t.detach() for t in tensors])]
    for index, tensor in enumerate(dense):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    found: dict[int, Tensor] = {}
    for (device, dtype), indices in kinds.items():
        wide = torch.float32 if dtype.itemsize < 4 else None  # a norm overflows fp16 before its entries do
        group = [dense[i] for i in indices]
        norms = torch._foreach_norm(group, dtype=wide)
        if device.type == "cpu" and not torch.stack(norms).isfinite().all():  # squares overflow before entries do
            norms = torch._foreach_norm(group, dtype=torch.float64)
        found.update(zip(indices, norms, strict=True))
    return [found[index] for index in range(len(dense))]


def nan_buffers(module: LightningModule) -> set[str]:
    """Names of the buffers with a NaN in them; infinities are common there, as in masks."""
    return {
        name
        for at, part in module.named_modules()
        for name, buffer in part.named_buffers(at, recurse=False)
        if name.rpartition(".")[2] not in part._non_persistent_buffers_set  # those are in no checkpoint
        if buffer.is_floating_point() and not is_lazy(buffer) and bool(_entries(local([buffer])[0]).isnan().any())
    }


def not_finite(module: LightningModule) -> set[str]:
    """Names of trained parameters with an entry that is not finite."""
    trained = {name: param for name, param in module.named_parameters() if _is_trained(param)}
    return {n for n, norm in zip(trained, norms_of(list(trained.values())), strict=True) if not norm.isfinite()}


def _entries(tensor: Tensor) -> Tensor:
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def spoilt(trainer: Trainer, module: LightningModule, passed_over: set[str], alone: bool = False) -> str:
    """What a checkpoint would hold that is not finite: a name, or nothing; alike on all processes but for the name."""
    bad = sorted(not_finite(module) - passed_over) + sorted(nan_buffers(module) - passed_over)
    if alone:
        return bad[0] if bad else ""
    flag = torch.tensor(float(bool(bad)), device=trainer.strategy.root_device)
    return (bad or ["a weight of another process"])[0] if over_ranks(trainer, flag) > 0 else ""


def _is_trained(param: nn.Parameter) -> bool:
    return param.requires_grad and not is_lazy(param)
