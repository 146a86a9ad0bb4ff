"""gradient_penalty_backward in manual optimization against float64 autograd on the written objective."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torchmetrics import MeanMetric
from toys import flat, mlp
from trainers import fit, quiet_trainer

from lightning_plugins import gradient_penalty_backward


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


C = 0.7
ENGINES = {
    "exact": ({"engine": "exact"}, 1e-12),
    "central": ({"difference": "central"}, 1e-7),
    "forward": ({}, 1e-5),
}


def data(n=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


class Manual(LightningModule):
    """One optimizer; ``step`` does what comes between zero_grad and the optimizer's step."""

    def __init__(self, step, net=None, lr=0.5):
        super().__init__()
        torch.manual_seed(1)
        self.net = net() if net else mlp(4, 8, 3)
        self.step, self.lr = step, lr
        self.automatic_optimization = False
        self.gradients = []

    def loss(self, batch):
        return F.cross_entropy(
            self.net(batch[0]).float() if self.dtype != torch.float64 else self.net(batch[0]), batch[1]
        )

    def other_loss(self, batch):
        return self.net(batch[0]).square().mean()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.step(self, batch)
        self.gradients.append(flat(param.grad for param in self.parameters()))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trained(model, batches=None, **options):
    fit(model, data() if batches is None else batches, **options)
    return model


def penalty(loss, params, norm="squared"):
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    squared = sum(grad.square().sum() for grad in grads)
    return C * (squared if norm == "squared" else squared.sqrt())


def written(model, objective):
    """The model's run in plain torch and double precision; ``objective(model, batch)`` is what it descends on."""
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    for x, y in data():
        grads = torch.autograd.grad(objective(model, (x.double(), y)), params)
        model.gradients.append(flat(grads))
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param -= model.lr * grad
    return model


def assert_same_run(found, expected, tolerance):
    assert len(found.gradients) == len(expected.gradients) > 0
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert (one - other).norm() / other.norm() < tolerance
    torch.testing.assert_close(
        flat(found.parameters()).double(), flat(expected.parameters()).double(), atol=3 * tolerance, rtol=0
    )


