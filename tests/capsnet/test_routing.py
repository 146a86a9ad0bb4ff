import itertools
from math import exp, log

import pytest
import torch

from lightning_plugins.capsnet.routing import compute_votes, route_votes, squash
from lightning_plugins.capsnet.streamed_routing import route
from lightning_plugins.capsnet.trace import kmeans_objective, routing_trace

KINDS = ["dynamic", "kmeans", "kmeans_squash", "uniform"]
J, K, D = 3, 4, 5


def draw(batch=2, inputs=6, shared=False, scale=1.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, inputs, D, generator=g, dtype=dtype)
    W = torch.randn(*([] if shared else [inputs]), D, J, K, generator=g, dtype=dtype)
    return u, W * scale


def loop(u, W, kind, iterations, scale=1.0, leaky=False, bias=None, mask=None):
    """The papers, one sample, input and output capsule at a time."""
    poses = []
    for b in range(len(u)):
        present = [i for i in range(u.shape[1]) if mask is None or mask[b, i]]
        votes = {(i, j): u[b, i] @ (W[i] if W.dim() == 4 else W)[:, j] for i in present for j in range(J)}
        logits = dict.fromkeys(votes, 0.0)
        for _ in range(iterations):
            totals = {i: sum(exp(logits[i, j]) for j in range(J)) + (1 if leaky else 0) for i in present}
            s = [sum(exp(logits[i, j]) / totals[i] * votes[i, j] for i in present) for j in range(J)]
            s = s if bias is None else [s[j] + bias[j] for j in range(J)]
            v = [(x @ x) / (scale + x @ x) * x / (x @ x) ** 0.5 for x in s]
            for i, j in votes:
                if kind == "dynamic":  # Sabour et al. 2017, procedure 1, line 7
                    logits[i, j] += float(votes[i, j] @ v[j])
                elif kind == "kmeans":  # kexue.fm/archives/5112
                    logits[i, j] = float(votes[i, j] @ s[j] / (s[j] @ s[j]) ** 0.5)
                elif kind == "kmeans_squash":  # kexue.fm/archives/4819
                    logits[i, j] = float(votes[i, j] @ v[j])
        poses.append(torch.stack(v))
    return torch.stack(poses)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5])
def test_every_kind_equals_the_papers_loop(kind, iterations, shared):
    u, W = draw(shared=shared)
    bias = torch.linspace(-1, 1, J * K, dtype=torch.float64).view(J, K)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]).bool()
    for leaky, b, m, scale in itertools.product([False, True], [None, bias], [None, mask], [1.0, 0.5]):
        expected = loop(u, W, kind, iterations, scale, leaky, b, m)
        options = dict(squash_scale=scale, leaky=leaky, bias=b, mask=m)
        trace = routing_trace(u, W, kind, iterations, **options)
        for got in (
            route(u, W, kind, iterations, **options),
            route_votes(compute_votes(u, W), kind, iterations, **options),
            trace.poses[-1],
        ):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
        assert trace.couplings.shape == (iterations, 2, 6, J)


@pytest.mark.parametrize("shared", [False, True])
def test_votes_are_the_transformed_inputs(shared):
    u, W = draw(shared=shared)
    votes = compute_votes(u, W)
    for b, i, j in itertools.product(range(2), range(6), range(J)):
        torch.testing.assert_close(votes[b, i, j], u[b, i] @ (W if shared else W[i])[:, j])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaky", [False, True])
