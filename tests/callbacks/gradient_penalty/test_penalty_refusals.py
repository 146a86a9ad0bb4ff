"""What GradientPenalty refuses: each with a sentence that says what, why and what instead, before a weight changes."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils.checkpoint import checkpoint
from toys import Applies, Classifier, mlp
from trainers import fit

from lightning_plugins.callbacks import GradientPenalty
from lightning_plugins.core.sharding import shard_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


EXACT = {"engine": "exact"}
MICRO = {"scope": "microbatch"}
INSTEAD = "use engine='finite_difference'"


class Net(Classifier):
    def __init__(self, optimizer=torch.optim.SGD, net=None):
        super().__init__(net or mlp(4, 8, 3), partial(optimizer, lr=0.1))


class Sharded(Net):
    def configure_model(self):
        shard_parts(self, self.net)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class DrawsBatches(Net):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class TwoGradients(torch.optim.SGD):
    """Evaluates the closure twice, as SAM does."""

    def step(self, closure):
        closure()
        return super().step(closure)


class Reentrant(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class FailsInside(torch.autograd.Function):
    """Its backward asks for a derivative that is not there, in words that reentrant checkpoints use too."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            a, b = torch.ones(2, requires_grad=True).unbind()
            torch.autograd.grad(a, b)
        return 2 * grad


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(2)]


def compiled(backend=aot_eager):
    return torch.compile(Net(), backend=backend)


def compiled_part():
    return Net(net=torch.compile(mlp(4, 8, 3), backend=aot_eager))


def compiled_in_place():
    model = Net()
    model.net.compile(backend=aot_eager)
    return model


def compiled_function():
    model = Net()
    model.net.forward = torch.compile(model.net.forward, backend=aot_eager)  # cannot be seen before training
    return model


def half():
    model = Net()
    model.net[0].bfloat16()
    model.net.insert(0, Cast(torch.bfloat16))
    model.net.insert(2, Cast(torch.float32))
    return model


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def stepped_in_backward():
    model = Net()
    model.net[0].weight.register_post_accumulate_grad_hook(lambda param: None)
    return model


def with_(part):
    return lambda: Net(net=nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 3)))


def fused(params, lr):
    return torch.optim.Adam(params, lr=lr, fused=True)


def ddp(**options):
    return lambda: DDPStrategy(process_group_backend="gloo", **options)


def fsdp2():
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


AOT = rf"torch.compile does not differentiate twice; {INSTEAD} or leave the module uncompiled"
STEPS = r"moves parameters by steps far below the resolution of "

