"""The nearest rows of each row, of all or of its class, by exhaustive search."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def class_sizes(labels: Tensor) -> Tensor:
    """How many of the labels ``(N,)`` are the same as each: ``(N,)``, without waiting for the device."""
    ordered = labels.sort().values
    return torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)


@torch.no_grad()
def nearest_neighbours(z: Tensor, k: int = 1, chunk_size: int = 512, labels: Tensor | None = None) -> Tensor:
    r"""Find the k nearest other rows of each row, by exhaustive search over blocks.

    Only :math:`\tfrac12 \|z_j\|^2 - \langle z_i, z_j \rangle` is compared: the rest of the distance is the same for all
    j. The k smallest of a row stand in the k groups of columns with the smallest minima, so that one fast pass finds
    the groups, and only their members are sorted.

    Args:
        z: ``(N, d)``, float32 or float64. It is centred first, as a common offset would cost precision.
        k: how many, below N.
        chunk_size: rows searched at once.
        labels: ``(N,)``; rows of another label are no neighbours. Where there are not k of the same, any row follows.

    Returns:
        ``(N, k)`` int64 indices, nearest first. Squared distances closer than some 1e-7 of the squared size of the
        centred codes are not told apart.

    Raises:
        ValueError: not more rows than k.
    """
    num_rows, dim = z.shape
    if num_rows <= k:
        raise ValueError(f"k={k} neighbours need more than {k} codes, got {num_rows}: enlarge the batch or lower k.")
    group_size = 16 if num_rows < 4096 else 32
    num_groups = -(-num_rows // group_size)
    z = z - z.mean(0)
    half_norms = z.square().sum(1) / 2
    # The norms in two parts, the first exact in bfloat16: matmuls of lowered precision (TF32) keep them.
    coarse = half_norms.bfloat16().to(z.dtype)
    left = torch.cat([z, z.new_ones(num_rows, 2)], 1)
    right = z.new_zeros(dim + 2, group_size * num_groups)
    right[:dim, :num_rows] = -z.T
    right[dim, :num_rows] = coarse
    right[dim, num_rows:] = math.inf  # columns that only fill the last group
    right[dim + 1, :num_rows] = half_norms - coarse

    members = num_groups * torch.arange(group_size, device=z.device)
    nearest = torch.empty(num_rows, k, dtype=torch.int64, device=z.device)
    buffer = z.new_empty(min(chunk_size, num_rows), group_size * num_groups)
    for start in range(0, num_rows, chunk_size):
        end = min(start + chunk_size, num_rows)
        distances = torch.mm(left[start:end], right, out=buffer[: end - start])
        distances.diagonal(start).fill_(math.inf)  # a row is not its own neighbour
        if labels is not None:
            distances[:, :num_rows].masked_fill_(labels[start:end, None] != labels, math.inf)
        minima = distances.view(-1, group_size, num_groups).amin(1)
        candidates = (_smallest(minima, min(k, num_groups))[..., None] + members).flatten(1)
        chosen = _smallest(distances.gather(1, candidates), k)
        nearest[start:end] = candidates.gather(1, chosen)
    return nearest if labels is None else nearest.clamp_(max=num_rows - 1)  # not a column that only fills


def _smallest(x: Tensor, k: int) -> Tensor:
    """``(rows, k)`` columns of the k smallest, in order."""
    return x.argmin(1, keepdim=True) if k == 1 else x.topk(k, 1, largest=False).indices
