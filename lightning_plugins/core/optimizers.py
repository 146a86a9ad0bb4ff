"""The parameters that optimizers own, each of them once."""

from torch import nn
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """An optimizer's parameters in the order of its groups; one that a group lists twice (tied weights) comes once.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> [p is weight for p in parameters_of(torch.optim.SGD([weight]))]
        [True]
    """
    return list(dict.fromkeys(param for group in optimizer.param_groups for param in group["params"]))


def maximized(*optimizers: Optimizer) -> set[nn.Parameter]:
    """The parameters that optimizers move up their gradients: those of groups with ``maximize=True``."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {param for group in groups if group.get("maximize") for param in group["params"]}
