"""Routing between capsules: which output capsule each input capsule belongs to, found by agreement.

Names follow the papers. Shape letters: B batch, N input capsules, D their size, J output capsules, K their size,
R iterations. ``u`` (B,N,D) are input capsules, ``W`` (N,D,J,K) or shared (D,J,K) the transforms, votes ``u W``
(B,N,J,K), couplings c (B,N,J), poses v (B,J,K).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.capsnet.agreement import (
    GradientKind,
    RoutingKind,
    check_shapes,
    compute_dtype,
    compute_votes,
    next_centres,
    squash,
    unit,
    vote_couplings,
    vote_sums,
)
from lightning_plugins.capsnet.streaming import coupled_sums
from lightning_plugins.core import arguments as must

__all__ = [
    "GradientKind", "RoutingKind", "RoutingTrace", "compute_votes", "kmeans_objective", "route", "route_votes",
    "routing_trace", "squash",
]  # fmt: skip


def route_votes(
    votes: Tensor,
    routing: RoutingKind = "dynamic",
    iterations: int = 3,
    *,
    gradient: GradientKind = "full",
    squash_scale: float = 1.0,
    leaky: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Route stored votes, by plain autograd: the portable, readable form of :func:`route`, which says what is what.

    Args:
        votes: ``(B, N, J, K)``, see :func:`compute_votes`.
        routing: see :func:`route`, as all further arguments.
        iterations: ``>= 1``.
        gradient: ``"full"`` or ``"last"``.
        squash_scale: ``> 0``.
        leaky: adds the orphan class.
        bias: ``(J, K)`` or None.
        mask: ``(B, N)`` bool or None.

    Returns:
        ``(B, J, K)`` poses.

    Raises:
        ValueError: if an argument is out of range or a shape does not fit.
    """
    iterations = check_options(routing, iterations, gradient, squash_scale, leaky)
    must.tensor()("votes", votes)
    if votes.dim() != 4:
        raise ValueError(f"votes must have shape (B, N, J, K), not {tuple(votes.shape)}; see compute_votes.")
    _check_extras(votes.shape, bias, mask)
    result_dtype = _result_dtype(votes)
    with torch.autocast(votes.device.type, enabled=False):
        votes = votes.to(compute_dtype(votes))
        bias = bias if bias is None else bias.to(votes.dtype)
        if mask is not None:
            votes = votes.masked_fill(~mask[:, :, None, None], 0)
        sums = vote_sums(votes, bias, routing, iterations, squash_scale, leaky, gradient == "last")
        return squash(sums[-1], squash_scale).to(result_dtype)


