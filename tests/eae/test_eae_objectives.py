"""What each model trains, against float64 computations by SciPy, torch.distributions and by hand."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln

from lightning_plugins import EAE
from lightning_plugins.eae.entropy import knn_entropy
from lightning_plugins.eae.gaussianity import mmd, sigreg
from lightning_plugins.eae.objectives import OBJECTIVES, Codes, reconstruction_error, regularization, resolve_objective


def entropy_by_tree(z, k):
    """Kozachenko-Leonenko, for float64 codes that are not close."""
    N, d = z.shape
    distances = cKDTree(z).query(z, k + 1)[0][:, k]
    log_ball = d / 2 * math.log(math.pi) - gammaln(d / 2 + 1)
    return digamma(N) - digamma(k) + log_ball + d * np.log(distances).mean()


def squared_errors(model, z, batch):
    return (model.decoder(z) - batch["image"]).square().flatten(1).sum(1)


@pytest.mark.parametrize("k", [1, [1, 3]])
def test_eae_is_the_squared_error_less_the_weighted_entropy(small, batch, k):
    model = small(weight=0.7, k=k).double()
    batch["image"] = batch["image"].double()
    terms = model.loss(batch)
    h = model.encoder(batch["image"])
    z = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    entropy = np.mean([entropy_by_tree(z.detach().numpy(), i) for i in ([k] if isinstance(k, int) else k)])
    assert set(terms) == {"reconstruction", "regularization"}
    torch.testing.assert_close(terms["reconstruction"], squared_errors(model, z, batch).mean())
    assert terms["regularization"].item() == pytest.approx(-0.7 * entropy, abs=2e-5)  # for the floor under distances
    assert terms["regularization"].dtype == torch.float64


def test_vae_is_the_evidence_bound(small, batch):
    """With a Gaussian likelihood of variance 1/2, up to its constant, and beta before the divergence."""
    model = small(objective="vae", weight=0.3).double()
    with torch.no_grad():
        list(model.encoder.parameters())[-1][4:] += 1.0  # else variances are nearly one, as are deviations
    batch["image"] = batch["image"].double()
    codes = model.codes(batch["image"])
    mean, log_variance = model.encoder(batch["image"]).chunk(2, 1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(codes.divergence, divergence)
    terms = model.loss(batch, codes)
    torch.testing.assert_close(terms["regularization"], 0.3 * divergence.mean())
    likelihood = torch.distributions.Normal(model.decoder(codes.own), math.sqrt(0.5)).log_prob(batch["image"])
    constant = 64 * 0.5 * math.log(math.pi)
    torch.testing.assert_close(terms["reconstruction"], -(likelihood.flatten(1).sum(1) + constant).mean())

    assert torch.equal(codes.all, mean)  # what the prior is fitted to
    many = torch.cat([((model.codes(batch["image"]).own - mean) / posterior.stddev).detach() for _ in repeat(model)])
    assert many.mean().item() == pytest.approx(0, abs=0.02) and many.std().item() == pytest.approx(1, abs=0.02)
    model.eval()
    assert torch.equal(model.codes(batch["image"]).own, mean)
    assert torch.equal(model.encode(batch["image"]), mean)


def repeat(model, times=200):
    """Batch after batch: the noise of each is another."""
    for batch_idx in range(times):
        model._place = 0, 0, batch_idx
        yield


def test_each_process_draws_a_vaes_noise_of_its_own(small, batch):
    """From the same means, while what all processes draw alike is the same."""

    class Second(EAE):
        global_rank = 1

    first, again, second = (small(cls, objective="vae") for cls in (EAE, EAE, Second))
    codes = [model.codes(batch["image"]) for model in (first, again, second)]
    assert torch.equal(codes[0].all, codes[2].all)
    assert torch.equal(codes[0].own, codes[1].own)
    assert (codes[0].own != codes[2].own).all()
    torch.manual_seed(2**64 - 1)  # any seed will do
    assert (first.codes(batch["image"]).own != codes[0].own).all()
    numbers = [small(cls, objective="mmd").loss(batch)["regularization"] for cls in (EAE, Second)]
    assert torch.equal(*numbers)


@pytest.mark.parametrize(("network", "kernels"), [("mlp", (0, 2, 4)), ("rae", (3, 6, 9))])
def test_rae_decays_the_decoders_kernels_alone(small, batch, network, kernels):
    """A step is that on the squared error, codes' norms and kernels' norms written out; no bias or norm."""
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    options = {"image_shape": (1, 32, 32), "width": 4, "network": "rae"} if network == "rae" else {}
    model, plain = (small(objective="rae_l2", weight=0.1, optimizer=sgd, **options).double() for _ in range(2))
    batch["image"] = torch.rand(8, *model.image_shape, dtype=torch.float64)
    sum(model.loss(batch).values()).backward()
    model.configure_optimizers().step()
    z = plain.encoder(batch["image"])
    weights = sum(plain.decoder[layer].weight.square().sum() for layer in kernels)
    loss = squared_errors(plain, z, batch) + 0.1 * z.square().sum(1) / 2
    (loss.mean() + 2.05e-4 * weights / 2).backward()
    sgd(plain.parameters()).step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_terms_of_the_others(small, batch):
    """Distances of the codes from N(0, I), with random numbers of the batch's own."""
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    for name, term in {"wae": mmd, "mmd": mmd, "sigreg": sigreg}.items():
        found = regularization(OBJECTIVES[name], Codes(z, z), 1, torch.Generator().manual_seed(2))
        assert torch.equal(found, term(z, generator=torch.Generator().manual_seed(2)))
        model = small(objective=name, weight=2.0)
        assert (model.batch_norm is None) == (name == "wae")
        codes = model.codes(batch["image"])
        assert torch.equal(
            model.loss(batch, codes)["regularization"], 2 * term(codes.all, generator=model._generator())
        )
    for name in ("ae", "ae_bn"):
        terms = small(objective=name).loss(batch)
        assert set(terms) == {"reconstruction"}
    assert (small(objective="ae").batch_norm is None) and small(objective="ae_bn").batch_norm is not None


