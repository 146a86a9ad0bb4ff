import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln, polygamma
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_plugins.eae import entropy
from lightning_plugins.eae.entropy import (
    KNNEntropyLoss,
    count_duplicates,
    entropy_gap,
    gaussian_reference_entropy,
    knn_entropy,
    koleo_loss,
)
from lightning_plugins.eae.nearest_neighbours import nearest_neighbours


def draw(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normalised(z):
    return (z - z.mean(0)) / z.std(0, correction=0)


def oracle(z, k=1, eps=0.0):
    """The formula in float64, distances by a k-d tree."""
    x = z.detach().double().numpy()
    n, d = x.shape
    r = cKDTree(x).query(x, k=[k + 1])[0][:, 0]
    ball = d / 2 * math.log(math.pi) - gammaln(d / 2 + 1)
    return digamma(n) - digamma(k) + ball + d / 2 * np.log(r**2 + eps).mean()


def naive(z, k=1, eps=1e-6):
    """The formula by autograd through all squared distances."""
    n, d = z.shape
    squares = (z[:, None] - z).square().sum(-1) + torch.eye(n, dtype=z.dtype) * 1e9
    ball = d / 2 * math.log(math.pi) - gammaln(d / 2 + 1)
    r2 = squares.kthvalue(k, 1).values
    return digamma(n) - digamma(k) + ball + d / 2 * (r2 + eps).log().mean()


@pytest.mark.parametrize(("n", "d"), [(2, 1), (12, 1), (300, 2), (97, 3), (515, 8), (1000, 16), (4100, 5), (260, 64)])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_value_against_a_tree(n, d, k):
    k = min(k, n - 1)
    z = draw(n, d)
    assert knn_entropy(z, k, eps=1e-30).item() == pytest.approx(oracle(z, k), rel=1e-5, abs=1e-5)
    assert knn_entropy(z.double(), k, eps=1e-30).item() == pytest.approx(oracle(z, k), rel=1e-10)
    assert (nearest_neighbours(z.double(), k)[:, -1].numpy() == cKDTree(z).query(z, k=[k + 1])[1][:, 0]).all()


def test_several_neighbours_are_the_mean_of_their_estimates():
    z = draw(200, 6)
    each = [knn_entropy(z, k) for k in (1, 2, 5)]
    torch.testing.assert_close(knn_entropy(z, [1, 2, 5]), sum(each) / 3)
    torch.testing.assert_close(knn_entropy(z, range(1, 4)), knn_entropy(z, (1, 2, 3)))
    torch.testing.assert_close(KNNEntropyLoss(k=2)(z), -each[1])
    torch.testing.assert_close(KNNEntropyLoss(eps=1.0, chunk_size=7)(z), -knn_entropy(z, eps=1.0))


@pytest.mark.parametrize(
    ("d", "k", "n", "bias", "deviation"),
    [
        (2, 1, 256, -0.02, 0.09),
        (8, 1, 128, 0.10, 0.14),
        (8, 5, 64, 0.50, 0.11),
        (16, 1, 256, 0.73, 0.13),
        (16, 3, 512, 0.85, 0.05),
        (32, 1, 1024, 2.63, 0.08),
        (64, 1, 512, 9.48, 0.15),
        (64, 5, 128, 13.44, 0.21),
    ],
)
def test_bias_for_normal_codes(d, k, n, bias, deviation):
    """Measured beforehand by another implementation, with the standard deviation of one draw."""
    measured = gaussian_reference_entropy(n, d, k, num_draws=16, seed=5) - d / 2 * math.log(2 * math.pi * math.e)
    assert abs(measured - bias) < 4 * deviation / math.sqrt(16) + 0.005  # the table's rounding


def test_reference_is_remembered_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    first = gaussian_reference_entropy(100, 16, [1, 2], num_draws=50)
    with torch.autocast("cpu", torch.bfloat16):
        assert gaussian_reference_entropy(100, 16, (1, 2), num_draws=50, seed=1) == pytest.approx(first, abs=0.1)
    assert gaussian_reference_entropy(100, 16, [1, 2], num_draws=50) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    gaps = torch.stack([entropy_gap(normalised(draw(256, 16, seed)), 3) for seed in range(10)])
    assert gaps.mean().abs() < 4 * 0.08 / math.sqrt(10)
    assert entropy_gap(normalised(draw(256, 16).repeat_interleave(8, 0) + 0.1 * draw(2048, 16, 1))) < -10


@pytest.mark.parametrize("k", [1, 4, [1, 3]])
def test_gradient(k):
    z = draw(24, 3, dtype=torch.float64).requires_grad_()

    def entropy(z):
        return knn_entropy(z, k, chunk_size=10)

    assert torch.autograd.gradcheck(entropy, z)
    assert torch.autograd.gradgradcheck(entropy, z)
    ks = [k] if isinstance(k, int) else k
    (expected,) = torch.autograd.grad(sum(naive(z, k) for k in ks) / len(ks), z)
    (gradient,) = torch.autograd.grad(entropy(z), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    z = z.detach().float().requires_grad_()
    torch.testing.assert_close(*torch.autograd.grad(entropy(z), z), expected.float(), rtol=1e-4, atol=1e-5)


def test_invariances_and_scale():
    z = draw(300, 5, dtype=torch.float64)
    entropy = knn_entropy(z, 2, eps=1e-30)
    rotation, _ = torch.linalg.qr(draw(5, 5, 1, torch.float64))
    permuted = z[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    for same in (permuted, z + 7, z @ rotation):
        torch.testing.assert_close(knn_entropy(same, 2, eps=1e-30), entropy)
    torch.testing.assert_close(knn_entropy(3 * z, 2, eps=1e-30), entropy + 5 * math.log(3))
    assert knn_entropy(draw(4096, 3)).item() == pytest.approx(oracle(draw(4096, 3)), abs=0.01)  # default eps


@pytest.mark.parametrize("n", [17, 250, 4099])
def test_blocks_do_not_matter(n):
    z = draw(n, 4)
    whole = knn_entropy(z, 3, chunk_size=n)
    for chunk_size in (1, 16, 100, 512, 5000) if n < 1000 else (512, 1000):
        torch.testing.assert_close(knn_entropy(z, 3, chunk_size=chunk_size), whole, rtol=1e-6, atol=0)


def test_close_pairs_and_duplicates():
    """Where a matrix of distances gives -inf or NaN: the pair at 1e-4 is pushed apart, copies are left alone."""
    z = draw(256, 16)
    z[1] = z[0]
    z[1, 0] += 1e-4
    z[3] = z[4] = z[2]
    z.requires_grad_()
    entropy = knn_entropy(z)
    (gradient,) = torch.autograd.grad(entropy, z)
    assert entropy.item() == pytest.approx(oracle(z, eps=1e-6), rel=1e-5)
    r = (z[1] - z[0]).double().norm().item()
    assert (gradient[1] - gradient[0])[0].item() == pytest.approx(2 * 2 * 16 / 256 * r / (r**2 + 1e-6), rel=0.01)
    assert gradient.isfinite().all()
    _, uses = torch.unique(nearest_neighbours(z.detach()), return_counts=True)
    assert gradient.norm(dim=1).max() <= 0.5 * 16 / 256 / math.sqrt(1e-6) * (1 + uses.max())
    assert gradient[2:5].norm(dim=1).max() < 1  # only what others do to them
    assert count_duplicates(z).item() == 2
    same = torch.ones(40, 3, requires_grad=True)
    knn_entropy(same).backward()
    assert same.grad.eq(0).all()
    assert count_duplicates(same).item() == 39


def test_offset_costs_no_precision():
    z = draw(512, 8, dtype=torch.float64)
    assert knn_entropy((z + 100).float()).item() == pytest.approx(knn_entropy(z).item(), rel=1e-4)
    assert (nearest_neighbours((z + 100).float()) == nearest_neighbours(z)).double().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    z = draw(1024, 64)
    half = z.to(dtype).requires_grad_()
    entropy = knn_entropy(half)
    assert entropy.dtype == torch.float32
    assert entropy.item() == pytest.approx(oracle(half.float()), rel=1e-5)
    assert entropy.item() == pytest.approx(knn_entropy(z).item(), abs=2e-3)
    entropy.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all()
    koleo = koleo_loss(z[:64])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_entropy(z), knn_entropy(half.float() * 0 + z))
        assert torch.equal(koleo_loss(z[:64]), koleo)
        assert knn_entropy(z).item() == pytest.approx(oracle(z), rel=1e-5)


def test_lowered_matmul_precision_costs_little():
    z = draw(1024, 64) + 3
    try:
        torch.set_float32_matmul_precision("medium")
        assert knn_entropy(z).item() == pytest.approx(oracle(z), abs=0.02)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_nothing_waits_for_the_device():
    """Tensors without values raise where the host would have to read one."""
    with FakeTensorMode():
        z = torch.zeros(600, 8, requires_grad=True)
        (knn_entropy(z, [1, 2]) + koleo_loss(z)).backward()
        assert z.grad.shape == z.shape
        with pytest.raises(DataDependentOutputException):
            z.sum().item()


def test_compiles_in_one_graph():
    compiled = torch.compile(knn_entropy, backend="aot_eager", fullgraph=True)
    z = draw(100, 3).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z), torch.autograd.grad(knn_entropy(z), z))


