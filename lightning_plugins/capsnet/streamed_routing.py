r"""Routing without votes in memory: a custom operator with a closed-form derivative.

Two rearrangements of the papers' loop:

* Logits are inner products of votes with centres ``a`` (B,J,K), so neither logits nor couplings need be kept between
  iterations; and as the softmax runs over the few output capsules, a block of inputs can be finished at once.
* Votes need not be formed: with :math:`h_{bijd} = \sum_k W_{idjk} a_{bjk}`,
  :math:`\langle \hat u_{bij}, a_{bj} \rangle = \sum_d u_{bid} h_{bijd}`, and
  :math:`\sum_i c_{bij} \hat u_{bij} = \sum_{id} (c_{bij} u_{bid}) W_{idjk}`: both are J matrix products, and what is
  summed element by element has D numbers per pair instead of K.

Blocks are laid out ``(J, I, D, B)``, the batch last, so that softmax and sums run over contiguous memory. For shared
transforms ``h`` does not depend on i: routing is attention of J queries ``h`` to the inputs, normalised over the
queries. Only u, W and the R sums (B,J,K) are saved for backward.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_plugins.capsnet.routing import (
    GradientKind,
    RoutingKind,
    bounded,
    by_largest,
    check_extras,
    check_options,
    check_shapes,
    compute_dtype,
    compute_votes,
    couplings,
    dtype_of_result,
    next_centres,
    squash,
    vote_sums,
    without_autocast,
)


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

    Arithmetic is float32 or wider, also under autocast. Under ``torch.func``, forward-mode differentiation and
    ``torch.export`` the votes are stored, and memory is that of :func:`~lightning_plugins.capsnet.route_votes`.

    Args:
        u: ``(B, N, D)`` input capsules.
        W: ``(N, D, J, K)`` one transform per pair, or ``(D, J, K)`` shared by any number of inputs.
        routing: which of the four kinds.
        iterations: computations of couplings R, 1 or more, the uniform first one included. This is Sabour's r (3 in
            the paper); Su's "r iterations after the uniform start" is r + 1 here.
        gradient: ``"full"`` through all iterations, as in the papers' code; ``"last"`` takes the couplings of the last
            iteration for constants, which is cheaper and a different training algorithm.
        squash_scale: the constant c of :func:`~lightning_plugins.capsnet.squash`, above 0.
        leaky: whether each softmax has one more logit, always 0: what belongs nowhere goes to this orphan class, and
            the couplings of an input sum to less than one.
        bias: ``(J, K)``, added to s in every iteration (the paper's official code).
        mask: ``(B, N)`` bool, True where an input capsule is present; absent ones count as if dropped.

    Returns:
        ``(B, J, K)`` poses v of the last iteration: float32 (float64 for float64 input) under autocast, else in the
        promoted dtype of ``u`` and ``W``.

    Raises:
        ValueError: an argument is out of range or a shape does not fit.
    """
    iterations = check_options(routing, iterations, gradient, squash_scale, leaky)
    check_shapes(u, W)
    check_extras((*u.shape[:2], *W.shape[-2:]), bias, mask)
    result_dtype = dtype_of_result(u, W)
    with without_autocast(u):
        dtype = compute_dtype(u, W)
        u, W, bias = u.to(dtype), W.to(dtype), bias if bias is None else bias.to(dtype)
        if mask is not None:  # the votes of a zero vector are zero: it pulls nowhere
            u = u.masked_fill(~mask[:, :, None], 0)
        options = routing, iterations, squash_scale, leaky, gradient == "last"
        if _wants_plain_operations(u, W, bias):
            sums = vote_sums(compute_votes(u, W), bias, *options)
        else:
            sums = coupled_sums(u.contiguous(), W.contiguous(), bias, *options)
        return squash(sums[-1], squash_scale).to(result_dtype)


