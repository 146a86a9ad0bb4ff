"""Learning-rate schedules from plain floats, for the optimisers of the papers."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
        ValueError: ``rate`` or ``steps`` is out of range.
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"exponential_decay needs 0 < rate <= 1, got rate={rate}; use 1 for a constant rate.")
    if steps < 1:
        raise ValueError(f"exponential_decay needs steps >= 1, got steps={steps}.")

    def factor(start: float):
        lowest = min(floor / start, 1.0) if start > 0 else 1.0
        return lambda step: max(lowest, rate ** (step / steps))

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])
