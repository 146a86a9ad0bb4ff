"""The formula: the gradient of ``c |grad L|^2`` or ``c |grad L|`` is a Hessian product along the gradient, weighted."""

from collections.abc import Container, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core.vectors import local

PenaltyNorm = Literal["squared", "norm"]


def weigh_(
    product: Sequence[Tensor], norm: PenaltyNorm, coefficient: float, length: Tensor, share: float = 1.0
) -> None:
    r"""Make the penalty's gradient of ``H grad L``, or of ``grad L`` before it is multiplied by ``H``, in place.

    .. math::
        \nabla\, c \|\nabla L\|^2 = 2 c\, H \nabla L, \qquad \nabla\, c \|\nabla L\| = c\, H \nabla L / \|\nabla L\|

    Args:
        product: tensors shaped like the parameters, sharded or not.
        norm: ``"squared"`` for the first form, ``"norm"`` for the second.
        coefficient: ``c``.
        length: ``|grad L|``, 0-dim; where it is zero the second form is taken as flat. Nothing waits for its value.
        share: factor of the loss that is trained, such as ``n / k`` of an incomplete window: ``H`` and ``grad L`` both
            have it, and the penalty's gradient is to have it once.
    """
    if norm == "squared":
        factor = torch.full_like(length, 2 * coefficient)
    else:
        factor = torch.where(length > 0, coefficient / length, 0.0)
    factor = factor / share
    for tensor in local(product):
        tensor.mul_(factor.to(tensor.dtype))


def descend_(extra: Sequence[Tensor | None], params: Sequence[Tensor], climbing: Container[Tensor]) -> None:
    """Negate the penalty's gradient where an optimizer climbs: a penalty is descended, whatever the loss is."""
    for param, part in zip(params, extra, strict=True):
        if part is not None and param in climbing:
            (tensor,) = local([part])
            tensor.neg_()


def size(norm: PenaltyNorm, lengths: Tensor) -> Tensor:
    """What the coefficient multiplies, for gradients of these lengths."""
    return lengths**2 if norm == "squared" else lengths
