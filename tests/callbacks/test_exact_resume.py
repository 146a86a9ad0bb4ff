"""A run that is stopped anywhere, and again, ends as one that never was: steps, batches, validations, hooks, bits."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from chains import Runs, Stopped, quiet
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, Dataset

from lightning_plugins import Flooding
from lightning_plugins.callbacks import ExactResume, RandomState
from lightning_plugins.core.lightning_internals import fit_progress, read_place
from lightning_plugins.data import Digits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("one_thread"),
]
CHAINS = int(os.environ.get("CHAINS", "2"))  # `make test-chains` runs more


@pytest.fixture
def one_thread(clean_process):
    torch.set_num_threads(1)
    quiet()


class Noisy(LightningModule):
    """Draws everywhere, and keeps statistics of its batches."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 10)
        )

    def on_train_epoch_start(self):
        self.scale = 0.1 * torch.rand(())

    def training_step(self, batch, batch_idx):
        x = batch["image"].flatten(1) + 0.1 * torch.rand(()) * torch.randn(64)
        return torch.nn.functional.cross_entropy(self.net(x), batch["label"])

    def validation_step(self, batch, batch_idx):
        noise = torch.rand(())
        self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch["image"].flatten(1)), batch["label"]))
        self.log("val/noise", noise)

    def on_train_epoch_end(self):
        torch.rand(())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


class OnPlateau(Noisy):
    """Its rate follows the validation, epoch by epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


def digits():
    return Digits(image_size=8, batch_size=200, shift=1)  # 6 batches an epoch


def noisy():
    return Noisy(), digits()


SETTINGS = {
    "plain": {},
    "validation": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "uneven": {"accumulate_grad_batches": 4, "val_check_interval": 0.5, "limit_train_batches": 5},
    "steps": {"max_steps": 17, "max_epochs": -1},
    "seldom": {"check_val_every_n_epoch": 2},
    "none": {"limit_val_batches": 0},
    "total": {"check_val_every_n_epoch": None, "val_check_interval": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_place_and_chains_of_them(tmp_path, name):
    """Checkpoints of every hook, each resumed to the end; and some of the endless chains."""
    runs = Runs(noisy, tmp_path, **SETTINGS[name])
    for path in runs.paths[:: max(1, 4 // CHAINS)]:
        runs.assert_resumes(path)
    for seed in range(CHAINS):
        runs.assert_chain(seed)


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}], ids=["epochs", "steps"])
def test_schedulers_that_watch_a_metric(tmp_path, settings):
    """Lightning leaves out their look at an epoch that was resumed, and at the one before."""
    runs = Runs(lambda: (OnPlateau(), digits()), tmp_path, max_epochs=4, **settings)
    for path in runs.paths[::3]:
        runs.assert_resumes(path)


def test_a_run_that_has_nothing_to_do_loses_nothing(tmp_path):
    """Resumed where it is to end, between accumulated batches, saved again, and resumed to the end."""
    runs = Runs(noisy, tmp_path, accumulate_grad_batches=2, max_epochs=2)
    (path,) = tmp_path.glob("001/002-*")  # after three batches
    runs.settings["max_steps"] = 1
    run, _, _ = runs.run(path, seed=98, saves=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    del runs.settings["max_steps"]
    runs.assert_resumes(tmp_path / "again.ckpt")


# Who writes the checkpoint.


class Break(Callback):
    """Breaks the run off in a hook of a chosen step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.global_step >= self.step and not trainer.sanity_checking:
            raise Stopped


WRITERS = {
    "every_n_train_steps": {"every_n_train_steps": 3},
    "last_batch": {"every_n_train_steps": 6, "save_last": True},
    "train_epoch_end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation_end": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "monitor": {"monitor": "val/loss", "save_last": True},
    "time": {"train_time_interval": timedelta(0)},
    "exception": {"save_on_exception": True, "every_n_train_steps": 100},
}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_model_checkpoint_writes(tmp_path, writer, hook):
    """In each of its ways; two runs are broken off, the third reaches the end."""
    whole = fit(tmp_path / "whole", writer, None)
    path = None
    for step in (7, 13):
        folder = tmp_path / f"{step}"
        with pytest.raises(Stopped):
            fit(folder, writer, path, Break(hook, step))
        path = max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    resumed = fit(tmp_path / "end", writer, path)
    assert resumed.seen == whole.seen
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


