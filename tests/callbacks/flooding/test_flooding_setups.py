"""Flooding in runs and modules of others: what works, what is refused, and what is left behind."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from toys import Bert, Squares, weights
from trainers import fit

from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.callbacks.flooding.loss import flood
from lightning_plugins.callbacks.gradient_penalty.callback import GradientPenalty

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.training_step. returned .None.",
    "ignore:.*dataloader_iter",
)


def boring():
    return BoringModel(), [torch.randn(4, 32) for _ in range(8)]


def bert():
    batches = [{"input_ids": torch.randint(40, (4, 12)), "labels": torch.randint(2, (4,))} for _ in range(8)]
    return Bert(), batches


class Transformer(LightningTransformer):
    prepare_data = LightningModule.prepare_data  # its own downloads a text


def transformer():
    return Transformer(vocab_size=20), [tuple(torch.randint(20, (2, 2, 10))) for _ in range(8)]


def trained(model, *callbacks, data=None, lr=0.1, optimizer=torch.optim.SGD, **options):
    def configure_optimizers():
        return optimizer(model.parameters(), lr=lr)

    model.configure_optimizers = configure_optimizers
    for name in ("validation_step", "train_dataloader", "val_dataloader"):
        setattr(model, name, None)
    seed_everything(0, verbose=False)
    data = boring()[1] if data is None else data
    return fit(model, data, *callbacks, **({"log_every_n_steps": 1} | options))


def assert_ascends(build, scope="step", optimizer=torch.optim.SGD, **options):
    """With a level above every loss it trains bit for bit as torch's own ``maximize=True``."""
    runs = []
    for callbacks, maximize in [([Flooding(1e6, scope)], False), ([], True)]:
        seed_everything(1, verbose=False)
        model = build()
        trained(model, *callbacks, optimizer=partial(optimizer, maximize=maximize), **options)
        runs.append(weights(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [boring, bert, transformer])
def test_modules_of_others(build, accumulate):
    """As a loop that calls their training_step and differentiates the written objective.

    In float64: eight steps of a transformer blow roundings up by a factor of a million.
    """
    torch.set_num_threads(1)
    levels = {boring: 2.0, bert: 0.69, transformer: 3.1}
    seed_everything(1, verbose=False)
    model, data = build()
    expected = type(model)(20) if build is transformer else type(model)()
    expected.load_state_dict(model.state_dict())
    expected.double()
    double, signs = DoublePrecision(), []

    class Signs(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            signs.append(trainer.callbacks[0].sign.item())

    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "precision": "64-true"}
    trained(model, Flooding(levels[build]), Signs(), data=data, **options)
    seed_everything(0, verbose=False)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=None)
    for _ in range(2):
        losses = []
        for index, batch in enumerate(loader):
            with double.forward_context():
                output = expected.train().training_step(double.convert_input(batch), index)
            losses.append(output["loss"] if isinstance(output, dict) else output)
            if len(losses) == accumulate:
                optimizer.zero_grad()
                ((torch.stack(losses).mean() - levels[build]).abs() + levels[build]).backward()
                optimizer.step()
                losses = []
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-8)
    assert set(signs) == {1, -1}


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_batches_without_a_loss(scope):
    """A window of which one batch, or all, are left out."""
    signs = []

    class Skips(BoringModel):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 2, 3, 4) else super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            signs.extend(c.sign.item() for c in self.trainer.callbacks if isinstance(c, Flooding))

    assert_ascends(Skips, scope, accumulate_grad_batches=2)
    assert signs == ([-1, 1, -1, -1] if scope == "step" else [1] * 4)


def test_a_window_that_is_broken_off_leaves_nothing_behind():
    class Stops(BoringModel):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    number = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            number.append(len(trainer.callbacks[0]._recorder.losses))

    trained(Stops(), Flooding(0.1), Look(), max_epochs=2, accumulate_grad_batches=2)
    assert number == [2] * 5


def test_sparse_gradients():
    def words():
        return Squares(nn.Embedding(10, 3, sparse=True))

    assert_ascends(words, data=[torch.tensor([1, 2, 2]), torch.tensor([5, 1, 9])])


