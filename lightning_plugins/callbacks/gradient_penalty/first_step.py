"""What the first penalised step is asked: can it be repeated, and does the finite difference see the curvature?"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.core.vectors import dot, local, norm

_UNRESOLVED = 0.25  # between a step and half of it: the forward difference is then wrong by about half


def check_repeatable(
    module: LightningModule,
    gradient: Sequence[Tensor],
    again: Sequence[Tensor],
    relative_step: float,
    name: str = "GradientPenalty",
    what: str = "training_step",
    cure: str = "use engine='exact' with scope='microbatch', which runs nothing twice, or check='off' if the "
    "difference is meant",
) -> None:
    """Raise if running a step again at the unmoved parameters has given another gradient.

    Args:
        module: the module that is trained.
        gradient: its gradient as it was at first, neither zero nor infinite.
        again: the second run's gradient, which is overwritten.
        relative_step: the displacement in whose finite difference the error would show.
        name: the name of the callback or function that asks.
        what: the name of what was run again.
        cure: what to do besides mending it.

    Raises:
        RuntimeError: with what may be the cause.
    """
    torch._foreach_sub_(local(again), local(gradient))
    error = (norm(again) / norm(gradient)).item()
    if not error <= min(1e-2, relative_step):  # a larger one would show in the finite difference
        raise RuntimeError(
            f"{name}: running {what} of {type(module).__name__} again on the same batch gives another gradient "
            f"(relative difference {error:.1e}). It may edit its batch in place, keep a state that is neither a buffer "
            "nor a metric, or draw from a generator of its own; or a hook changes gradients after the backward pass. "
            f"Mend that, or {cure}."
        )


class Extent(NamedTuple):
    """A Hessian product's length, and its part along the direction: all that is kept of it for a comparison."""

    length: float
    along: float


def extent(product: Sequence[Tensor], direction: Sequence[Tensor]) -> Extent:
    """Measure a product along a direction."""
    return Extent(norm(product).item(), (dot(product, direction) / norm(direction)).item())


def is_resolved(whole: Extent, half: Extent, relative_step: float, coarse: float) -> bool:
    """Whether half the step gives the same Hessian product, told by a warning where not.

    Args:
        whole: the product by the step.
        half: the product by half of it.
        relative_step: the step, for the warning.
        coarse: the step that will be taken in its place, for the warning.
    """
    if half.length == 0:
        return True
    change = max(abs(whole.length - half.length), abs(whole.along - half.along)) / half.length
    if change > _UNRESOLVED:
        rank_zero_warn(
            f"GradientPenalty: the automatic relative_step={relative_step:g} does not resolve this loss's curvature in "
            f"its first step: half of it changes the Hessian product by {change:.0%}. It may have kinks: {coarse:g} is "
            "taken, over which they are averaged. Else use engine='exact' or a smaller relative_step of your own."
        )
    return not change > _UNRESOLVED
