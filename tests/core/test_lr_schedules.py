"""The schedules against their formulas."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_plugins.core.lr_schedules import exponential_decay, linear_warmup_decay, optimizer_or_own


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
        ({"rate": 0.0, "steps": 1}, "rate=0.0 must lie in (0, 1]: 1 keeps the rate constant."),
        ({"rate": 1.5, "steps": 1}, "rate=1.5 must lie in (0, 1]: 1 keeps the rate constant."),
        ({"rate": 0.9, "steps": 0}, "steps=0 must be 1 or more."),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError) as error:
        exponential_decay(optimizer, **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(("warmup", "total"), [(3, 10), (0, 7), (0.25, 8), (5, math.inf)])
def test_linear_warmup_and_decay_is_that_of_transformers(warmup, total):
    from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5) for _ in range(2))
    steps = warmup if warmup >= 1 else int(warmup * total)
    if math.isinf(total):
        reference = get_constant_schedule_with_warmup(theirs, steps)
    else:
        reference = get_linear_schedule_with_warmup(theirs, steps, total)
    asked = []

    def tell():
        asked.append(True)
        return total

    schedule = linear_warmup_decay(ours, warmup, tell)
    assert not asked  # asking too early makes Lightning load the data before the checkpoint
    for _ in range(12):
        assert schedule.get_last_lr() == pytest.approx(reference.get_last_lr())
        for optimizer, scheduler in ((ours, schedule), (theirs, reference)):
            optimizer.step()
            scheduler.step()


def test_a_share_of_endless_steps_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    schedule = linear_warmup_decay(optimizer, 0.1, lambda: math.inf)
    optimizer.step()
    with pytest.raises(ValueError, match=r"warmup=0.1 is a share of all steps"):
        schedule.step()
    with pytest.raises(ValueError, match=r"warmup=-1 must be 0"):
        linear_warmup_decay(optimizer, -1, lambda: 10)


@pytest.mark.parametrize("own_optimizer", [False, True])
@pytest.mark.parametrize("own_scheduler", [False, True])
def test_an_own_optimizer_or_scheduler_replaces_the_papers(own_optimizer, own_scheduler):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    made = optimizer_or_own(
        parameters,
        lambda groups: torch.optim.Adam(groups, 0.1),
        lambda optimizer: {"scheduler": LambdaLR(optimizer, lambda step: 0.5), "interval": "step"},
        (lambda groups: torch.optim.SGD(groups, 0.2)) if own_optimizer else None,
        (lambda optimizer: LambdaLR(optimizer, lambda step: 0.25)) if own_scheduler else None,
    )
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    assert type(optimizer) is (torch.optim.SGD if own_optimizer else torch.optim.Adam)
    share = 0.25 if own_scheduler else 1 if own_optimizer else 0.5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(share * (0.2 if own_optimizer else 0.1))
    assert isinstance(made, dict) == (own_scheduler or not own_optimizer)