# name: module, arguments, options of the trainer, sentence
SETUPS = {
    "static graph": (Net, EXACT, {"strategy": ddp(static_graph=True)}, rf"static_graph=True\) counts .*; {INSTEAD} or"),
    "sharded": (Sharded, EXACT, {"strategy": fsdp2}, f"FSDP2 differentiates once only; {INSTEAD}"),
    "sharded micro-batches": (Sharded, MICRO, {"strategy": fsdp2}, r"rank's own loss.*FSDP2.*: use scope='step'"),
    "compressed": (
        Net,
        {},
        {"strategy": ddp(ddp_comm_hook=bf16_compress_hook)},
        "mean of all ranks' gradients, and a ddp_comm_hook compresses or delays it: leave it out",
    ),
    "compiled module": (compiled, EXACT, {}, AOT),
    "compiled part": (compiled_part, EXACT, {}, AOT),
    "compiled in place": (compiled_in_place, EXACT, {}, AOT),
    "compiled function": (compiled_function, EXACT, {}, AOT),
    "reentrant": (with_(Reentrant(8, 8)), EXACT, {}, rf"reentrant gradient checkpointing .*; {INSTEAD} or use_reen"),
    "fails inside": (
        with_(Applies(FailsInside)),
        EXACT,
        {},
        rf"second differentiation failed \(.*not have been used in the graph.*\); {INSTEAD}\.$",
    ),
    "differentiates once": (with_(Applies(Once)), EXACT, {}, rf"second differentiation failed.*; {INSTEAD}"),
    "lbfgs": (lambda: Net(torch.optim.LBFGS), {}, {}, r"one gradient for each .* LBFGS .*: use .* SGD or AdamW"),
    "manual": (Manual, {}, {}, r"automatic_optimization=False: call gradient_penalty_backward\(...\) in training_step"),
    "draws batches": (DrawsBatches, {}, {}, r"dataloader_iter gets others: let training_step take \(batch, batch_idx"),
    "fused and scaled": (
        lambda: Net(fused),
        {},
        {"plugins": scaled},
        r"fused optimizer unscales .*give fused=False",
    ),
    "bf16-true": (Net, {}, {"precision": "bf16-true"}, rf"{STEPS}precision='bf16-true': use one of 32-true, 64-true"),
    "16-true": (Net, {}, {"precision": "16-true"}, rf"{STEPS}precision='16-true': use one of 32-true, 64-true, bf16"),
    "half parameters": (half, {}, {}, rf"{STEPS}half precision, .*: keep them in fp32 and use precision='bf16-mixed'"),
    "in backward": (stepped_in_backward, {}, {}, r"hooks that run as soon as .*optimizer in the backward.*remove them"),
    "sparse": (
        lambda: Net(net=nn.Sequential(Cast(torch.long), nn.EmbeddingBag(9, 3, sparse=True))),
        {},
        {},
        r"curvature of all parameters, and an embedding has sparse gradients: give sparse=False",
    ),
    "adaptive": (
        lambda: Net(torch.optim.Adam),
        {"match_lr": 0.1},
        {},
        r"needs torch.optim.SGD, got Adam: .*coeff",
    ),
    "sgd of one's own": (lambda: Net(TwoGradients), {"match_lr": 0.1}, {}, r"needs torch.optim.SGD, got TwoGradients"),
}


@pytest.mark.parametrize("name", SETUPS)
def test_setups(name):
    build, arguments, options, sentence = SETUPS[name]
    model = build()
    before = copy.deepcopy(list(getattr(model, "_orig_mod", model).parameters()))
    penalty = GradientPenalty(**({} if "match_lr" in arguments else {"coefficient": 0.1}), **arguments)
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with pytest.raises((MisconfigurationException, RuntimeError), match=f"(?s)^GradientPenalty.*{sentence}"):
        fit(model, batches(), penalty, **options)
    for param, old in zip(getattr(model, "_orig_mod", model).parameters(), before, strict=True):
        assert torch.equal(getattr(param, "_local_tensor", param), old.to(param.dtype))


@pytest.mark.parametrize("name", ["static graph", "sharded", "compiled module", "reentrant", "differentiates once"])
def test_auto_takes_finite_differences_there(name):
    build, _, options, _ = SETUPS[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with pytest.warns(UserWarning, match=r"GradientPenalty\(engine='auto'\) takes finite differences: "):
        fit(build(), batches(), GradientPenalty(0.1, engine="auto"), **options)


def test_optimizers_that_evaluate_several_gradients():
    """Found in their first step: what they did to the weights before it was theirs."""
    sentence = r"GradientPenalty needs one gradient for each optimizer step, .*\(as SAM does\): use a plain one"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Net(TwoGradients), batches(), GradientPenalty(0.1))


def test_two_penalties():
    with pytest.raises(MisconfigurationException, match=r"Only one GradientPenalty in a trainer: add their coeff"):
        fit(Net(), batches(), GradientPenalty(0.1), GradientPenalty(0.2, scope="microbatch"))


class Mine(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, Mine])
def test_strategies_with_gradients_elsewhere(strategy):
    penalty = GradientPenalty(0.1)
    trainer = SimpleNamespace(callbacks=[penalty], strategy=object.__new__(strategy), optimizers=[])
    with pytest.raises(MisconfigurationException, match=rf"gradients are kept under {strategy.__name__}: use a single"):
        penalty.on_fit_start(trainer, Net())


