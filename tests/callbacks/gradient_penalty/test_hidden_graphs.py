"""Parts of a loss that autograd.grad does not see: engine="exact" refuses them, "auto" takes finite differences."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint
from toys import SGD, Squares, WatchedClassifier, flat, mlp
from trainers import fit

from lightning_plugins import Flooding, GradientPenalty, ODEDiagnostics, gradient_penalty_backward

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated"),  # of transformers
]

C = 0.5
FELL_BACK = r"GradientPenalty\(engine='auto'\) takes finite differences: .*{}"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Hides(nn.Module):
    """A part that is run inside a reentrant checkpoint, on an input that depends on no trained parameter."""

    def __init__(self, part, reentrant=True):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        return checkpoint(self.part, x.detach().requires_grad_(), use_reentrant=self.reentrant)


class Reversible(torch.autograd.Function):
    """Keeps no graph: its backward runs the part again and differentiates that, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, part):
        ctx.x, ctx.part = x, part
        with torch.no_grad():
            return x + part(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(x + ctx.part(x), grad)
        return x.grad, None


class Reverses(nn.Module):
    def __init__(self, part, plain=False):
        super().__init__()
        self.part, self.plain = part, plain

    def forward(self, x):
        return x + self.part(x) if self.plain else Reversible.apply(x, self.part)


class Half(nn.Module):
    """A layer that is used twice: behind a reentrant checkpoint, and in the open."""

    def __init__(self, reentrant=True):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.hidden, self.head = Hides(nn.Sequential(self.layer, nn.Tanh()), reentrant), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.hidden(x) + 0.1 * torch.tanh(self.layer(x)))


def behind_checkpoint(plain):
    torch.manual_seed(0)
    return nn.Sequential(Hides(mlp(4, 4), not plain), nn.Tanh(), nn.Linear(4, 3))


def reversible(plain):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Reverses(mlp(4, 6, 4), plain), nn.Tanh(), nn.Linear(4, 3))


def reversible_first(plain):
    """What it hides depends on no parameter that can be seen, so that its node is never visited."""
    torch.manual_seed(0)
    grows = Reverses(mlp(4, 6, 4), plain)
    return nn.Sequential(Needs(), grows, nn.Tanh(), nn.Linear(4, 3))


class Needs(nn.Module):
    def forward(self, x):
        return x.detach().requires_grad_()


# name: network by whether it is written without hiding, what the sentence says
KINDS = {
    "reentrant checkpoint": (behind_checkpoint, r"in net\.0\.part\.0\.weight and 1 more \(rel.*use_reentrant=False"),
    "partly hidden": (lambda plain: Half(not plain), r"in net\.layer\.weight and 1 more \(relative.*inside a node"),
    "reversible": (reversible, r"the gradient of 4 parameters is computed inside a node of the loss's graph"),
    "reversible first": (reversible_first, r"in net\.1\.part\.0\.weight and 3 more \(relative .*as reversible layers"),
}
# name: arguments of the penalty, accumulation, more callbacks
SETUPS = {
    "at once": ({}, 1, ()),
    "window": ({}, 2, ()),
    "microbatch": ({"scope": "microbatch"}, 2, ()),
    "flooded": ({}, 1, (-100.0,)),
    "no check": ({"check": "off"}, 1, ()),
}
# what is half visible is found by comparing gradients, which check="off" leaves out
CASES = [(kind, setup) for kind in KINDS for setup in SETUPS if (kind, setup) != ("partly hidden", "no check")]


def batches(n=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(6) % 3) for _ in range(n)
    ]


def watched(net):
    return WatchedClassifier(net.double())


def written(net, data, k, scope="step"):
    """The gradient of every step of L + c |grad L|^2 and the weights, by plain autograd."""
    module = watched(net)
    params, found = list(module.parameters()), []
    for start in range(0, len(data), k):
        losses = [module.loss(batch) for batch in data[start : start + k]]
        mean = sum(losses) / len(losses)
        terms = [mean] if scope == "step" else losses
        grads = [torch.autograd.grad(term, params, create_graph=True) for term in terms]
        total = mean + C * sum(g.square().sum() for grad in grads for g in grad) / len(terms)
        gradient = torch.autograd.grad(total, params)
        found.append(flat(gradient))
        with torch.no_grad():
            for param, g in zip(params, gradient, strict=True):
                param -= 0.1 * g
    return found


@pytest.mark.parametrize(("kind", "setup"), CASES)
def test_exact_refuses_before_a_weight_changes(kind, setup):
    (net, sentence), (arguments, k, level) = KINDS[kind], SETUPS[setup]
    module = watched(net(False))
    before = flat(module.parameters())
    penalty = GradientPenalty(C, engine="exact", **arguments)
    with pytest.raises(RuntimeError, match=rf"(?s)^GradientPenalty\(engine='exact'\): .*{sentence}"):
        fit(module, batches(), penalty, *map(Flooding, level), accumulate_grad_batches=k)
    assert torch.equal(flat(module.parameters()), before)
    assert not any(param._backward_hooks for param in module.parameters())


