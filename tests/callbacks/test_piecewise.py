"""Piecewise linear schedules from plain data, against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.callbacks.piecewise import check_points, value_at

STEPS = st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True).map(sorted)


@given(st.data())
def test_value(data):
    steps = data.draw(STEPS)
    values = [data.draw(st.floats(-10, 10)) for _ in steps]
    points = [list(point) for point in zip(steps, values, strict=True)]
    check_points("schedule", points)
    at = data.draw(st.integers(0, 1100))
    np.testing.assert_allclose(value_at(points, at), np.interp(at, steps, values), rtol=1e-12, atol=1e-12)


def test_a_point_is_met_exactly():
    points = [[0, 0.1], [7, 0.7], [11, 0.3]]
    assert [value_at(points, step) for step, _ in points] == [value for _, value in points]


def test_none_is_no_schedule():
    check_points("schedule", None)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[0, 1.0], [0, 2.0]],
        [[5, 1.0], [0, 2.0]],
        [[0]],
        [[0, 1.0, 2.0]],
        [0, 1],
        0.5,
        {"0": 1.0},
        ["01", "12"],
        [[0, "high"]],
        [[0, None]],
        [[0, float("nan")], [1, 1.0]],
        [[0, 1.0], [float("nan"), 1.0]],
    ],
    ids=str,
)
def test_anything_else_is_refused_by_name_and_value(points):
    with pytest.raises(ValueError, match=r"^level_schedule=.* must be pairs .* with growing steps, such as"):
        check_points("level_schedule", points)