def test_synchronised_batch_norm():
    """Which torch computes on GPUs only."""
    penalty, model = GradientPenalty(0.1, scope="microbatch"), Net(net=nn.SyncBatchNorm(4))
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")])
    trainer = SimpleNamespace(callbacks=[penalty], strategy=strategy, optimizers=[], world_size=2, precision="32-true")
    trainer.precision_plugin = SimpleNamespace()
    with pytest.raises(MisconfigurationException, match=r"rank's own loss.*SyncBatchNorm never forms.*scope='step'"):
        penalty.on_fit_start(trainer, model)


def test_a_step_that_cannot_be_repeated():
    model = Net()
    model.noise = iter(torch.linspace(0, 1, 10))
    model.training_step = lambda batch, batch_idx: model.loss((batch[0] + next(model.noise), batch[1]))
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"(?s)of Net again .* another gradient.*keep a state.*check='off"):
        fit(model, batches(), GradientPenalty(0.1))
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give either coefficient or match_lr, got coefficient=None and match_lr=None"),
        ({"coefficient": 0.1, "match_lr": 0.1}, "give either coefficient or match_lr, got coefficient=0.1 and match_l"),
        ({"coefficient": -1}, r"coefficient=-1 must be .*0 or more"),
        ({"coefficient": float("nan")}, r"coefficient=nan must be .*0 or more"),
        ({"coefficient": float("inf")}, r"coefficient=inf must be .*0 or more"),
        ({"coefficient": "0.1"}, r"coefficient='0.1' must be .*0 or more"),
        ({"coefficient": True}, r"coefficient=True must be .*0 or more"),
        ({"match_lr": -0.1}, r"match_lr=-0.1 must be 0 or more"),
        ({"match_lr": 0.1, "norm": "norm"}, "match_lr belongs to norm='squared'.*got norm='norm'"),
        ({"coefficient": 0.1, "norm": "l2"}, r"norm='l2' must be one of squared, norm"),
        ({"coefficient": 0.1, "engine": "fd"}, r"engine='fd' must be one of finite_difference, exact, auto"),
        ({"coefficient": 0.1, "scope": "batch"}, r"scope='batch' must be one of step, microbatch"),
        ({"coefficient": 0.1, "difference": "backward"}, r"'backward' must be one of auto, forward, central"),
        ({"coefficient": 0.1, "check": True}, r"check=True must be one of steps, first_step, off"),
        ({"coefficient": 0.1, "relative_step": 0.0}, r"relative_step=0.0 must .*in \(0, 1\): 'auto' takes"),
        ({"coefficient": 0.1, "relative_step": 1.0}, r"relative_step=1.0 must .*in \(0, 1\): 'auto' takes"),
        ({"coefficient": 0.1, "relative_step": "small"}, r"relative_step='small' must .*in \(0, 1\): 'auto' takes"),
        ({"coefficient": 0.1, "every_n_steps": 0}, r"every_n_steps=0 must be .*1 or more"),
        ({"coefficient": 0.1, "relative_step": True}, r"relative_step=True must .*in \(0, 1\): 'auto' takes"),
        ({"coefficient": 0.1, "every_n_steps": True}, r"every_n_steps=True must be .*1 or more"),
        ({"coefficient": 0.1, "every_n_steps": 1.5}, r"every_n_steps=1.5 must be .*1 or more"),
        ({"coefficient": 0.1, "warmup_steps": -1}, r"warmup_steps=-1 must be 0 or more"),
        (
            {"coefficient": 0.1, "schedule": []},
            r"schedule=\[\] must be pairs \[step, value\] with growing steps",
        ),
        ({"coefficient": 0.1, "schedule": [[5, 1.0], [5, 2.0]]}, "schedule=.* must be pairs .* with growing steps"),
        ({"coefficient": 0.1, "schedule": [[0, 1.0, 2.0]]}, "schedule=.* must be pairs .* with growing steps"),
        ({"coefficient": 0.1, "schedule": [[0, -1.0]]}, "schedule=.* must have finite factors of 0 or more"),
        ({"coefficient": 0.1, "schedule": [[0, float("inf")]]}, "schedule=.* must have finite factors of 0 or more"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        GradientPenalty(**arguments)
