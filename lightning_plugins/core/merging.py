"""Metrics merged with others of their kind, and plotted: what torchmetrics leaves to each metric, or gets wrong."""

from collections.abc import Sequence
from typing import Any

from torchmetrics import Metric


class Merging(Metric):
    """To stand before a metric whose states add up or are joined.

    Example:
        >>> from torchmetrics import SumMetric
        >>> class Sum(Merging, SumMetric):
        ...     pass
        >>> first, second = Sum(), Sum()
        >>> first.update(1), second.update(2), first.compute()
        (None, None, tensor(1.))
        >>> first.merge_state(second)
        >>> first.compute()  # torchmetrics 1.9 still says 1
        tensor(3.)
    """

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take what another metric has seen, as if its updates had followed.

        Args:
            incoming_state: the other metric, or its states by name.
        """
        super().merge_state(incoming_state)
        self._computed = None
        self._update_count += incoming_state._update_count if isinstance(incoming_state, Metric) else 1

    def plot(self, val: Any | Sequence[Any] | None = None, ax: Any = None) -> Any:
        """Draw a value, or several in their order.

        Args:
            val: what ``compute`` or ``forward`` gave, or a list of such; by default what ``compute`` gives now.
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)
