"""What is not finite by intention, or harms nothing, does not stop a run under NonFiniteGuard."""

import math

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision
from toys import Squares, mlp
from trainers import fit

from lightning_plugins import NonFiniteGuard

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.training_step. returned .None.",
    "ignore:Sparse CSR tensor support is in beta state",
    "ignore:Lazy modules are a new feature",
)


class Net(Squares):
    def __init__(self):
        super().__init__(mlp(4, 1, seed=0))


def batches():
    return list(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).split(2))


class Banned(Net):
    """A weight that is minus infinity by intention, as of a token that is never to be drawn."""

    def __init__(self, value=-math.inf):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.0, 0.0, value]))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.bias.softmax(0).square().sum()


class Huge(Banned):
    """A weight whose square overflows."""

    def __init__(self):
        super().__init__(-1e30)


class FilledAtStart(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def on_train_start(self):
        self.seen.fill_(math.nan)


class InNoCheckpoint(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(3), persistent=False)

    def on_train_batch_end(self, *_):
        self.last.fill_(math.nan)


class SparseBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("neighbours", torch.eye(3).to_sparse_csr())


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 1))


@pytest.mark.parametrize("make", [Banned, Huge, FilledAtStart, InNoCheckpoint, SparseBuffer, Lazy])
def test_checkpoints_of_healthy_modules_are_written(make, tmp_path):
    trainer = fit(make(), batches(), NonFiniteGuard())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.global_step == 6 and (tmp_path / "a.ckpt").exists()


def test_gradients_whose_squares_overflow_are_finite():
    class Large(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e20

    clipped = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    assert fit(Large(), batches(), NonFiniteGuard(), **clipped).global_step == 6


def test_a_line_search_may_try_what_is_not_finite():
    """f = exp(100 p) + exp(-p) from p = -5: the search's first point has an infinite value."""

    class Steep(Net):
        values: list

        def __init__(self):
            super().__init__()
            self.values = []
            self.point = nn.Parameter(torch.tensor(-5.0))

        def training_step(self, batch, batch_idx):
            loss = (100 * self.point).exp() + (-self.point).exp()
            self.values.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.LBFGS([self.point], lr=10, max_iter=6, line_search_fn="strong_wolfe")

    model = Steep()
    fit(model, [torch.ones(2, 4)], NonFiniteGuard())
    assert math.inf in model.values and model.point.isfinite()


class Listing(Net):
    """Metrics that keep every prediction in a list, called as functions."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad
        self.scores = MetricCollection([BinaryAUROC(), BinaryAveragePrecision()])

    def training_step(self, batch, batch_idx):
        out = self.net(batch).flatten()
        self.scores(out.detach().sigmoid(), torch.tensor([0, 1]))
        return out.square().mean() * (math.nan if batch_idx == self.bad else 1)

    def on_train_epoch_end(self):
        self.counts = [sum(map(len, score.preds)) for score in self.scores.values()]
        self.scores.reset()


@pytest.mark.parametrize("bad", [0, 3, 5])
@pytest.mark.filterwarnings("ignore:NonFiniteGuard")
def test_lists_of_metrics_keep_the_other_batches(bad):
    model = Listing(bad)
    fit(model, batches(), NonFiniteGuard(policy="skip"))
    assert model.counts == [10, 10]


@pytest.mark.filterwarnings("ignore:NonFiniteGuard has left out")
def test_a_window_begins_anew_after_a_verdict():
    """The first batch of the second window gives no loss: that of the bad window is not looked at again."""

    class Gaps(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                return None
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 0 else 1)

    guard = NonFiniteGuard(policy="skip")
    with pytest.warns(UserWarning, match="NonFiniteGuard: in step 0"):
        fit(Gaps(), batches(), guard, accumulate_grad_batches=2)
    assert guard.skipped == 1


def test_no_batch_is_held_between_steps():
    guard = NonFiniteGuard()

    class Held(Net):
        def on_train_batch_start(self, batch, batch_idx):
            held.append(guard._batch[1] is batch)

    held = []
    fit(Held(), batches(), guard)
    assert held == [True] * 6 and guard._batch == (5, None)


@pytest.mark.filterwarnings("ignore:NonFiniteGuard")
def test_sparse_batches_can_be_reported():
    class Sparse(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.to_dense(), batch_idx) * (math.nan if batch_idx == 1 else 1)

    guard = NonFiniteGuard(policy="skip")
    fit(Sparse(), [torch.eye(4).to_sparse() for _ in range(4)], guard)
    assert guard.skipped == 1


class Ignoring(Net):
    """Every label of some batches is to be ignored: their loss is 0 / 0, its gradient 0."""

    def __init__(self, ignored):
        super().__init__()
        self.net, self.ignored = nn.Linear(4, 3), ignored

    def training_step(self, batch, batch_idx):
        label = torch.full((len(batch),), -100 if batch_idx in self.ignored else 1)
        return nn.functional.cross_entropy(self.net(batch), label)


def test_a_loss_without_consequence_is_told_once():
    model, plain = Ignoring({1, 3}), Ignoring({1, 3})
    with pytest.warns(UserWarning, match="the loss is not finite") as told:
        assert fit(model, batches(), NonFiniteGuard()).global_step == 6
    fit(plain, batches())
    assert sum("NonFiniteGuard" in str(warning.message) for warning in told) == 1
    assert torch.equal(model.net.weight, plain.net.weight) and model.net.weight.isfinite().all()


def test_losses_that_are_never_finite_end_the_run():
    with pytest.warns(UserWarning), pytest.raises(FloatingPointError, match="It is step 3 in a row"):
        fit(Ignoring(set(range(6))), batches(), NonFiniteGuard(patience=2))