@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradient(engine, norm):
    arguments, tolerance = ENGINES[engine]
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), C, norm=norm, **arguments))
    expected = written(model, lambda m, b: m.loss(b) + penalty(m.loss(b), list(m.parameters()), norm))
    plain = written(model, lambda m, b: m.loss(b))
    assert (plain.gradients[0] - expected.gradients[0]).norm() / plain.gradients[0].norm() > 0.2
    assert_same_run(trained(model, precision="64-true"), expected, tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_losses_share_a_step(engine):
    """Plain ones before and after, and another penalty: every order of the graphs' making and use."""
    arguments, tolerance = ENGINES[engine]

    def step(m, batch):
        before, after = m.other_loss(batch), 0.3 * m.loss(batch)  # made before the replay, used on both sides of it
        m.manual_backward(before)
        gradient_penalty_backward(m, lambda: m.loss(batch), C, **arguments)
        m.manual_backward(after)
        gradient_penalty_backward(m, lambda: m.other_loss(batch), C, norm="norm", **arguments)

    def objective(m, batch):
        params, loss, other = list(m.parameters()), m.loss(batch), m.other_loss(batch)
        return 2 * other + 1.3 * loss + penalty(loss, params) + penalty(other, params, "norm")

    model = Manual(step, lr=0.2)
    expected = written(model, objective)
    assert_same_run(trained(model, precision="64-true"), expected, tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_parameters_get_the_gradient_of_the_loss(engine):
    """Those that are not penalised, and none that are frozen or unused."""
    arguments, tolerance = ENGINES[engine]

    def step(m, batch):
        gradient_penalty_backward(m, lambda: m.loss(batch), C, (*m.net[2].parameters(), *m.aside), **arguments)

    def objective(m, batch):
        loss = m.loss(batch)
        return loss + penalty(loss, list(m.net[2].parameters()))

    model = Manual(step)
    first = torch.autograd.grad(
        model.double().loss((data()[0][0].double(), data()[0][1])), list(model.net[0].parameters())
    )
    expected = torch.autograd.grad(
        objective(model, (data()[0][0].double(), data()[0][1])), list(model.net[2].parameters())
    )
    unused, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    model.aside = [unused, frozen]
    model = trained(model, data(1), precision="64-true")
    grads = [param.grad for param in model.net.parameters()]
    torch.testing.assert_close(flat(grads[:2]), flat(first), rtol=1e-13, atol=1e-15)
    assert (flat(grads[2:]) - flat(expected)).norm() / flat(expected).norm() < tolerance
    assert unused.grad is None
    assert frozen.grad is None


class Gan(LightningModule):
    """A generator and a discriminator, each with its optimizer; the penalty is on both of their losses."""

    def __init__(self, arguments):
        super().__init__()
        torch.manual_seed(2)
        self.generator, self.discriminator = mlp(3, 6, 4), mlp(4, 6, 1)
        self.arguments, self.automatic_optimization = arguments, False

    def losses(self, real, noise):
        fake = self.generator(noise)
        of_discriminator = (
            F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        )
        return of_discriminator, F.softplus(-self.discriminator(fake)).mean()

    def training_step(self, batch, batch_idx):
        real, noise = batch
        for which, (optimizer, part) in enumerate(zip(self.optimizers(), self.parts(), strict=True)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            gradient_penalty_backward(
                self, lambda which=which: self.losses(real, noise)[which], C, part.parameters(), **self.arguments
            )
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def parts(self):
        return self.discriminator, self.generator

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.3, momentum=0.5) for part in self.parts()]


@pytest.mark.parametrize("engine", ENGINES)
def test_gan(engine):
    arguments, tolerance = ENGINES[engine]
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(4)]
    model, expected = Gan(arguments), Gan({}).double()
    optimizers = expected.configure_optimizers()
    for real, noise in batches:
        for which, (optimizer, part) in enumerate(zip(optimizers, expected.parts(), strict=True)):
            loss, params = expected.losses(real.double(), noise.double())[which], list(part.parameters())
            grads = torch.autograd.grad(loss + penalty(loss, params), params)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
    trained(model, batches, precision="64-true")
    torch.testing.assert_close(flat(model.parameters()), flat(expected.parameters()), rtol=0, atol=10 * tolerance)


class Tracked(nn.Module):
    """Has dropout, batch norm and a metric."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.mean = MeanMetric()

    def forward(self, x):
        out = self.body(x)
        self.mean.update(out.detach())
        return out


def logged(m, batch):
    loss = m.loss(batch)
    m.log("train/loss", loss, on_step=False, on_epoch=True)
    return loss


@pytest.mark.parametrize("arguments", [{"engine": "exact"}, {"difference": "central", "relative_step": 1e-6}], ids=str)
def test_dropout_batch_norm_metrics_and_logs(arguments):
    """The masks are those of the loss; what is left behind is what plain steps on the same weights leave."""

    def step(m, batch):
        gradient_penalty_backward(m, lambda: logged(m, batch), C, **arguments)

    def by_hand(m, batch):
        loss = logged(m, batch)
        m.manual_backward(loss + penalty(loss, list(m.parameters())))

    runs = []
    for each in (step, by_hand):
        seed_everything(3, verbose=False)
        model = trained(Manual(each, Tracked), precision="64-true", log_every_n_steps=1)
        runs.append((model, model.trainer.callback_metrics["train/loss"], torch.rand(3)))
    (model, log, draw), (expected, expected_log, expected_draw) = runs
    assert_same_run(model, expected, 1e-7)
    torch.testing.assert_close(log, expected_log, rtol=0, atol=1e-7)
    assert torch.equal(draw, expected_draw)
    for found, right in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    assert model.net.mean.weight == expected.net.mean.weight == 4 * 24


@pytest.mark.parametrize("arguments", [{}, {"difference": "central"}, {"engine": "exact"}], ids=str)
def test_bf16(arguments):
    """Autocast is on within training_step, and keeps copies of the weights in bf16: those of the displaced ones."""

    def step(m, batch):
        assert torch.is_autocast_enabled("cpu")
        m.net(batch[0])  # fills autocast's cache
        gradient_penalty_backward(m, lambda: m.loss(batch), C, **arguments)

    model = Manual(step, lr=0.02)
    expected = written(model, lambda m, b: m.loss(b) + penalty(m.loss(b), list(m.parameters())))
    assert_same_run(trained(model, precision="bf16-mixed"), expected, 5e-2)


def test_an_autocast_of_ones_own():
    """Its precision, not the trainer's, decides how far to go."""

    def step(m, batch):
        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                return m.loss(batch)

        gradient_penalty_backward(m, loss, C)

    model = Manual(step, lr=0.02)
    expected = written(model, lambda m, b: m.loss(b) + penalty(m.loss(b), list(m.parameters())))
    assert_same_run(trained(model), expected, 5e-2)


