"""Whether losses, gradients, weights or buffers are finite: sums that nobody waits for, and a verdict that is read."""

from functools import cached_property
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_plugins.callbacks.non_finite_guard.report import Step, logged_losses
from lightning_plugins.core.optimizers import parameters_of
from lightning_plugins.core.vectors import local

Batch = tuple[int, Any]  # with its number in the epoch


class Window:
    """The micro-batches of an optimizer step, until a verdict is asked for.

    Args:
        scaled: whether a GradScaler multiplies the losses.

    Attributes:
        is_open: whether batches came that no verdict is about.
    """

    def __init__(self, scaled: bool = False) -> None:
        self._scaled, self.is_open = scaled, False
        self._judged: tuple[Optimizer, int] | None = None
        self._empty()

    def open(self) -> None:
        """Begin with the next batch."""
        self.is_open, self._judged = True, None
        self._empty()

    def _empty(self) -> None:
        self._losses: list[Tensor] = []
        self._suspect: Batch | None = None  # the first whose loss is not finite

    def add(self, loss: Tensor, batch: Batch) -> None:
        """Remember the loss of a micro-batch."""
        loss = loss.detach()
        if self._scaled:  # an infinity may be the scale's, and shows in the gradients
            loss = torch.where(loss.isinf(), 0.0, loss)
        self._losses.append(loss)
        if self._suspect is None and loss.device.type == "cpu" and not loss.isfinite().all():
            self._suspect = batch

    def judge(self, trainer: Trainer, optimizer: Optimizer, batch: Batch, late: bool) -> "Verdict | None":
        """The verdict on an optimizer's step, before it; ``None`` where there is nothing (more) to judge.

        Of several evaluations in one step of LBFGS the first counts: its line search may try what is not finite.
        """
        key = optimizer, trainer.global_step
        if isinstance(optimizer, torch.optim.LBFGS) and self._judged == key:
            self._empty()
            return None
        params = [p for p in parameters_of(optimizer) if p.grad is not None]
        if not params and not self._losses:  # training_step returned None
            return None
        norms = norms_of([param.grad for param in params if param.grad is not None])
        flags = over_ranks(trainer, flags_of(self._losses, norms, trainer.strategy.root_device))
        verdict = Verdict(self._step(trainer, batch, params, norms), flags, late, scaled=self._scaled)
        self.is_open, self._judged = False, key
        self._empty()  # under manual optimization each optimizer's step has losses of its own
        return verdict

    def judge_module(self, trainer: Trainer, all_lost: Tensor, batch: Batch, late: bool) -> "Verdict":
        """The verdict of a module that leaves samples out by itself: bad if it left out all, in every process."""
        lost = over_ranks(trainer, all_lost.float().reshape(1), everywhere=True)
        flags = torch.cat([lost, torch.zeros_like(lost)])
        return Verdict(self._step(trainer, batch, [], []), flags, late, self._scaled, own=True)

    def _step(self, trainer: Trainer, batch: Batch, params: list[nn.Parameter], norms: list[Tensor]) -> Step:
        batch_idx, content = self._suspect or batch
        at = trainer.global_step, trainer.current_epoch, batch_idx, trainer.global_rank
        return Step(*at, content, list(self._losses), logged_losses(trainer), params, norms)


class Verdict:
    """Whether a step's losses and gradients are not finite: read at once, or on a GPU when they have been copied.

    Args:
        step: the step that it is about.
        flags: two numbers ``(2,)``, above 0 if losses, and if gradients, are not finite.
        late: whether the flags are read later, so that their copy may begin now.
        scaled: whether a GradScaler looks at the gradients, too, and skips the step.
        own: whether the module itself has dealt with it.
    """

    def __init__(self, step: Step, flags: Tensor, late: bool, scaled: bool, own: bool = False) -> None:
        self.step, self.scaled, self.own = step, scaled, own
        self._flags = flags
        self._copied: torch.cuda.Event | None = None
        if late and flags.is_cuda:
            self._flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @cached_property
    def bad(self) -> tuple[bool, bool]:
        """Whether losses, and whether gradients are not finite; waits for the copy, not for what comes after it."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, gradient = self._flags.tolist()
        return loss > 0, gradient > 0

    @property
    def is_bad(self) -> bool:
        """Whether anything is not finite."""
        return any(self.bad)

    @property
    def is_harmless(self) -> bool:
        """Whether all gradients are finite, so that no weight can become NaN."""
        return not self.bad[1]

    @property
    def is_anothers(self) -> bool:
        """Whether the module has left the step out, or the GradScaler will: an overflow is its everyday matter."""
        return self.own or (self.scaled and not self.bad[0])

    @property
    def scaler_skips(self) -> bool:
        """Whether the GradScaler finds it, too, and needs the gradients for that."""
        return self.scaled and self.bad[1]


class Row:
    """Batches in a row with a step that is not finite; several optimizers may step in one batch.

    Args:
        length: the length of the row that a resumed run is in.

    Attributes:
        length: the length of the row so far.
        bad: whether the latest batch belongs to it.
    """

    def __init__(self, length: int = 0) -> None:
        self.length, self.bad = length, length > 0
        self._batch: tuple[int, int] | None = None

    def add(self, verdict: Verdict) -> None:
        """Count a step of a batch, which is named by epoch and number."""
        batch, bad = (verdict.step.epoch, verdict.step.batch_idx), verdict.is_bad
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


class Start:
    """What was not finite when the first batch came, and so may be in checkpoints: infinities and NaN by intention.

    Args:
        module: the trained module.

    Attributes:
        alone: whether other processes may not be asked any more, as after an exception.
    """

    def __init__(self, module: LightningModule) -> None:
        self.alone = False
        self._passed_over = nan_buffers(module) | not_finite(module)

    def spoilt(self, trainer: Trainer, module: LightningModule) -> str:
        """What has become NaN or infinite since then: a name, or nothing; alike on all processes but for the name."""
        bad = sorted(not_finite(module) - self._passed_over) + sorted(nan_buffers(module) - self._passed_over)
        if self.alone:
            return bad[0] if bad else ""
        flag = torch.tensor(float(bool(bad)), device=trainer.strategy.root_device)
        return (bad or ["a weight of another process"])[0] if over_ranks(trainer, flag) > 0 else ""


def _is_trained(param: nn.Parameter) -> bool:
    return param.requires_grad and not is_lazy(param)