def test_one_iteration_is_the_squashed_uniform_sum(kind, leaky):
    u, W = draw()
    expected = squash(compute_votes(u, W).sum(1) / (J + leaky))
    torch.testing.assert_close(route(u, W, kind, 1, leaky=leaky), expected)
    torch.testing.assert_close(route(u, W, "uniform", 7, leaky=leaky), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_couplings_sum_to_one_over_outputs(kind):
    u, W = draw(scale=0.3)
    total = routing_trace(u, W, kind, 4).couplings.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    leaky = routing_trace(u, W, kind, 4, leaky=True)
    assert (leaky.couplings.sum(-1) < 1).all()
    assert (leaky.couplings > 0).all()
    assert (leaky.entropy <= 1 + 1e-12).all()


def test_the_orphan_class_has_its_share_of_the_entropy():
    """By hand; and where the others leave it nothing, or less by rounding, which has no logarithm."""
    u, W = draw(scale=0.3)
    trace = routing_trace(u, W, "kmeans", 3, leaky=True)
    shares = torch.cat([trace.couplings, 1 - trace.couplings.sum(-1, keepdim=True)], -1)
    expected = -(shares * shares.log()).sum(-1).mean(-1) / log(J + 1)
    torch.testing.assert_close(trace.entropy, expected)
    sharp = routing_trace(*draw(batch=40, inputs=40, scale=9.0, dtype=torch.float32), "kmeans", 4, leaky=True)
    assert bool((sharp.couplings.sum(-1) > 1).any())
    assert bool((sharp.entropy >= 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_see_their_neighbours(kind):
    u, W = draw(batch=5, dtype=torch.float32)
    together = route(u, W, kind, 4)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], route(u[i : i + 1], W, kind, 4), atol=1e-6, rtol=0)


def test_trace_is_right_by_hand():
    u, W = draw(scale=0.3)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]).bool()
    trace = routing_trace(u, W, "kmeans", 3, mask=mask)
    votes = compute_votes(u, W)
    centres = routing_trace(u, W, "kmeans", 2, mask=mask).poses[-1]
    centres = centres / centres.norm(dim=-1, keepdim=True)
    couplings = (votes * centres[:, None]).sum(-1).softmax(-1)
    torch.testing.assert_close(trace.couplings[-1], couplings * mask[..., None])
    torch.testing.assert_close(trace.entropy[0], torch.ones(2, dtype=torch.float64))
    entropy = -(couplings * couplings.log()).sum(-1) / log(J)
    torch.testing.assert_close(trace.entropy[-1], (entropy * mask).sum(-1) / mask.sum(-1))
    direction = trace.poses[-1] / trace.poses[-1].norm(dim=-1, keepdim=True)
    objective = -((votes * direction[:, None]).sum(-1).exp().sum(-1).log() * mask).sum(-1)
    torch.testing.assert_close(trace.objective[-1], objective)
    torch.testing.assert_close(kmeans_objective(votes, trace.poses[-1], mask), objective)
    assert not trace.couplings[:, ~mask].any()


def test_kmeans_never_raises_its_objective():
    for seed, scale in enumerate([0.1, 0.3, 1.0, 3.0]):
        u, W = draw(batch=25, inputs=20, scale=scale, seed=seed)
        objective = routing_trace(u, W, "kmeans", 20).objective
        rise = objective.diff(dim=0) / objective[:-1].abs()
        assert rise.max() < 1e-14
        assert objective[-1].sum() < objective[0].sum()


def test_kmeans_converges_where_accumulation_sharpens():
    g = torch.Generator().manual_seed(0)
    u = torch.randn(3, 100, 8, generator=g, dtype=torch.float64)
    W = torch.randn(100, 8, 5, 8, generator=g, dtype=torch.float64) * 0.3 / 8**0.5  # votes of deviation 0.3
    limit = routing_trace(u, W, "kmeans", 61)
    torch.testing.assert_close(limit.poses[60], limit.poses[59], atol=1e-5, rtol=0)
    assert (limit.entropy[-1] > 0.9).all()
    assert (routing_trace(u, W, "dynamic", 40).entropy[-1] < 0.1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_mask_equals_dropping(kind):
    for shared in (False, True):
        u, W = draw(shared=shared)
        keep = torch.tensor([True, False, True, True, False, True])
        dropped = route(u[:, keep], W if shared else W[keep], kind, 3)
        broken = u.masked_fill(~keep[:, None], torch.nan)  # what is absent is not even looked at
        torch.testing.assert_close(route(broken, W, kind, 3, mask=keep.expand(2, 6)), dropped)
        none = route(u, W, kind, 3, mask=torch.zeros(2, 6, dtype=torch.bool))
        assert not none.any()


@pytest.mark.parametrize("kind", KINDS)
def test_shared_transforms_ignore_order_and_zero_padding(kind):
    u, W = draw(shared=True)
    poses = route(u, W, kind, 4)
    torch.testing.assert_close(route(u[:, torch.tensor([3, 1, 5, 0, 2, 4])], W, kind, 4), poses)
    torch.testing.assert_close(route(torch.nn.functional.pad(u, (0, 0, 0, 9)), W, kind, 4), poses)


@pytest.mark.parametrize("kind", KINDS)
def test_rotating_the_output_frame_rotates_the_poses(kind):
    u, W = draw()
    R = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    torch.testing.assert_close(route(u, W @ R, kind, 4), route(u, W, kind, 4) @ R)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_squash_has_the_formulas_length_and_direction(scale):
    direction = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    for n in [1e-3, 0.1, 0.7, 1.0, 2.0, 10.0, 1e3]:
        expected = n * n / (scale + n * n) * direction
        torch.testing.assert_close(squash(n * direction, scale), expected, atol=0, rtol=1e-14)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15, 1e20, 3e38])