def scaler(**options):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("arguments", [{}, {"difference": "central"}, {"engine": "exact"}], ids=str)
def test_fp16(arguments):
    """The gradients of training_step are scaled, those that the optimizer sees are not."""
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), C, **arguments), lr=0.1)
    expected = written(model, lambda m, b: m.loss(b) + penalty(m.loss(b), list(m.parameters())))
    model = trained(model, plugins=scaler(init_scale=2.0**10))
    model.gradients = [gradient / 2**10 for gradient in model.gradients]
    assert_same_run(model, expected, 2e-2)


@pytest.mark.parametrize("arguments", [{}, {"engine": "exact"}], ids=str)
def test_fp16_overflow_skips_the_step(arguments):
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), C, **arguments), lr=0.1)
    before = flat(model.parameters())
    plugin = scaler(init_scale=2.0**40, backoff_factor=2.0**-30)
    assert torch.equal(flat(trained(copy.deepcopy(model), data(1), plugins=plugin).parameters()), before)
    assert plugin.scaler.get_scale() == 2.0**10
    after = flat(trained(model, data(2), plugins=scaler(init_scale=2.0**40, backoff_factor=2.0**-30)).parameters())
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("engine", ["finite_difference", "exact"])
def test_no_coefficient_is_manual_backward(engine):
    with_, without = (
        trained(Manual(step, Tracked))
        for step in (
            lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), 0.0, engine=engine),
            lambda m, batch: m.manual_backward(m.loss(batch)),
        )
    )
    assert torch.equal(flat(with_.parameters()), flat(without.parameters()))


def test_returns_the_loss_alone():
    found = []

    def step(m, batch):
        found.append((gradient_penalty_backward(m, lambda: m.loss(batch), C), m.loss(batch)))

    trained(Manual(step))
    for loss, expected in found:
        assert not loss.requires_grad
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("engine", ["finite_difference", "exact"])
def test_nothing_is_added_where_the_gradient_is_zero(engine):
    def step(m, batch):
        gradient_penalty_backward(m, lambda: 0 * m.loss(batch), C, norm="norm", engine=engine)

    assert all(not gradient.any() for gradient in trained(Manual(step)).gradients)


def compiled():
    return torch.compile(mlp(4, 8, 3), backend=aot_eager)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ({"coefficient": -1.0}, {}, ValueError, "coefficient=-1.0 must be 0 or more"),
        ({"norm": "l1"}, {}, ValueError, "norm='l1' must be one of squared, norm"),
        ({"engine": "fd"}, {}, ValueError, "engine='fd' must be one of finite_difference, exact"),
        ({"engine": "auto"}, {}, ValueError, "engine='auto' must be one of finite_difference, exact"),
        ({"difference": "backward"}, {}, ValueError, "difference='backward' must be one of auto, forward, central"),
        ({"relative_step": 0}, {}, ValueError, r"relative_step=0 must lie in \(0, 1\): 'auto' takes"),
        (
            {},
            {"precision": "bf16-true"},
            MisconfigurationException,
            "far below the resolution of precision='bf16-true'",
        ),
    ],
)
def test_refusals(arguments, options, error, sentence):
    arguments = {"coefficient": C} | arguments
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), **arguments))
    with pytest.raises(error, match=sentence):
        trained(model, **options)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_exact_and_compiled():
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), C, engine="exact"), compiled)
    with pytest.raises(
        ValueError, match=r"torch\.compile does not differentiate twice; use engine='finite_difference'"
    ):
        trained(model)


