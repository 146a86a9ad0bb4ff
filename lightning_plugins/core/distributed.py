"""Several processes: sums and rows of all of them with gradient, and a clean end."""

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch import Tensor


def rank_of_process() -> int:
    """This process's number among all of the running group, 0 without one."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if running else 0


def largest_over_ranks(number: int, device: torch.device, group: torch.distributed.ProcessGroup | None = None) -> int:
    """The largest of all processes' numbers, so that all decide alike."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return int(largest)


@contextmanager
def all_or_none(device: torch.device) -> Iterator[None]:
    """Raise the same in every process if one of them raises within, before any of them waits for the others.

    What runs within must not itself communicate (as FSDP2 and SyncBatchNorm do): processes may be at different places.
    One process alone raises what was raised.

    Raises:
        RuntimeError: with the first process's error.
    """
    if not _several_processes(None):
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not largest_over_ranks(int(error is not None), device):
        return
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    own = None if error is None else f"{type(error).__name__}: {error}"
    torch.distributed.all_gather_object(texts, own)
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    raise RuntimeError(f"on rank {rank}, {text}") from error


def gather_rows(rows: Tensor, group: torch.distributed.ProcessGroup | None = None) -> tuple[Tensor, slice]:
    """All processes' rows with gradient, in the order of their ranks; one process gets its own rows back.

    The gradient is that of the mean over processes of their losses, which is what DDP and FSDP2 train: a loss of all
    rows, computed by every process, then moves each network as one process with the joined batch would. It can be
    differentiated again.

    Args:
        rows: ``(n, ...)``; processes may differ in n.
        group: the processes; all by default.

    Returns:
        ``(N, ...)`` with N the sum of all n, and where this process's rows stand in it.
    """
    if not _several_processes(group):
        return rows, slice(0, len(rows))
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(counts, count, group)
    sizes = torch.cat(counts).tolist()
    start = sum(sizes[: torch.distributed.get_rank(group)])
    end = start + len(rows)
    before, after = (rows.new_zeros(size, *rows.shape[1:]) for size in (start, sum(sizes) - end))
    return sum_over_ranks(torch.cat([before, rows, after]), group), slice(start, end)


def sum_over_ranks(value: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """The sum of all processes' values, with gradient of any order; one process gets its own value back."""
    return _Sum.apply(value, group) if _several_processes(group) else value


@torch.no_grad()
def means_over_ranks(values: Mapping[str, Tensor], weight: float) -> tuple[dict[str, Tensor], Tensor | float]:
    """Means over all processes of numbers to be logged, such as the means over each one's rows, and the weights' sum.

    All go in one message, whose end no process waits for; one process alone gets its own values back. Lightning's
    ``sync_dist=True`` sends one for each name and has all processes wait before it, in each batch, logged or not, and
    weighs a process with few rows as one with many.

    Args:
        values: scalars by name, on one device; the same names on every process.
        weight: of this process's values, such as its rows or tokens.

    Returns:
        The means by name, of the types that came in, and the sum of all weights.
    """
    columns = [value.detach() for value in values.values()]
    if not _several_processes(None):
        return dict(zip(values, columns, strict=True)), weight
    total = torch.full((), float(weight), dtype=torch.float64, device=columns[0].device)
    sums = torch.stack([total, *(total * value for value in columns)])
    torch.distributed.all_reduce(sums)
    means = (sums[1:] / sums[0].clamp(min=1e-30)).unbind()
    return {name: mean.to(value.dtype) for (name, value), mean in zip(values.items(), means, strict=True)}, sums[0]


class _Sum(torch.autograd.Function):
    """Each process's value acts on every process's sum, so that the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


def _several_processes(group: torch.distributed.ProcessGroup | None) -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


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
