import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_plugins.capsnet import streamed_routing
from lightning_plugins.capsnet.routing import compute_votes, route_votes, squash
from lightning_plugins.capsnet.streamed_routing import route

KINDS = ["dynamic", "kmeans", "kmeans_squash", "uniform"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Let a handful of inputs make several blocks, the last one shorter."""
    monkeypatch.setattr(streamed_routing, "_CPU_BLOCK", 200)


def draw(batch=3, inputs=17, D=4, J=3, K=5, shared=False, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(0)
    u = torch.randn(batch, inputs, D, generator=g, dtype=dtype)
    W = torch.randn(*([] if shared else [inputs]), D, J, K, generator=g, dtype=dtype) * scale
    return u.requires_grad_(), W.requires_grad_()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_stored(kind, gradient, shared, small_blocks):
    u, W = draw(shared=shared)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 17, generator=g) > 0.3
    for r, (leaky, b, m) in itertools.product([1, 2, 3, 4, 5], [(False, None, None), (True, bias, mask)]):
        options = dict(gradient=gradient, leaky=leaky, bias=b, mask=m, squash_scale=0.5)
        streamed = route(u, W, kind, r, **options)
        stored = route_votes(compute_votes(u, W), kind, r, **options)
        torch.testing.assert_close(streamed, stored, atol=1e-12, rtol=1e-12)
        inputs = [u, W] + ([] if b is None else [b])
        towards = torch.randn(streamed.shape, generator=g, dtype=torch.float64)
        for ours, theirs in zip(
            torch.autograd.grad(streamed, inputs, towards), torch.autograd.grad(stored, inputs, towards), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "kmeans", "kmeans_squash"])
def test_derivatives_by_finite_differences(kind, shared, monkeypatch):
    monkeypatch.setattr(streamed_routing, "_CPU_BLOCK", 24)  # three inputs in a block
    u, W = draw(batch=2, inputs=4, D=2, J=2, K=2, shared=shared)
    bias = torch.tensor([[0.1, -0.3], [0.2, 0.4]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 3 + [False], [True] * 4])

    def poses(u, W, bias):
        return route(u, W, kind, 3, leaky=True, bias=bias, mask=mask)

    assert torch.autograd.gradcheck(poses, (u, W, bias))
    assert torch.autograd.gradgradcheck(poses, (u, W, bias), fast_mode=True)


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("trained", ["u", "W", "b", "uW", "Wb", "ub"])
def test_differentiated_twice_with_frozen_inputs(trained, gradient):
    """Behind frozen layers u has no gradient; penalties on the gradient of the rest are those of the stored form."""
    u, W = draw()
    bias = torch.linspace(-0.3, 0.3, 15, dtype=torch.float64).view(3, 5).requires_grad_()
    inputs = {"u": u, "W": W, "b": bias}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    found = []
    for poses in (
        route(u, W, bias=bias, gradient=gradient),
        route_votes(compute_votes(u, W), bias=bias, gradient=gradient),
    ):
        first = torch.autograd.grad((poses - 0.2).square().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "kmeans", "kmeans_squash"])
def test_last_takes_the_last_couplings_as_constants(kind, shared, small_blocks):
    u, W = draw(shared=shared)
    towards = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    votes = compute_votes(u, W)
    with torch.no_grad():  # two iterations by hand, to the couplings of the third
        c, total = torch.full_like(votes[..., 0], 1 / 3), 0
        for _ in range(2):
            s = (c[..., None] * votes).sum(1)
            total = (total if kind == "dynamic" else 0) + (
                s / s.norm(dim=-1, keepdim=True) if kind == "kmeans" else squash(s)
            )
            c = (votes * total[:, None]).sum(-1).softmax(-1)
    reference = squash((c[..., None] * votes).sum(1))
    ours = route(u, W, kind, 3, gradient="last")
    torch.testing.assert_close(ours, reference)
    # gradcheck cannot see this one: it is no derivative of the whole
    for a, b in zip(
        torch.autograd.grad(ours, (u, W), towards, create_graph=True),
        torch.autograd.grad(reference, (u, W), towards),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    full = torch.autograd.grad(route(u, W, kind, 3), u, towards)[0]
    assert not torch.allclose(full, torch.autograd.grad(ours, u, towards)[0], rtol=0.1)


def test_gradient_penalty_sees_dependence_between_arguments():
    x, W = draw(inputs=5)

    def penalty(form):
        u = x * W.mean()  # u depends on W: only direct dependence may count inside
        poses = form(u, W)
        (g,) = torch.autograd.grad(poses.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum() + poses.sum(), (x, W))

    for ours, theirs in zip(penalty(route), penalty(lambda u, W: route_votes(compute_votes(u, W))), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
def test_the_operator_keeps_torchs_rules(shared):
    u, W = draw(shared=shared)
    bias = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    for last in (False, True):
        torch.library.opcheck(streamed_routing.coupled_sums, (u, W, bias, "kmeans", 3, 1.0, False, last))


@pytest.mark.parametrize("gradient", ["full", "last"])
def test_compiles_without_graph_breaks(gradient):
    u, W = draw(dtype=torch.float32)

    def loss(u, W):
        return route(u.relu(), W, "dynamic", 3, gradient=gradient).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, W), loss(u, W))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(u, W), (u, W)), torch.autograd.grad(loss(u, W), (u, W)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["streamed", "stored"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_under_autocast(half, form):
    u, W = draw(dtype=torch.float32, scale=0.3)

    def poses(u, W):
        return route(u, W) if form == "streamed" else route_votes(compute_votes(u.float(), W))

    expected = poses(u.detach().to(half).float(), W)
    with torch.autocast("cpu", dtype=half):
        got = poses(u.to(half), W)
        grads = torch.autograd.grad(got.sum(), (u, W))
    if form == "streamed":
        torch.testing.assert_close(got, expected)
        wide = u.detach().to(half).float().requires_grad_()
        exact = torch.autograd.grad(poses(wide, W).sum(), (wide, W))
        torch.testing.assert_close(grads[0], exact[0].to(half).float())
        torch.testing.assert_close(grads[1], exact[1])
    assert got.dtype == torch.float32
    large = route((1000 * u).to(half), W.detach().to(half))
    assert large.dtype == half and large.isfinite().all()
    with torch.autocast("cpu", dtype=half):
        assert route(u.double(), W).dtype == torch.float64


def test_saves_only_inputs_and_poses_for_backward():
    u, W = draw(batch=8, inputs=288, D=8, J=10, K=16, dtype=torch.float32)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    poses_bytes = 8 * 10 * 16 * 4
    for gradient in ("full", "last"):
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            poses = route(u, W, gradient=gradient)
        assert sum(storages.values()) <= u.nbytes + W.nbytes + (3 + 3) * poses_bytes  # three sums, squash's own
        poses.sum().backward()


class PeakBytes(TorchDispatchMode):
    """Bytes of all live tensors made under the mode, now and at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                storage = tensor.untyped_storage()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, size):
        self.live -= size


def temporaries(inputs, shared, last):
    """Peak bytes of forward and of backward, without the gradients themselves."""
    u, W = (x.detach() for x in draw(batch=8, inputs=inputs, D=8, J=10, K=16, shared=shared, dtype=torch.float32))
    options = (None, "dynamic", 3, 1.0, False, last)
    with PeakBytes() as forward:
        sums = streamed_routing.coupled_sums._init_fn(u, W, *options)  # what the operator runs, op by op
    with PeakBytes() as backward:
        streamed_routing._coupled_sums_backward._init_fn(torch.ones_like(sums), sums, u, W, *options)
    return forward.peak, backward.peak - u.nbytes - W.nbytes


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_does_not_grow_with_the_inputs(shared, last, monkeypatch):
    monkeypatch.setattr(streamed_routing, "_CPU_BLOCK", 2**16)  # several blocks also at the smaller size
    small, large = temporaries(1152, shared, last), temporaries(4608, shared, last)
    for few, many in zip(small, large, strict=True):
        assert 0 < few < 8 * 4 * streamed_routing._CPU_BLOCK  # eight blocks of float32
        assert abs(many / few - 1) < 0.1
