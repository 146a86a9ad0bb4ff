"""ExactResume with modules, loaders and checkpoints of others."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from noisy import quiet_trainer
from torch.utils.data import DataLoader, IterableDataset
from toys import Squares, mlp

from lightning_plugins.callbacks import ExactResume, RandomState

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.*does not define a .val_dataloader",
    "ignore:You defined a .validation_step. but have no",
    "ignore:Your .IterableDataset. has .__len__. defined",
    "ignore:Length of IterableDataset",
    "ignore:Be aware that when using .ckpt_path., callbacks",
    "ignore:The dirpath has changed",
    "ignore:ReduceLROnPlateau conditioned on metric",
)


class Net(Squares):
    """Keeps what it has trained."""

    def __init__(self):
        super().__init__(mlp(4, 1, seed=0))
        self.events = []

    def training_step(self, batch, batch_idx):
        self.events.append((self.current_epoch, batch_idx))
        return self.loss(batch)

    def on_train_epoch_end(self):
        self.events.append(f"end of {self.current_epoch}")


class Plateau(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class Short(IterableDataset):
    """Gives six rows where it tells of eight."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(torch.eye(6, 4))


class Rows:
    """A loader with a place of its own; ``form`` makes a state of its epoch, counted from 1, and its place."""

    def __init__(self, form=lambda epoch, place: {"at": (epoch, place)}):
        self.form, self.epoch, self.place = form, 0, 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.epoch += self.place == 0
        while self.place < 6:
            self.place += 1
            yield torch.full((2, 4), float(self.place))
        self.place = 0

    def state_dict(self):
        return self.form(self.epoch, self.place)

    def load_state_dict(self, state):
        self.epoch, self.place = state["at"] if "at" in state else state.values() if isinstance(state, dict) else state


def shortened():
    return DataLoader(Short(), batch_size=2)


@pytest.mark.parametrize("callback", [ExactResume, RandomState])
def test_a_plateau_whose_metric_the_checkpoint_of_others_lacks(tmp_path, callback):
    rows = DataLoader(torch.eye(8, 4), batch_size=2), DataLoader(torch.eye(4), batch_size=2)
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/loss", save_top_k=-1)
    quiet_trainer(saver, max_epochs=3).fit(Plateau(), *rows)
    model, trainer = Plateau(), quiet_trainer(callback(), max_epochs=3)
    with pytest.warns(match="random numbers start afresh") if callback is RandomState else nullcontext():
        trainer.fit(model, *rows, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.global_step == 12 and next(event for event in model.events if event != "end of 0") == (1, 0)
    assert all(config.strict for config in trainer.lr_scheduler_configs)


@pytest.mark.parametrize("callback", [ExactResume, RandomState])
def test_an_epoch_that_ended_before_its_loader_said_is_over(tmp_path, callback):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = Net()
    quiet_trainer(callback(), saver, max_epochs=3).fit(whole, shortened())
    model = Net()
    quiet_trainer(callback(), max_epochs=3).fit(model, shortened(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [e for e in model.events if e != "end of 0"] == whole.events[4:]
    assert torch.equal(model.net[0].weight, whole.net[0].weight)


def test_random_states_of_such_an_epoch_are_not_those_of_the_next(tmp_path):
    class Drawing(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.rand(())

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    quiet_trainer(RandomState(), saver, max_epochs=2).fit(Drawing(), shortened())
    states = [torch.load(path, weights_only=True)["random_state"][0]["torch"] for path in tmp_path.glob("*.ckpt")]
    assert len({bytes(state.numpy()) for state in states}) == 6


@pytest.mark.parametrize(
    "form",
    [lambda epoch, place: {"epoch": epoch, "place": place}, lambda epoch, place: [epoch, place]],
    ids=["counts epochs from 1", "a list"],
)
def test_states_of_loaders_of_others(tmp_path, form):
    first = quiet_trainer(ExactResume(), max_steps=3, max_epochs=-1)
    first.fit(Net(), Rows(form))
    first.save_checkpoint(tmp_path / "a.ckpt")
    model = Net()
    quiet_trainer(ExactResume(), max_epochs=2).fit(model, Rows(form), ckpt_path=tmp_path / "a.ckpt")
    assert model.events[:4] == [(0, 3), (0, 4), (0, 5), "end of 0"]


class StopAfter(Callback):
    def __init__(self, batch_idx):
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx == self.batch_idx


def stopped(model, path, **settings):
    trainer = quiet_trainer(ExactResume(), StopAfter(2), max_epochs=1, min_epochs=0, **settings)
    trainer.fit(model, Rows())
    trainer.save_checkpoint(path)


def test_gradients_that_a_module_accumulates_by_hand(tmp_path):
    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    whole, model = ByHand(), ByHand()
    quiet_trainer(ExactResume(), max_epochs=1).fit(whole, Rows())
    stopped(ByHand(), tmp_path / "a.ckpt")
    quiet_trainer(ExactResume(), max_epochs=1).fit(model, Rows(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(model.net[0].weight, whole.net[0].weight)


def test_gradients_of_another_window_are_not_mixed_in(tmp_path):
    """A quarter's share of batch 2 is no half's: batch 3 makes the step alone."""
    stopped(Net(), tmp_path / "a.ckpt", accumulate_grad_batches=4)
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(module.net[0].bias.grad.clone())

    model = Net()
    trainer = quiet_trainer(ExactResume(), Watch(), max_epochs=1, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="in the middle of 2 accumulated batches, without their gradients"):
        trainer.fit(model, Rows(), ckpt_path=tmp_path / "a.ckpt")
    fresh = Net()
    (fresh.net(torch.full((2, 4), 4.0)).square().mean() / 2).backward()
    assert torch.allclose(seen[0], fresh.net[0].bias.grad, rtol=1e-5)
