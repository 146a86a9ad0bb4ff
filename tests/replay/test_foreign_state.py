"""Modules that edit their batch, or keep state that is no buffer: watched, they train as they do alone, bit for bit."""

import copy
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torchmetrics import MeanMetric
from toys import Classifier, mlp, weights
from trainers import fit

from lightning_plugins import Flooding, GradientPenalty, ODEDiagnostics

NOTHING = 1e-40  # a coefficient that vanishes beside every gradient in fp32, yet takes every path


class Base(Classifier):
    """Batches are dicts; ``loss`` gets one that may be edited."""

    def __init__(self):
        super().__init__(mlp(4, 8, 3, seed=0))
        self.prepare()

    def prepare(self):
        pass

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def seen(self):
        """What it keeps, to be compared."""
        return {}


# Batches that are edited


class PopsALabel(Base):
    def loss(self, batch):
        y = batch.pop("y")
        return F.cross_entropy(self.net(batch["x"]), y)


class EncodesIntoItsBatch(Base):
    def prepare(self):
        self.encoder = nn.Linear(4, 4)

    def loss(self, batch):
        batch["x"] = self.encoder(batch["x"])
        return super().loss(batch)


class ScalesInPlace(Base):
    def loss(self, batch):
        batch["x"].mul_(2)
        return super().loss(batch)


class MixesUp(Base):
    """As timm's Mixup(prob=0.5) does: half of the batches are mixed with themselves turned round, in place."""

    def prepare(self):
        self.random = np.random.RandomState(0)

    def loss(self, batch):
        x, y = batch["x"], F.one_hot(batch["y"], 3).to(batch["x"])
        if self.random.rand() < 0.5:
            share = self.random.beta(1.0, 1.0)
            flipped = x.flip(0).mul_(1 - share)
            x.mul_(share).add_(flipped)
            y = share * y + (1 - share) * y.flip(0)
        return F.cross_entropy(self.net(x), y)


class EditsAView(Base):
    def loss(self, batch):
        batch["first"].add_(1.0)  # which is a part of x
        return super().loss(batch)


# States that are no buffers


class AveragesItself(Base):
    """torch's AveragedModel: its weights require gradients, and no optimizer owns them."""

    def prepare(self):
        self.average = AveragedModel(self.net, multi_avg_fn=None, avg_fn=get_ema_avg_fn(0.9))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def loss(self, batch):
        loss = super().loss(batch) + (self.net(batch["x"]) - self.average(batch["x"]).detach()).square().mean()
        self.average.update_parameters(self.net)
        return loss

    def seen(self):
        return {"average": self.average.state_dict()}


class HasGradientsOfItsOwn(AveragesItself):
    """Gradients reach the average too, and pile up there."""

    def loss(self, batch):
        return super().loss(batch) + 0.1 * self.average(batch["x"]).square().mean()

    def seen(self):
        return super().seen() | {"gradients": [p.grad for p in self.average.module.parameters()]}


class TeacherInAList(Base):
    def prepare(self):
        self.held = [copy.deepcopy(self.net).requires_grad_(False)]

    def loss(self, batch):
        (teacher,) = self.held
        loss = super().loss(batch) + (self.net(batch["x"]) - teacher(batch["x"])).square().mean()
        for slow, fast in zip(teacher.parameters(), self.net.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1  # as MoCo writes it
        return loss

    def seen(self):
        return {"teacher": self.held[0].state_dict()}


class ExponentialMovingAverage:
    """As that of the package torch_ema: copies in a list of an object, written in place."""

    def __init__(self, parameters, decay):
        self.decay, self.num_updates = decay, 0
        self.shadow_params = [p.clone().detach() for p in parameters]

    def update(self, parameters):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for shadow, param in zip(self.shadow_params, parameters, strict=True):
            shadow.sub_((1 - decay) * (shadow - param.detach()))


class HasShadows(Base):
    def prepare(self):
        self.ema = ExponentialMovingAverage(self.net.parameters(), 0.9)

    def loss(self, batch):
        pull = sum((p - s).square().sum() for p, s in zip(self.net.parameters(), self.ema.shadow_params, strict=True))
        loss = super().loss(batch) + 0.1 * pull + 0.01 * self.ema.num_updates
        self.ema.update(self.net.parameters())
        return loss

    def seen(self):
        return {"shadows": self.ema.shadow_params, "updates": self.ema.num_updates}


class CountsInADeque(Base):
    def prepare(self):
        self.state = {"n": deque([0], maxlen=4)}

    def loss(self, batch):
        self.state["n"].append(self.state["n"][-1] + 1)
        return super().loss(batch) * (1 + 0.1 * sum(self.state["n"]))

    def seen(self):
        return {"n": list(self.state["n"])}


class CollectsInContainers(Base):
    def prepare(self):
        self.kept = {"loss": [], "counter": Counter(), "array": np.zeros(3), "metric": MeanMetric(), "set": {0}}

    def loss(self, batch):
        kept = self.kept
        loss = super().loss(batch) * (
            1 + 0.01 * len(kept["loss"]) + 0.01 * kept["array"].sum() + 0.01 * len(kept["set"])
        )
        kept["loss"].append(loss.item())
        kept["counter"]["calls"] += 1
        kept["array"][1] += 1
        kept["set"].add(len(kept["set"]))
        kept["metric"].update(loss.detach())
        return loss + 0.01 * kept["metric"].compute() * kept["counter"]["calls"]

    def seen(self):
        kept = self.kept
        numbers = {name: kept[name] for name in ("loss", "array", "counter")}
        return numbers | {"set": sorted(kept["set"]), "updates": kept["metric"].update_count}


@dataclass(slots=True)
class Grows:
    """An object of one's own that insists on steps that grow."""

    last: int = -1

    def tell(self, step):
        assert step > self.last, "steps must grow"
        self.last = step


class TellsItsSteps(Base):
    def prepare(self):
        self.steps = Grows()

    def training_step(self, batch, batch_idx):
        self.steps.tell(100 * self.current_epoch + batch_idx)
        return self.loss(batch)

    def seen(self):
        return {"last": self.steps.last}


class DrawsFromItsOwn(Base):
    def prepare(self):
        self.generators = [torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)]
        self.generators.append(np.random.RandomState(0))

    def loss(self, batch):
        torchs, numpys, pythons, old = self.generators
        noise = torch.randn(4, generator=torchs) + numpys.normal() + pythons.gauss(0, 1) + old.randn()
        return super().loss({"x": batch["x"] + 0.1 * noise, "y": batch["y"]})

    def seen(self):
        return {"next": [g.random() for g in self.generators[1:3]]}


