"""Distilling mixtures in the plane with ``benchmarks/sid_mixtures.py``: its parts, a short run, and the full bars."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_plugins.sid import losses

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sid_mixtures.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sid_mixtures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # it adds its folder
        spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_energy_distance_is_scipys(script):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1500, generator=g), 0.3 + torch.rand(700, generator=g)
    line = [torch.stack([a, torch.zeros_like(a)], 1) for a in (x, y)]
    assert script.energy_distance(*line) == pytest.approx(stats.energy_distance(x, y) ** 2, rel=1e-4)


@pytest.mark.parametrize("name", ["ring", "uneven"])
def test_the_teacher_is_exact(script, name):
    """Tweedie's formula: D = x + sigma^2 grad log p, with the noised density written out by stock distributions."""
    mixture = script.MIXTURES[name]().scaled()
    x = (2 * torch.randn(50, 2, dtype=torch.float64)).requires_grad_()
    for level in (0.05, 0.7, 20.0):
        width = torch.full((len(mixture.weights), 2), (mixture.std**2 + level**2) ** 0.5, dtype=torch.float64)
        parts = torch.distributions.Independent(torch.distributions.Normal(mixture.means.double(), width), 1)
        noised = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights.double()), parts)
        (score,) = torch.autograd.grad(noised.log_prob(x).sum(), x)
        denoised = mixture.denoise(x, torch.full((50,), level, dtype=torch.float64))
        torch.testing.assert_close(denoised, (x + level**2 * score).detach(), rtol=1e-5, atol=1e-5)
    samples = mixture.sample(20_000, torch.Generator().manual_seed(0))
    assert samples.var(0).mean().sqrt().item() == pytest.approx(0.5, rel=0.02)
    assert samples.mean(0).abs().max() < 0.02
    figures = script.score(mixture, samples[:10_000])
    assert figures["energy_distance"] < 2e-3 and figures["total_variation"] < 0.03  # the floor
    assert 0.9 < figures["least_spread"] < 1.05
    shrunk = samples[:10_000].clone()
    nearest = mixture.means[torch.cdist(shrunk, mixture.means).argmin(1)]
    shrunk[:, 0] = nearest[:, 0] + 0.1 * (shrunk - nearest)[:, 0]  # each mode a tenth as wide
    assert script.score(mixture, shrunk)["least_spread"] == pytest.approx(0.1, abs=0.02)


def test_noise_and_image_notation_are_one_loss(script):
    """A generator, a teacher and a fake score that predict noise in variance-preserving scaling, values and gradients.

    Of each level: x_t = a x_g + b noise, sigma = b / a, and the networks see x_t as it is, not divided by a.
    """
    torch.manual_seed(0)
    student, teacher, fake = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)).double() for _ in range(3))
    for network in (teacher, fake):
        network.requires_grad_(False)
    z, noise = torch.randn(2, 8, 6, dtype=torch.float64)
    sigma = torch.logspace(-1.5, 1, 8, dtype=torch.float64)
    a, b = 1 / (1 + sigma**2).sqrt()[:, None], (sigma / (1 + sigma**2).sqrt())[:, None]
    for alpha in (0.5, 1.0, 1.2):
        x_g = student(z)
        x_t = a * x_g + b * noise
        eps_teacher, eps_fake = teacher(x_t), fake(x_t)
        d_teacher, d_fake = ((x_t - b * eps) / a for eps in (eps_teacher, eps_fake))
        plain = losses.generator_loss(x_g, d_teacher, d_fake, alpha, "none")
        weighted = losses.generator_loss(x_g, d_teacher, d_fake, alpha)
        by_noise = sigma**2 * script.epsilon_generator_loss(noise, eps_teacher, eps_fake, alpha)
        by_method = script.sid_epsilon(alpha)(x_g, x_t / a, sigma, d_teacher, d_fake)
        for values in ((plain, by_noise), (weighted, by_method)):
            torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
            gradients = [torch.autograd.grad(v.sum(), student.parameters(), retain_graph=True) for v in values]
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
                assert one.abs().max() > 1e-3


def test_both_notations_train_the_same(script):
    """From the same random numbers, to the rounding of float64 that training has grown."""
    mixture = script.uneven().scaled()
    runs = [
        script.distil(mixture, script.METHODS[method], 0, 30, batch=64, dtype=torch.float64)
        for method in ("alpha 0.5", "alpha 0.5, epsilon", "alpha 1")
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-6)
    assert (runs[0] - runs[2]).abs().max() > 1e-3


def test_a_short_run_finds_every_mode_and_the_naive_loss_collapses(script):
    mixture = script.ring().scaled()
    found = script.score(mixture, script.distil(mixture, script.METHODS["alpha 0.5"], 0, 150, batch=256))
    naive = script.score(mixture, script.distil(mixture, script.METHODS["naive L1"], 0, 150, batch=256))
    assert found["energy_distance"] < 0.08 and found["least_mode"] > 0.5
    assert naive["energy_distance"] > 1 and naive["total_variation"] > 0.6  # three modes or fewer


@pytest.mark.slow
def test_the_full_bars(script, request):
    """The setting of the benchmark with one seed: about a minute of one core for each mixture."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("two minutes: ask for it with -m slow")
    for name, (distance, share) in script.BARS.items():
        run = script.one_run(name, "alpha 0.5", 0, 4000)
        assert run["energy_distance"] <= distance, name
        assert run["least_mode"] >= share, name
