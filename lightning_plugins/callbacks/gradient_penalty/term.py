"""The gradient of ``c |grad L|^2`` or ``c |grad L|``: a Hessian-vector product along the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core.vectors import local, mean_over_ranks_, norm
from lightning_plugins.replay.differences import Difference, step_along
from lightning_plugins.replay.window import WindowLoss

PenaltyNorm = Literal["squared", "norm"]


@dataclass(frozen=True)
class PenaltyTerm:
    r"""The added gradient, and what is worth knowing about it.

    .. math::
        \nabla\, c \|\nabla L\|^2 = 2 c\, H \nabla L, \qquad \nabla\, c \|\nabla L\| = c\, H \nabla L / \|\nabla L\|

    Attributes:
        gradient: shaped like the parameters; ``None`` where there is no direction (``|grad L|`` zero or not finite).
        squared_norm: ``|grad L|^2``, 0-dim float64; for the micro-batch scope its mean over this rank's micro-batches.
        size: what ``c`` multiplies, ``|grad L|^2`` or ``|grad L|``, or its mean.
        step: relative displacement that was used; ``None`` for exact products.
    """

    gradient: list[Tensor] | None
    squared_norm: Tensor
    size: Tensor
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
        return self.term(product, length)

    def of_micro_batches(self, window: WindowLoss, coefficient: float, accumulate: int) -> PenaltyTerm:
        """The mean of the penalties of every micro-batch on every rank (divided by the full ``k``, as the loss is)."""
        total = [torch.zeros_like(param) for param in window.params]
        lengths = [self._add_micro_batch(part, total, coefficient / accumulate) for part in window.micro_batches()]
        mean_over_ranks_(total)
        return self.term(total, torch.stack(lengths))

    def _add_micro_batch(self, part: WindowLoss, total: list[Tensor], coefficient: float) -> Tensor:
        """Add one penalty's gradient to ``total``; returns the norm of the loss's."""
        _, gradient = part.gradient()
        length = norm(gradient)
        product = self._product(part, gradient)
        if product is not None:
            scale(product, self.weight(coefficient, length))
            torch._foreach_add_(total, product)
        return length

    def term(self, gradient: list[Tensor] | None, lengths: Tensor) -> PenaltyTerm:
        """The penalty's gradient with the norms of the loss's, one for each micro-batch or a single one."""
        squared = lengths**2
        size = squared if self.norm == "squared" else lengths
        return PenaltyTerm(gradient, squared.mean(), size.mean(), None if self.exact else self.relative_step)

    def _product(self, window: WindowLoss, direction: Sequence[Tensor]) -> list[Tensor] | None:
        if self.exact:
            return window.exact_product(direction)
        step = step_along(window.params, direction, self.relative_step)
        return None if step is None else window.product(direction, step, self.difference, direction)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a 0-dim tensor, shards too, without waiting for its value."""
    for tensor in local(tensors):
        tensor.mul_(factor.to(tensor.dtype))