class QueuesInATuple(Base):
    """A queue as MoCo's, filled through a view, in a tensor that is neither a buffer nor an attribute."""

    def prepare(self):
        self.bank = (torch.zeros(12, 3), {"at": 0})

    def loss(self, batch):
        queue, place = self.bank
        out = self.net(batch["x"])
        loss = F.cross_entropy(out, batch["y"]) + (out @ queue.clone().T).square().mean()
        queue[place["at"] : place["at"] + 4] = out.detach()
        place["at"] = (place["at"] + 4) % 12
        return loss

    def seen(self):
        return {"queue": self.bank[0], "at": self.bank[1]["at"]}


class TurnsItsRate(Base):
    """Writes to the optimizer's groups, as nanoGPT's loop does, but by a factor."""

    def loss(self, batch):
        for group in self.optimizers().optimizer.param_groups:
            group["lr"] *= 0.9
        return super().loss(batch)

    def seen(self):
        return {"lr": self.optimizers().optimizer.param_groups[0]["lr"]}


class StepsACritic(Base):
    """Another network with an optimizer that is not the trainer's, stepped by hand."""

    def prepare(self):
        self.critic = [mlp(3, 4, 1, seed=1)]
        self.critic_optimizer = torch.optim.Adam(self.critic[0].parameters(), lr=0.05)

    def loss(self, batch):
        out, (critic,) = self.net(batch["x"]), self.critic
        self.critic_optimizer.zero_grad()
        (critic(out.detach()).square().mean() - critic(out.detach()).mean()).backward()
        self.critic_optimizer.step()
        return super().loss(batch) - critic(out).mean()

    def seen(self):
        return {"critic": self.critic[0].state_dict(), "adam": self.critic_optimizer.state_dict()["state"]}


EDITS = [PopsALabel, EncodesIntoItsBatch, ScalesInPlace, MixesUp, EditsAView]
STATES = [
    AveragesItself, HasGradientsOfItsOwn, TeacherInAList, HasShadows, CountsInADeque, CollectsInContainers,
    TellsItsSteps, DrawsFromItsOwn, QueuesInATuple, TurnsItsRate, StepsACritic,
]  # fmt: skip


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(6):
        x = torch.randn(4, 4, generator=generator).to(dtype)
        made.append({"x": x, "y": torch.randint(3, (4,), generator=generator), "first": x[:2]})
    return made