def test_entropy_is_of_all_codes_and_reconstruction_of_ones_own():
    own, all_codes = torch.zeros(2, 4), torch.randn(32, 4)
    found = regularization(OBJECTIVES["eae"], Codes(own, all_codes), 2)
    assert torch.equal(found, -knn_entropy(all_codes, 2))


def test_errors_are_sums_over_an_image():
    images, made = torch.rand(2, 3, 3, 4, 4, dtype=torch.float64).clamp(0.01, 0.99)
    functions = {"mse": torch.nn.MSELoss, "l1": torch.nn.L1Loss, "bce": torch.nn.BCELoss}
    for kind, function in functions.items():
        expected = torch.stack([function(reduction="sum")(m, x) for m, x in zip(made, images, strict=True)])
        torch.testing.assert_close(reconstruction_error(made, images, kind), expected)
        with torch.autocast("cpu", torch.bfloat16):
            found = reconstruction_error(made.bfloat16(), images.bfloat16(), kind)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0)


def test_a_cross_entropy_is_never_asked_under_autocast(monkeypatch):
    """Which a GPU refuses."""
    function, under = torch.nn.functional.binary_cross_entropy, []

    def noted(*args, **options):
        under.append(torch.is_autocast_enabled("cpu"))
        return function(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy", noted)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction_error(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), "bce")
    assert under == [False]


def test_weights():
    assert resolve_objective("vae", None).weight == 1.0
    assert resolve_objective("vae", 0.25).weight == 0.25 and OBJECTIVES["vae"].weight == 1.0
    assert resolve_objective("ae", 0).weight == 0


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("gan", None, "objective='gan' must be one of eae, ae, ae_bn, rae_l2, vae, wae, sigreg, mmd."),
        ("ae_bn", 0.1, "weight=0.1 weighs nothing: objective='ae_bn' is the reconstruction error alone."),
        ("eae", -1.0, "weight=-1.0 must be 0 or more: the entropy is maximised by a positive one."),
        ("eae", math.nan, "weight=nan must be a finite number of 0 or more"),
    ],
)
def test_mistakes_in_one_sentence(name, weight, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        resolve_objective(name, weight)
    assert message in str(error.value)
