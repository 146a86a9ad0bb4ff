"""The hash of keys, and integers drawn with it."""

import pytest
import torch

from lightning_plugins.core.random_numbers import _mix, _mix_integer, _signed, generator, hash_keys, random_integers


def test_mix_gives_the_published_outputs_of_splitmix64():
    state = torch.tensor([_signed(1234567 + n * 0x9E3779B97F4A7C15) for n in range(1, 6)])
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x % 2**64 for x in _mix(state).tolist()] == published
    assert [_mix_integer(x % 2**64) for x in state.tolist()] == published


def test_hash_is_elementwise_and_depends_on_seed_and_stream():
    keys = torch.arange(1000)
    h = hash_keys(keys, seed=3, stream=1)
    assert h.min() >= 0
    assert torch.equal(h[700:], hash_keys(keys[700:], seed=3, stream=1))
    assert len(h.unique()) == 1000
    for other in (hash_keys(keys, 4, 1), hash_keys(keys, 3, 2)):
        assert not (h == other).any()


@pytest.mark.parametrize("high", [2, 5, 9, 1000])
def test_random_integers_are_uniform_and_streams_independent(high):
    count = 200_000
    x, y = (random_integers(torch.arange(count), high, seed=1, stream=s) for s in (0, 1))
    assert x.min() == 0 and x.max() == high - 1
    frequency = x.bincount(minlength=high).double() / count
    assert (frequency - 1 / high).abs().max() < 5 * (1 / high / count) ** 0.5
    correlation = torch.corrcoef(torch.stack([x, y]).double())[0, 1]
    assert abs(correlation) < 5 / count**0.5


def test_a_place_in_a_run_has_its_own_draws():
    places = [(seed, step, rank) for seed in (0, 1, 2**62) for step in (0, 1, 999_999) for rank in (0, 1)]
    draws = torch.stack([torch.rand(4, generator=generator("cpu", *place)) for place in places])
    assert torch.equal(draws[3], torch.rand(4, generator=generator("cpu", *places[3])))
    assert len(draws.unique(dim=0)) == len(places)
    assert not torch.equal(draws[0], torch.rand(4, generator=generator("cpu", 0, 0)))  # fewer numbers


def test_a_default_device_changes_nothing():
    expected = hash_keys(torch.arange(3), seed=1)
    with torch.device("meta"):
        assert torch.equal(hash_keys(torch.arange(3, device="cpu"), seed=1), expected)
        assert generator("cpu", 1).initial_seed() == generator("cpu", 1).initial_seed()