def _wants_plain_operations(*tensors: Tensor | None) -> bool:
    """Whether the operator, which has one derivative and is no part of ONNX, would not do: votes are stored then.

    In forward-mode differentiation, which passes over an operator without a word, within ``torch.func``'s transforms,
    and in ``torch.export``, on which ONNX is built.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    given = [tensor for tensor in tensors if tensor is not None]
    return any(map(cast(Any, torch._C)._functorch.is_functorch_wrapped_tensor, given)) or any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in given
    )


# The operator: the sums of all iterations, block by block.


_OPTIONS = "Tensor? bias, str routing, int iterations, float squash_scale, bool leaky, bool last"


@torch.library.custom_op(
    "lightning_plugins::coupled_sums", mutates_args=(), schema=f"(Tensor u, Tensor W, {_OPTIONS}) -> Tensor"
)
def coupled_sums(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    routing: str,
    iterations: int,
    squash_scale: float,
    leaky: bool,
    last: bool,
) -> Tensor:
    """Compute the sums ``s = sum_i c_ij u_i W_ij + bias`` of every routing iteration, the first one uniform.

    Args:
        u: ``(B, N, D)`` contiguous input capsules, in one floating type with W and bias.
        W: ``(N, D, J, K)`` or ``(D, J, K)`` contiguous transforms.
        bias: ``(J, K)`` added to every sum, or None.
        routing: ``dynamic``, ``kmeans`` or ``kmeans_squash``.
        iterations: how many sums R, 1 or more.
        squash_scale: the constant c of squash.
        leaky: whether the orphan class takes part in the softmax.
        last: whether gradients pass through the last sum only, its couplings taken for constants.

    Returns:
        ``(R, B, J, K)``. With ``last``, gradients that arrive at all but the last of these are ignored.
    """
    with without_autocast(u):
        s = _uniform_sum(u, W, leaky)
        sums, centres = [s if bias is None else s + bias], None
        for _ in range(iterations - 1):
            centres = next_centres(centres, sums[-1], routing, squash_scale)
            s = _coupled_sum(u, W, centres, leaky)
            sums.append(s if bias is None else s + bias)
        return torch.stack(sums)


@coupled_sums.register_fake
def _(u, W, bias, routing, iterations, squash_scale, leaky, last):
    return u.new_empty(iterations, u.shape[0], *W.shape[-2:])


def _uniform_sum(u: Tensor, W: Tensor, leaky: bool) -> Tensor:
    """Return the sum of all votes by uniform couplings: one matrix product."""
    J, K = W.shape[-2:]
    rows = u.sum(1) if W.dim() == 3 else u.flatten(1)
    return (rows @ W.reshape(-1, J * K)).view(-1, J, K) / (J + leaky)


def _coupled_sum(u: Tensor, W: Tensor, centres: Tensor, leaky: bool) -> Tensor:
    """Return ``sum_i softmax_j(<votes_ij, a_j>) votes_ij``, ``(B, J, K)``."""
    if W.dim() == 3:
        return _shared_sum(u, W, centres, leaky)
    a = centres.permute(1, 2, 0).contiguous()  # (J, K, B)
    s = a.new_zeros(a.shape[0], a.shape[2], a.shape[1])  # (J, B, K)
    h_all, x_all = (_scratch(u, W) for _ in range(2))
    for _, u_b, W_b in _blocks(u, W):
        x, h = x_all[:, : len(u_b)], _fold(W_b, a, h_all)
        c = couplings(torch.mul(h, u_b, out=x).sum(2), leaky, dim=0)  # (J, I, B)
        torch.mul(c.unsqueeze(2), u_b, out=x)
        s.baddbmm_(x.flatten(1, 2).transpose(1, 2), W_b)
    return s.transpose(0, 1)


def _shared_sum(u: Tensor, W: Tensor, centres: Tensor, leaky: bool) -> Tensor:
    """:func:`_coupled_sum` for shared transforms ``(D, J, K)``."""
    h = torch.einsum("djk,bjk->bjd", W, centres)
    x = torch.zeros_like(h)  # sum_i c_ij u_i
    for _, u_b in _shared_blocks(u, W):
        x.baddbmm_(couplings(h @ u_b.mT, leaky, dim=1), u_b)
    return torch.einsum("bjd,djk->bjk", x, W)


# Its derivative, from the last iteration to the first.


@torch.library.custom_op(
    "lightning_plugins::coupled_sums_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor sums, Tensor u, Tensor W, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _coupled_sums_backward(
    grad: Tensor,
    sums: Tensor,
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    routing: str,
    iterations: int,
    squash_scale: float,
    leaky: bool,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients ``(u, W, bias)``, the inputs streamed once per iteration, from the last to the first."""
    with without_autocast(u):
        du, dW, dbias = torch.zeros_like(u), torch.zeros_like(W), sums.new_zeros(sums.shape[2:])
        centres: list[Tensor] = []  # of all iterations but the uniform first one
        for s in sums[:-1]:
            centres.append(next_centres(centres[-1] if centres else None, s, routing, squash_scale))
        dcentres = None
        for r in reversed(range(iterations)):
            ds = grad[r]
            if dcentres is not None:
                ds = ds + next_centres_vjp(dcentres, sums[r], routing, squash_scale)
            dbias += ds.sum(0)
            if r == 0:
                _uniform_sum_vjp(ds, u, W, leaky, du, dW)
                break
            da = _coupled_sum_vjp(ds, u, W, centres[r - 1], leaky, last, du, dW)
            if last:
                break
            dcentres = da + dcentres if routing == "dynamic" and dcentres is not None else da
        return du, dW, dbias


