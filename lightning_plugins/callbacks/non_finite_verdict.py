"""Whether losses, gradients, weights or buffers are finite: sums that nobody waits for, and a verdict that is read."""

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_plugins.callbacks.non_finite_report import Step
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
    for (_, dtype), indices in kinds.items():
        wide = torch.float32 if dtype.itemsize < 4 else None  # a norm overflows fp16 before its entries do
        found.update(zip(indices, torch._foreach_norm([dense[i] for i in indices], dtype=wide), strict=True))
    return [found[index] for index in range(len(dense))]


def nan_buffers(module: LightningModule) -> set[str]:
    """Names of the buffers with a NaN in them; infinities are common there, as in masks."""
    return {
        name
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point() and bool(local([buffer])[0].isnan().any())
    }


def spoilt(trainer: Trainer, module: LightningModule, passed_over: set[str]) -> str:
    """What a checkpoint would hold that is not finite: a name, or nothing; alike on all processes but for the name."""
    bad = sorted(nan_buffers(module) - passed_over)
    trained = {name: param for name, param in module.named_parameters() if _is_trained(param)}
    norms = zip(trained, norms_of(list(trained.values())), strict=True)
    bad = [name for name, norm in norms if not norm.isfinite()] + bad
    flag = torch.tensor(float(bool(bad)), device=trainer.strategy.root_device)
    return (bad or ["a weight of another process"])[0] if over_ranks(trainer, flag) > 0 else ""


def _is_trained(param: nn.Parameter) -> bool:
    return param.requires_grad and not isinstance(param, nn.parameter.UninitializedParameter)
