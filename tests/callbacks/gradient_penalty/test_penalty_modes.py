"""The penalty in half precision with a loss scaler, compiled, with fused attention and with gradient checkpointing."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from toys import WatchedClassifier, flat
from trainers import fit

from lightning_plugins.callbacks import GradientPenalty
from lightning_plugins.replay.recorder import is_replaying

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's

C = 1.0


class Classifier(WatchedClassifier):
    """Counts the steps that its optimizer took."""

    def __init__(self, net):
        super().__init__(net)
        self.taken = 0

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(self.count)
        return optimizer

    def count(self, *_):
        self.taken += 1


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.view(-1, 1, 2, 4)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        first, *rest = mlp()
        self.first, self.rest, self.use_reentrant = first, nn.Sequential(*rest), use_reentrant

    def forward(self, x):
        return checkpoint(self.rest, self.first(x), use_reentrant=self.use_reentrant)


def batches(n, size=20):
    torch.manual_seed(1)
    return [(2 * torch.randn(size, 8), torch.randint(3, (size,))) for _ in range(n)]


def fp16(init_scale):
    """A real scaler on a CPU, where ``precision="16-mixed"`` alone would be bf16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def windows_of(data, k):
    return [data[i : i + k] for i in range(0, len(data), k)]


def assert_penalised(module, windows, tolerance, reference=None, steps=None):
    """Compare with float64 autograd on ``L + C |grad L|^2`` for each step's window of batches."""
    reference = Classifier(copy.deepcopy(module.net) if reference is None else reference).double()
    params = list(reference.parameters())
    assert len(windows) == len(module.before)
    for step in range(len(windows)) if steps is None else steps:
        before = {name.replace("_orig_mod.", ""): value for name, value in module.before[step].items()}
        reference.load_state_dict(before)
        with sdpa_kernel(SDPBackend.MATH):
            loss = sum(reference.loss((x.double(), y)) for x, y in windows[step]) / len(windows[step])
            first = torch.autograd.grad(loss, params, create_graph=True)
            expected = flat(torch.autograd.grad(loss + C * sum((grad**2).sum() for grad in first), params))
        assert (expected - flat(first)).norm() > 0.3 * expected.norm()
        assert (module.gradients[step] - expected).norm() < tolerance * expected.norm()


# A scaler


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("arguments", [{}, {"difference": "central"}, {"engine": "exact"}], ids=str)
def test_fp16(arguments, k):
    module, data = Classifier(mlp()), batches(4)
    fit(module, data, GradientPenalty(C, **arguments), accumulate_grad_batches=k, **fp16(2.0**10))
    assert module.taken == 4 // k
    assert_penalised(module, windows_of(data, k), 3e-2)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("engine", ["finite_difference", "exact"])
def test_fp16_steps_that_overflow_are_skipped_and_later_ones_are_right(engine, k):
    module, data = Classifier(mlp()), batches(8 * k)
    trainer = fit(module, data, GradientPenalty(C, engine=engine), accumulate_grad_batches=k, **fp16(2.0**20))
    overflows = [not torch.isfinite(gradient).all() for gradient in module.gradients]
    assert 0 < sum(overflows) < 8
    assert module.taken == 8 - sum(overflows)
    assert trainer.global_step == 8
    for before, after, overflow in zip(module.before, module.before[1:], overflows, strict=False):
        assert all(torch.equal(before[name], after[name]) for name in before) == overflow
    assert_penalised(module, windows_of(data, k), 3e-2, steps=[i for i, skipped in enumerate(overflows) if not skipped])


def test_fp16_overflow_in_the_replay_alone_leaves_the_step_without_penalty():
    class Overflows(Classifier):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss * torch.inf if is_replaying() and self.global_step == 1 else loss

    module, plain, data = Overflows(mlp()), Classifier(mlp()), batches(3)
    with pytest.warns(UserWarning, match="a replay overflowed in fp16; such a step goes without penalty"):
        fit(module, data, GradientPenalty(C), **fp16(2.0**10))
    assert module.taken == 3
    plain.load_state_dict(module.before[1])
    fit(plain, data[1:2], **fp16(2.0**10))
    assert torch.equal(module.gradients[1], plain.gradients[0])
    assert_penalised(module, windows_of(data, 1), 3e-2, steps=[0, 2])


