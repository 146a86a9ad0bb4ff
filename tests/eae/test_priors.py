"""Priors fitted to codes: against NumPy, SciPy and scikit-learn, and what training may do to them."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import chi2, multivariate_normal
from sklearn.datasets import load_digits, make_blobs, make_moons
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_plugins.eae.mixture import fit_mixture, log_densities
from lightning_plugins.eae.priors import LatentPrior

KINDS = ("normal", "gaussian", "mixture")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small tensors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated(n=2000, d=4, seed=0):
    generator = seeded(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + torch.arange(d)


def clusters(n=3000):
    points, _ = make_blobs(n, centers=[[-6.0, 0.0], [0.0, 3.0], [5.0, -4.0]], cluster_std=[0.5, 1, 2], random_state=0)
    return torch.from_numpy(points)


def overlapping():
    """A large cluster and a small one beside it, whose shares of a code depend on their sizes."""
    large, small = (torch.randn(n, 2, generator=seeded(n), dtype=torch.float64) for n in (2500, 500))
    return torch.cat([large, small / 2 + torch.tensor([2.0, 1.0])])


@pytest.fixture(scope="module")
def fitted():
    prior = LatentPrior(2, num_components=3).double()
    prior.fit(clusters())
    return prior


def covariances(factors):
    return factors @ factors.mT


def test_the_gaussian_has_the_codes_mean_and_covariance():
    z = correlated()
    prior = LatentPrior(4).double()
    prior.fit(z)
    floor = 1e-6 * z.var(0, correction=0).mean() * torch.eye(4, dtype=z.dtype)
    np.testing.assert_allclose(prior.mean, np.mean(z.numpy(), 0), rtol=1e-12)
    np.testing.assert_allclose(covariances(prior.factor) - floor, np.cov(z.numpy().T), rtol=1e-10, atol=1e-10)


def test_one_component_is_the_gaussian():
    z = correlated()
    weights, means, factors = fit_mixture(z, 1)
    np.testing.assert_allclose(weights, [1.0])
    np.testing.assert_allclose(means[0], z.mean(0), atol=1e-12)
    np.testing.assert_allclose(covariances(factors)[0], np.cov(z.numpy().T, bias=True), rtol=1e-4, atol=1e-4)


def test_separate_clusters_are_found():
    z = clusters()
    weights, means, factors = fit_mixture(z, 3)
    order = means[:, 0].argsort()
    np.testing.assert_allclose(weights, [1 / 3] * 3, atol=0.02)
    np.testing.assert_allclose(means[order], [[-6, 0], [0, 3], [5, -4]], atol=0.2)
    spread = covariances(factors).diagonal(dim1=1, dim2=2).mean(1).sqrt()
    np.testing.assert_allclose(spread[order], [0.5, 1, 2], rtol=0.1)


DIGITS = load_digits().data / 16
DATA = {
    "digits": (PCA(8, whiten=True, random_state=0).fit_transform(DIGITS), 10),
    "raw digits": (1000 * PCA(16, random_state=0).fit_transform(DIGITS), 5),
    "moons": (make_moons(1000, noise=0.05, random_state=0)[0], 10),
    "blobs": (make_blobs(1500, 6, centers=8, random_state=0)[0], 8),
}


@pytest.mark.parametrize("name", DATA)
def test_as_likely_as_scikit_learns_mixture(name):
    points, num_components = DATA[name]
    prior = LatentPrior(points.shape[1], num_components).double()
    prior.fit(torch.from_numpy(points))
    ours = prior.log_prob(torch.from_numpy(points), "mixture").mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = GaussianMixture(num_components, n_init=1, random_state=0).fit(points).score(points)
    assert ours > theirs - 0.02
    assert prior.log_prob(torch.from_numpy(points), "gaussian").mean() < ours


@pytest.mark.parametrize(("codes", "num_components"), [(clusters, 3), (overlapping, 2)])
def test_a_step_is_scikit_learns(codes, num_components):
    """From the same start, the same fixed point."""
    points = codes().numpy()
    fitted = fit_mixture(codes(), num_components, tolerance=1e-10, num_steps=500)
    weights, means, factors = (x.numpy() for x in fitted)
    inverses = np.linalg.inv(factors @ factors.swapaxes(1, 2))
    start = {"weights_init": weights, "means_init": means, "precisions_init": inverses}
    theirs = GaussianMixture(num_components, tol=1e-10, max_iter=50, random_state=0, **start).fit(points)
    np.testing.assert_allclose(theirs.means_, means, atol=1e-3)
    np.testing.assert_allclose(theirs.covariances_, factors @ factors.swapaxes(1, 2), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(theirs.weights_, weights, atol=1e-4)


def test_everything_is_computed_where_the_codes_are():
    """Tensors without values raise where two devices meet."""
    prior = LatentPrior(2, num_components=3).to("meta")
    prior.remember(torch.zeros(7, 2, device="meta"))
    assert prior.memory.device.type == "meta"
    with FakeTensorMode():
        found = log_densities(*(torch.zeros(shape, device="cuda") for shape in ((7, 2), (3, 2), (3, 2, 2))))
    assert found.shape == (7, 3) and found.device.type == "cuda"


def test_log_densities_are_scipys(fitted):
    z = 4 * torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    parts = zip(fitted.means.numpy(), covariances(fitted.factors).numpy(), strict=True)
    densities = np.stack([multivariate_normal(mean, covariance).logpdf(z) for mean, covariance in parts], 1)
    expected = {
        "normal": multivariate_normal(np.zeros(2)).logpdf(z),
        "gaussian": multivariate_normal(fitted.mean.numpy(), covariances(fitted.factor).numpy()).logpdf(z),
        "mixture": logsumexp(densities, 1, b=fitted.weights.numpy()),
    }
    for kind in KINDS:
        np.testing.assert_allclose(fitted.log_prob(z, kind), expected[kind], rtol=1e-10)
        assert torch.autograd.gradcheck(lambda z, kind=kind: fitted.log_prob(z, kind), z[:3].clone().requires_grad_())
        assert fitted.log_prob(z.bfloat16(), kind).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_allclose(fitted.log_prob(z, kind), expected[kind], rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_neither_densities_nor_samples(fitted, kind):
    """In float32, which is what it would lower: float64 it leaves alone."""
    prior = LatentPrior(2, num_components=3)
    prior.load_state_dict(fitted.state_dict())
    z = 4 * torch.randn(200, 2, generator=seeded())
    exact = fitted.log_prob(z.double(), kind).float()
    outside = prior.sample(50, kind, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior.log_prob(z, kind), exact, rtol=1e-4, atol=1e-4)
        assert torch.equal(prior.sample(50, kind, generator=seeded(1)), outside)
    if kind == "gaussian":
        noise = torch.randn(50, 2, generator=seeded(1))
        torch.testing.assert_close(outside, prior.mean + noise @ prior.factor.mT, rtol=1e-5, atol=1e-5)


def moments(z):
    return z.mean(0), z.T.cov()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_distributions_moments(fitted, kind):
    n = 40_000
    mean, covariance = moments(fitted.sample(n, kind, generator=seeded(1)))
    data = clusters()
    expected = (torch.zeros(2), torch.eye(2)) if kind == "normal" else moments(data)
    scale = expected[1].diagonal().max().item()
    np.testing.assert_allclose(mean, expected[0], atol=5 * math.sqrt(scale / n))
    np.testing.assert_allclose(covariance, expected[1], atol=0.03 * scale)


def test_samples_of_a_component_are_normal(fitted):
    z = fitted.sample(6000, "mixture", generator=seeded(2))
    left = fitted.means[:, 0].argmin()
    own = z[z[:, 0] < -3]  # one cluster, far from the others
    assert len(own) / len(z) == pytest.approx(1 / 3, abs=0.03)
    whitened = torch.linalg.solve_triangular(fitted.factors[left], (own - fitted.means[left]).T, upper=False)
    shares = (whitened.square().sum(0)[:, None] < torch.tensor(chi2(2).ppf([0.25, 0.5, 0.9]))).double().mean(0)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.9], atol=0.05)


def test_temperature_scales_deviations(fitted):
    for kind, centre in (("normal", torch.zeros(2)), ("gaussian", fitted.mean)):
        full, cold = (fitted.sample(8, kind, t, seeded(3)) - centre for t in (1.0, 0.25))
        torch.testing.assert_close(cold, 0.25 * full, check_dtype=False)
    frozen = fitted.sample(200, "mixture", 0.0, seeded(3))
    assert torch.equal(frozen.unique(dim=0), fitted.means.unique(dim=0))
    warm, cold = (fitted.sample(200, "mixture", t, seeded(3)) - frozen for t in (1.0, 0.5))
    torch.testing.assert_close(cold, 0.5 * warm)  # the same components are drawn


def test_seeded_draws_and_fits_repeat(fitted):
    state = torch.get_rng_state()
    again = LatentPrior(2, num_components=3).double()
    again.fit(clusters())
    assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in again.state_dict().items())
    for kind in KINDS:
        assert torch.equal(again.sample(9, kind, generator=seeded()), fitted.sample(9, kind, generator=seeded()))
    assert torch.equal(torch.get_rng_state(), state)
    again.sample(1)
    assert not torch.equal(torch.get_rng_state(), state)


def awkward():
    z = torch.randn(300, 6, generator=seeded())
    yield "a collapsed dimension", torch.cat([z, 1e-9 * z[:, :1]], 1)
    yield "a constant dimension", torch.cat([z, torch.full((300, 1), 5.0)], 1)
    yield "a repeated dimension", torch.cat([z, z[:, :1]], 1)
    yield "a tiny scale", 1e-5 * torch.randn(300, 7, generator=seeded())
    yield "a far offset", 1e4 + torch.randn(300, 7, generator=seeded())
    yield "one code", torch.ones(300, 7)
    yield "two codes", torch.eye(7)[[0, 1] * 150]
    yield "fewer codes than dimensions", torch.randn(5, 7, generator=seeded())


@pytest.mark.parametrize("case", [*awkward()], ids=lambda case: case[0])
def test_nearly_singular_covariances(case):
    z = case[1]
    prior = LatentPrior(7, num_components=4)
    prior.fit(z)
    assert all(value.isfinite().all() for value in prior.state_dict().values())
    assert prior.weights.sum().item() == pytest.approx(1)
    spread, centre = z.std(0).norm(), z.mean(0)
    for kind in ("gaussian", "mixture"):
        drawn = prior.sample(500, kind, generator=seeded())
        assert drawn.isfinite().all() and prior.log_prob(drawn, kind).isfinite().all()
        assert prior.log_prob(z, kind).isfinite().all()
        assert ((drawn - centre).norm(dim=1) <= 10 * spread + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules(fitted, dtype):
    wide, half = (LatentPrior(2, num_components=3) for _ in range(2))
    wide.load_state_dict(fitted.state_dict())
    half.load_state_dict(fitted.state_dict())
    half.to(dtype)
    for kind in KINDS:
        expected, z = (prior.sample(500, kind, generator=seeded()) for prior in (wide, half))
        assert z.dtype == dtype and half.log_prob(z, kind).dtype == torch.float32
        near = (z - expected).abs().amax(1) < 0.1
        assert near.double().mean() > (0.99 if kind == "mixture" else 0.9999)  # a rounded weight may change a component
        assert half.log_prob(z, kind).mean().item() == pytest.approx(wide.log_prob(z, kind).mean().item(), abs=0.05)


def test_memory_keeps_the_newest_codes():
    prior = LatentPrior(2, num_components=2, capacity=10)
    codes = torch.arange(74.0).view(37, 2)
    kept = []
    for batch in codes.split([4, 4, 4, 25]):  # fits, fits, wraps around, more than all
        prior.remember(batch.requires_grad_())
        kept = [*kept, *batch.tolist()][-10:]
        assert prior.num_remembered == len(kept)
        assert sorted(prior.memory[: prior.num_remembered].tolist()) == kept
    assert int(prior.num_seen) == 37 and not prior.memory.requires_grad


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    batches = torch.randn(8, 7, 3, generator=seeded())
    straight, first = (LatentPrior(3, num_components=2, capacity=40) for _ in range(2))
    for i, batch in enumerate(batches):
        straight.remember(batch)
        if i < 4:
            first.remember(batch)  # 28 of 40
    torch.save(first.state_dict(), tmp_path / "half.pt")
    resumed = LatentPrior(3, num_components=2, capacity=40)
    resumed.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True), strict=True)
    assert not resumed.is_fitted and resumed.num_remembered == 28
    for batch in batches[4:]:
        resumed.remember(batch)
    straight.fit()
    resumed.fit()
    assert resumed.is_fitted
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())
    loaded = LatentPrior(3, num_components=2, capacity=40)
    loaded.load_state_dict(straight.state_dict())
    assert loaded.is_fitted
    assert torch.equal(
        loaded.sample(5, "mixture", generator=seeded()), straight.sample(5, "mixture", generator=seeded())
    )


def test_a_fit_holds_until_more_codes_are_remembered():
    z = torch.randn(400, 2, generator=seeded())
    prior, other = (LatentPrior(2, num_components=2, capacity=100) for _ in range(2))
    prior.remember(z[:50])
    assert not prior.is_fitted and prior.can_be_fitted
    for use in (lambda: prior.sample(3, "mixture"), lambda: prior.log_prob(z[:3], "gaussian")):
        prior.fitted.fill_(False)
        use()
        other.fit(z[:50])
        assert prior.is_fitted and torch.equal(prior.factors, other.factors)
    prior.fit(z)  # what is given, not what is remembered
    other.fit(z)
    assert torch.equal(prior.sample(9, "mixture", generator=seeded()), other.sample(9, "mixture", generator=seeded()))
    prior.remember(z[50:100])
    assert not prior.is_fitted
    prior.sample(1)  # N(0, I) needs none
    assert not prior.is_fitted
    other.fit(z[:100])
    assert torch.equal(prior.sample(9, "gaussian", generator=seeded()), other.sample(9, "gaussian", generator=seeded()))
    prior.remember(torch.full((1, 2), math.nan))
    assert not prior.can_be_fitted
    with pytest.raises(ValueError, match="not finite"):
        prior.sample(1, "mixture")


def test_a_partly_filled_memory_fits_its_codes_alone():
    z = correlated(60).float() + 50
    prior, given = (LatentPrior(4, num_components=2) for _ in range(2))
    prior.remember(z)
    prior.fit()
    given.fit(z)
    assert torch.equal(prior.mean, given.mean) and torch.equal(prior.factors, given.factors)


def test_in_inference_mode():
    prior = LatentPrior(2, num_components=2, capacity=50)
    with torch.inference_mode():
        prior.remember(torch.randn(30, 2))
        prior.fit()
        prior.sample(3, "mixture")
    z = torch.zeros(1, 2, requires_grad=True)
    prior.log_prob(z, "mixture").sum().backward()
    assert z.grad.isfinite().all()


def test_memory_has_a_bounded_size():
    assert LatentPrior(16).capacity == LatentPrior(64).capacity == 10_000
    prior = LatentPrior(1024, num_components=1)
    assert prior.memory.nbytes == 2**24
    assert LatentPrior(1024, num_components=1, capacity=10).memory.shape == (10, 1024)


@pytest.mark.parametrize("argument", ["latent_dim", "num_components", "capacity"])
def test_bad_sizes(argument):
    with pytest.raises(ValueError, match=f"{argument}=0 must be 1 or more"):
        LatentPrior(**{"latent_dim": 2, argument: 0})


def test_refusals(fitted):
    prior = LatentPrior(2, num_components=5)
    prior.remember(torch.randn(4, 2))
    with pytest.raises(ValueError, match="num_components=5 needs 5 codes or more, got 4"):
        prior.fit()
    with pytest.raises(ValueError, match="num_components=1 needs 2 codes or more, got 1"):
        LatentPrior(2, num_components=1).fit(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        prior.fit(torch.full((9, 2), math.nan))
    assert not prior.is_fitted and not prior.can_be_fitted
    for use in (lambda kind: prior.sample(3, kind), lambda kind: prior.log_prob(torch.zeros(3, 2), kind)):
        with pytest.raises(ValueError, match=r"fitted to 5 codes or more, .* left 4: .* fit_prior\(dataloader\)"):
            use("mixture")
        with pytest.raises(ValueError, match="prior='gmm' must be one of normal, gaussian, mixture"):
            use("gmm")
    for use in (prior.remember, prior.fit, prior.log_prob):
        with pytest.raises(ValueError, match=r"z must have shape \(codes, 2\), got \(3, 4\)"):
            use(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="temperature=-1 must be 0 or more"):
        fitted.sample(3, temperature=-1)
    with pytest.raises(ValueError, match=r"generator=0 must be .*torch\.Generator"):
        fitted.sample(3, generator=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_are_an_empty_tensor_and_fewer_are_refused(fitted, kind):
    assert fitted.sample(0, kind).shape == (0, 2)
    with pytest.raises(ValueError, match="n=-1 must be 0 or more"):
        fitted.sample(-1, kind)
    with pytest.raises(ValueError, match="generator=7 must be"):
        fitted.sample(3, kind, generator=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_codes_of_another_type_are_remembered_in_the_memorys_own(dtype):
    prior = LatentPrior(2, num_components=2, capacity=8)
    codes = torch.randn(5, 2, generator=seeded()).to(dtype)
    prior.remember(codes)
    assert prior.memory.dtype == torch.float32 and torch.equal(prior.memory[:5], codes.float())


def test_a_mixture_draws_its_components_by_their_weights():
    prior = LatentPrior(1, num_components=3).double()
    prior.fit(clusters()[:, :1])
    prior.weights.copy_(torch.tensor([0.7, 0.3, 0.0]))
    prior.means.copy_(torch.tensor([[-100.0], [0.0], [100.0]]))
    z = prior.sample(4000, "mixture", generator=seeded())
    shares = torch.stack([(z < -50).double().mean(), (z.abs() < 50).double().mean(), (z > 50).double().mean()])
    # four standard deviations of a share of 4,000 draws
    np.testing.assert_allclose(shares, [0.7, 0.3, 0.0], atol=4 * math.sqrt(0.7 * 0.3 / 4000))
    assert shares[2] == 0
