"""Routing between capsules: which output capsule each input capsule belongs to, found by agreement.

Names follow the papers. Shape letters: B batch, N input capsules, D their size, J output capsules, K their size,
R iterations. ``u`` (B,N,D) are input capsules, ``W`` (N,D,J,K) or shared (D,J,K) the transforms, votes ``u W``
(B,N,J,K), couplings c (B,N,J), poses v (B,J,K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

RoutingKind = Literal["dynamic", "kmeans", "kmeans_squash", "uniform"]
GradientKind = Literal["full", "last"]


def squash(s: Tensor, scale: float = 1.0) -> Tensor:
    r"""Shrink vectors to a length below one, keeping their direction.

    .. math:: \mathrm{squash}(s) = \frac{\|s\|^2}{c + \|s\|^2} \, \frac{s}{\|s\|}

    Args:
        s: ``(..., D)`` capsule inputs; half precision is widened for the norm.
        scale: ``c > 0``. 1 in Sabour et al. 2017 eq. 1; 0.5 in kexue.fm/archives/5112, where length 0.9 is reached at
            ``|s| = 2.12`` in place of 3.

    Returns:
        ``(..., D)`` vectors with length in [0, 1), in the dtype of ``s``; the zero vector stays zero, its gradient too.

    Source: Sabour, Frosst, Hinton 2017, eq. 1.

    >>> squash(torch.tensor([3.0, 4.0])).norm()  # 25 / 26
    tensor(0.9615)
    """
    wide = s.to(_compute_dtype(s))
    # squash(s; c) = squash(s/q; c/q^2) for every q > 0: with q = max(1, |s|_inf) no square overflows
    q = wide.detach().abs().amax(-1, keepdim=True).clamp_min(1)
    t = wide / q
    n = torch.linalg.vector_norm(t, dim=-1, keepdim=True)  # its gradient is 0 at 0
    return (t * (n / (scale / q / q + n * n))).to(s.dtype)


def compute_votes(u: Tensor, W: Tensor) -> Tensor:
    """Let every input capsule predict every output capsule: ``u_i W_ij``.

    For reference, traces and tests: :func:`route` gives the same result without storing this tensor.

    Args:
        u: ``(B, N, D)`` input capsules.
        W: ``(N, D, J, K)`` one transform per pair, or ``(D, J, K)`` shared by any number of inputs.

    Returns:
        ``(B, N, J, K)`` votes.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_shapes(u, W)
    return torch.einsum("bnd,djk->bnjk" if W.dim() == 3 else "bnd,ndjk->bnjk", u, W)


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
    _check_options(routing, iterations, gradient)
    if votes.dim() != 4:
        raise ValueError(f"votes must have shape (B, N, J, K), not {tuple(votes.shape)}; see compute_votes.")
    _check_extras(votes.shape, bias, mask)
    result_dtype = _result_dtype(votes, votes)
    with torch.autocast(votes.device.type, enabled=False):
        votes = votes.to(_compute_dtype(votes))
        if mask is not None:
            votes = votes.masked_fill(~mask[:, :, None, None], 0)

        def coupled_sum(centres: Tensor | None, constant: bool) -> Tensor:
            c = _couplings(votes, centres, leaky)
            return torch.einsum("bnj,bnjk->bjk", c.detach() if constant else c, votes)

        return _iterate(coupled_sum, routing, iterations, gradient, squash_scale, bias).to(result_dtype)


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
            paper); su's "r iterations after the uniform start" is r + 1 here.
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
    _check_options(routing, iterations, gradient)
    _check_shapes(u, W)
    result_dtype = _result_dtype(u, W)
    with torch.autocast(u.device.type, enabled=False):
        dtype = _compute_dtype(u, W)
        votes = compute_votes(u.to(dtype), W.to(dtype))
        poses = route_votes(
            votes, routing, iterations, gradient=gradient, squash_scale=squash_scale, leaky=leaky, bias=bias, mask=mask
        )
    return poses.to(result_dtype)


