"""The exact engine: the penalty of one loss from its own graph, added within its backward pass or after it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_plugins.callbacks.gradient_penalty.term import PenaltyNorm, weigh_
from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.vectors import mean_over_ranks_, norm
from lightning_plugins.replay.twice import (
    Arrivals,
    MissedTermError,
    first_derivative,
    look_into,
    second_derivative,
)


class ExactPenalty:
    """The penalty on the gradient of a loss whose graph is at hand and whose backward pass is yet to come.

    Args:
        loss: as the backward pass gets it: ``scale`` times the loss whose gradient is penalised.
        params: the parameters to differentiate by.
        scale: of a GradScaler, and ``1 / k`` under accumulation.
        coefficient: ``c``.
        kind: which norm.
        joined: whether the gradient is the mean over ranks; else this rank's own.

    Attributes:
        first: the scaled loss's first derivatives with their graph, ``None`` where there is no dependence.
        direction: what their derivative is taken along: ``2 c grad L``, or ``c grad L / |grad L|``.
        length: of the gradient that is penalised, a 0-dim tensor.
    """

    def __init__(
        self,
        loss: Tensor,
        params: Sequence[Tensor],
        scale: Tensor | float,
        coefficient: float,
        kind: PenaltyNorm,
        joined: bool,
    ) -> None:
        self.loss, self.params = loss, list(params)
        self.first = first_derivative(loss, self.params)
        self.direction = [
            torch.zeros_like(param) if g is None else g.detach() / scale
            for g, param in zip(self.first, self.params, strict=True)
        ]
        if joined:
            mean_over_ranks_(self.direction)
        self.length = norm(self.direction)
        weigh_(self.direction, kind, coefficient, self.length)

    def extras(self) -> list[Tensor | None]:
        """The penalty's gradient, scaled as the loss is; ``None`` where there is none. The loss's graph is kept."""
        return second_derivative(self.first, self.params, self.direction, retain_graph=True)

    def add_to_loss(self) -> None:
        """Add zero to the loss, with the penalty's gradient: one backward pass serves both.

        Lightning hands over a loss of its own making, not the module's.
        """
        pairs = zip(self.first, self.direction, strict=True)
        parts = [_inner(g, v) for g, v in pairs if g is not None and g.requires_grad]
        if parts:
            total = torch.stack(parts).sum().to(self.loss.dtype)
            self.loss.add_(total - total.detach())


def add_by_hooks(params: Sequence[Tensor], extras: Sequence[Tensor | None]) -> list[Any]:
    """Add the penalty's gradient to what arrives at the parameters; returns the hooks' handles, to be removed."""
    pairs = zip(params, extras, strict=True)
    return [param.register_hook(partial(torch.add, extra)) for param, extra in pairs if extra is not None]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """``<x, y>``, complex numbers as pairs of real ones."""
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    return (x * y).sum()


class Look:
    """A step that is looked at: its penalties wait until its backward passes have shown the same gradient.

    Args:
        module: the module that is trained.
        compares: whether gradients are compared; else only whether there is one.

    Attributes:
        functions: custom functions in the losses' graphs.
        precision: the coarsest in a part of them.
    """

    def __init__(self, module: LightningModule, compares: bool) -> None:
        self.functions: set[str] = set()
        self.precision = torch.float64
        self._module, self._compares = module, compares
        self._waiting: dict[Tensor, Tensor] = {}
        self._arrivals: Arrivals | None = None

    def listen(self, penalty: ExactPenalty) -> None:
        """Call it before a backward pass."""
        functions, self.precision = look_into(penalty.loss)
        self.functions |= functions
        for param, extra in zip(penalty.params, penalty.extras(), strict=True):
            if extra is not None:
                self._waiting[param] = self._waiting[param] + extra if param in self._waiting else extra
        self._arrivals = Arrivals(penalty.first, penalty.params, self._module, self.precision, self._compares)

    def check(self) -> bool:
        """Call it after that backward pass, on every rank.

        Returns:
            Whether a penalty is not finite, on some rank.

        Raises:
            MissedTermError: it brought another gradient, on some rank.
        """
        arrivals, self._arrivals, missed = self._arrivals, None, None
        if arrivals is None:
            return False
        try:
            arrivals.check()
        except MissedTermError as error:
            missed = error
        waiting = list(self._waiting.values())
        overflows = bool(waiting) and not math.isfinite(norm(waiting).item())
        worst = largest_over_ranks(2 if missed else int(overflows), self._module.device)
        if worst == 2:
            raise missed or MissedTermError(
                "another process found a part of its loss hidden; use engine='finite_difference'"
            )

        return worst == 1

    def extras(self, params: Sequence[Tensor], scale: Tensor | float) -> list[Tensor]:
        """The penalty's gradient over all ranks, unscaled; zeros where there is none."""
        extras = [self._waiting[p] / scale if p in self._waiting else torch.zeros_like(p) for p in params]
        mean_over_ranks_(extras)
        return extras

    def close(self) -> None:
        """Listen no more."""
        if self._arrivals is not None:
            self._arrivals.close()
