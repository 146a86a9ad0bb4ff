"""Which steps are checked, what the checks find (steps that do not repeat, kinks, rounding), and resumed runs."""

import copy
import itertools
import random
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import toys
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from toys import flat
from trainers import fit

from lightning_plugins import GradientPenalty
from lightning_plugins.replay.graph import has_kinks


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (300.0, True)])
def test_a_loss_that_bends_within_the_step_is_told(scale, warns):
    """Of sines so fast that the automatic step goes around them the finite difference is nonsense."""
    torch.set_num_threads(1)

    class Waves(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(50))

        def training_step(self, batch, batch_idx):
            return torch.sin(scale * 300 * self.weight).sum() / 300**2 + self.weight.square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Waves(), [torch.zeros(1)] * 2, GradientPenalty(0.1))
    assert warns == any("does not resolve this loss's curvature" in str(warning.message) for warning in told)


class Classifier(LightningModule):
    """Everything by its arguments: an activation, an autocast of its own, parameters that no optimizer has."""

    def __init__(self, activation=torch.tanh, half=False, rates=(0.1,), unused=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(3), requires_grad=unused)
        self.activation, self.half, self.rates = activation, half, rates
        self.scales = []

    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.last(self.activation(self.first(batch[0]))) * self.scale
        return F.cross_entropy(logits.float(), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.scales.append(None if self.scale.grad is None else self.scale.grad.clone())

    def configure_optimizers(self):
        parts = [self.first, self.last]
        groups = [{"params": list(p.parameters()), "lr": self.rates[n % len(self.rates)]} for n, p in enumerate(parts)]
        return torch.optim.SGD(groups)


def batches():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


@pytest.mark.parametrize(
    ("module", "step"),
    [
        ({}, {"relative": 1e-4}),
        ({"half": True}, {"length": 0.03}),
        ({"activation": torch.relu}, {"length": 0.05}),
        ({"activation": F.gelu}, {"relative": 1e-4}),
    ],
)
def test_the_automatic_step_follows_the_loss(module, step):
    module = Classifier(**module)
    start = flat(param for param in module.parameters() if param.requires_grad).norm().item()
    trainer = fit(module, batches(), GradientPenalty(0.1, check="off"), log_every_n_steps=1, max_steps=1)
    expected = step.get("relative", step.get("length", 0.0) / start)
    assert trainer.callback_metrics["igr/relative_step"] == pytest.approx(expected)


def test_kinks_that_the_graph_does_not_tell_are_found_by_halving_the_step():
    class NearKinks(LightningModule):
        def __init__(self):
            super().__init__()
            self.near = nn.Parameter(torch.linspace(1e-6, 1e-5, 200))
            self.far = nn.Parameter(torch.ones(100))

        def training_step(self, batch, batch_idx):
            return torch.where(self.near > 0, -self.near, 0 * self.near).sum() + self.far.square().sum() / 200

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    module = NearKinks()
    start = flat(module.parameters()).norm().item()
    with pytest.warns(UserWarning, match=r"It may have kinks: 0\.03, at most a length of 0\.05, is taken"):
        trainer = fit(module, batches(), GradientPenalty(0.1), log_every_n_steps=1)
    assert trainer.callback_metrics["igr/relative_step"] == pytest.approx(0.05 / start)


@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
def test_gradients_of_what_no_optimizer_has_are_left_alone(engine):
    plain, penalised = Classifier(unused=True), Classifier(unused=True)
    fit(plain, batches())
    fit(penalised, batches(), GradientPenalty(1e-40, engine=engine))
    torch.testing.assert_close(penalised.scales, plain.scales)
    penalised = Classifier(unused=True)
    fit(penalised, batches(), GradientPenalty(0.5, engine=engine), max_steps=1)
    torch.testing.assert_close(penalised.scales, plain.scales[:1])


def test_a_step_without_penalty_logs_no_penalty():
    trainer = fit(Classifier(), batches(), GradientPenalty(0.1, schedule=[[0, 1], [1, 0]]), log_every_n_steps=1)
    assert trainer.callback_metrics["igr/coefficient"] == 0


def test_match_lr_looks_at_the_groups_of_every_step():
    def apart(step):
        return 1.0 if step < 2 else 0.5

    class Module(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, apart])
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with pytest.raises(MisconfigurationException, match="parameter groups that share lr"):
        fit(Module(), batches(), GradientPenalty(match_lr=0.2))


def test_nothing_is_penalised_while_lightning_only_runs_batches_through():
    class Skips(Callback):
        seen = ()

        def on_train_epoch_start(self, trainer, pl_module):
            trainer.fit_loop._skip_backward = trainer.current_epoch == 1  # as SWA does for batch norm

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen = [*self.seen, trainer.callbacks[0]._now]

    skips = Skips()
    fit(Classifier(), batches(), GradientPenalty(0.1), skips, max_epochs=2)
    assert skips.seen == [0.1] * 3 + [0.0] * 3


# Which steps are checked


