"""Numbers that change during training, described by plain data."""

from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[Sequence[float]]


def check_points(name: str, points: Points | None) -> None:
    """Raise unless ``points`` is ``None`` or pairs ``[step, value]`` with growing steps.

    Raises:
        ValueError: naming the argument and its value.
    """
    if points is None:
        return
    steps = [point[0] for point in points if len(point) == 2]
    if not steps or len(steps) != len(points) or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(
            f"{name} must be pairs [step, value] with growing steps, such as [[0, 0.0], [500, 1.0]], got {points}."
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