def test_a_module_that_draws_its_own_batches():
    class Draws(BoringModel):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.step(batch)

    assert_ascends(Draws)


def test_an_optimizer_that_unscales_by_itself():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    assert_ascends(BoringModel, optimizer=partial(torch.optim.SGD, fused=True), plugins=[plugin], lr=0.01)


def test_order_of_callbacks():
    class Other(Callback):
        pass

    given = [GradientPenalty(0.1), Other(), Flooding(0.1)]
    trainer = trained(BoringModel(), *given)
    assert trainer.callbacks[:3] == [given[2], given[1], given[0]]


def test_one_callback_serves_two_runs():
    flooding = Flooding(1e6)
    for _ in range(2):
        model = BoringModel()
        trained(model, flooding, data=[torch.ones(4, 32)])
        assert "training_step" not in vars(model)
        assert flooding.sign == -1


def test_training_step_is_given_back_after_an_error():
    class Fails(BoringModel):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    model = Fails()
    with pytest.raises(KeyError, match="mine"):
        trained(model, Flooding(0.1))
    assert "training_step" not in vars(model)


class TwoGradients(torch.optim.SGD):
    """Evaluates the closure twice, as SAM does."""

    def step(self, closure):
        closure()
        return super().step(closure)


def test_optimizers_that_evaluate_several_gradients():
    with pytest.raises(MisconfigurationException, match=r"Flooding.*one gradient for each optimizer step"):
        trained(BoringModel(), Flooding(0.1), optimizer=TwoGradients)
    assert_ascends(BoringModel, "microbatch", TwoGradients)


def test_lbfgs_is_refused():
    with pytest.raises(MisconfigurationException, match=r"Flooding.*LBFGS.*use an optimizer such as SGD or AdamW"):
        trained(BoringModel(), Flooding(0.1), optimizer=torch.optim.LBFGS)


def test_an_optimizer_in_the_backward_pass_is_refused():
    model = BoringModel()
    model.layer.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(MisconfigurationException, match=r"Flooding changes gradients before.*remove them"):
        trained(model, Flooding(0.1))


def test_manual_optimization_is_refused():
    model = BoringModel()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"automatic_optimization=False: call flood\(losses, level\)"):
        trained(model, Flooding(0.1))


def test_two_are_refused():
    with pytest.raises(MisconfigurationException, match=r"Only one Flooding in a trainer, .*: remove one"):
        trained(BoringModel(), Flooding(0.1), Flooding(0.2, "microbatch"))


class Mine(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, Mine])
def test_strategies_with_gradients_elsewhere_are_refused(strategy):
    flooding = Flooding(0.1)
    trainer = SimpleNamespace(callbacks=[flooding], strategy=object.__new__(strategy), optimizers=[])
    with pytest.raises(MisconfigurationException, match=rf"gradients are kept under {strategy.__name__}: use a single"):
        flooding.on_fit_start(trainer, BoringModel())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "Give either level or level_schedule, got level=None and level_schedule=None"),
        ({"level": 0.1, "level_schedule": [[0, 0.1]]}, "Give either level or level_schedule"),
        ({"level": math.nan}, "level=nan must be a finite number: it is in units of the loss, -inf is for none"),
        ({"level": math.inf}, "level=inf must be a finite number"),
        ({"level": True}, "level=True must be a finite number"),
        ({"level": "low"}, "level='low' must be a finite number"),
        ({"level": 0.1, "scope": "batch"}, "scope='batch' must be one of step, microbatch"),
        ({"level": 0.1, "start": "later"}, "start='later' must be 'immediately', 'epoch N' or 'step N'"),
        ({"level": 0.1, "start": "epoch -1"}, "start='epoch -1' must be .*"),
        ({"level": 0.1, "start": 5}, "start=5 must be a text"),
        ({"level_schedule": [[5, 0.1], [5, 0.2]]}, "level_schedule=.* must be pairs .* with growing steps"),
        ({"level_schedule": [[0, -math.inf], [5, 0.2]]}, "level_schedule=.* must have finite levels.*start='step N'"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Flooding(**arguments)


def test_numbers_of_numpy():
    assert Flooding(np.float32(0.5)).level == 0.5
    losses = torch.tensor([0.25, 1.0])
    assert flood(losses, np.float32(0.5), "sample") == flood(losses, 0.5, "sample")


def test_arguments_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Flooding, "flooding")
    text = "flooding:\n  level_schedule: [[0, 1.0], [500, 0.1]]\n  scope: microbatch\n  start: epoch 2\n"
    flooding = parser.instantiate_classes(parser.parse_string(text)).flooding
    assert flooding.level_at(SimpleNamespace(current_epoch=2, global_step=250)) == pytest.approx(0.55)
    assert flooding.level_at(SimpleNamespace(current_epoch=1, global_step=250)) == -math.inf
    off = parser.instantiate_classes(parser.parse_string("flooding: {level: -.inf}")).flooding
    assert off.level == -math.inf


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_the_epoch_for_the_statistics_of_batch_norm_is_left_alone(scope):
    """Stochastic weight averaging: the step at its end has gradients of the last epoch, with its sign already."""
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    signs, found = [], []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            signs.append(trainer.callbacks[1].sign.item())
            found.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    normed = Squares(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)))
    trained(normed, averaging, Flooding(1e6, scope), Look(), data=data, max_epochs=3, lr=0.01)
    assert len(found) == 3 * 3 + 1  # the last is that of the added epoch
    assert signs[-1] == 1
    assert torch.equal(found[-1], found[-2])


