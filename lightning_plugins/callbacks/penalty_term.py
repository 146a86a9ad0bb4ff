"""The gradient of ``c |grad L|^2`` or ``c |grad L|``: a Hessian-vector product along the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core.curvature import Difference, WindowLoss, step_along
from lightning_plugins.core.vectors import local, mean_over_ranks_, norm

PenaltyNorm = Literal["squared", "norm"]


@dataclass(frozen=True)
class PenaltyTerm:
    r"""The added gradient, and what is worth knowing about it.

    .. math::
        \nabla\, c \|\nabla L\|^2 = 2 c\, H \nabla L, \qquad \nabla\, c \|\nabla L\| = c\, H \nabla L / \|\nabla L\|

    Attributes:
        gradient: shaped like the parameters; ``None`` where there is no direction (``|grad L|`` zero or not finite).
        squared_norm: ``|grad L|^2`` (its mean over micro-batches and ranks for the micro-batch scope), 0-dim float64.
        step: relative displacement that was used; ``None`` for exact products.
    """

    gradient: list[Tensor] | None
    squared_norm: Tensor
    step: float | None


@dataclass(frozen=True)
class Penalty:
    """How the penalty is computed; see :class:`GradientPenalty` for the meaning of each."""

    norm: PenaltyNorm
    exact: bool
    difference: Difference
    relative_step: float

    def weight(self, coefficient: float, length: Tensor) -> Tensor:
        """The factor of ``H grad L`` for a gradient of this length; ``|grad L|`` is taken as flat where it is zero."""
        if self.norm == "squared":
            return torch.full_like(length, 2 * coefficient)
        return torch.where(length > 0, coefficient / length, 0.0)

    def of_window(
        self, window: WindowLoss, gradient: Sequence[Tensor], coefficient: float, share: float
    ) -> PenaltyTerm:
        r"""The penalty of a whole effective batch.

        Lightning divides an incomplete window's sum by the full ``k``, so that its gradient is ``share = n / k`` of the
        mean's, and the penalty's is scaled alike: ``share * d/dtheta c |grad mean|^2``.

        Args:
            window: the window's loss.
            gradient: its gradient here, as Lightning accumulated it.
            coefficient: ``c``.
            share: ``n / k``.
        """
        length = norm(gradient) / share
        product = self._product(window, gradient)
        if product is not None:
            scale(product, self.weight(coefficient, length) / share)
        return PenaltyTerm(product, length**2, None if self.exact else self.relative_step)

    def of_micro_batches(self, window: WindowLoss, coefficient: float, accumulate: int) -> PenaltyTerm:
        """The mean of the penalties of every micro-batch on every rank (divided by the full ``k``, as the loss is)."""
        total = [torch.zeros_like(param) for param in window.params]
        squares = torch.zeros((), dtype=torch.float64, device=total[0].device)
        parts = window.micro_batches()
        for part in parts:
            _, gradient = part.gradient()
            length = norm(gradient)
            squares += length**2 / len(parts)
            product = self._product(part, gradient)
            if product is not None:
                scale(product, self.weight(coefficient, length) / accumulate)
                torch._foreach_add_(total, product)
        mean_over_ranks_([*total, squares])
        return PenaltyTerm(total, squares, None if self.exact else self.relative_step)

    def _product(self, window: WindowLoss, direction: Sequence[Tensor]) -> list[Tensor] | None:
        if self.exact:
            return window.exact_product(direction)
        step = step_along(window.params, direction, self.relative_step)
        return None if step is None else window.product(direction, step, self.difference, direction)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a 0-dim tensor, shards too, without waiting for its value."""
    for tensor in local(tensors):
        tensor.mul_(factor.to(tensor.dtype))
