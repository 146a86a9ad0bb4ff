"""GradientPenalty on modules that were written without it in mind: the gradient of every step against autograd."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import nn
from toys import Bert, Classifier
from trainers import fit

from lightning_plugins import GradientPenalty

C = 0.5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class LoggingClassifier(Classifier):
    """The plain module around somebody's network."""

    def loss(self, batch):
        loss = super().loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss


def bert(attention, dropout):
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return Bert(attn_implementation=attention, **dropouts)


class Boring(BoringModel):
    """In double precision its batches must be made so."""

    def train_dataloader(self):
        return None

    val_dataloader = train_dataloader


class DemoTransformer(LightningTransformer):
    prepare_data = LightningModule.prepare_data  # its own downloads a text


class Tied(nn.Module):
    """A language model whose embedding is its last layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embedding(x))))


class Recurrent(nn.Module):
    """An LSTM holds its weights in a list of its own, too."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def images():
    return torch.randn(6, 1, 8, 8), torch.randint(3, (6,))


def tokens():
    mask = (torch.arange(12) < torch.randint(4, 13, (4, 1))).long()
    return {"input_ids": torch.randint(40, (4, 12)), "attention_mask": mask, "labels": torch.randint(2, (4,))}


def cnn():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.SiLU()]
    return LoggingClassifier(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 3))
    )


def with_frozen_parts():
    model = cnn()
    model.net[0].requires_grad_(False)
    model.net[4].bias.requires_grad_(False)
    return model


# name: module, batch
MODULES = {
    "bert": (lambda: bert("eager", 0.1), tokens),
    "bert with fused attention": (lambda: bert("sdpa", 0.1), tokens),
    "cnn": (cnn, images),
    "frozen parts": (with_frozen_parts, images),
    "boring": (Boring, lambda: torch.randn(4, 32)),
    "demo transformer": (lambda: DemoTransformer(vocab_size=20), lambda: tuple(torch.randint(20, (2, 2, 10)))),
    "tied weights": (lambda: LoggingClassifier(Tied()), lambda: (torch.randint(12, (9,)), torch.randint(12, (9,)))),
    "recurrent": (lambda: LoggingClassifier(Recurrent()), lambda: (torch.randn(4, 5, 4), torch.randint(3, (4,)))),
}


class Witness(Callback):
    """Fixes the random numbers of each step, and keeps weights and gradients that the optimizer is given."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights.append(copy.deepcopy(pl_module.state_dict()))
        self.gradients.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}
        )


def make(name, n=3):
    torch.manual_seed(0)
    build, batch = MODULES[name]
    return build(), [batch() for _ in range(n)]


def witnessed(model, batches, callback, precision="64-true"):
    witness = Witness()
    fit(model, batches, callback, witness, precision=precision, limit_val_batches=0)
    return witness


def in_double(batch):
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {name: in_double(value) for name, value in batch.items()}
    return tuple(map(in_double, batch))


def written(model, weights, batch, step, params=None):
    """The gradient of L + c |grad L|^2 by autograd in double precision, and that of L."""
    model = copy.deepcopy(model).double().train()
    model.load_state_dict(weights)
    model.log = lambda *args, **kwargs: None
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    penalised = [p for name, p in named.items() if params is None or name in params]
    torch.manual_seed(step)
    output = model.training_step(in_double(batch), step)
    loss = output["loss"] if isinstance(output, dict) else output
    first = torch.autograd.grad(loss, penalised, create_graph=True, allow_unused=True)
    objective = loss + C * sum(grad.square().sum() for grad in first if grad is not None)
    found = [
        torch.autograd.grad(f, list(named.values()), retain_graph=True, allow_unused=True) for f in (objective, loss)
    ]
    return [dict(zip(named, grads, strict=True)) for grads in found]


def assert_gradients(witness, model, batches, tolerance, visible=0.02):
    assert len(witness.gradients) == len(batches)
    for step, (weights, gradients) in enumerate(zip(witness.weights, witness.gradients, strict=True)):
        expected, plain = written(model, weights, batches[step], step)
        names = [name for name in expected if expected[name] is not None]
        found, right, without = (
            torch.cat([grads[name].flatten().double() for name in names]) for grads in (gradients, expected, plain)
        )
        assert (found - right).norm() / right.norm() < tolerance
        assert (without - right).norm() / right.norm() > visible  # there is a penalty
        assert all(grad is None for name, grad in gradients.items() if name not in names)


ENGINES = {
    "exact": ({"engine": "exact"}, 1e-11),
    "central": ({"difference": "central"}, 1e-5),
    "forward": ({}, 1e-3),
}
# The demo transformer's attention logits are in the hundreds, so that the gradient turns within a larger step; and its
# first step, with a gradient of norm 1e5, ends where no finite difference holds: one step says all.
TINY = {"relative_step": 3e-9}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_gradient(engine, name):
    arguments, tolerance = ENGINES[engine]
    steep = name == "demo transformer"
    model, batches = make(name, 1 if steep else 3)
    witness = witnessed(model, batches, GradientPenalty(C, **arguments, **(TINY if steep else {})))
    assert_gradients(witness, model, batches, tolerance)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "demo transformer"])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_gradient_in_fp32(difference, name):
    """As users run them."""
    model, batches = make(name)
    witness = witnessed(model, batches, GradientPenalty(C, difference=difference), precision="32-true")
    assert_gradients(witness, model, batches, 2e-2)


def test_fused_attention_that_has_no_second_derivative():
    """Without dropout torch takes its flash kernel: finite differences alone can do it."""
    torch.manual_seed(0)
    model, batches = bert("sdpa", 0.0), [tokens() for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"flash_attention.* has no second derivative; use engine='finite_diff"):
        witnessed(copy.deepcopy(model), batches, GradientPenalty(C, engine="exact"))
    witness = witnessed(model, batches, GradientPenalty(C, difference="central"))
    assert_gradients(witness, eager(model), batches, 1e-5)


def eager(model):
    """The same network with attention that autograd can differentiate twice."""
    other = bert("eager", 0.0)
    other.load_state_dict(model.state_dict())
    return other


def test_parameters_outside_the_optimizer():
    """They are not penalised, and gather the loss's gradient as without the callback."""
    torch.manual_seed(0)
    model, batches = cnn(), [images() for _ in range(2)]
    inside = ["net.9.weight", "net.9.bias"]
    model.configure_optimizers = lambda: torch.optim.SGD([model.get_parameter(name) for name in inside], lr=0.05)
    witness = witnessed(model, batches, GradientPenalty(C, difference="central"))
    for step, (weights, gradients) in enumerate(zip(witness.weights, witness.gradients, strict=True)):
        expected, plain = written(model, weights, batches[step], step, params=inside)
        for name, grad in gradients.items():
            right = expected[name] if name in inside else plain[name]
            before = 0 if step == 0 or name in inside else witness.gradients[step - 1][name]  # nobody empties these
            torch.testing.assert_close(grad - before, right, rtol=1e-5, atol=1e-9)
        assert not torch.allclose(gradients["net.9.bias"], plain["net.9.bias"], rtol=1e-2)


def test_parameter_groups():
    """One penalty over all of them, each with its own rate."""
    torch.manual_seed(0)
    model, batches = cnn(), [images() for _ in range(2)]
    parts = [{"params": model.net[:6].parameters(), "lr": 0.01}, {"params": model.net[6:].parameters()}]
    model.configure_optimizers = lambda: torch.optim.AdamW(parts, lr=0.1)
    witness = witnessed(model, batches, GradientPenalty(C, engine="exact"))
    assert_gradients(witness, model, batches, 1e-11)
