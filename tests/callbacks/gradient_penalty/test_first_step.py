"""How the automatic step is chosen, and the first step's look at whether it resolves the curvature."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from trainers import fit

from lightning_plugins import GradientPenalty


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
    [({}, 1e-4), ({"half": True}, 3e-2), ({"activation": torch.relu}, 3e-2), ({"activation": F.gelu}, 1e-4)],
)
def test_the_automatic_step_follows_the_loss(module, step):
    penalty = GradientPenalty(0.1)
    trainer = fit(Classifier(**module), batches(), penalty, log_every_n_steps=1)
    assert trainer.callback_metrics["igr/relative_step"] == pytest.approx(step)


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

    with pytest.warns(UserWarning, match="It may have kinks: 0.03 is taken"):
        trainer = fit(NearKinks(), batches(), GradientPenalty(0.1), log_every_n_steps=1)
    assert trainer.callback_metrics["igr/relative_step"] == pytest.approx(3e-2)


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