def kmeans_objective(votes: Tensor, centres: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Measure how well the centres explain the votes: the loss that ``kmeans`` routing never raises.

    .. math:: L = -\sum_i \log \sum_j \exp \langle \hat u_{ij}, v_j / \|v_j\| \rangle

    Args:
        votes: ``(B, N, J, K)``.
        centres: ``(B, J, K)``; only their directions count.
        mask: ``(B, N)`` bool, True where an input capsule is present.

    Returns:
        ``(B,)`` objective of each sample.

    Source: kexue.fm/archives/5112.
    """
    terms = _agreement(votes, _unit(centres)).logsumexp(-1)
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
    _check_options(routing, iterations, "full")
    _check_shapes(u, W)
    with torch.autocast(u.device.type, enabled=False):
        dtype = _compute_dtype(u, W)
        votes = compute_votes(u.to(dtype), W.to(dtype))
        _check_extras(votes.shape, bias, mask)
        present = torch.ones_like(votes[:, :, 0, 0]) if mask is None else mask.to(dtype)
        couplings, poses, objective, entropy = [], [], [], []

        def coupled_sum(centres: Tensor | None, constant: bool) -> Tensor:
            c = _couplings(votes, centres, leaky)
            share = torch.special.entr(c).sum(-1) + (torch.special.entr((1 - c.sum(-1)).clamp_min(0)) if leaky else 0)
            entropy.append((share * present).sum(-1) / present.sum(-1) / math.log(max(2, c.shape[-1] + leaky)))
            couplings.append(c * present[..., None])
            s = torch.einsum("bnj,bnjk->bjk", couplings[-1], votes)
            biased = s if bias is None else s + bias
            poses.append(squash(biased, squash_scale))
            objective.append(kmeans_objective(votes, biased, mask))
            return s

        for _ in range(iterations if routing == "uniform" else 1):
            _iterate(coupled_sum, routing, iterations, "full", squash_scale, bias)
    return RoutingTrace(*(torch.stack(steps) for steps in (couplings, poses, objective, entropy)))


def _iterate(
    coupled_sum: Callable[[Tensor | None, bool], Tensor],
    routing: RoutingKind,
    iterations: int,
    gradient: GradientKind,
    squash_scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Run the loop all forms share; ``coupled_sum(a, constant couplings)`` is the pass over the inputs."""
    centres = None  # uniform couplings
    for _ in range(0 if routing == "uniform" else iterations - 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "full"):
            s = coupled_sum(centres, False)
            s = s if bias is None else s + bias
            v = _unit(s) if routing == "kmeans" else squash(s, squash_scale)
            centres = v if centres is None or routing != "dynamic" else centres + v
    s = coupled_sum(centres, gradient == "last")
    return squash(s if bias is None else s + bias, squash_scale)


def _unit(v: Tensor) -> Tensor:
    """Divide vectors by their length; zero stays zero."""
    n = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / n.masked_fill(n == 0, 1)


def _agreement(votes: Tensor, centres: Tensor) -> Tensor:
    """Inner products ``(B, N, J)`` of votes with centres."""
    return torch.einsum("bnjk,bjk->bnj", votes, centres)


def _couplings(votes: Tensor, centres: Tensor | None, leaky: bool) -> Tensor:
    """Softmax over the output capsules (and the orphan's zero logit) of the agreement, ``(B, N, J)``."""
    num_outputs = votes.shape[2]
    if centres is None:
        return votes.new_full(votes.shape[:3], 1 / (num_outputs + leaky))
    logits = _agreement(votes, centres)
    if leaky:
        return torch.nn.functional.pad(logits, (0, 1)).softmax(-1)[..., :num_outputs]
    return logits.softmax(-1)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _result_dtype(u: Tensor, W: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(u.device.type):
        return _compute_dtype(u, W)
    return torch.promote_types(u.dtype, W.dtype)


def _check_options(routing: str, iterations: int, gradient: str) -> None:
    if routing not in get_args(RoutingKind):
        raise ValueError(f"routing must be one of {', '.join(get_args(RoutingKind))}, not {routing!r}.")
    if gradient not in get_args(GradientKind):
        raise ValueError(f"gradient must be 'full' or 'last', not {gradient!r}.")
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, not {iterations}: the first one is the uniform start.")


def _check_shapes(u: Tensor, W: Tensor) -> None:
    if u.dim() != 3:
        raise ValueError(f"u must have shape (B, N, D), not {tuple(u.shape)}.")
    if W.dim() not in (3, 4):
        raise ValueError(f"W must have shape (N, D, J, K) or, shared, (D, J, K), not {tuple(W.shape)}.")
    if tuple(W.shape[:-2]) != tuple(u.shape[1:])[4 - W.dim() :]:
        raise ValueError(
            f"W {tuple(W.shape)} does not fit u {tuple(u.shape)}: u is (B, N, D), W (N, D, J, K) or, shared, (D, J, K)."
        )


def _check_extras(votes_shape: torch.Size, bias: Tensor | None, mask: Tensor | None) -> None:
    if bias is not None and bias.shape != votes_shape[2:]:
        raise ValueError(f"bias must have shape (J, K) = {tuple(votes_shape[2:])}, not {tuple(bias.shape)}.")
    if mask is not None and (mask.shape != votes_shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool of shape (B, N) = {tuple(votes_shape[:2])}, not {mask.dtype} {tuple(mask.shape)}."
        )