@pytest.mark.parametrize(("kind", "setup"), CASES)
def test_auto_takes_finite_differences_from_the_first_step_on(kind, setup):
    (net, _), (arguments, k, level) = KINDS[kind], SETUPS[setup]
    module, data = watched(net(False)), batches(4)
    penalty = GradientPenalty(C, engine="auto", difference="central", **arguments)
    with pytest.warns(UserWarning, match=FELL_BACK.format("")) as told:
        fit(module, data, penalty, *map(Flooding, level), accumulate_grad_batches=k)
    assert sum("takes finite differences" in str(warning.message) for warning in told) == 1
    expected = written(net(True), data, k, arguments.get("scope", "step"))
    assert len(module.gradients) == len(expected)
    for found, right in zip(module.gradients, expected, strict=True):
        assert (found - right).norm() < 1e-6 * right.norm()


def test_what_is_hidden_later_is_found_in_a_later_look():
    class HidesLater(WatchedClassifier):
        def training_step(self, batch, batch_idx):
            self.net[0].reentrant = batch_idx >= 3
            return super().training_step(batch, batch_idx)

    module, data = HidesLater(behind_checkpoint(True).double()), batches(8)
    with pytest.raises(RuntimeError, match=r"net\.0\.part\.0\.weight"):
        fit(module, data, GradientPenalty(C, engine="exact"))
    assert len(module.gradients) == 3  # the fourth is looked at, and every step asks whether there is a gradient
    module = HidesLater(behind_checkpoint(True).double())
    with pytest.warns(UserWarning, match=FELL_BACK.format("net")):
        fit(module, data, GradientPenalty(C, engine="auto", difference="central"))
    for found, right in zip(module.gradients, written(behind_checkpoint(True), data, 1), strict=True):
        assert (found - right).norm() < 1e-6 * right.norm()


class Backs(WatchedClassifier):
    """Brings a gradient of its own."""

    def __init__(self, net, way):
        super().__init__(net)
        self.way = way

    def backward(self, loss):
        if self.way == "scaled":
            (0.5 * loss).backward()
        elif self.way == "more":
            (loss + self.net[-1].weight.square().sum()).backward()
        elif self.way == "detached":
            head, body = self.net[-1], self.net[:-1]
            head(body(self.batch[0]).detach()).square().sum().backward()
        else:
            loss.backward()

    def training_step(self, batch, batch_idx):
        self.batch = batch
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("way", ["scaled", "more", "detached"])
def test_a_backward_of_ones_own_that_brings_another_gradient(way, k):
    module = Backs(mlp(4, 5, 3, seed=0).double(), way)
    before = flat(module.parameters())
    with pytest.raises(RuntimeError, match=r"exact'\): backward of Backs brings another .* in net\..*leave backward"):
        fit(module, batches(), GradientPenalty(C, engine="exact"), accumulate_grad_batches=k)
    assert torch.equal(flat(module.parameters()), before)


@pytest.mark.parametrize("k", [1, 2])
def test_a_backward_of_ones_own_that_brings_the_same_is_let_be(k):
    module, data = Backs(mlp(4, 5, 3, seed=0).double(), "same"), batches(4)
    fit(module, data, GradientPenalty(C, engine="exact"), accumulate_grad_batches=k)
    for found, right in zip(module.gradients, written(mlp(4, 5, 3, seed=0), data, k), strict=True):
        assert (found - right).norm() < 1e-12 * right.norm()


# Checkpoints inside and behind frozen parts


class Checkpointed(nn.Module):
    def __init__(self, part, reentrant):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


def frozen_middle(reentrant, needs_grad=False):
    torch.manual_seed(0)
    middle = Checkpointed(mlp(4, 5, 4), reentrant).requires_grad_(False)
    first = Needs() if needs_grad else nn.Linear(4, 4)
    return nn.Sequential(first, middle, nn.Tanh(), nn.Linear(4, 3)).double()


class Trained(WatchedClassifier):
    def configure_optimizers(self):
        return self.optimizer([param for param in self.parameters() if param.requires_grad])

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(flat(param.grad for param in self.parameters() if param.requires_grad))


def written_once(module, batch):
    params = [param for param in module.parameters() if param.requires_grad]
    loss = module.loss(batch)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    return flat(torch.autograd.grad(loss + C * sum(g.square().sum() for g in grads), params))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("reentrant", "needs_grad"), [(False, False), (False, True), (True, True)])
def test_a_checkpoint_inside_a_frozen_part_that_hides_nothing(reentrant, needs_grad, k):
    """Both kinds, and in front of every trained parameter too, where inputs are made to need a gradient."""
    module, data = Trained(frozen_middle(reentrant, needs_grad)), batches(1)
    right = written_once(Trained(frozen_middle(False, needs_grad)), data[0])
    fit(module, data, GradientPenalty(C, engine="exact"), accumulate_grad_batches=k)
    assert (k * module.gradients[0] - right).norm() < 1e-12 * right.norm()  # of an incomplete window


