"""Whether a custom function's backward lets itself be differentiated: exact Hessian products against differences.

A ``torch.autograd.Function`` whose backward computes from detached values, or runs an inner backward pass, gives the
right gradient; differentiated once more it counts as constant, and the product lacks a term without a word.
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.vectors import dot, foreach_add_, foreach_mul_, local, mean_over_ranks_, norm
from lightning_plugins.replay.differences import best_displacement, step_along
from lightning_plugins.replay.twice import MissedTermError, rounding_of
from lightning_plugins.replay.window import WindowLoss, displaced

Verdict = Literal["whole", "lacking", "surrogate", "unknown"]

_RUNGS = 5  # steps that are tried, each a quarter of the last: kinks want short ones, rounding long ones
_RESOLVED = 0.02  # most relative change of a difference from one rung to the next that counts as measured
_SURE = 4.0  # times that change: what a product must be off by to be called wrong


class _Along(NamedTuple):
    """Central differences over one step along a direction."""

    product: list[Tensor]  # of the gradient
    slope: float  # of the loss
    expected: float  # of the loss, by the gradient


def examine(
    window: WindowLoss,
    direction: Sequence[Tensor],
    product: Sequence[Tensor],
    step: float,
    rounding: float,
    kinked: bool,
) -> Verdict:
    """Compare an exact Hessian product with finite differences. Every rank must call it.

    Args:
        window: the loss.
        direction: of the product.
        product: the exact one.
        step: the longest step along the direction, such as the best of a central difference.
        rounding: relative error of a gradient.
        kinked: whether the loss is known to be linear in pieces: differences then see jumps that no product sees.

    Returns:
        ``"whole"``: they agree; ``"lacking"``: they do not, and the gradient is that of the loss; ``"surrogate"``: the
        gradient is not that of the loss (straight-through estimators, gradient reversal), so that differences of it say
        nothing; ``"unknown"``: no difference was resolved.
    """
    coarse = _along(window, direction, step)
    for _ in range(_RUNGS):
        step /= 4
        fine = _along(window, direction, step)
        length = norm(fine.product).item()
        change = _distance(coarse.product, fine.product)
        if change <= _RESOLVED * length or length == 0 == norm(product).item():
            missing = _distance(product, fine.product)
            if missing <= max(_SURE * change, rounding * length):
                return "whole"
            if not kinked:
                off = abs(fine.slope - fine.expected)
                return "surrogate" if off > 10 * max(rounding, _RESOLVED**2) * abs(fine.expected) else "lacking"
        coarse = fine
    return "unknown"


def _along(window: WindowLoss, direction: Sequence[Tensor], step: float) -> _Along:
    with displaced(window.params, direction) as move:
        move(step)
        loss, product = window.gradient()
        move(-step)
        behind, gradient = window.gradient()
    slope = (loss - behind) * (window.weight / (2 * step))
    if not window.alone:
        mean_over_ranks_([slope])
    expected = (dot(product, direction) + dot(gradient, direction)) / 2
    foreach_add_(local(product), local(gradient), alpha=-1)
    foreach_mul_(local(product), 1 / (2 * step))
    return _Along(product, slope.item(), expected.item())


def _distance(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return norm([x - y for x, y in zip(xs, ys, strict=True)]).item()


def ask(
    trainer: Trainer,
    module: LightningModule,
    window: WindowLoss,
    functions: Collection[str],
    gradient: Sequence[Tensor],
    kinked: bool,
    half: torch.dtype | None,
    direction: Sequence[Tensor] | None = None,
) -> str | None:
    """Whether the custom functions of a window's graph let themselves be differentiated. Every rank must call it.

    Args:
        trainer: the running trainer.
        module: the module that is trained.
        window: the loss.
        functions: the names of the functions on this rank.
        gradient: that of the backward pass.
        kinked: whether this rank's loss is known to be linear in pieces.
        half: the half precision of a part of the loss.
        direction: of the products that are compared; by default the gradient.

    Returns:
        What is to be told in a warning, if anything.

    Raises:
        MissedTermError: a second derivative lacks a term.
    """
    direction = gradient if direction is None else direction
    step = step_along(window.params, direction, best_displacement(trainer, module, "central", half=half))
    if step is None:
        return None  # look in a later step
    rounding = rounding_of(window.params, half or torch.float64)
    again = window.gradient()[1]
    if not _distance(again, gradient) <= rounding * norm(gradient).item():
        return told(functions, "unknown", "running the step again gives another gradient")
    product = window.exact_product(direction, again)
    kinked = bool(largest_over_ranks(int(kinked or window.selects), trainer.strategy.root_device))
    rounding = rounding_of(window.params, window.precision)
    return told(
        functions, examine(window, direction, product, step.size, rounding, kinked), "no difference was resolved"
    )


def told(functions: Collection[str], verdict: Verdict, why_unknown: str) -> str | None:
    """What is to be said of custom functions in one warning; nothing where all is well.

    Raises:
        MissedTermError: a second derivative lacks a term.
    """
    names = " and ".join(sorted(functions)) or "of another process"
    if verdict == "lacking":
        raise MissedTermError(
            f"the backward of torch.autograd.Function {names} cannot be differentiated: the second derivative lacks a "
            "term that finite differences see; use engine='finite_difference' or compute that backward by "
            "differentiable operations on ctx's saved tensors"
        )
    if verdict == "surrogate":
        return (
            f"torch.autograd.Function {names} has a backward that is not the derivative of its forward (such as a "
            "straight-through estimator): its second derivative is taken as that backward says"
        )
    if verdict == "unknown":
        return (
            f"torch.autograd.Function {names} is taken as its backward says, and nothing has shown whether its second "
            f"derivative lacks a term ({why_unknown})"
        )
    return None
