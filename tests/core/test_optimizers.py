"""The schedule against its formula."""

import pytest
import torch

from lightning_plugins.core.optimizers import exponential_decay


def rates(optimizer, schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def test_every_group_decays_from_its_own_rate_to_the_floor():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    schedule = exponential_decay(optimizer, rate=0.5, steps=2, floor=0.05)
    for step, (first, second) in enumerate(rates(optimizer, schedule, 12)):
        assert first == pytest.approx(max(0.05, 1.0 * 0.5 ** (step / 2)))
        assert second == pytest.approx(max(0.05, 0.1 * 0.5 ** (step / 2)))


def test_a_floor_above_the_rate_keeps_the_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert rates(optimizer, exponential_decay(optimizer, 0.5, 1, floor=1.0), 3) == [[0.1]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0, "steps": 1}, "exponential_decay needs 0 < rate <= 1, got rate=0.0; use 1 for a constant rate."),
        ({"rate": 1.5, "steps": 1}, "exponential_decay needs 0 < rate <= 1, got rate=1.5; use 1 for a constant rate."),
        ({"rate": 0.9, "steps": 0}, "exponential_decay needs steps >= 1, got steps=0."),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError) as error:
        exponential_decay(optimizer, **arguments)
    assert str(error.value) == message