@pytest.mark.parametrize("k", [1, 2])
def test_a_reentrant_checkpoint_behind_a_trained_part(k):
    module = Trained(frozen_middle(True))
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing differentiates once only; use engine="):
        fit(module, batches(), GradientPenalty(C, engine="exact"), accumulate_grad_batches=k)
    module = Trained(frozen_middle(True))
    right = written_once(Trained(frozen_middle(False)), batches(1)[0])
    with pytest.warns(UserWarning, match=FELL_BACK.format("reentrant gradient checkpointing")):
        fit(module, batches(1), GradientPenalty(C, engine="auto", difference="central"), accumulate_grad_batches=k)
    assert (k * module.gradients[0] - right).norm() < 1e-6 * right.norm()


def test_a_compiled_function_called_inside_training_step():
    """Which nothing shows before training."""

    class Compiles(WatchedClassifier):
        def __init__(self, net, compiled=True):
            super().__init__(net)
            self.call = torch.compile(net[0].forward, backend=aot_eager) if compiled else net[0].forward

        def loss(self, batch):
            return nn.functional.cross_entropy(self.net[1:](self.call(batch[0])), batch[1])

    net = mlp(4, 5, 3, seed=0).double()
    with pytest.raises(RuntimeError, match=r"torch\.compile does not differentiate twice; use engine="):
        fit(Compiles(copy.deepcopy(net)), batches(), GradientPenalty(C, engine="exact"))
    module = Compiles(copy.deepcopy(net))
    with pytest.warns(UserWarning, match=FELL_BACK.format("torch.compile does not differentiate twice")):
        fit(module, batches(), GradientPenalty(C, engine="auto", difference="central"))
    for found, right in zip(module.gradients, written(net, batches(), 1), strict=True):
        assert (found - right).norm() < 1e-6 * right.norm()


# A language model with adapters


class Adapted(LightningModule):
    """A tiny Llama whose base is frozen, with LoRA adapters, checkpointed as its users do it."""

    def __init__(self, reentrant):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=2, attn_implementation="eager", use_cache=False)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        self.net = get_peft_model(LlamaForCausalLM(config), lora)
        self.net.enable_input_require_grads()
        self.net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        self.gradients = []

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(flat(p.grad for p in self.parameters() if p.requires_grad))

    def configure_optimizers(self):
        return SGD([param for param in self.parameters() if param.requires_grad])


def tokens():
    return [torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def test_reentrant_checkpointing_with_adapters():
    module = Adapted(True)
    before = flat(module.parameters())
    with pytest.raises(RuntimeError, match=r"shows, in net\..*lora_A.* and \d+ more .*use_reentrant=False"):
        fit(module, tokens(), GradientPenalty(C, engine="exact"))
    assert torch.equal(flat(module.parameters()), before)
    module, open_, step = Adapted(True), Adapted(False), 1e-4
    with pytest.warns(UserWarning, match=FELL_BACK.format("lora_A")):
        fit(module, tokens(), GradientPenalty(C, engine="auto", difference="central", relative_step=step))
    fit(open_, tokens(), GradientPenalty(C, engine="exact"))
    tolerance = 16 * torch.finfo(torch.float32).eps / step  # rounding of two gradients, divided by the displacement
    reference = Adapted(False)
    params = [param for param in reference.parameters() if param.requires_grad]
    for batch, by_differences, by_autograd in zip(tokens(), module.gradients, open_.gradients, strict=True):
        loss = reference.training_step(batch, 0)
        first = torch.autograd.grad(loss, params, create_graph=True)
        gradient = torch.autograd.grad(loss + C * sum(g.square().sum() for g in first), params)
        right = flat(gradient)
        assert (right - flat(first)).norm() > 10 * tolerance * right.norm()
        assert (by_autograd - right).norm() < 1e-4 * right.norm()
        assert (by_differences - right).norm() < tolerance * right.norm()
        with torch.no_grad():
            for param, g in zip(params, gradient, strict=True):
                param -= 0.1 * g


# The sharpness, and manual optimization


class Logged(Squares):
    def __init__(self, net):
        super().__init__(net.double())

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def sharpness(net, engine):
    diagnostics = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_engine=engine)
    trainer = fit(Logged(net), batches(1), diagnostics)
    return trainer.callback_metrics["ode/sharpness"].item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sharpness_of_what_is_hidden(kind):
    net, _ = KINDS[kind]
    with pytest.warns(UserWarning, match="ODEDiagnostics takes finite differences for the sharpness"):
        found = sharpness(net(False), "auto")
    assert found == pytest.approx(sharpness(net(True), "exact"), rel=1e-3)


class Manual(Squares):
    def __init__(self, net):
        super().__init__(net.double())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        gradient_penalty_backward(
            self, lambda: nn.functional.cross_entropy(self.net(batch[0]), batch[1]), C, engine="exact"
        )
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_manual_optimization_refuses(kind):
    net, sentence = KINDS[kind]
    module = Manual(net(False))
    before = flat(module.parameters())
    with pytest.raises(RuntimeError, match=rf"(?s)^gradient_penalty_backward\(engine='exact'\): .*{sentence}"):
        fit(module, batches())
    assert torch.equal(flat(module.parameters()), before)
