"""Pairs of rows that lie close together, found in blocks: memory is a block times N, never N x N.

Shapes: N rows, F features, K closest pairs.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SLACK = 1e-14  # of the largest squared norm: rounding of a squared distance in float64


def closest_pairs(x: Tensor, num: int, chunk_size: int = 512) -> tuple[Tensor, Tensor]:
    """The pairs of rows with the smallest Euclidean distance, found in blocks of ``chunk_size`` x N.

    Args:
        x: ``(N, F)`` rows to compare.
        num: K, number of pairs wanted.
        chunk_size: rows compared at a time.

    Returns:
        Distances ``(K,)`` float64, smallest first, and ``(K, 2)`` int64 rows; fewer if there are fewer pairs.
    """
    x = _centred(x)
    best, pairs = x.new_empty(0), torch.empty(0, 2, dtype=torch.int64, device=x.device)
    for start, squared in _blocks(x, chunk_size):
        bound = best[-1] if len(best) == num else math.inf
        rows, columns = (squared < bound).nonzero(as_tuple=True)
        best = torch.cat([best, squared[rows, columns]])
        pairs = torch.cat([pairs, torch.stack([rows, columns], 1) + start])
        best, order = best.topk(min(num, len(best)), largest=False)
        pairs = pairs[order]
    distances = (x[pairs[:, 0]] - x[pairs[:, 1]]).norm(dim=1)  # without the products' rounding
    order = distances.argsort(stable=True)
    return distances[order], pairs[order]


class NearDuplicates(NamedTuple):
    """What a search for pairs within a distance finds."""

    count: int
    """Pairs."""
    dispersion: float
    """Variance of the count over a Poisson count's, 1 or more: samples that have many near-duplicates raise it."""
    previous: Tensor
    """``(N,)`` int64: the latest earlier near-duplicate of each sample, -1 if there is none."""


def near_duplicates(x: Tensor, threshold: float, chunk_size: int = 512) -> NearDuplicates:
    r"""Count the pairs of rows that are no further apart than a threshold.

    The count is a U-statistic of pairs, of which those that share a row depend on each other. With :math:`d_i`
    near-duplicates of row i, c pairs and :math:`p = c / \binom N2`,

    .. math:: \frac{\mathrm{Var}(c)}{\mathrm E(c)} \approx 1 + \frac{\sum_i d_i (d_i - 1) - N (N-1) (N-2) \, p^2}{c}

    Args:
        x: ``(N, F)`` rows to compare.
        threshold: largest distance of a pair. Distances are right to 1e-7 of the largest norm.
        chunk_size: rows compared at a time: memory is ``chunk_size`` x N.

    Source: Hoeffding 1948, equation 5.13 (the variance).
    """
    x = _centred(x)
    N = len(x)
    limit = threshold**2 + _SLACK * float(x.square().sum(1).max())
    degree = torch.zeros(N, dtype=torch.int64, device=x.device)
    previous = torch.full((N,), -1, dtype=torch.int64, device=x.device)
    for start, squared in _blocks(x, chunk_size):
        near = squared <= limit
        degree[start : start + len(near)] += near.sum(1)
        degree[start:] += near.sum(0)
        latest = len(near) - 1 - near.flip(0).to(torch.uint8).argmax(0)
        previous[start:] = torch.where(near.any(0), start + latest, previous[start:])
    count = int(degree.sum()) // 2
    if not count:
        return NearDuplicates(0, 1.0, previous)
    p = count / math.comb(N, 2)
    shared = int((degree * (degree - 1)).sum()) - N * (N - 1) * (N - 2) * p**2
    return NearDuplicates(count, max(1.0, 1 + shared / count), previous)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)  # a common offset would cost digits


def _blocks(x: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    """Squared distances of rows ``start, start + 1, ...`` to rows from ``start`` on; each pair once, else infinity."""
    norms = x.square().sum(1)
    for start in range(0, len(x), chunk_size):
        rows, rest = x[start : start + chunk_size], x[start:]
        squared = norms[start : start + chunk_size, None] + norms[start:] - 2 * rows @ rest.T
        yield start, squared.masked_fill_(~torch.ones_like(squared, dtype=torch.bool).triu_(1), math.inf)
