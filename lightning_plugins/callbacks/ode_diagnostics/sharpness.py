"""The largest eigenvalue of a symmetric operator on lists of tensors, from products alone."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_plugins.core.vectors import dot, local, norm

Vector = list[Tensor]


class TopEigenpair(NamedTuple):
    """The result of :func:`top_eigenpair`.

    Attributes:
        value: the Rayleigh quotient of ``vector``, a lower bound of the largest eigenvalue; NaN if a product was not
            finite.
        vector: its vector, of length one, shaped like the start.
        products: the number of operator products used.
    """

    value: float
    vector: Vector
    products: int


def top_eigenpair(
    product: Callable[[Vector], Vector], start: Vector, rtol: float = 1e-3, max_products: int = 50
) -> TopEigenpair:
    r"""The largest (most positive) eigenvalue by locally optimal conjugate gradients.

    Each round takes one product: of the residual :math:`w = A x - \rho x`, orthogonalised. The new ``x`` is the best
    vector in the span of ``x``, ``w`` and the last move ``p``. That needs a fraction of power iteration's products,
    finds the largest eigenvalue also where a negative one is larger in size, and starts well from an earlier vector.

    Args:
        product: the symmetric operator ``A``, which may be inexact (finite differences).
        start: a vector that is not zero, in the parameters' shapes, plain or sharded (``DTensor``: every rank gets the
            same value).
        rtol: share of the value, above 0; the search stops when the value grew by less in each of two rounds.
        max_products: most operator products, 1 or more.

    Source: Knyazev 2001, Toward the Optimal Preconditioned Eigensolver, algorithm 4.1 without preconditioner.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> pair = top_eigenpair(lambda v: [A @ v[0]], [torch.tensor([1.0, 0.0], dtype=torch.float64)])
        >>> round(pair.value, 6), pair.products
        (3.0, 2)
    """
    x = _scaled(start, 1 / norm(start).item())
    basis, images, calm = [x], [product(x)], 0
    value, products = dot(x, images[0]).item(), 1
    while products < max_products and calm < 2 and math.isfinite(value):
        residual = _combined([images[0], basis[0]], [1.0, -value])
        length = norm(residual).item()
        w = _orthogonalised(residual, basis) if length > 0 else None
        if w is None:
            break  # an eigenvector already
        basis.append(w)
        images.append(product(w))
        products += 1
        before, value = value, _best(basis, images)
        calm = calm + 1 if abs(value - before) <= rtol * abs(value) else 0
    return TopEigenpair(value, basis[0], products)


def _best(basis: list[Vector], images: list[Vector]) -> float:
    """Rayleigh-Ritz on an orthonormal basis; leaves the best vector and, orthogonal to it, the move towards it."""
    gram = torch.tensor([[dot(u, Av).item() for Av in images] for u in basis], dtype=torch.float64)
    if not gram.isfinite().all():
        return math.nan
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    best = vectors[:, -1]
    move = best.clone()
    move[0] = 0
    move -= (move @ best) * best
    coefficients = [best] if move.norm() < 1e-12 else [best, move / move.norm()]
    basis[:], images[:] = ([_combined(part, c.tolist()) for c in coefficients] for part in (basis, images))
    return values[-1].item()


def _orthogonalised(vector: Vector, basis: list[Vector]) -> Vector | None:
    """A unit vector; ``None`` if ``vector`` lies in the basis up to rounding."""
    for _ in range(2):  # once leaves rounding errors of the part taken away
        vector = _scaled(vector, 1 / norm(vector).item())
        vector = _combined([vector, *basis], [1.0, *(-dot(vector, u).item() for u in basis)])
        if norm(vector).item() < 1e-10:
            return None
    return _scaled(vector, 1 / norm(vector).item())


def _combined(vectors: Sequence[Vector], coefficients: Sequence[float]) -> Vector:
    return [sum(c * part for c, part in zip(coefficients, parts, strict=True)) for parts in zip(*vectors, strict=True)]


def _scaled(vector: Vector, factor: float) -> Vector:
    return [part * factor for part in vector]


def random_direction(params: Sequence[Tensor]) -> Vector:
    """Normal numbers shaped and sharded like ``params``; the same on every rank, from no global random state."""
    direction = [torch.zeros_like(param) for param in params]
    shards = local(direction)
    sharded = any(isinstance(param, DTensor) for param in params)
    generator = torch.Generator(shards[0].device).manual_seed(torch.distributed.get_rank() if sharded else 0)
    for shard in shards:
        shard.normal_(generator=generator)
    return direction