@_coupled_sums_backward.register_fake
def _(grad, sums, u, W, bias, routing, iterations, squash_scale, leaky, last):
    return torch.empty_like(u), torch.empty_like(W), sums.new_empty(sums.shape[2:])


def _setup_context(ctx, inputs, output) -> None:
    u, W, bias, *ctx.options = inputs
    ctx.save_for_backward(output, u, W, bias)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    sums, u, W, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is asked for: differentiate the stored form instead
        grads = _differentiable_vjp(grad, u, W, bias, *ctx.options)
    else:
        grads = _coupled_sums_backward(grad.contiguous(), sums, u, W, bias, *ctx.options)
    return grads[0], grads[1], None if bias is None else grads[2], *(None for _ in ctx.options)


coupled_sums.register_autograd(_backward, setup_context=_setup_context)


def _differentiable_vjp(grad: Tensor, u: Tensor, W: Tensor, bias: Tensor | None, *options) -> tuple[Tensor | None, ...]:
    # views, so that only direct dependence counts: u, W and bias may depend on each other further up
    u, W, bias = u.view_as(u), W.view_as(W), None if bias is None else bias.view_as(bias)
    inputs = u, W, bias
    wanted = [t for t in inputs if t is not None and t.requires_grad]  # u has no gradient behind frozen layers
    with without_autocast(u):
        sums = torch.stack(vote_sums(compute_votes(u, W), bias, *options))
        grads = iter(torch.autograd.grad(sums, wanted, grad, create_graph=True))
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in inputs)


def next_centres_vjp(grad: Tensor, s: Tensor, routing: str, squash_scale: float) -> Tensor:
    r"""Pull a gradient of :func:`next_centres` back to ``s``.

    .. math:: v = f(n) \, s, \quad \bar s = f \bar v + \frac{f'(n)}{n} \langle s, \bar v \rangle \, s,
        \qquad f = \frac{n}{c + n^2}, \; f' = \frac{c - n^2}{(c + n^2)^2}

    for squash, and :math:`\bar s = (\bar v - v \langle v, \bar v \rangle) / n` for unit length.
    """
    if routing == "kmeans":
        t, n, zero, largest = by_largest(s)
        v = t / n
        return ((grad - v * (v * grad).sum(-1, keepdim=True)) / n / largest).masked_fill(zero, 0)
    t, n, c, q, zero = bounded(s, squash_scale)
    w = c + n * n
    along = (t * grad).sum(-1, keepdim=True) / n
    return ((grad * (n / w) + t * ((c - n * n) / w / w * along)) / q).masked_fill(zero, 0)


def _uniform_sum_vjp(ds: Tensor, u: Tensor, W: Tensor, leaky: bool, du: Tensor, dW: Tensor) -> None:
    """Add the gradients of :func:`_uniform_sum` to du and dW."""
    J, K = W.shape[-2:]
    ds = ds.reshape(-1, J * K) / (J + leaky)
    rows = u.sum(1) if W.dim() == 3 else u.flatten(1)
    dW.view(-1, J * K).addmm_(rows.T, ds)
    if W.dim() == 3:
        du += (ds @ W.view(-1, J * K).T)[:, None]
    else:
        du.flatten(1).addmm_(ds, W.view(-1, J * K).T)


