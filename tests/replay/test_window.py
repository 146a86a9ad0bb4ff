"""Gradients and Hessian-vector products of a window against float64 autograd."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from toys import Squares
from trainers import fit, quiet_trainer

from lightning_plugins.core.vectors import norm
from lightning_plugins.replay.differences import Displacement, best_displacement, step_along
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import second_derivative
from lightning_plugins.replay.window import WindowLoss


class Net(Squares):
    def __init__(self, dtype=torch.float64):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        super().__init__(net.to(dtype))
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch), torch.arange(len(batch)) % 3)


class Looks(Callback):
    """Calls a function with the window of each step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_start(self, trainer, pl_module):
        self.recorder = StepRecorder.attach(trainer, pl_module, self)
        self.recorder.keep(self, True)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        window = WindowLoss(trainer, pl_module, self.recorder.calls, list(pl_module.parameters()))
        self.seen.append(self.look(window, pl_module))

    def on_train_end(self, trainer, pl_module):
        self.recorder.detach(self)


def data(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(30, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]


def looked(look, k, module=None, **options):
    module, looks = module or Net(), Looks(look)
    fit(module, data(3, module.unused.dtype), looks, accumulate_grad_batches=k, **options)
    return looks.seen


def reference(theta, batches, k, vectors=None):
    """The mean loss, its gradient as Lightning accumulates it and ``H v``; batch norm's buffers do not matter."""
    module = Net()
    params = list(module.parameters())
    for param, value in zip(params, theta, strict=True):
        param.data = value
    losses = [module.loss(batch) for batch in batches]
    gradient = torch.autograd.grad(sum(losses) / k + 0.0 * module.unused.square().sum(), params, create_graph=True)
    vectors = [torch.zeros_like(param) for param in params] if vectors is None else vectors
    product = torch.autograd.grad(gradient, params, vectors, materialize_grads=True)
    return sum(losses) / len(losses), gradient, product


def close(found, expected, tolerance):
    difference = norm([a.double() - b for a, b in zip(found, expected, strict=True)])
    return difference < tolerance * norm(expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradient_loss_and_products(k):
    batches = data(3)

    def look(window, module):
        params = window.params
        before = [p.detach().clone() for p in params]
        grads = [p.grad for p in params]
        generator = torch.Generator().manual_seed(2)
        vectors = [torch.randn(p.shape, generator=generator).double() for p in params]
        loss, gradient = window.gradient()
        step = step_along(params, vectors, Displacement("forward", 1e-6)).size
        found = {
            "exact": window.exact_product(vectors),
            "forward": window.product(vectors, step, "forward", gradient),
            "central": window.product(vectors, 10 * step, "central"),
        }
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        assert [p.grad for p in params] == grads  # the same objects, or None
        return before, vectors, loss, gradient, found, [None if g is None else g.clone() for g in grads]

    seen = looked(look, k)
    windows = [batches[i : i + k] for i in range(0, 3, k)]
    for window, (theta, vectors, loss, gradient, found, grads) in zip(windows, seen, strict=True):
        right_loss, right_gradient, product = reference(theta, window, k, vectors)
        assert loss.dtype == torch.float64 and not loss.requires_grad  # a graph would be kept
        torch.testing.assert_close(loss, right_loss, rtol=1e-12, atol=0)
        assert close(gradient, right_gradient, 1e-12)
        assert close([torch.zeros(2) if g is None else g for g in grads], right_gradient, 1e-12)
        for name, tolerance in {"exact": 1e-12, "central": 1e-7, "forward": 1e-5}.items():
            assert close(found[name], product, tolerance), name


def test_micro_batches_are_whole_losses():
    batches = data(3)

    def look(window, module):
        parts = [part.gradient() for part in window.micro_batches()]
        return [p.detach().clone() for p in window.params], parts

    ((theta, parts),) = looked(look, 3)
    assert len(parts) == 3
    for batch, (loss, gradient) in zip(batches, parts, strict=True):
        right_loss, right_gradient, _ = reference(theta, [batch], 1)
        torch.testing.assert_close(loss, right_loss, rtol=1e-12, atol=0)
        assert close(gradient, right_gradient, 1e-12)


def test_a_loss_scale_does_not_show():
    def look(window, module):
        gradient = window.gradient()[1]
        return gradient, window.exact_product(gradient), window.product(gradient, 1e-2, "central")

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = looked(look, 1, Net(torch.float32))[0]
    scaled = looked(look, 1, Net(torch.float32), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])[0]
    for found, expected in zip(scaled, plain, strict=True):
        assert close(found, [x.double() for x in expected], 5e-2)


class Shared(Net):
    """Two parameters whose gradients autograd keeps in one tensor."""

    def __init__(self):
        super().__init__()
        self.shift, self.other = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.3, 0.5))

    def loss(self, batch):
        return super().loss(batch) + ((self.shift + self.other) ** 4).sum()