def test_a_step_in_which_no_parameter_has_a_gradient():
    class Constant(BoringModel):
        def training_step(self, batch, batch_idx):
            return torch.ones((), requires_grad=True) * 2

    model = Constant()
    before = weights(model)
    trained(model, Flooding(5.0))
    assert torch.equal(weights(model), before)


def test_other_devices_are_refused():
    flooding, strategy = Flooding(0.1), SingleDeviceStrategy(torch.device("mps"))
    trainer = SimpleNamespace(callbacks=[flooding], strategy=strategy, optimizers=[])
    with pytest.raises(MisconfigurationException, match=r"Flooding sums in double.* cpu and cuda, not on 'mps': use"):
        flooding.on_fit_start(trainer, BoringModel())


class Tied(Squares):
    """A weight that is used twice, and listed twice in the optimizer's group."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3, bias=False))
        self.twin = nn.Linear(3, 3, bias=False)
        self.twin.weight = self.net.weight

    def loss(self, batch):
        return (self.twin(self.net(batch)) - batch).square().mean() - 0.5

    def configure_optimizers(self):
        return torch.optim.SGD([self.net.weight, self.twin.weight], lr=0.05)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("level", [100.0, 0.3])
def test_tied_weights_that_are_listed_twice_are_turned_once(scope, level):
    """As a loop on the written objective, whose optimizer steps such a weight twice as well."""
    seed_everything(0, verbose=False)
    model = Tied().double()
    expected, data = copy.deepcopy(model), [torch.randn(4, 3).double() for _ in range(8)]
    fit(model, data, Flooding(level, scope), precision="64-true")
    optimizer, ascends = expected.configure_optimizers(), []
    for batch in data:
        loss = expected.loss(batch)
        ascends.append(loss.item() < level)
        optimizer.zero_grad()
        ((loss - level).abs() + level).backward()
        optimizer.step()
    assert any(ascends)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("climbs", ["all", "one group"])
def test_an_optimizer_that_climbs_is_refused(scope, climbs):
    """Reflecting at a level from below would keep what is maximised away from it."""

    def sgd(params, lr):
        first, *rest = params
        return torch.optim.SGD(
            [{"params": [first], "maximize": climbs == "all"}, {"params": rest, "maximize": True}], lr
        )

    model = BoringModel()
    before = weights(model)
    with pytest.raises(MisconfigurationException, match=r"SGD has maximize=True: .* minus that objective.* minus the"):
        trained(model, Flooding(0.1, scope), optimizer=sgd)
    assert torch.equal(weights(model), before)