def _coupled_sum_vjp(
    ds: Tensor, u: Tensor, W: Tensor, centres: Tensor, leaky: bool, last: bool, du: Tensor, dW: Tensor
) -> Tensor:
    """Add the gradients of :func:`_coupled_sum` to du and dW; return that of the centres (zero with ``last``)."""
    if W.dim() == 3:
        return _shared_sum_vjp(ds, u, W, centres, leaky, last, du, dW)
    a, g = (x.permute(1, 2, 0).contiguous() for x in (centres, ds))  # (J, K, B)
    ga = torch.cat([g] if last else [g, a], 2).transpose(1, 2)  # (J, 2B, K)
    B = len(u)
    da = torch.zeros_like(ga[:, :B])  # (J, B, K)
    h_all, dx_all, y_all, x_all = (_scratch(u, W, copies) for copies in (1, 1, 1, 1 if last else 2))
    for block, u_b, W_b in _blocks(u, W):
        x, y = x_all[:, : len(u_b)], y_all[:, : len(u_b)]
        h, dx = _fold(W_b, a, h_all), _fold(W_b, g, dx_all)  # dx is the gradient of c u
        c = couplings(torch.mul(h, u_b, out=y).sum(2), leaky, dim=0)  # (J, I, B)
        torch.mul(c.unsqueeze(2), u_b, out=x[..., :B])
        if not last:
            dc = torch.mul(dx, u_b, out=y).sum(2)
            dlogits = c * (dc - (c * dc).sum(0))
            torch.mul(dlogits.unsqueeze(2), u_b, out=x[..., B:])
        rows = x.flatten(1, 2)
        _by_output(dW, block).baddbmm_(rows, ga)
        du_b = torch.mul(dx, c.unsqueeze(2), out=y)
        if not last:
            da.baddbmm_(rows[..., B:].transpose(1, 2), W_b)
            du_b.addcmul_(h, dlogits.unsqueeze(2))
        du[:, block] += du_b.sum(0).permute(2, 0, 1)
    return da.transpose(0, 1)


def _shared_sum_vjp(
    ds: Tensor, u: Tensor, W: Tensor, centres: Tensor, leaky: bool, last: bool, du: Tensor, dW: Tensor
) -> Tensor:
    """:func:`_coupled_sum_vjp` for shared transforms ``(D, J, K)``."""
    h, dx = torch.einsum("djk,bjk->bjd", W, centres), torch.einsum("djk,bjk->bjd", W, ds)
    x, dh = torch.zeros_like(h), torch.zeros_like(h)
    for block, u_b in _shared_blocks(u, W):
        c = couplings(h @ u_b.mT, leaky, dim=1)  # (B, J, I)
        x.baddbmm_(c, u_b)
        du[:, block].baddbmm_(c.mT, dx)
        if not last:
            dc = dx @ u_b.mT
            dlogits = c * (dc - (c * dc).sum(1, keepdim=True))
            dh.baddbmm_(dlogits, u_b)
            du[:, block].baddbmm_(dlogits.mT, h)
    dW += torch.einsum("bjd,bjk->djk", x, ds) + torch.einsum("bjd,bjk->djk", dh, centres)
    return torch.einsum("bjd,djk->bjk", dh, W)


# Blocks of inputs.


# numbers in one block: on a CPU the fastest of 2**15 to 2**22 for the paper's layer; a GPU wants larger launches
_CPU_BLOCK = 2**20
_GPU_BLOCK = 2**24


def _block_size(u: Tensor, numbers: int) -> int:
    """Inputs in a block, of which each takes ``numbers`` per sample."""
    return min(u.shape[1], max(1, (_CPU_BLOCK if u.is_cpu else _GPU_BLOCK) // (max(1, len(u)) * numbers)))


def _blocks(u: Tensor, W: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cut the inputs into blocks: the slice, ``u`` as ``(I, D, B)``, ``W`` by output."""
    size = _block_size(u, W.shape[1] * W.shape[2])
    for i in range(0, u.shape[1], size):
        block = slice(i, min(i + size, u.shape[1]))
        yield block, u[:, block].permute(1, 2, 0).contiguous(), _by_output(W, block)


def _scratch(u: Tensor, W: Tensor, copies: int = 1) -> Tensor:
    """Memory ``(J, I, D, copies B)`` that every block uses again: fresh pages would cost as much as the arithmetic."""
    _, D, J, _ = W.shape
    return u.new_empty(J, _block_size(u, D * J), D, copies * len(u))


def _by_output(W: Tensor, block: slice) -> Tensor:
    """View a block's transforms as J matrices ``(J, I D, K)``."""
    return W[block].view(-1, *W.shape[2:]).transpose(0, 1)


def _fold(W_b: Tensor, a: Tensor, scratch: Tensor) -> Tensor:
    """Take centres ``(J, K, B)`` to the inputs' side: ``h`` ``(J, I, D, B)``, written to scratch."""
    h = scratch[:, : W_b.shape[1] // scratch.shape[2]]
    torch.bmm(W_b, a, out=h.flatten(1, 2))
    return h


def _shared_blocks(u: Tensor, W: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = _block_size(u, u.shape[2] + W.shape[1])
    for i in range(0, u.shape[1], size):
        block = slice(i, min(i + size, u.shape[1]))
        yield block, u[:, block]
