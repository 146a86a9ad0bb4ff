"""A module in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode; on leaving, each of their parts has the mode that it had before.

    ``module.train()`` afterwards would not do: it also wakes a part that its user keeps in evaluation mode, such as a
    frozen backbone with batch norm.

    Args:
        modules: with all their parts.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluating(network):
        ...     [part.training for part in network]
        [False, False]
        >>> [part.training for part in network]
        [True, False]
    """
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in before:  # parents first; by train(), in which some parts undo what they do in eval()
            if part.training != mode:
                part.train(mode)
