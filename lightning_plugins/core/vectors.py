"""Lists of tensors (parameters, gradients) as one long vector, sharded or not.

Sums over a list are global: shards of FSDP2 (``DTensor``) are summed over the processes that hold them, so that every
rank gets the same number.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# Whole lists at once, as torch's own optimizers move them; its stubs do not say that the names are exported.
_torch: Any = torch
foreach_add_ = _torch._foreach_add_
foreach_copy_ = _torch._foreach_copy_
foreach_div = _torch._foreach_div
foreach_mul_ = _torch._foreach_mul_

_ROW = 2**10  # squares that are summed in their own precision
_SHORT = 2**15  # elements of a tensor up to which its squares are summed in float64
_BLOCK = 2**16  # elements that are copied to float64 at a time: 512 kB, which a core's cache holds
_BUCKET = 2**23  # elements that travel together, 32 MB in fp32


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's shards, which share their storage with ``tensors``."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """``sum_i <x_i, y_i>`` over all tensors and shards.

    Args:
        xs: tensors of any shapes, at least one.
        ys: tensors of the same shapes, sharded in the same way.

    Returns:
        0-dim float64 tensor on the first tensor's device.
    """
    return _global_sum(xs, [_dot(x, y) for x, y in zip(local(xs), local(ys), strict=True)])


def norm(xs: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors and shards: a 0-dim float64 tensor on the first tensor's device."""
    return _global_sum(xs, _lengths(local(xs)), 2).sqrt()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """In float64, where products of fp32 are exact, a block at a time.

    Sums of the BLAS in fp32 err by up to 7e-4, depending on the processor, the threads and the operands' addresses;
    they take as long.
    """
    x, y = _flat(x), _flat(y)
    if x.numel() <= _BLOCK:
        return torch.dot(x.double(), y.double())
    blocks = zip(x.split(_BLOCK), y.split(_BLOCK), strict=True)
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in blocks]).sum()


def _lengths(xs: Sequence[Tensor]) -> list[Tensor]:
    """Short ones in float64, all at once; longer ones by rows."""
    flats = [_flat(x) for x in xs]
    short = iter(_torch._foreach_norm(found, 2, torch.float64) if (found := [x for x in flats if _is_short(x)]) else ())
    return [next(short) if _is_short(flat) else _length(flat) for flat in flats]


def _is_short(flat: Tensor) -> bool:
    return flat.numel() <= _SHORT


def _length(flat: Tensor) -> Tensor:
    """Within 1e-6 for fp32: the lengths of rows, joined in float64."""
    even = flat.numel() - flat.numel() % _ROW
    rows = torch.linalg.vector_norm(_widened(flat[:even].view(-1, _ROW)), dim=1)
    rest = torch.linalg.vector_norm(_widened(flat[even:]))
    return torch.linalg.vector_norm(torch.cat([rows, rest[None]]).double())


def _flat(x: Tensor) -> Tensor:
    """In one dimension, complex numbers as pairs of real ones."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).flatten()


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _global_sum(xs: Sequence[Tensor], parts: Sequence[Tensor], power: int = 1) -> Tensor:
    """The sum of powers of one float64 for each tensor; a sum of squares does not overflow fp32."""
    device = parts[0].device
    kinds: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for x, part in zip(xs, parts, strict=True):
        kinds.setdefault(_shard_groups(x), []).append(part if part.device == device else part.to(device))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for groups, numbers in kinds.items():
        share = (torch.stack(numbers) ** power).sum()
        for group in groups:
            dist.all_reduce(share, group=group)
        total += share
    return total


def _shard_groups(x: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes that hold different shards of ``x``."""
    if not isinstance(x, DTensor):
        return ()
    return tuple(x.device_mesh.get_group(dim) for dim, place in enumerate(x.placements) if place.is_shard())


def mean_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Average plain tensors over all processes in place, many of them in one message; nothing on one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in (bucket for kind in kinds.values() for bucket in _buckets(kind)):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