def test_gradients_that_share_memory_are_not_changed_twice():
    """Where DDP counts gradients they come from autograd.grad, and are divided in place."""
    product = {}

    def look(window, module):
        assert window._watched
        vectors = [torch.zeros_like(param) for param in window.params]
        for vector, param in zip(vectors, window.params, strict=True):
            vector += param is module.shift
        found = window.product(vectors, 1e-6, "forward", window.gradient()[1])
        product.update({name: value for (name, _), value in zip(module.named_parameters(), found, strict=True)})

    looked(look, 1, Shared(), strategy="ddp_find_unused_parameters_true", devices=1, max_steps=1)
    second = 12 * 0.8**2  # of the fourth power
    assert product["shift"].item() == pytest.approx(second, rel=1e-4)
    assert product["other"].item() == pytest.approx(second, rel=1e-4)


def test_second_derivative_leaves_out_what_does_not_depend():
    x, y = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    first = torch.autograd.grad(x**3 + y, [x, y], create_graph=True)
    assert second_derivative(first, [x, y], [torch.ones(()), torch.ones(())]) == [torch.tensor(12.0), None]
    assert second_derivative([None, first[1]], [x, y], [torch.ones(()), torch.ones(())]) == [None, None]


def test_step_along():
    theta, v = [torch.full((4,), 2.0)], [torch.full((4,), 0.5)]
    relative = Displacement("forward", 1e-3)
    assert step_along(theta, v, relative) == pytest.approx((4e-3, 4e-3, 1e-3))
    assert step_along([torch.zeros(4)], v, relative) == pytest.approx((1e-3, 1e-3, 1e-3))
    assert step_along(theta, [5 * v[0]], relative._replace(longest=1e-3)) == pytest.approx((2e-4, 1e-3, 2.5e-4))
    assert step_along([1e-6 * theta[0]], v, relative._replace(shortest=1e-3)) == pytest.approx((1e-3, 1e-3, 250.0))
    for nowhere in (0.0, float("nan"), float("inf")):
        assert step_along(theta, [torch.full((4,), nowhere)], relative) is None


@pytest.mark.parametrize(
    ("precision", "dtype", "forward", "central"),
    [
        ("32-true", torch.float32, 1e-4, 1e-3),
        ("64-true", torch.float64, 1e-7, 1e-5),
        ("32-true", torch.float64, 1e-7, 1e-5),
        ("bf16-mixed", torch.float32, 3e-2, 1e-1),
        ("16-mixed", torch.float32, 1e-2, 3e-2),
    ],
)
def test_relative_step_follows_the_precision_of_the_forward_pass(precision, dtype, forward, central):
    if precision == "16-mixed":  # which becomes bf16 on a CPU unless given so
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        trainer = quiet_trainer(plugins=[plugin])
    else:
        trainer = quiet_trainer(precision=precision)
    module = nn.Linear(2, 2).to(dtype)
    found = {difference: best_displacement(trainer, module, difference) for difference in ("forward", "central")}
    assert [found[difference].relative for difference in found] == [forward, central]
    automatic = "central" if "mixed" in precision else "forward"
    assert best_displacement(trainer, module) == found[automatic]
    assert best_displacement(trainer, module, kinked=True) == best_displacement(trainer, module, "central", True)
    for difference, smooth in found.items():
        kinked = best_displacement(trainer, module, difference, kinked=True)
        assert kinked.relative >= max(1e-2, smooth.relative)
        assert kinked.longest in (0.05, 0.1)  # a length, whatever the norm of the parameters


@pytest.mark.parametrize(
    ("capability", "matmul", "part", "cudnn", "coarse"),
    [
        ((8, 0), "highest", nn.Linear(2, 2), True, False),
        ((8, 0), "high", nn.Linear(2, 2), False, True),
        ((8, 0), "highest", nn.Conv2d(1, 1, 1), True, True),
        ((8, 0), "highest", nn.Conv2d(1, 1, 1), False, False),
        ((7, 5), "high", nn.Conv2d(1, 1, 1), True, False),
    ],
)
def test_tf32_counts_as_half_precision(monkeypatch, capability, matmul, part, cudnn, coarse):
    """Where a GPU has it, and a product or a convolution uses it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", cudnn)
    trainer = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cuda")))
    found = best_displacement(trainer, part)
    trainer.strategy.root_device = torch.device("cpu")
    assert found == best_displacement(trainer, part, half=torch.float16 if coarse else None)