# Kernels that cannot be differentiated twice


def compiled(function):
    return torch.compile(function, backend="aot_eager")


class Hidden(nn.Module):
    """Compiled where no look at the modules shows it."""

    def __init__(self, wrap=compiled):
        super().__init__()
        self.net = mlp()
        self.function = wrap(lambda x: torch.tanh(3 * x))

    def forward(self, x):
        return self.net[1:](self.function(self.net[0](x)))


# what cannot, the same network for the reference, and the sentence
UNABLE = {
    "attention": (
        Attention,
        Attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward has no second derivative",
    ),
    "checkpointing": (lambda: Checkpointed(True), lambda: Checkpointed(False), "reentrant gradient checkpointing"),
    "network": (lambda: compiled(mlp()), mlp, "torch.compile does not differentiate twice"),
    "function": (Hidden, lambda: Hidden(lambda f: f), "torch.compile does not differentiate twice"),
}


@pytest.fixture(autouse=True)
def no_compiled_code_is_left():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", UNABLE)
def test_finite_differences_need_no_second_derivative(name):
    build, plain, _ = UNABLE[name]
    module, data = Classifier(build()), batches(4)
    fit(module, data, GradientPenalty(C, difference="central"), accumulate_grad_batches=2)
    assert_penalised(module, windows_of(data, 2), 1e-3, plain())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", UNABLE)
def test_exact_says_what_cannot_be_differentiated_twice(name, k):
    build, _, sentence = UNABLE[name]
    with pytest.raises((RuntimeError, MisconfigurationException), match=f"{sentence}.* use engine='finite_difference'"):
        fit(Classifier(build()), batches(2), GradientPenalty(C, engine="exact"), accumulate_grad_batches=k)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", UNABLE)
def test_auto_falls_back_with_one_warning_and_the_first_step_is_penalised(name, k):
    build, plain, sentence = UNABLE[name]
    module, data = Classifier(build()), batches(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, data, GradientPenalty(C, engine="auto"), accumulate_grad_batches=k)
    ours = [str(warning.message) for warning in caught if "GradientPenalty" in str(warning.message)]
    assert len(ours) == 1
    assert f"engine='auto') takes finite differences: {sentence}" in ours[0]
    assert_penalised(module, windows_of(data, k), 1e-2, plain())


@pytest.mark.parametrize("arguments", [{"engine": "exact"}, {"engine": "auto"}, {}], ids=str)
def test_checkpointing_that_is_not_reentrant(arguments):
    module, data = Classifier(Checkpointed(use_reentrant=False)), batches(2)
    fit(module, data, GradientPenalty(C, **arguments))
    assert_penalised(module, windows_of(data, 1), 1e-3)


def test_exact_attention_by_the_math_backend():
    module, data = Classifier(Attention()), batches(2)
    with sdpa_kernel(SDPBackend.MATH):
        fit(module, data, GradientPenalty(C, engine="exact"))
    assert_penalised(module, windows_of(data, 1), 1e-5)


# torch.compile


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "network"])
def test_compiled_modules_are_right_and_compile_once(whole, k):
    module, data = Classifier(mlp()), batches(6)
    steps = []  # in which something was compiled

    def backend(graph, inputs):
        steps.append(module.global_step)
        return aot_eager(graph, inputs)

    if whole:
        network = torch.compile(module, backend=backend)
    else:
        module.net = torch.compile(module.net, backend=backend)
        network = module
    fit(network, data, GradientPenalty(C), accumulate_grad_batches=k)
    assert set(steps) == {0}
    assert_penalised(module, windows_of(data, k), 1e-2, mlp())
