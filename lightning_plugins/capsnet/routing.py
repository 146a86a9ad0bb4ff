r"""Routing between capsules: which output capsule each input capsule belongs to, found by agreement.

The paper on a page. Input capsules u vote for the output capsules by transforms W; in each iteration the votes are
summed by couplings c, which grow where a vote agrees with a centre a, and the last sum is squashed to a pose v:

.. math::
    \hat u_{ij} = u_i W_{ij}, \quad c_{ij} = \mathrm{softmax}_j \langle \hat u_{ij}, a_j \rangle, \quad
    s_j = \sum_i c_{ij} \hat u_{ij}, \quad v_j = \mathrm{squash}(s_j)

The first iteration has no centres: its couplings are uniform. The kinds of routing differ in the centres that follow:
``dynamic`` adds up v (Sabour et al. 2017, procedure 1), ``kmeans`` takes s by its length (kexue.fm/archives/5112),
``kmeans_squash`` v (kexue.fm/archives/4819), and ``uniform`` stays with the first iteration.

Each formula is a function, in the paper's order: :func:`squash`, :func:`compute_votes`, :func:`couplings`,
:func:`next_centres`, the loop :func:`vote_sums`, and :func:`route_votes` around it; below stand lengths without
overflow, and checks. ``streamed_routing.py`` computes the same without storing the votes.

Shape letters: B batch, N input capsules, D their size, J output capsules, K their size, R iterations. ``u`` (B,N,D),
``W`` (N,D,J,K) or shared (D,J,K), votes (B,N,J,K), couplings c (B,N,J), centres a, sums s and poses v (B,J,K). Only
votes and couplings are large.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must

RoutingKind = Literal["dynamic", "kmeans", "kmeans_squash", "uniform"]
GradientKind = Literal["full", "last"]


def squash(s: Tensor, scale: float = 1.0) -> Tensor:
    r"""Shrink vectors to a length below one, keeping their direction.

    .. math:: \mathrm{squash}(s) = \frac{\|s\|^2}{c + \|s\|^2} \, \frac{s}{\|s\|}

    Args:
        s: ``(..., D)`` capsule inputs; half precision is widened for the norm.
        scale: the constant c, above 0: 1 in Sabour et al. 2017, eq. 1; 0.5 in kexue.fm/archives/5112, where length 0.9
            is reached at ``|s| = 2.12`` in place of 3.

    Returns:
        ``(..., D)`` vectors with length in [0, 1), in the dtype of ``s``; the zero vector stays zero, its gradient too.

    Raises:
        ValueError: ``scale`` is not positive, or ``s`` no floating tensor.

    Source: Sabour, Frosst, Hinton 2017, eq. 1.

    >>> squash(torch.tensor([3.0, 4.0])).norm()  # 25 / 26
    tensor(0.9615)
    """
    must.tensor("(..., D)")("s", s)
    must.positive("scale", scale)
    t, n, c, _, zero = bounded(s.to(compute_dtype(s)), scale)  # squash(s; scale) = squash(t; c)
    return (t * (n / (c + n * n)).masked_fill(zero, 0)).to(s.dtype)


def compute_votes(u: Tensor, W: Tensor) -> Tensor:
    r"""Let every input capsule predict every output capsule: :math:`\hat u_{ij} = u_i W_{ij}`.

    Args:
        u: ``(B, N, D)`` input capsules.
        W: ``(N, D, J, K)`` one transform per pair, or ``(D, J, K)`` shared by any number of inputs.

    Returns:
        ``(B, N, J, K)`` votes.

    Raises:
        ValueError: the shapes do not fit.

    Source: Sabour, Frosst, Hinton 2017, eq. 2.
    """
    check_shapes(u, W)
    return torch.einsum("bnd,djk->bnjk" if W.dim() == 3 else "bnd,ndjk->bnjk", u, W)


def couplings(logits: Tensor, leaky: bool, dim: int = -1) -> Tensor:
    """Softmax over the output capsules (Sabour et al. 2017, eq. 3).

    Args:
        logits: agreements of votes and centres, with the J output capsules at ``dim``.
        leaky: whether an orphan class with logit 0 takes its share, which is not returned.
        dim: place of the output capsules among the dimensions.
    """
    if not leaky:
        return logits.softmax(dim)
    orphan = torch.zeros_like(logits.narrow(dim, 0, 1))
    return torch.cat([logits, orphan], dim).softmax(dim).narrow(dim, 0, logits.shape[dim])


def vote_couplings(votes: Tensor, centres: Tensor | None, leaky: bool) -> Tensor:
    """Couplings ``(B, N, J)`` of stored votes with centres ``(B, J, K)``, uniform where these are None."""
    if centres is None:
        return votes.new_full(votes.shape[:3], 1 / (votes.shape[2] + leaky))
    return couplings(torch.einsum("bnjk,bjk->bnj", votes, centres), leaky)


def next_centres(centres: Tensor | None, s: Tensor, routing: str, squash_scale: float) -> Tensor:
    """What the votes are compared with after an iteration that summed to ``s``.

    Args:
        centres: ``(B, J, K)`` of this iteration; None for the uniform first one.
        s: ``(B, J, K)`` sums of this iteration.
        routing: ``dynamic`` adds up squashed sums, so that the logits accumulate; the other kinds start afresh.
        squash_scale: the constant c of :func:`squash`.

    Returns:
        ``(B, J, K)`` centres of the next iteration.
    """
    v = unit(s) if routing == "kmeans" else squash(s, squash_scale)
    return centres + v if routing == "dynamic" and centres is not None else v


def vote_sums(
    votes: Tensor, bias: Tensor | None, routing: str, iterations: int, squash_scale: float, leaky: bool, last: bool
) -> list[Tensor]:
    """The loop of the papers on stored votes, by plain autograd.

    Args:
        votes: ``(B, N, J, K)`` votes of the input capsules.
        bias: ``(J, K)`` added to every sum, or None.
        routing: which centres follow, as :func:`next_centres` knows them.
        iterations: how many sums R, 1 or more.
        squash_scale: the constant c of :func:`squash`.
        leaky: whether the orphan class takes its share.
        last: whether couplings are constants and gradients pass through the last sum alone.

    Returns:
        The R sums s ``(B, J, K)`` before squash, of which the last is the result.
    """
    centres: Tensor | None = None
    sums: list[Tensor] = []
    for r in range(iterations):
        is_result = r == iterations - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and (is_result or not last)):
            c = vote_couplings(votes, centres, leaky)
            s = torch.einsum("bnj,bnjk->bjk", c.detach() if last else c, votes)
            sums.append(s if bias is None else s + bias)
            if not is_result:
                centres = next_centres(centres, sums[-1], routing, squash_scale)
    return sums


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
    """Route stored votes, by plain autograd: the portable, readable form of ``route``, which tells more of arguments.

    Args:
        votes: ``(B, N, J, K)`` votes, from :func:`compute_votes`.
        routing: which of the four kinds.
        iterations: computations of couplings R, 1 or more, the uniform first one included.
        gradient: ``"full"`` through all iterations, ``"last"`` with couplings as constants.
        squash_scale: the constant c of :func:`squash`, above 0.
        leaky: whether an orphan class takes the share of what belongs nowhere.
        bias: ``(J, K)``, added to the sums of every iteration.
        mask: ``(B, N)`` bool, True where an input capsule is present.

    Returns:
        ``(B, J, K)`` poses.

    Raises:
        ValueError: an argument is out of range or a shape does not fit.
    """
    iterations = check_options(routing, iterations, gradient, squash_scale, leaky)
    must.tensor()("votes", votes)
    if votes.dim() != 4:
        raise ValueError(f"votes must have shape (B, N, J, K), not {tuple(votes.shape)}; see compute_votes.")
    check_extras(votes.shape, bias, mask)
    result_dtype = dtype_of_result(votes)
    with without_autocast(votes):
        votes = votes.to(compute_dtype(votes))
        bias = bias if bias is None else bias.to(votes.dtype)
        if mask is not None:
            votes = votes.masked_fill(~mask[:, :, None, None], 0)
        sums = vote_sums(votes, bias, routing, iterations, squash_scale, leaky, gradient == "last")
        return squash(sums[-1], squash_scale).to(result_dtype)


# Lengths of vectors, however long or short.


def unit(s: Tensor) -> Tensor:
    """Divide vectors by their length; zero stays zero, and so does its gradient."""
    t, n, zero = by_largest(s)[:3]
    return (t / n).masked_fill(zero, 0)


def lengths(v: Tensor) -> Tensor:
    """Lengths ``(...)`` of vectors ``(..., K)`` in float32 or wider; the gradient is finite however short they are."""
    _, n, zero, largest = by_largest(v.to(compute_dtype(v)))
    return (n * largest).masked_fill(zero, 0).squeeze(-1)


def bounded(s: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return t = s/q, |t|, c/q^2, q = max(1, |s|_inf), and where s is zero: squash(s; c) = squash(t; c/q^2).

    No square overflows then, nor underflows, as |t| is taken of t by its largest entry. These scales count as
    constants: their true derivatives cancel. Zero vectors are replaced by ones, as the norm's second derivative is NaN
    at zero.
    """
    largest = s.detach().abs().amax(-1, keepdim=True)
    zero, q = largest == 0, largest.clamp_min(1)
    t = (s / q).masked_fill(zero, 1)
    m = torch.where(zero, 1, largest / q).clamp_min(torch.finfo(s.dtype).tiny)
    return t, m * torch.linalg.vector_norm(t / m, dim=-1, keepdim=True), scale / q / q, q, zero


