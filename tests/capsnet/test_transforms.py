"""Routing under torch's transforms: forward mode, torch.func, whole-graph compilation, odd tensors.

References are central differences and the stored form under plain autograd, both in float64.
"""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from lightning_plugins import CapsNet
from lightning_plugins.capsnet import compute_votes, route, route_votes, squash
from lightning_plugins.capsnet.routing import lengths

# torch's own, at the first use of its forward mode
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch.jit.script. is deprecated:DeprecationWarning")

KINDS = ("dynamic", "kmeans", "kmeans_squash", "uniform")
NETWORKS = {
    "sabour2017_paper": {"channels": 8, "num_types": 2},
    "sabour2017_official": {"channels": 8, "num_types": 2},
    "su2018": {"channels": 8, "primary_dim": 16},
    "efficient": {"channels": 4, "num_types": 4},
}
ROUTED = [(preset, {}) for preset in NETWORKS]
ROUTED += [("sabour2017_paper", {"routing": "kmeans"}), ("sabour2017_paper", {"leaky": True, "share_weights": True})]


def inputs(shared=False):
    """Five input capsules of four dimensions, two outputs of three."""
    torch.manual_seed(0)
    shape = (4, 2, 3) if shared else (5, 4, 2, 3)
    return torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def stored(u, W, kind):
    return route_votes(compute_votes(u, W), kind)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_a_central_difference(kind, shared):
    """It was 0, without a word."""
    u, W = inputs(shared)
    du, dW, eps = torch.randn_like(u), torch.randn_like(W), 1e-6
    expected = (route(u + eps * du, W + eps * dW, kind) - route(u - eps * du, W - eps * dW, kind)) / (2 * eps)
    _, found = jvp(lambda u, W: route(u, W, kind), (u, W), (du, dW))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = route(forward_ad.make_dual(u, du), forward_ad.make_dual(W, dW), kind)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found)


def test_forward_mode_through_a_network_and_of_a_bias():
    torch.manual_seed(0)
    model = CapsNet(image_shape=(1, 20, 20), channels=8, num_types=2).double()
    images = torch.rand(2, 1, 20, 20, dtype=torch.float64)
    direction, eps = torch.randn_like(images), 1e-6
    expected = (model(images + eps * direction) - model(images - eps * direction)) / (2 * eps)
    torch.testing.assert_close(jvp(model, (images,), (direction,))[1], expected, rtol=1e-5, atol=1e-8)
    u, W = inputs()
    bias, along = torch.randn(2, 2, 3, dtype=torch.float64)
    expected = (route(u, W, bias=bias + eps * along) - route(u, W, bias=bias - eps * along)) / (2 * eps)
    found = jvp(lambda bias: route(u, W, bias=bias), (bias,), (along,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_is_autograd_of_stored_votes(kind):
    u, W = inputs()

    def total(u, W, form=route):
        return form(u, W, kind).pow(3).sum()

    leaves = u.clone().requires_grad_(), W.clone().requires_grad_()
    expected = torch.autograd.grad(total(*leaves, form=stored), leaves)
    torch.testing.assert_close(grad(total, argnums=(0, 1))(u, W), expected)
    per_sample = vmap(grad(total, argnums=1), in_dims=(0, None))(u[:, None], W)  # (B, N, D, J, K)
    torch.testing.assert_close(per_sample.sum(0), expected[1])
    one = torch.autograd.grad(total(leaves[0][1:2], leaves[1], form=stored), leaves[1])[0]
    torch.testing.assert_close(per_sample[1], one)
    torch.testing.assert_close(vmap(lambda x: route(x[None], W, kind)[0])(u), route(u, W, kind))
    reverse, forward = (jacobian(lambda u: route(u, W, kind))(u) for jacobian in (jacrev, jacfwd))
    torch.testing.assert_close(reverse, forward)
    second = torch.autograd.functional.hessian(lambda u: total(u, W, form=stored), u)
    torch.testing.assert_close(hessian(lambda u: total(u, W))(u), second)


@pytest.mark.parametrize("scale", [1e-20, 1e-24, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_capsules_have_finite_gradients(kind, scale):
    """Squares of such numbers are zero, and a length of zero has no direction."""
    torch.manual_seed(0)
    u, W = (torch.randn(3, 5, 4) * scale).requires_grad_(), torch.randn(5, 4, 2, 3).requires_grad_()
    for value in (route(u, W, kind).sum(), lengths(route(u, W, kind)).sum()):
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (u, W), retain_graph=True))
    s = (torch.randn(7, 3) * scale).requires_grad_()
    (found,) = torch.autograd.grad(lengths(s).sum(), s)
    torch.testing.assert_close(found.double(), s.detach().double() / s.detach().double().norm(dim=1, keepdim=True))
    (found,) = torch.autograd.grad(squash(s).sum(), s)  # to first order |s| s: it is as small as s
    assert found.isfinite().all() and found.abs().max() <= 4 * scale * math.sqrt(3)


def test_lengths_of_zero_and_of_huge_vectors():
    v = torch.tensor([[0.0, 0.0], [3e30, 4e30], [3.0, 4.0]], requires_grad=True)
    torch.testing.assert_close(lengths(v), torch.tensor([0.0, 5e30, 5.0]))
    (found,) = torch.autograd.grad(lengths(v).sum(), v)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_without_samples(shared):
    u, W = inputs(shared)
    u, W = u[:0].clone().requires_grad_(), W.requires_grad_()
    poses = route(u, W)
    assert poses.shape == (0, 2, 3)
    poses.sum().backward()
    assert u.grad.shape == u.shape and not W.grad.any()
    assert CapsNet(channels=8, num_types=2)(torch.rand(0, 1, 28, 28)).shape == (0, 10, 16)


@pytest.mark.parametrize("preset", NETWORKS)
def test_on_the_device_meta(preset):
    with torch.device("meta"):
        model = CapsNet(preset, **NETWORKS[preset])
        images = torch.rand(2, 1, 28, 28)
    assert model(images).shape == (2, 10, 16) and model(images).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_of_the_modules_precision(dtype):
    model = CapsNet(channels=8, num_types=2).to(dtype)
    batch = {"image": torch.rand(2, 1, 28, 28, dtype=dtype), "label": torch.tensor([0, 1])}
    assert {value.dtype for value in model.loss(batch).values()} == {dtype}


@pytest.mark.parametrize(("preset", "options"), ROUTED)
def test_one_graph_each_time(preset, options):
    """Also the second network of a process, whose numbers torch takes for variables."""
    torch.compiler.reset()
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        extra = {} if preset == "efficient" else {"squash_scale": scale}
        model = CapsNet(preset, **(NETWORKS[preset] | options | extra))
        images = torch.rand(2, 1, 28, 28)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(found, model(images))