class Counting(Noisy):
    """Its checkpoints hold the batches that were trained."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, self.global_step, batch["image"].sum().item()))

    def on_save_checkpoint(self, checkpoint):
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current
        checkpoint["seen"] = list(self.seen)
        if batches.completed < batches.processed:  # callbacks save before this module's own hook
            checkpoint["seen"] += [(self.current_epoch, batches.completed, self.global_step, self.now)]

    def training_step(self, batch, batch_idx):
        self.now = batch["image"].sum().item()
        return super().training_step(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint):
        self.seen = [tuple(row) for row in checkpoint["seen"]]


def fit(folder, writer, path, *callbacks):
    seed_everything(1 if path is None else 99, verbose=False)
    model = Counting()
    saver = ModelCheckpoint(folder, "{step}-{epoch}", **WRITERS[writer])
    trainer = quiet_trainer(callbacks=[RandomState(), *callbacks, saver], max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`|The dirpath has changed")
        trainer.fit(model, digits(), ckpt_path=path)
    return model


def quiet_trainer(**settings):
    base = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**(base | {"num_sanity_val_steps": 0} | settings))


# What is said.


class SaveOnException(Checkpoint):
    def on_exception(self, trainer, *_):
        trainer.save_checkpoint("broken.ckpt")


def broken_run(*callbacks, data=None, **settings):
    """The checkpoint of a run that an exception ended."""
    seed_everything(1, verbose=False)
    trainer = quiet_trainer(callbacks=[RandomState(), *callbacks, SaveOnException()], max_epochs=2, **settings)
    with pytest.raises(Stopped):
        trainer.fit(Counting(), data or digits())
    return "broken.ckpt"


def test_in_the_middle_of_a_step_no_batch_is_left_out():
    path = broken_run(Break("on_before_backward", 8))
    seed_everything(99, verbose=False)
    model, trainer = Counting(), quiet_trainer(callbacks=[RandomState()], max_epochs=2)
    with pytest.warns(UserWarning, match="after batch 2 of epoch 1, in the middle of a training step that did not end"):
        trainer.fit(model, digits(), ckpt_path=path)
    assert trainer.global_step == 12
    assert [row[:2] for row in model.seen] == [(epoch, batch) for epoch in range(2) for batch in range(6)]
    assert len({row[3] for row in model.seen[6:]}) == 6


def test_between_accumulated_batches_a_callback_that_must_see_them_all():
    path = broken_run(Break("on_validation_end", 1), accumulate_grad_batches=2, val_check_interval=3)
    trainer = quiet_trainer(callbacks=[RandomState(), Flooding(0.1)], max_epochs=1, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="in the middle of 2 accumulated batches, which Flooding must see together"):
        trainer.fit(Noisy(), digits(), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["accumulated_gradients"]  # as Lightning alone writes it
    torch.save(checkpoint, path)
    trainer = quiet_trainer(callbacks=[ExactResume()], max_epochs=1, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="in the middle of 2 accumulated batches, without their gradients"):
        trainer.fit(Noisy(), digits(), ckpt_path=path)


# Loaders of others.


class Rows(Dataset):
    """Pictures with noise that whoever loads them draws."""

    def __init__(self, noise=0.1):
        self.noise = noise
        self.images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"image": self.images[index] + (self.noise and self.noise * torch.rand(())), "label": index % 10}


class Lazy:
    """A loader that starts where it was told to, whatever the epoch."""

    def __init__(self):
        self.loader, self.start, self.done = DataLoader(Rows(0.0), 4, generator=torch.Generator()), 0, 0

    def __len__(self):
        return 5

    def __iter__(self):
        start, self.start, self.done = self.start, 0, 0
        for number, batch in enumerate(self.loader):
            self.done = number + 1
            if number >= start:
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = state["done"]


class Loaders(LightningDataModule):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()

    def val_dataloader(self):
        return DataLoader(Rows(), 10)


def torch_loader(workers=0, seed=None, **options):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(Rows(), 4, shuffle=True, num_workers=workers, generator=generator, **options)


LOADERS = {
    "torch": torch_loader,
    "workers": lambda: torch_loader(1),
    "generator": lambda: torch_loader(seed=5),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_torch_loader_goes_on_at_the_end_of_an_epoch(tmp_path, name):
    """Also with random numbers drawn by its workers, and from a checkpoint in the middle of the validation."""
    runs = Runs(lambda: (Noisy(), Loaders(LOADERS[name])), tmp_path)
    places = [(read_place(fit_progress(torch.load(path, weights_only=True))), path) for path in runs.paths]
    paths = [path for place, path in places if place.is_last or not place.batches]
    for path in paths[:: 2 if name == "torch" else 5]:
        runs.assert_resumes(path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_torch_loader_cannot_go_on_in_mid_epoch():
    path = broken_run(Break("on_train_batch_end", 2), data=Loaders(torch_loader))
    trainer = quiet_trainer(callbacks=[RandomState()], max_epochs=1)
    with pytest.warns(UserWarning, match="a DataLoader cannot go on there: the rest of the epoch is of a new order"):
        trainer.fit(Noisy(), Loaders(torch_loader), ckpt_path=path)


def test_workers_that_live_on_are_named():
    def persistent():
        return torch_loader(1, persistent_workers=True)

    path = broken_run(Break("on_train_epoch_start", 5), data=Loaders(persistent))
    trainer = quiet_trainer(callbacks=[RandomState()], max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="Set persistent_workers=False"):
        trainer.fit(Noisy(), Loaders(persistent), ckpt_path=path)


def test_a_loader_with_a_state_of_its_own(tmp_path):
    """Its state is of the middle of an epoch: given at the end of one, the next would be empty."""
    runs = Runs(lambda: (Noisy(), Loaders(Lazy)), tmp_path, max_steps=14, max_epochs=-1)
    for path in runs.paths[::2]:
        runs.assert_resumes(path)


# Counters that Lightning left behind.


def plain_fit(folder, path=None, callbacks=(), **settings):
    model = Steps()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    settings = {"limit_train_batches": 4, "limit_val_batches": 0, "max_epochs": 3} | settings
    trainer = quiet_trainer(callbacks=[*callbacks, saver], **settings)
    trainer.fit(model, Boring(), ckpt_path=path)
    return model.steps, trainer.global_step


class Steps(BoringModel):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class Boring(Digits):
    """Digits as rows of 32 numbers."""

    def __init__(self):
        super().__init__(image_size=8, batch_size=100)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch["image"].flatten(1)[:, :32]


@pytest.mark.parametrize("callbacks", [[], [ExactResume()]], ids=["Lightning", "ExactResume"])
def test_a_chain_that_lightning_loses_count_of(tmp_path, callbacks):
    """From an epoch's last batch, then from the middle of the next: 4 batches are trained twice by Lightning 2.6."""
    plain_fit(tmp_path, max_steps=4)
    plain_fit(tmp_path, tmp_path / "step=4.ckpt", max_steps=6)
    assert plain_fit(tmp_path, tmp_path / "step=6.ckpt", callbacks=callbacks) == ((6, 12) if callbacks else (8, 14))
