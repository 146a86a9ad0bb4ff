"""Numbers that change during training, described by plain data."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_plugins.core import arguments as must

Points = Sequence[Sequence[float]]


def check_points(name: str, points: Points | None) -> None:
    """Raise unless ``points`` is ``None`` or pairs ``[step, value]`` with growing steps.

    Raises:
        ValueError: naming the argument and its value.
    """
    if points is None:
        return
    well_formed = isinstance(points, Sequence) and len(points) > 0 and all(_is_point(point) for point in points)
    if not well_formed or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError(
            f"{name}={must.told(points)} must be pairs [step, value] with growing steps, such as [[0, 0.0], "
            "[500, 1.0]]."
        )


def _is_point(point: Any) -> bool:
    return (
        isinstance(point, Sequence)
        and len(point) == 2
        and must.is_number(point[0])
        and (must.is_number(point[1]) or point[1] in (math.inf, -math.inf))
    )


def value_at(points: Points, step: int) -> float:
    """Piecewise linear: between two points interpolated, before the first and after the last constant.

    Example:
        >>> [value_at([[0, 0.0], [10, 1.0]], step) for step in (0, 5, 10, 99)]
        [0.0, 0.5, 1.0, 1.0]
    """
    before = [point for point in points if point[0] <= step]
    after = [point for point in points if point[0] > step]
    if not before or not after:
        return float((before[-1:] or after[:1])[0][1])
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * (step - left) / (right - left)
