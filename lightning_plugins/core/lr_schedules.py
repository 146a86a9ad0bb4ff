"""Learning-rate schedules from plain floats, for the optimisers of the papers."""

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_plugins.core import arguments as must

WARMUP = must.number(0, why="0 is for none, below 1 it is a share of all steps")


def with_scheduler(optimizer: Optimizer, make: LRSchedulerCallable) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for a scheduler of the user's, stepped once per epoch.

    Args:
        optimizer: the module's.
        make: from the optimizer to the scheduler; Lightning's ``ReduceLROnPlateau`` says itself what it watches.
    """
    scheduler = make(optimizer)
    monitor = {"monitor": scheduler.monitor} if isinstance(scheduler, ReduceLROnPlateau) else {}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **monitor}}


def optimizer_or_own(
    parameters: Any,
    paper: Callable[[Any], Optimizer],
    schedule: Callable[[Optimizer], Any] | None,
    own_optimizer: OptimizerCallable | None,
    own_scheduler: LRSchedulerCallable | None,
) -> Any:
    """What ``configure_optimizers`` returns: the paper's optimizer and schedule, unless the user gives their own.

    Args:
        parameters: parameters or groups of them.
        paper: makes the paper's optimizer.
        schedule: makes its schedule, as Lightning's ``lr_scheduler`` takes it; ``None`` for a constant rate. It does
            not follow an optimizer of the user's.
        own_optimizer: the user's, in its place.
        own_scheduler: the user's, for either optimizer.
    """
    optimizer = own_optimizer(parameters) if own_optimizer else paper(parameters)
    if own_scheduler:
        return with_scheduler(optimizer, own_scheduler)
    if own_optimizer or schedule is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}


def exponential_decay(optimizer: Optimizer, rate: float, steps: int, floor: float = 0.0) -> LambdaLR:
    r"""Smooth exponential decay of every group's rate with a lower bound, stepped once per optimiser step.

    .. math:: \eta_t = \max(\eta_\text{floor},\; \eta_0 \cdot \text{rate}^{t / \text{steps}})

    Args:
        optimizer: its groups' ``lr`` are the start values :math:`\eta_0`.
        rate: factor per ``steps``, in (0, 1]; 1 keeps the rate constant.
        steps: optimiser steps per factor, at least 1.
        floor: smallest rate, in the unit of ``lr``.

    Returns:
        A scheduler to be stepped per optimiser step (Lightning: ``"interval": "step"``).

    Raises:
        ValueError: ``rate``, ``steps`` or ``floor`` is out of range.
    """
    must.check(
        locals(),
        rate=must.number(above=0, most=1, why="1 keeps the rate constant"),
        steps=must.count,
        floor=must.non_negative,
    )

    def factor(start: float):
        lowest = min(floor / start, 1.0) if start > 0 else 1.0
        return lambda step: max(lowest, rate ** (step / steps))

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


def linear_warmup_decay(optimizer: Optimizer, warmup: int | float, total: Callable[[], int | float]) -> LambdaLR:
    r"""Linear warm-up from 0, then linear decay to 0 at the last step, stepped once per optimiser step.

    .. math:: \eta_t = \eta_0 \min\left(\frac{t}{w},\; \frac{\max(0, n - t)}{n - w}\right)

    Args:
        optimizer: its groups' ``lr`` are the highest rates :math:`\eta_0`.
        warmup: steps :math:`w`, or below 1 their share of :math:`n`; 0 for none.
        total: tells the number of steps :math:`n`; infinite for a rate that stays. It is not asked before the first
            step has been taken: ``trainer.estimated_stepping_batches`` loads the training data, and Lightning 2.6 does
            not give loaders their place in an epoch back that were loaded before a checkpoint.

    Returns:
        A scheduler to be stepped per optimiser step (Lightning: ``"interval": "step"``).

    Raises:
        ValueError: ``warmup`` is negative, or a share of steps without end.
    """
    WARMUP("warmup", warmup)

    def factor(step: int) -> float:
        if step == 0:
            return 0.0 if warmup else 1.0
        n = total()
        if warmup < 1 and warmup and math.isinf(n):
            raise ValueError(f"warmup={warmup} is a share of all steps, which have no end here: give a count of steps.")
        w = int(warmup if warmup >= 1 else warmup * n)
        if step < w:
            return step / w
        return 1.0 if math.isinf(n) else max(0.0, n - step) / max(1, n - w)

    return LambdaLR(optimizer, factor)