def test_squash_and_its_gradient_stay_finite(size):
    s = torch.tensor([[size, -size, 0.0, size / 2], [0.3, 0.0, 0.0, 0.4]], requires_grad=True)
    v = squash(s)
    length = v.detach().norm(dim=-1)
    torch.testing.assert_close(length, torch.tensor([1.0 if size > 1 else 0.0, 0.2]))
    (gradient,) = torch.autograd.grad(v.sum(), s, create_graph=True)
    assert gradient.isfinite().all()
    # the Jacobian at size 0.5 along (0.6, 0.8): radial 2n/(1+n^2)^2 = 0.64, tangential n/(1+n^2) = 0.4
    torch.testing.assert_close(
        gradient[1].detach(), 0.4 + (0.64 - 0.4) * 1.4 * torch.tensor([0.6, 0, 0, 0.8]), atol=1e-6, rtol=0
    )
    assert torch.autograd.grad(gradient.sum(), s)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squash_in_half_precision(dtype):
    s = torch.tensor([[100.0] * 16, [0.0] * 16, [6e4] * 16], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = squash(s)
    assert v.dtype == dtype
    torch.testing.assert_close(v[:, 0].float(), torch.tensor([0.25, 0.0, 0.25]), atol=1e-3, rtol=0)
    v.sum().backward()
    assert s.grad.isfinite().all()


def test_squash_passes_gradcheck():
    s = torch.tensor([[0.1, -0.2], [3.0, 0.5], [-40.0, 7.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squash, s)
    assert torch.autograd.gradgradcheck(squash, s)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["streamed", "stored"])
def test_zero_inputs_have_finite_gradients(kind, form):
    u, W = torch.zeros(2, 6, D, requires_grad=True), draw(dtype=torch.float32)[1].requires_grad_()
    poses = route(u, W, kind, 3) if form == "streamed" else route_votes(compute_votes(u, W), kind, 3)
    poses.sum().backward()
    assert not poses.detach().any()
    assert u.grad.isfinite().all() and W.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(routing="em"), "routing='em' must be one of dynamic, kmeans, kmeans_squash, uniform."),
        (dict(gradient="none"), "gradient='none' must be one of full, last."),
        (dict(iterations=0), "iterations=0 must be 1 or more: the first one is the uniform start."),
        (dict(u=torch.zeros(6, D)), "u must have shape (B, N, D), not (6, 5)."),
        (dict(W=torch.zeros(D, J)), "W must have shape (N, D, J, K) or, shared, (D, J, K), not (5, 3)."),
        (
            dict(W=torch.zeros(7, D, J, K)),
            "W (7, 5, 3, 4) does not fit u (2, 6, 5): u is (B, N, D), W (N, D, J, K) or, shared, (D, J, K).",
        ),
        (
            dict(W=torch.zeros(D + 1, J, K)),
            "W (6, 3, 4) does not fit u (2, 6, 5): u is (B, N, D), W (N, D, J, K) or, shared, (D, J, K).",
        ),
        (dict(bias=torch.zeros(J)), "bias must have shape (J, K) = (3, 4), not (3,)."),
        (dict(mask=torch.ones(2, 6)), "mask must be bool of shape (B, N) = (2, 6), not torch.float32 (2, 6)."),
    ],
)
def test_wrong_arguments_get_one_sentence(change, message):
    arguments = dict(zip(("u", "W"), draw(), strict=True)) | change
    for function in (route, routing_trace):
        if function is routing_trace and "gradient" in change:
            continue  # it differentiates nothing
        with pytest.raises(ValueError) as error:
            function(**arguments)
        assert str(error.value) == message


def test_stored_votes_must_have_four_axes():
    with pytest.raises(ValueError, match=r"votes must have shape \(B, N, J, K\), not \(2, 3\); see compute_votes."):
        route_votes(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"bias must have shape \(J, K\) = \(4, 5\), not \(5,\)"):
        route_votes(torch.zeros(2, 3, 4, 5), bias=torch.zeros(5))
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        kmeans_objective(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5), torch.ones(2, 4, dtype=torch.bool))
