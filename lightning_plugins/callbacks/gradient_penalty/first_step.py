"""What GradientPenalty looks at once, in its first step: is it repeatable, and is the finite difference resolved?"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.core.vectors import dot, local, norm
from lightning_plugins.replay.differences import Difference, step_along
from lightning_plugins.replay.window import WindowLoss

_UNRESOLVED = 0.25  # between a step and half of it: the forward difference is then wrong by about half


def check_repeatable(
    module: LightningModule,
    window: WindowLoss,
    gradient: Sequence[Tensor],
    relative_step: float,
    name: str = "GradientPenalty",
    what: str = "training_step",
    cure: str = "use engine='exact' with scope='microbatch', which runs nothing twice, or check='off' if the "
    "difference is meant",
) -> bool:
    """Raise if running the window again at the unmoved parameters gives another gradient.

    Args:
        module: the one that is trained.
        window: its loss.
        gradient: as it was at first.
        relative_step: displacement in whose finite difference the error would show.
        name: of who asks.
        what: is run again.
        cure: besides mending it.

    Returns:
        Whether there was something to compare: a gradient that is finite and not zero.

    Raises:
        RuntimeError: with what may be the cause.
    """
    length = norm(gradient).item()
    if not 0 < length < float("inf"):
        return False
    _, again = window.gradient()
    torch._foreach_sub_(local(again), local(gradient))
    error = norm(again).item() / length
    if not error <= min(1e-2, relative_step):  # a larger one would show in the finite difference
        raise RuntimeError(
            f"{name}: running {what} of {type(module).__name__} again on the same batch gives another gradient "
            f"(relative difference {error:.1e}). It may edit its batch in place, keep a state that is neither a buffer "
            "nor a metric, or draw from a generator of its own; or a hook changes gradients after the backward pass. "
            f"Mend that, or {cure}."
        )
    return True


def unresolved(
    window: WindowLoss, gradient: Sequence[Tensor], relative_step: float, difference: Difference, coarse: float
) -> bool:
    """Whether half the step gives another Hessian product, told by a warning; not for losses known to have kinks.

    Args:
        window: the window's loss.
        gradient: its gradient.
        relative_step: to look at.
        difference: ``"forward"`` or ``"central"``.
        coarse: the step that will be taken in its place.
    """
    step = step_along(window.params, gradient, relative_step)
    (length, along), (half_length, half_along) = (
        _size(window.product(gradient, h, difference, gradient), gradient) for h in (step, step / 2)
    )
    if half_length == 0:
        return False
    change = max(abs(length - half_length), abs(along - half_along)) / half_length
    found = change > _UNRESOLVED
    if found:
        rank_zero_warn(
            f"GradientPenalty: the automatic relative_step={relative_step:g} does not resolve this loss's curvature in "
            f"its first step: half of it changes the Hessian product by {change:.0%}. It may have kinks: {coarse:g} is "
            "taken, over which they are averaged. Else use engine='exact' or a smaller relative_step of your own."
        )
    return found


def _size(product: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[float, float]:
    """The product's length, and its part along the direction; two numbers, so that one product is kept at a time."""
    return norm(product).item(), (dot(product, direction) / norm(direction)).item()