class Turns(Classifier):
    """From one step on, what ``late`` does; before it is an ordinary module."""

    def __init__(self, late, begins):
        super().__init__()
        self.late, self.begins = late, begins

    @property
    def is_late(self):
        return self.trainer.global_step >= self.begins


class ClipsLate(Turns):
    """A hook that does nothing while gradients are small enough."""

    def on_after_backward(self):
        if self.is_late:
            nn.utils.clip_grad_norm_(self.parameters(), 1e-2)


class CountsLate(Turns):
    """Each run of the training step scales the loss anew, by an iterator that hides its state."""

    def __init__(self, late, begins):
        super().__init__(late, begins)
        self.late = itertools.count(1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.is_late:
            return loss
        return loss * (1 + next(self.late) % 7)


def many(n):
    return (batches() * n)[:n]


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_hook_that_begins_late_is_found_by_the_jump_of_the_penalty(scope):
    module = ClipsLate(None, begins=5)
    sentence = r"relative difference .*, in step 6; steps 1, 2 and 4 were checked and right\)"
    with pytest.raises(RuntimeError, match=sentence):
        fit(module, many(12), GradientPenalty(0.1, scope=scope))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("begins", "found"), [(0, 1), (1, 2), (3, 4), (7, 8)])
def test_what_begins_at_a_checked_step_is_found_there(begins, found, k, monkeypatch):
    monkeypatch.setattr("lightning_plugins.callbacks.checked_steps._JUMP", float("inf"))
    with pytest.raises(RuntimeError, match=rf"another gradient \(relative difference .*, in step {found}[;)]"):
        fit(CountsLate(None, begins), many(10 * k), GradientPenalty(0.1), accumulate_grad_batches=k)


@pytest.mark.filterwarnings("ignore:GradientPenalty. .*does not resolve", "ignore:GradientPenalty. finite differences")
def test_edits_at_random_that_nothing_shows_are_found():
    """One call in two is scaled, at random and unseen by random states: no seed trains more than a few steps."""

    class AtRandom(CountsLate):
        def training_step(self, batch, batch_idx):
            loss = Classifier.training_step(self, batch, batch_idx)
            return loss * (1.5 if self.generator.random() < 0.5 else 1.0)

    for seed in range(6):
        module = AtRandom(None, 0)
        module.generator = HiddenRandom(seed)
        with pytest.raises(RuntimeError, match="another gradient"):
            fit(module, many(64), GradientPenalty(0.1))


class HiddenRandom:
    """Python's generator behind an object that no replay looks into."""

    __slots__ = ("random",)

    def __init__(self, seed):
        self.random = random.Random(seed).random


def test_the_first_step_alone():
    module = CountsLate(None, begins=1)
    fit(module, many(4), GradientPenalty(1e-3, check="first_step"))
    with pytest.raises(RuntimeError, match="another gradient"):
        fit(CountsLate(None, begins=0), many(4), GradientPenalty(1e-3, check="first_step"))
    fit(CountsLate(None, begins=0), many(4), GradientPenalty(1e-3, check="off"))


def test_a_jump_that_is_the_loss_s_own_is_checked_once():
    class Steepens(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (100.0 if self.global_step >= 2 else 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    looked = []

    class Watched(GradientPenalty):
        def _check(self, trainer, *args):
            looked.append(trainer.global_step)
            super()._check(trainer, *args)

    fit(Steepens(), many(7), Watched(0.1))
    assert looked == [0, 1, 2, 3]  # 100 times the curvature in step 3, which stays


# The displacement that a run finds


class Where(nn.Module):
    """ReLU by an operation that has kinks only if one writes them."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.1 * x)


class Rounds(nn.Module):
    """Rounds to tenths, straight through."""

    def forward(self, x):
        return x + ((8 * x).round() / 8 - x).detach()


class Codebook(nn.Module):
    """The nearest of 64 numbers, straight through."""

    def forward(self, x):
        book = torch.linspace(-2, 2, 64)
        nearest = book[(x.detach().flatten()[:, None] - book).abs().argmin(1)].view_as(x)
        return x + (nearest - x).detach()


class OwnKernel(nn.Module):
    """A custom function, as a kernel of one's own would be."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (x > 0)

    def forward(self, x):
        return self.Kernel.apply(x)


@pytest.mark.parametrize("activation", [Where, Rounds, Codebook, OwnKernel])
@pytest.mark.parametrize("check", ["steps", "first_step"])
def test_kinks_are_found_whatever_made_them(activation, check):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 128), activation(), nn.Linear(128, 128), activation(), nn.Linear(128, 5))
    data = [(torch.randn(256, 10), torch.randint(5, (256,))) for _ in range(2)]
    module = toys.Classifier(net, partial(torch.optim.SGD, lr=1e-3))
    with pytest.warns(UserWarning, match=r"does not resolve this loss's curvature: .* It may have kinks"):
        trainer = fit(module, data, GradientPenalty(1e-3, check=check), log_every_n_steps=1)
    theta = flat(module.parameters()).norm().item()
    assert trainer.callback_metrics["igr/relative_step"] == pytest.approx(0.05 / theta, rel=1e-2)


