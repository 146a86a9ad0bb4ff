"""The hash of keys, and numbers drawn with it."""

import pytest
import torch
from scipy import stats

from lightning_plugins.core.random_numbers import (
    RowGenerator,
    _mix,
    _mix_integer,
    _signed,
    generator,
    hash_keys,
    rand,
    randint,
    randn,
    random_integers,
)


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


def rows(count=2000, *numbers):
    return RowGenerator(torch.arange(count), *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_uniform_and_normal(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        uniform, normal = rand((2000, 100), rows(2000, 1)), randn((2000, 100), rows(2000, 2))
    finally:
        torch.set_default_dtype(before)
    assert uniform.dtype == normal.dtype == dtype
    assert uniform.min() >= 0 and uniform.max() < 1
    for found, law in ((uniform, "uniform"), (normal, "norm")):
        assert stats.kstest(found.flatten().numpy(), law).pvalue > 1e-3
        for table in (found[:100], found.T):  # rows, and places in a row
            assert torch.corrcoef(table).fill_diagonal_(0).abs().max() < 6 / table.shape[1] ** 0.5
    counts = torch.bincount(randint(7, (2000, 100), rows(2000, 3)).flatten())
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_row_depends_on_its_key_and_on_numbers_and_draw_alone():
    whole, part = rows(6, 1, 2), RowGenerator(torch.tensor([4, 2]), 1, 2)
    for draw, wide, narrow in ((randn, (6, 5), (2, 3)), (rand, (6, 2, 2), (2, 2, 2)), (rand, (6,), (2,))):
        expected, found = draw(wide, whole)[[4, 2]], draw(narrow, part)
        assert torch.equal(found, expected[:, : found.shape[1]] if found.ndim == 2 else expected)
    assert torch.equal(randint(9, (6, 4), whole)[[4, 2]], randint(9, (2, 4), part))
    sources = rows(6, 1, 2), rows(6, 2, 1), rows(6, 1)
    drawn = torch.cat([rand((6, 3), source) for source in sources for _ in range(2)])
    assert len(drawn.unique()) == drawn.numel()


def test_other_sources_draw_as_torch_does():
    for draw, of_torch in ((rand, torch.rand), (randn, torch.randn)):
        expected = of_torch(2, 3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(draw((2, 3), torch.Generator().manual_seed(1)), expected)
        torch.manual_seed(1)
        assert torch.equal(draw((2, 3), None, "cpu"), expected)
    assert torch.rand(3, generator=rows(4, 5)).tolist() == torch.rand(3, generator=generator("cpu", 5)).tolist()