def by_largest(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return t = s/|s|_inf, |t|, where s is zero (t is one there), and |s|_inf: short vectors too keep all digits."""
    largest = s.detach().abs().amax(-1, keepdim=True)
    zero, largest = largest == 0, largest.clamp_min(torch.finfo(s.dtype).tiny)
    t = (s / largest).masked_fill(zero, 1)
    return t, torch.linalg.vector_norm(t, dim=-1, keepdim=True), zero, largest


# Types, and what is refused.


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Arithmetic in the tensors' own types; the device ``meta`` knows no other."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype for arithmetic: the tensors' promoted one, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def dtype_of_result(*tensors: Tensor) -> torch.dtype:
    """Float32 or wider under autocast, else the tensors' promoted dtype."""
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
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


def check_shapes(u: Tensor, W: Tensor) -> None:
    """Raise a ValueError unless ``u`` is (B, N, D) and ``W`` (N, D, J, K) or (D, J, K)."""
    must.check({"u": u, "W": W}, u=must.tensor(), W=must.tensor())
    if u.dim() != 3:
        raise ValueError(f"u must have shape (B, N, D), not {tuple(u.shape)}.")
    if W.dim() not in (3, 4):
        raise ValueError(f"W must have shape (N, D, J, K) or, shared, (D, J, K), not {tuple(W.shape)}.")
    if W.shape[:-2] != u.shape[5 - W.dim() :]:
        raise ValueError(
            f"W {tuple(W.shape)} does not fit u {tuple(u.shape)}: u is (B, N, D), W (N, D, J, K) or, shared, (D, J, K)."
        )


def check_extras(votes_shape: Sequence[int], bias: Tensor | None, mask: Tensor | None) -> None:
    """Raise a ValueError unless bias and mask fit votes of that shape."""
    B, N, J, K = votes_shape
    must.check({"bias": bias, "mask": mask}, bias=_TENSOR, mask=_TENSOR)
    if bias is not None and bias.shape != (J, K):
        raise ValueError(f"bias must have shape (J, K) = ({J}, {K}), not {tuple(bias.shape)}.")
    if mask is not None and (mask.shape != (B, N) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape (B, N) = ({B}, {N}), not {mask.dtype} {tuple(mask.shape)}.")