def test_a_modulus_is_no_kink():
    z = torch.tensor([1 + 1j, 2 - 1j], requires_grad=True)
    x = torch.ones(2, requires_grad=True)
    assert not has_kinks(z.abs().sum(), nn.Linear(1, 1))
    assert not has_kinks((z * x).abs().square().sum(), nn.Linear(1, 1))
    assert has_kinks(x.abs().sum(), nn.Linear(1, 1))
    assert has_kinks((z.real * x).abs().sum(), nn.Linear(1, 1))


class Head(LightningModule):
    """A frozen body and a part that starts from zero: a linear head, or the second factor of LoRA."""

    def __init__(self, kind, rate):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(10, 32), nn.Tanh()).requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros(4, 32 if kind == "head" else 3))
        self.register_buffer("before", torch.randn(3, 32) if kind == "LoRA" else torch.eye(32))
        self.register_buffer("base", torch.randn(4, 32) * 0.2 if kind == "LoRA" else torch.zeros(4, 32))
        self.rate, self.seen = rate, []

    def loss(self, batch, weight):
        x, y = batch
        features = self.body(x)
        return F.cross_entropy(features @ (self.base + weight @ self.before).T, y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch, self.weight)

    def on_before_optimizer_step(self, optimizer):
        self.seen.append((self.weight.detach().clone(), self.weight.grad.clone()))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=self.rate)


@pytest.mark.parametrize("difference", ["auto", "forward", "central"])
@pytest.mark.parametrize("rate", [1e-6, 1e-4])
@pytest.mark.parametrize("kind", ["head", "LoRA"])
def test_weights_that_start_from_zero(kind, rate, difference):
    """Their norm says nothing of how far they may move: by a share of a tiny one the difference is all rounding."""
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(64, 10, generator=generator), torch.randint(4, (64,), generator=generator)) for _ in range(6)]
    module, c = Head(kind, rate), 0.5
    reference = copy.deepcopy(module).double()
    fit(module, data, GradientPenalty(c, difference=difference))
    assert len(module.seen) == 6
    for (weight, found), (x, y) in zip(module.seen, data, strict=True):
        weight = weight.double().requires_grad_()
        (plain,) = torch.autograd.grad(reference.loss((x.double(), y), weight), weight, create_graph=True)
        (extra,) = torch.autograd.grad(c * plain.square().sum(), weight)
        assert (found.double() - plain - extra).norm() < 2e-2 * extra.norm()


# A run that was stopped


class Changes(Classifier):
    """Its loss has kinks from the fourth step on: what is found of it depends on when one looks."""

    def training_step(self, batch, batch_idx):
        self.activation = torch.relu if self.trainer.global_step >= 3 else torch.tanh
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"scope": "microbatch"}, {"check": "off"}, {"check": "first_step"}, {"engine": "exact"}, {"engine": "auto"}],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(stop, arguments, tmp_path):
    whole, first, rest = Changes(), Changes(), Changes()
    fit(whole, batches(), GradientPenalty(0.1, **arguments), max_epochs=4)
    fit(first, batches(), GradientPenalty(0.1, **arguments), max_epochs=stop).save_checkpoint(tmp_path / "run.ckpt")
    fit(rest, batches(), GradientPenalty(0.1, **arguments), max_epochs=4, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(flat(rest.parameters()), flat(whole.parameters()))


def test_an_exactness_that_was_given_up_stays_so(tmp_path):
    """What has no second derivative in the first epoch only: a resumed run must not find it possible."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * (1 - x.tanh() ** 2)

    class Early(Classifier):
        def training_step(self, batch, batch_idx):
            self.activation = Once.apply if self.current_epoch == 0 else torch.tanh
            return super().training_step(batch, batch_idx)

    def run(module, **options):
        return fit(module, batches(), GradientPenalty(0.1, engine="auto"), **options)

    whole, first, rest = Early(), Early(), Early()
    with pytest.warns(UserWarning, match="takes finite differences: .*once_differentiable"):
        run(whole, max_epochs=3)
        run(first, max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    run(rest, max_epochs=3, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(flat(rest.parameters()), flat(whole.parameters()))


def test_the_state_is_plain_data_and_belongs_to_its_arguments(tmp_path):
    def difference():
        return torch.load(path, weights_only=True)["callbacks"]["GradientPenalty"]["displacement"]["_now"][0]

    path = tmp_path / "run.ckpt"
    fit(Classifier(F.gelu), batches(), GradientPenalty(0.1)).save_checkpoint(path)
    assert difference() == "forward"
    penalty = GradientPenalty(0.1, difference="central")
    fit(Classifier(F.gelu), batches(), penalty, max_epochs=2, ckpt_path=path).save_checkpoint(path)
    assert difference() == "central"


def test_a_checkpoint_without_the_state_loads(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(Classifier(), batches(), GradientPenalty(0.1)).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"].pop("GradientPenalty")
    torch.save(checkpoint, path)
    trainer = fit(Classifier(), batches(), GradientPenalty(0.1), max_epochs=2, ckpt_path=path)
    assert trainer.global_step == 6
