"""Noise levels against EDM's schedule and scipy's tests of a distribution."""

import pytest
import torch
from scipy import stats

from lightning_plugins.sid.noise_levels import fake_score_sigmas, generator_sigmas, grid_sigmas, karras_sigmas


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_schedule_is_edms():
    """EDM writes sigma_i of i steps from the most noise down; r counts from the least up."""
    for low, high, rho in ((0.002, 80.0, 7.0), (0.01, 24.0, 3.0)):
        r = torch.linspace(0, 1, 11, dtype=torch.float64)
        edm = [(high ** (1 / rho) + i / 10 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(11)]
        assert karras_sigmas(r, low, high, rho).tolist() == pytest.approx(edm[::-1], rel=1e-12)
    assert karras_sigmas(torch.tensor(0.8)).item() == pytest.approx(24.4, abs=0.05)


def test_the_generators_levels_are_uniform_along_the_schedule():
    sigma = generator_sigmas(20_000, generator=seeded())
    assert sigma.shape == (20_000,) and sigma.dtype == torch.float32
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    r = (sigma.double() ** (1 / 7) - low) / (high - low)
    assert stats.kstest(r.numpy(), stats.uniform(0, 0.8).cdf).pvalue > 0.01
    assert 0.002 <= sigma.min() < 0.0025 and 23 < sigma.max() < 24.5
    assert sigma.median().item() == pytest.approx(0.97, abs=0.05)
    other = generator_sigmas(5000, generator=seeded(), t_min=500, t_max=600, sigma_min=0.1, sigma_max=10)
    ends = karras_sigmas(torch.tensor([0.5, 0.6]), 0.1, 10.0).tolist()
    assert [other.min().item(), other.max().item()] == pytest.approx(ends, rel=1e-2)


def test_the_fake_scores_levels_are_lognormal():
    sigma = fake_score_sigmas(20_000, generator=seeded())
    assert stats.kstest(sigma.log().numpy(), stats.norm(-1.2, 1.2).cdf).pvalue > 0.01
    sigma = fake_score_sigmas(20_000, mean=0.5, std=0.3, generator=seeded())
    assert stats.kstest(sigma.log().numpy(), stats.norm(0.5, 0.3).cdf).pvalue > 0.01


def test_levels_of_a_grid_are_its_own_and_equally_likely():
    grid = torch.linspace(0.01, 10, 1000)
    sigma = grid_sigmas(50_000, grid, generator=seeded())
    assert torch.isin(sigma, grid).all() and len(sigma.unique()) == 1000
    counts = torch.bincount(torch.searchsorted(grid, sigma), minlength=1000)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    sigma = grid_sigmas(50_000, grid, generator=seeded(), t_min=20, t_max=980)
    assert (sigma.min(), sigma.max()) == (grid[20], grid[979])  # t from 20 to 979, as SiD-LSG
    few = torch.arange(1.0, 5.0)  # where the ends weigh enough to show
    counts = torch.bincount(grid_sigmas(8_000, few, generator=seeded()).long())[1:]
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_levels_are_drawn_where_the_generator_is_and_stand_where_they_are_wanted():
    for draw in (generator_sigmas, fake_score_sigmas):
        assert draw(3, generator=seeded(), device="meta").device.type == "meta"
        assert draw(3, generator=seeded()).device.type == "cpu"


@pytest.mark.parametrize(
    "draw",
    [generator_sigmas, fake_score_sigmas, lambda n, **k: grid_sigmas(n, torch.arange(9.0), **k)],
)
def test_the_same_generator_draws_the_same_and_leaves_the_global_one(draw):
    state = torch.get_rng_state()
    assert torch.equal(draw(5, generator=seeded(3)), draw(5, generator=seeded(3)))
    assert not torch.equal(draw(5, generator=seeded(3)), draw(5, generator=seeded(4)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert len(draw(5)) == 5 and not torch.equal(torch.get_rng_state(), state)  # without one, the global numbers


def test_impossible_noise_levels_are_refused():
    with pytest.raises(ValueError, match=r"sigma_min=3\.0 must be positive and below sigma_max=2\.0"):
        karras_sigmas(torch.ones(1), 3.0, 2.0)
    with pytest.raises(ValueError, match="sigma_min=0 must be positive"):
        generator_sigmas(2, sigma_min=0)
    with pytest.raises(ValueError, match=r"t_min=0\.0 and t_max=1200"):
        generator_sigmas(2, t_max=1200)
    with pytest.raises(ValueError, match="t_min=900 and t_max=800"):
        grid_sigmas(2, torch.arange(10.0), t_min=900, t_max=800)
    with pytest.raises(ValueError, match="leave none of 10 noise levels"):
        grid_sigmas(2, torch.arange(10.0), t_min=910, t_max=930)
