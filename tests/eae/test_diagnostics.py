"""Diagnostics of codes against closed forms, numpy and scipy; the metric against the function."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_plugins.eae.diagnostics import LatentDiagnostics, chi_density, chi_moments, latent_diagnostics
from lightning_plugins.eae.entropy import gaussian_reference_entropy, knn_entropy


def normal(N, d, seed=0):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d", [1, 2, 8, 64, 1000])
def test_chi_against_scipy(d):
    chi = scipy.stats.chi(d)
    assert chi_moments(d) == pytest.approx((chi.mean(), chi.std()), rel=1e-8)
    radius = torch.linspace(max(chi.mean() - 3 * chi.std(), 0.01), chi.mean() + 3 * chi.std(), 7, dtype=torch.float64)
    np.testing.assert_allclose(chi_density(radius, d), chi.pdf(radius.numpy()), rtol=1e-9)


def test_draws_from_the_prior_look_like_it():
    N, d = 4096, 16
    values = latent_diagnostics(normal(N, d))
    assert abs(values["entropy_gap"]) < 0.2  # its standard deviation is below 0.05
    # four standard errors; a radius's variance is that of chi, a standard deviation's relative error is (2 N)^-1/2
    assert values["radius_mean_ratio"] == pytest.approx(1, abs=4 * chi_moments(d)[1] / chi_moments(d)[0] / N**0.5)
    assert values["radius_std_ratio"] == pytest.approx(1, abs=4 / (2 * N) ** 0.5)
    assert values["correlation"] == pytest.approx(math.sqrt(2 / (math.pi * N)), rel=0.3)
    assert values["active_dims"] == d and values["duplicates"] == 0


def test_values_are_those_of_numpy():
    z = normal(300, 5) @ normal(5, 5, seed=1) + 100
    values = latent_diagnostics(z.double(), k=[1, 2])
    radius = np.linalg.norm(z.double(), axis=1)
    correlation = np.abs(np.corrcoef(z.double().T)[np.triu_indices(5, 1)]).mean()
    assert values["radius_mean"] == pytest.approx(radius.mean())
    assert values["radius_std"] == pytest.approx(radius.std(ddof=1))
    assert values["correlation"] == pytest.approx(correlation)
    assert values["entropy"] == knn_entropy(z.double(), [1, 2])
    assert values["entropy_gap"] == values["entropy"] - gaussian_reference_entropy(300, 5, [1, 2])
    assert latent_diagnostics(z)["correlation"] == pytest.approx(correlation, rel=1e-4)  # in spite of the offset
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert {value.dtype for value in latent_diagnostics(z.bfloat16()).values()} == {torch.float32}


def test_a_collapse_is_seen():
    points = normal(50, 8)
    collapsed = points.repeat(10, 1)
    values = latent_diagnostics(collapsed)
    assert values["duplicates"] == 450
    assert values["entropy_gap"] < -10
    clusters = latent_diagnostics(collapsed + 0.01 * normal(500, 8, seed=1))
    assert clusters["duplicates"] == 0 and clusters["entropy_gap"] < -10


def test_a_thin_shell_is_seen():
    z = torch.nn.functional.normalize(normal(500, 8)) * 3
    values = latent_diagnostics(z)
    assert values["radius_std_ratio"] < 1e-5
    assert values["radius_mean_ratio"] == pytest.approx(3 / scipy.stats.chi(8).mean())


def test_dead_dimensions_are_counted_and_have_no_correlation():
    z = normal(1000, 4)
    z = (z - z.mean(0)) / z.std(0)
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]
    z[:, 2] *= math.sqrt(0.0101)
    z[:, 3] *= math.sqrt(0.0099)
    whole = latent_diagnostics(z)
    assert whole["active_dims"] == 3
    dead = latent_diagnostics(torch.cat([z, torch.full((1000, 1), 3.7)], 1))
    assert dead["active_dims"] == 3
    assert dead["correlation"] == pytest.approx(whole["correlation"])
    assert latent_diagnostics(torch.stack([z[:, 0], torch.zeros(1000)], 1))["correlation"] == 0
    assert latent_diagnostics(z[:, :1])["correlation"] == 0
    pair = latent_diagnostics(torch.stack([z[:, 0], -2 * z[:, 0]], 1))
    assert pair["correlation"] == pytest.approx(1)


def test_metric_is_the_function_of_all_updates():
    z = normal(700, 6)
    metric = LatentDiagnostics(6, k=2)
    for part in z.split([256, 256, 100, 87, 1]):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), latent_diagnostics(z, k=2))
    assert sorted(metric.codes().tolist()) == sorted(z.tolist())
    assert not metric.codes().requires_grad and metric.state_dict() == {}
    metric.reset()
    torch.testing.assert_close(metric(z[:99]), latent_diagnostics(z[:99], k=2))
    metric(z[99:].requires_grad_())
    torch.testing.assert_close(metric.compute(), latent_diagnostics(z, k=2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"z must hold one code in each row, \(N, d\), got \(3, 1, 2\)\."):
        latent_diagnostics(torch.zeros(3, 1, 2))
    with pytest.raises(ValueError, match="k=3 neighbours need more than 3 codes, got 3"):
        latent_diagnostics(normal(3, 2), k=3)
    with pytest.raises(ValueError, match="latent_dim=0 must be 1 or more"):
        LatentDiagnostics(0)
    with pytest.raises(ValueError, match="max_codes=4 must be 6 or more: k=5"):
        LatentDiagnostics(2, k=[1, 5], max_codes=4)
    with pytest.raises(ValueError, match=r"z must be \(n, 2\), one code in each row, got \(5, 3\)\."):
        LatentDiagnostics(2).update(torch.zeros(5, 3))