def trained(kind, *callbacks, **options):
    module = kind()
    fit(module, batches(), *callbacks, **({"max_epochs": 2} | options))
    return {"weights": weights(module.net), "seen": module.seen()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", EDITS + STATES)
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [ODEDiagnostics(1, sharpness_every_n_steps=4, sharpness_max_products=3)],
        lambda: [ODEDiagnostics(1, sharpness_every_n_steps=4, sharpness_engine="finite_difference")],
        lambda: [GradientPenalty(NOTHING)],
        lambda: [GradientPenalty(NOTHING), ODEDiagnostics(2)],
    ],
    ids=["ode", "ode by differences", "penalty", "both"],
)
def test_watched_it_trains_as_alone(kind, callbacks, accumulate):
    """Edited batches stay edited from epoch to epoch where the list keeps them: popped labels are asked for once."""
    options = {
        "accumulate_grad_batches": accumulate,
        "max_epochs": 1 if kind in (PopsALabel, EncodesIntoItsBatch) else 2,
    }
    plain = trained(kind, **options)
    watched = callbacks()
    torch.testing.assert_close(trained(kind, *watched, **options), plain, rtol=0, atol=0)
    if isinstance(watched[0], ODEDiagnostics):
        assert all("ode/curvature_step" in row for row in watched[0].history)


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def penalised(module, data, coefficient, accumulate):
    """The written-out loop in float64: each batch runs once, and is differentiated twice."""
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = params = [
        p for group in module.configure_optimizers().param_groups for p in group["params"]
    ]
    module.optimizers = lambda: type("Of", (), {"optimizer": optimizer})
    for start in range(0, len(data), accumulate):
        loss = sum(module.loss(batch) for batch in data[start : start + accumulate]) / accumulate
        first = torch.autograd.grad(loss, params, create_graph=True)
        total = torch.autograd.grad(loss + coefficient * sum(g.square().sum() for g in first), params)
        for param, grad in zip(params, total, strict=True):
            param.grad = grad
        optimizer.step()
    return weights(module.net)


def assert_penalised_as_written_out(kind, engine, accumulate):
    expected, module = kind(), kind()
    reference = penalised(expected, batches(torch.float64), 0.2, accumulate)
    penalty = GradientPenalty(0.2, engine=engine, difference="central")
    fit(module, batches(torch.float64), penalty, accumulate_grad_batches=accumulate, precision="64-true")
    torch.testing.assert_close(weights(module.net), reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "kind", [k for k in EDITS + STATES if k not in (TellsItsSteps, HasGradientsOfItsOwn, StepsACritic)]
)
@pytest.mark.parametrize("engine", ["finite_difference", "exact"])
def test_a_real_penalty_is_that_of_a_loop_written_out(kind, engine, accumulate, in_double):
    """Central differences in float64 err by some 1e-10."""
    assert_penalised_as_written_out(kind, engine, accumulate)


def test_what_is_computed_from_the_weights_before_the_loss_is_constant_to_the_exact_engine(in_double):
    """Finite differences see that it moves with them."""
    assert_penalised_as_written_out(StepsACritic, "exact", 1)


# What cannot be put back is refused before anything moves


class Iterates(Base):
    def prepare(self):
        self.noise = itertools.count()

    def loss(self, batch):
        return super().loss(batch) * (1 + 0.1 * next(self.noise))


class NormalisesItsWeights(Base):
    """As SwAV does with its prototypes, within the step."""

    def loss(self, batch):
        with torch.no_grad():
            self.net[2].weight.copy_(F.normalize(self.net[2].weight))
        return super().loss(batch)


def assert_not_run_again(kind, sentence):
    """The penalty refuses the step, and the diagnostics leave it as it trains alone."""
    plain = trained(kind)
    with pytest.raises(RuntimeError, match=sentence):
        trained(kind, GradientPenalty(0.1))
    with pytest.warns(UserWarning, match=f"failed with RuntimeError: training_step {sentence}"):
        watched = trained(kind, ODEDiagnostics(1))
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)


def test_a_step_that_writes_to_trained_weights_is_not_run_again():
    sentence = "writes to parameters that are trained.* do so in on_train_batch_start"
    assert_not_run_again(NormalisesItsWeights, sentence)


@pytest.mark.parametrize("kind", [TeacherInAList, AveragesItself, HasShadows, QueuesInATuple])
def test_what_is_too_large_to_be_saved_is_watched(kind, monkeypatch):
    monkeypatch.setattr("lightning_plugins.replay.module_state._LEAST", 1)
    monkeypatch.setattr("lightning_plugins.replay.module_state._TIMES", 0)
    sentence = "writes to parameters that are not trained, too many to be put back.*on_train_batch_end"
    assert_not_run_again(kind, sentence)


def test_the_manual_penalty_keeps_state_alike():
    from lightning_plugins.callbacks import gradient_penalty_backward

    class ByHand(TeacherInAList):
        coefficient = 0.0

        def prepare(self):
            super().prepare()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            gradient_penalty_backward(self, lambda: self.loss(batch), self.coefficient)
            optimizer.step()

    class Vanishing(ByHand):
        coefficient = NOTHING

    torch.testing.assert_close(trained(Vanishing), trained(ByHand), rtol=0, atol=0)


def test_flooding_alone_runs_nothing_twice():
    torch.testing.assert_close(trained(Iterates, Flooding(-1e9)), trained(Iterates), rtol=0, atol=0)
