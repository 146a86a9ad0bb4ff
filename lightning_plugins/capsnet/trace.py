"""What happens in each routing iteration, for pictures, tests and the eye: couplings, poses, objective, entropy."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.capsnet.routing import (
    RoutingKind,
    check_extras,
    check_options,
    check_shapes,
    compute_dtype,
    compute_votes,
    next_centres,
    squash,
    unit,
    vote_couplings,
    vote_sums,
    without_autocast,
)
from lightning_plugins.core import arguments as must


@dataclass(frozen=True)
class RoutingTrace:
    """What happened in each of R routing iterations.

    Attributes:
        couplings: ``(R, B, N, J)``, zero for absent inputs.
        poses: ``(R, B, J, K)`` after squash.
        objective: ``(R, B)`` :func:`kmeans_objective` at the poses of that iteration.
        entropy: ``(R, B)`` entropy of the couplings, mean over present inputs, as a fraction of the largest possible,
            ``log J`` (``log(J + 1)`` when leaky, the orphan's share included).
    """

    couplings: Tensor
    poses: Tensor
    objective: Tensor
    entropy: Tensor


@torch.no_grad()
def routing_trace(
    u: Tensor,
    W: Tensor,
    routing: RoutingKind = "dynamic",
    iterations: int = 3,
    *,
    squash_scale: float = 1.0,
    leaky: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> RoutingTrace:
    """Record couplings, poses, objective and entropy of every iteration; votes are stored, nothing is differentiated.

    Args:
        u: ``(B, N, D)`` input capsules.
        W: ``(N, D, J, K)`` one transform per pair, or ``(D, J, K)`` shared by any number of inputs.
        routing: which of the four kinds of :func:`~lightning_plugins.capsnet.route`.
        iterations: computations of couplings R, 1 or more, the uniform first one included.
        squash_scale: the constant c of :func:`~lightning_plugins.capsnet.squash`, above 0.
        leaky: whether an orphan class takes the share of what belongs nowhere.
        bias: ``(J, K)``, added to the sums of every iteration.
        mask: ``(B, N)`` bool, True where an input capsule is present.

    Returns:
        A :class:`RoutingTrace`.

    Raises:
        ValueError: an argument is out of range or a shape does not fit.
    """
    steps = check_options(routing, iterations, "full", squash_scale, leaky)
    check_shapes(u, W)
    with without_autocast(u):
        dtype = compute_dtype(u, W)
        votes = compute_votes(u.to(dtype), W.to(dtype))
        check_extras(votes.shape, bias, mask)
        if mask is not None:
            votes = votes.masked_fill(~mask[:, :, None, None], 0)
        sums = vote_sums(votes, bias, routing, steps, squash_scale, leaky, False)
        centres: list[Tensor | None] = [None]
        for s in sums[:-1]:
            centres.append(next_centres(centres[-1], s, routing, squash_scale))
        sums += sums[-1:] * (iterations - steps)  # uniform couplings stay as they are
        centres += centres[-1:] * (iterations - steps)

        present = torch.ones_like(votes[:, :, 0, 0]) if mask is None else mask.to(dtype)
        c = torch.stack([vote_couplings(votes, a, leaky) for a in centres])
        return RoutingTrace(
            couplings=c * present[..., None],
            poses=squash(torch.stack(sums), squash_scale),
            objective=torch.stack([kmeans_objective(votes, s, mask) for s in sums]),
            entropy=(_relative_entropy(c, leaky) * present).sum(-1) / present.sum(-1),
        )


def kmeans_objective(votes: Tensor, centres: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Measure how well the centres explain the votes: the loss that ``kmeans`` routing never raises.

    .. math:: L = -\sum_i \log \sum_j \exp \langle \hat u_{ij}, v_j / \|v_j\| \rangle

    Args:
        votes: ``(B, N, J, K)`` votes of the input capsules.
        centres: ``(B, J, K)`` centres of the output capsules; only their directions count.
        mask: ``(B, N)`` bool, True where an input capsule is present.

    Returns:
        ``(B,)`` objective of each sample.

    Raises:
        ValueError: a tensor of another shape.

    Source: kexue.fm/archives/5112.
    """
    must.check(
        {"votes": votes, "centres": centres}, votes=must.tensor("(B, N, J, K)"), centres=must.tensor("(B, J, K)")
    )
    check_extras((*votes.shape[:2], *centres.shape[1:]), None, mask)
    terms = torch.einsum("bnjk,bjk->bnj", votes, unit(centres)).logsumexp(-1)
    if mask is not None:
        terms = terms.masked_fill(~mask, 0)
    return -terms.sum(-1)


def _relative_entropy(couplings: Tensor, leaky: bool) -> Tensor:
    """Entropy of each input's couplings, the orphan's share included, as a fraction of the largest possible."""
    entropy = torch.special.entr(couplings).sum(-1)
    if leaky:
        entropy = entropy + torch.special.entr((1 - couplings.sum(-1)).clamp_min(0))
    return entropy / math.log(max(2, couplings.shape[-1] + leaky))