def test_maximising_the_entropy_alone_makes_clusters_normal():
    generator = torch.Generator().manual_seed(0)
    codes = draw(10, 8).repeat(103, 1)[:1024] + 0.02 * draw(1024, 8, 1)
    assert entropy_gap(normalised(codes)) < -10
    codes.requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=0.03)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 500)
        rows = torch.randint(1024, (256,), generator=generator).unique()
        loss = -knn_entropy(normalised(codes[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert entropy_gap(normalised(codes.detach())) > -1.5


def test_koleo_equals_its_published_definition():
    z = draw(50, 6, dtype=torch.float64).requires_grad_()
    u = z / z.norm(dim=1, keepdim=True)
    nearest = (u @ u.T - 2 * torch.eye(50)).argmax(1)
    published = -((u - u[nearest] + 1e-8).norm(dim=1) + 1e-8).log().mean()
    torch.testing.assert_close(koleo_loss(z), published, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *torch.autograd.grad(koleo_loss(z), z), *torch.autograd.grad(published, z), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(koleo_loss(z.float()), published.float())
    twins = torch.ones(4, 3, requires_grad=True)
    koleo_loss(twins).backward()
    assert twins.grad.isfinite().all()


def test_koleo_is_of_the_codes_of_a_group_only_if_one_is_given(monkeypatch):
    """What the group of processes has is gathered; none is asked without."""
    own, others = draw(20, 4), draw(20, 4, 1)
    monkeypatch.setattr(entropy, "gather_rows", lambda z, group: (torch.cat([z, others]), slice(len(z))))
    torch.testing.assert_close(koleo_loss(own, group="all"), koleo_loss(torch.cat([own, others])))
    assert koleo_loss(own) != koleo_loss(own, group="all")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(z=torch.ones(3, 2), k=3), "k=3 neighbours need more than 3 codes, got 3: enlarge"),
        (dict(z=torch.ones(3, 2), k=range(1, 5)), "k=4 neighbours need more than 4 codes, got 3"),
        (dict(z=torch.ones(3, 2), k=0), "k=0 must be 1 or more, or several such numbers"),
        (dict(z=torch.ones(3, 2), k=[]), r"k=.* must be a whole number of 1 or more"),
        (dict(z=torch.ones(3, 2), eps=0.0), "eps=0.0 must be positive: without"),
        (dict(z=torch.ones(3, 2), chunk_size=0), "chunk_size=0 must be 1 or more: 512"),
        (dict(z=torch.ones(3, 2, 2)), r"codes \(N, d\), got \(3, 2, 2\)"),
        (dict(z=torch.ones(3, 2, dtype=torch.int64)), "torch.int64"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        knn_entropy(**arguments)


def test_koleo_refuses_a_single_code_and_no_eps():
    with pytest.raises(ValueError, match="k=1 neighbours need more than 1 codes, got 1"):
        koleo_loss(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"eps=0\.0 must be positive"):
        koleo_loss(torch.ones(3, 2), eps=0.0)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(
    ("distribution", "entropy", "variance"),
    [  # of minus the logarithm of the density
        (torch.distributions.Uniform(0.0, 1.0), 0.0, 0.0),
        (torch.distributions.Exponential(1.0), 1.0, 1.0),
        (torch.distributions.Laplace(0.0, 1.0), 1 + math.log(2), 1.0),
    ],
    ids=["uniform", "exponential", "laplace"],
)
def test_other_distributions_have_their_own_entropy(distribution, entropy, variance, k):
    """In one dimension, where the bias is far below the noise.

    Its variance is (c psi'(k) + Var log p) / N, where c counts the codes that may share a distance: 2 k and the code.
    """
    z = distribution.sample((4096, 1)).double()
    noise = math.sqrt(((2 * k + 1) * polygamma(1, k) + variance) / 4096)
    assert knn_entropy(z, k, eps=1e-30).item() == pytest.approx(entropy, abs=4 * noise + k / 4096)


def test_by_default_the_reference_is_of_as_many_codes_as_fit_in_two_to_the_fifteen():
    for num_samples, num_draws in ((2**14, 2), (12_000, 3)):
        default = gaussian_reference_entropy(num_samples, 1, seed=3)
        assert default == gaussian_reference_entropy(num_samples, 1, num_draws=num_draws, seed=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(num_samples=3, dim=2, k=3), "num_samples=3 must be 4 or more: k=3 neighbours need more than 3 codes"),
        (dict(num_samples=4, dim=2, k=[1, 4]), "num_samples=4 must be 5 or more"),
        (dict(num_samples=9, dim=0), "dim=0 must be 1 or more"),
        (dict(num_samples=9, dim=2, k=0), "k=0 must be 1 or more"),
        (dict(num_samples=9, dim=2, num_draws=0), "num_draws=0 must be"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        gaussian_reference_entropy(**arguments)


@pytest.mark.parametrize("function", [entropy_gap, knn_entropy, koleo_loss, count_duplicates, KNNEntropyLoss()])
def test_other_shapes_are_refused(function):
    with pytest.raises(ValueError, match=r"codes \(N, d\), got \(6,\)"):
        function(torch.ones(6))


def test_a_loss_refuses_its_options_when_it_is_made():
    for options in (dict(k=0), dict(eps=-1.0), dict(chunk_size=0), dict(all_ranks="yes")):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}=.* must be"):
            KNNEntropyLoss(**options)