def test_automatic_optimization_has_the_callback():
    model = Manual(None)
    model.automatic_optimization = True
    with pytest.raises(ValueError, match=r"Manual has automatic_optimization=True: add the callback GradientPenalty"):
        gradient_penalty_backward(model, lambda: model.loss(data()[0]), C)


def test_strategies_with_gradients_elsewhere():
    model = Manual(None)
    model.trainer = quiet_trainer()
    model.trainer._accelerator_connector.strategy = object.__new__(FSDPStrategy)
    with pytest.raises(MisconfigurationException, match=r"gradient_penalty_backward .* kept under FSDPStrategy: use a"):
        gradient_penalty_backward(model, lambda: model.loss(data()[0]), C)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, batch: m.loss((batch[0].mul_(0.9), batch[1])),
        lambda m, batch: m.loss((batch[0] + next(m.noise), batch[1])),
    ],
    ids=["edits its batch", "draws on its own"],
)
def test_a_loss_that_cannot_be_repeated(step):
    def repeated(m, batch):
        gradient_penalty_backward(m, lambda: step(m, batch), C)

    model = Manual(repeated)
    model.noise = iter(torch.linspace(0, 1, 10))
    sentence = r"(?s)gradient_penalty_backward: running loss_fn of Manual again .* another gradient.*use engine='exact'"
    with pytest.raises(RuntimeError, match=sentence):
        trained(model)

    def exact(m, batch):
        gradient_penalty_backward(m, lambda: step(m, batch), C, engine="exact")

    model = Manual(exact)
    model.noise = iter(torch.linspace(0, 1, 10))
    assert len(trained(model).gradients) == 4


def test_the_first_second_fourth_call_of_a_function_is_looked_at():
    calls = []

    def step(m, batch):
        def loss():
            calls.append(m.trainer.global_step)
            return (0.0 if m.trainer.global_step == 0 else 1.0) * m.loss(batch)  # the first gradient tells nothing

        gradient_penalty_backward(m, loss, C)

    trained(Manual(step))
    trained(Manual(step), data(1))  # another module, whose gradient is zero
    assert [calls.count(number) for number in range(4)] == [2, 3, 2, 3]


def test_a_graph_that_was_made_outside():
    def step(m, batch):
        logits = m.net(batch[0])
        gradient_penalty_backward(m, lambda: F.cross_entropy(logits, batch[1]), C)

    with pytest.raises(RuntimeError, match="a part of its graph was made outside: compute everything that depends on"):
        trained(Manual(step))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (lambda m: [], "none of the 0 params is trainable.* requires_grad=True"),
        (lambda m: [p.requires_grad_(False) for p in m.net[0].parameters()], "none of the 2 params is trainable"),
        (lambda m: m.optimizers().param_groups, r"got one with a dict: of an optimizer they are \[p for group in opt"),
        (lambda m: m.named_parameters(), "params must be a list of parameters, got one with a tuple"),
        (lambda m: m.net[0].weight, "params must be a list of parameters, got one with a Tensor"),
    ],
    ids=["none", "frozen", "groups", "named", "one"],
)
def test_params_of_another_kind(params, sentence):
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: m.loss(batch), C, params(m)))
    with pytest.raises(ValueError, match=sentence):
        trained(model)


def test_no_trainable_parameters():
    def step(m, batch):
        m.requires_grad_(False)
        gradient_penalty_backward(m, lambda: m.loss(batch), C)

    with pytest.raises(ValueError, match="none of the 4 params is trainable"):
        trained(Manual(step))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda loss: loss.expand(8), r"loss_fn must return a single number, got shape \(8,\): take the mean"),
        (lambda loss: {"loss": loss}, "loss_fn must return a single number, got a dict"),
    ],
)
def test_losses_of_another_kind(change, sentence):
    model = Manual(lambda m, batch: gradient_penalty_backward(m, lambda: change(m.loss(batch)), C))
    with pytest.raises(ValueError, match=sentence):
        trained(model)
