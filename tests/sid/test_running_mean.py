"""The running mean of the generator's weights."""

import copy

import pytest
import torch
from torch import nn

from lightning_plugins.sid.networks import half_life_decay, update_average


def test_an_image_counts_half_after_the_half_life():
    """In batches of any size: after h images the old mean's share is a half."""
    for batch in (10, 100, 1000):
        decay = half_life_decay(batch, 10_000_000, 5000)
        assert decay ** (5000 / batch) == pytest.approx(0.5)


def test_the_memory_grows_with_the_images_seen():
    assert half_life_decay(64, 0, 500_000) == 0.0  # the first batch leaves nothing of the teacher
    assert half_life_decay(64, 6400, 500_000, ramp_up=0.05) == pytest.approx(0.5 ** (64 / 320))
    assert half_life_decay(64, 6400, 100, ramp_up=0.05) == pytest.approx(0.5 ** (64 / 100))
    assert half_life_decay(64, 6400, 0) == half_life_decay(64, 6400, 500_000, ramp_up=0) == 0.0
    decays = [half_life_decay(64, seen, 1000) for seen in range(0, 40_000, 640)]
    assert decays == sorted(decays)
    assert decays[-1] == half_life_decay(64, 20_000, 1000) < 1


def test_trained_parameters_move_and_buffers_follow():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network[0].bias.requires_grad_(False)
    average = copy.deepcopy(network).requires_grad_(False)
    before = copy.deepcopy(average.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    network[1].running_mean += 5
    network[1].num_batches_tracked += 3
    update_average(average, network, 0.75)
    after = average.state_dict()
    for name, value in network.named_parameters():
        expected = 0.75 * before[name] + 0.25 * value.detach() if value.requires_grad else before[name]
        torch.testing.assert_close(after[name], expected)
        assert after[name].data_ptr() != value.data_ptr()
    assert torch.equal(after["1.running_mean"], network[1].running_mean)
    assert after["1.num_batches_tracked"] == 3
    update_average(average, network, 0.0)
    assert torch.equal(average[0].weight, network[0].weight)