def route(
    u: Tensor,
    W: Tensor,
    routing: RoutingKind = "dynamic",
    iterations: int = 3,
    *,
    gradient: GradientKind = "full",
    squash_scale: float = 1.0,
    leaky: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Find the poses of the output capsules by iterated agreement.

    .. math::
        c_{ij} = \mathrm{softmax}_j \langle \hat u_{ij}, a_j \rangle, \quad
        s_j = \sum_i c_{ij} \hat u_{ij} + \mathrm{bias}_j, \quad v_j = \mathrm{squash}(s_j)

    The first iteration is uniform (``c = 1/J``). What the votes are compared with in iteration r is

    * ``dynamic``: ``a = v_1 + ... + v_{r-1}``, the paper's accumulated logits (Sabour et al. 2017, procedure 1);
    * ``kmeans``: ``a = s_{r-1} / |s_{r-1}|`` (kexue.fm/archives/5112);
    * ``kmeans_squash``: ``a = v_{r-1}`` (kexue.fm/archives/4819);
    * ``uniform``: nothing; couplings stay uniform whatever the iterations.

    Arithmetic is float32 or wider, also under autocast.

    Args:
        u: ``(B, N, D)`` input capsules.
        W: ``(N, D, J, K)`` one transform per pair, or ``(D, J, K)`` shared by any number of inputs.
        routing: which of the four kinds.
        iterations: ``>= 1`` computations of couplings, the uniform first one included. This is Sabour's r (3 in the
            paper); Su's "r iterations after the uniform start" is r + 1 here.
        gradient: ``"full"`` through all iterations, as in the papers' code; ``"last"`` takes the couplings of the last
            iteration as constants, which is cheaper and a different training algorithm.
        squash_scale: ``c`` of :func:`squash`.
        leaky: one more logit, always 0, in each softmax: what belongs nowhere goes to this orphan class, and the
            couplings of an input sum to less than one.
        bias: ``(J, K)``, added to s in every iteration (the paper's official code).
        mask: ``(B, N)`` bool, True where an input capsule is present; absent ones count as if dropped.

    Returns:
        ``(B, J, K)`` poses v of the last iteration: float32 (float64 for float64 input) under autocast, else in the
        promoted dtype of ``u`` and ``W``.

    Raises:
        ValueError: if an argument is out of range or a shape does not fit.
    """
    iterations = check_options(routing, iterations, gradient, squash_scale, leaky)
    check_shapes(u, W)
    _check_extras((*u.shape[:2], *W.shape[-2:]), bias, mask)
    result_dtype = _result_dtype(u, W)
    with torch.autocast(u.device.type, enabled=False):
        dtype = compute_dtype(u, W)
        u, W, bias = u.to(dtype), W.to(dtype), bias if bias is None else bias.to(dtype)
        if mask is not None:  # the votes of a zero vector are zero: it pulls nowhere
            u = u.masked_fill(~mask[:, :, None], 0)
        sums = coupled_sums(
            u.contiguous(), W.contiguous(), bias, routing, iterations, squash_scale, leaky, gradient == "last"
        )
        return squash(sums[-1], squash_scale).to(result_dtype)


def kmeans_objective(votes: Tensor, centres: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Measure how well the centres explain the votes: the loss that ``kmeans`` routing never raises.

    .. math:: L = -\sum_i \log \sum_j \exp \langle \hat u_{ij}, v_j / \|v_j\| \rangle

    Args:
        votes: ``(B, N, J, K)``.
        centres: ``(B, J, K)``; only their directions count.
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
    _check_extras((*votes.shape[:2], *centres.shape[1:]), None, mask)
    terms = torch.einsum("bnjk,bjk->bnj", votes, unit(centres)).logsumexp(-1)
    if mask is not None:
        terms = terms.masked_fill(~mask, 0)
    return -terms.sum(-1)


@dataclass(frozen=True)
class RoutingTrace:
    """What happened in each of R routing iterations.

    Attributes:
        couplings: ``(R, B, N, J)``, zero for absent inputs.
        poses: ``(R, B, J, K)`` after squash.
        objective: ``(R, B)`` :func:`kmeans_objective` at the poses of that iteration.
        entropy: ``(R, B)`` of the couplings, mean over present inputs, as a fraction of the largest possible,
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
        u: see :func:`route`, as all further arguments.
        W: ``(N, D, J, K)`` or ``(D, J, K)``.
        routing: which of the four kinds.
        iterations: ``>= 1``.
        squash_scale: ``> 0``.
        leaky: adds the orphan class.
        bias: ``(J, K)`` or None.
        mask: ``(B, N)`` bool or None.

    Returns:
        A :class:`RoutingTrace`.

    Raises:
        ValueError: if an argument is out of range or a shape does not fit.
    """
    steps = check_options(routing, iterations, "full", squash_scale, leaky)
    check_shapes(u, W)
    with torch.autocast(u.device.type, enabled=False):
        dtype = compute_dtype(u, W)
        votes = compute_votes(u.to(dtype), W.to(dtype))
        _check_extras(votes.shape, bias, mask)
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


def _relative_entropy(couplings: Tensor, leaky: bool) -> Tensor:
    """Entropy of each input's couplings, the orphan's share included, as a fraction of the largest possible."""
    entropy = torch.special.entr(couplings).sum(-1)
    if leaky:
        entropy = entropy + torch.special.entr((1 - couplings.sum(-1)).clamp_min(0))
    return entropy / math.log(max(2, couplings.shape[-1] + leaky))


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32 or wider under autocast, else the tensors' promoted dtype."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        return compute_dtype(*tensors)
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


_ROUTING, _GRADIENT = must.one_of(RoutingKind), must.one_of(GradientKind)
_TENSOR = must.optional(must.tensor(dtype="any"))
_ITERATIONS = must.whole(1, why="the first one is the uniform start")


def check_options(routing: str, iterations: int, gradient: str, squash_scale: float, leaky: bool) -> int:
    """Raise a ValueError unless all are valid; return the number of iterations that differ from each other."""
    _ROUTING("routing", routing)
    _ITERATIONS("iterations", iterations)
    _GRADIENT("gradient", gradient)
    must.positive("squash_scale", squash_scale)
    must.flag("leaky", leaky)
    return 1 if routing == "uniform" else iterations


def _check_extras(votes_shape: Sequence[int], bias: Tensor | None, mask: Tensor | None) -> None:
    B, N, J, K = votes_shape
    must.check({"bias": bias, "mask": mask}, bias=_TENSOR, mask=_TENSOR)
    if bias is not None and bias.shape != (J, K):
        raise ValueError(f"bias must have shape (J, K) = ({J}, {K}), not {tuple(bias.shape)}.")
    if mask is not None and (mask.shape != (B, N) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape (B, N) = ({B}, {N}), not {mask.dtype} {tuple(mask.shape)}.")
