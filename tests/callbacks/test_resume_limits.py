"""Resumes that cannot be exact say so; loaders of others; counters that Lightning left behind."""

import pytest
import torch
from chains import Runs, StoppedError, quiet
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from noisy import Break, Counting, Noisy, digits, quiet_trainer
from torch.utils.data import DataLoader, Dataset

from lightning_plugins import Flooding
from lightning_plugins.callbacks import ExactResume, RandomState
from lightning_plugins.core.lightning_internals import fit_progress, read_place
from lightning_plugins.data import Digits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def one_thread(clean_process):
    torch.set_num_threads(1)
    quiet()


class SaveOnException(Checkpoint):
    def on_exception(self, trainer, *_):
        trainer.save_checkpoint("broken.ckpt")


def broken_run(*callbacks, data=None, **settings):
    """The checkpoint of a run that an exception ended."""
    seed_everything(1, verbose=False)
    trainer = quiet_trainer(RandomState(), *callbacks, SaveOnException(), max_epochs=2, **settings)
    with pytest.raises(StoppedError):
        trainer.fit(Counting(), data or digits())
    return "broken.ckpt"


def test_in_the_middle_of_a_step_no_batch_is_left_out():
    path = broken_run(Break("on_before_backward", 8))
    seed_everything(99, verbose=False)
    model, trainer = Counting(), quiet_trainer(RandomState(), max_epochs=2)
    with pytest.warns(UserWarning, match="after batch 2 of epoch 1, in the middle of a training step that did not end"):
        trainer.fit(model, digits(), ckpt_path=path)
    assert trainer.global_step == 12
    assert [row[:2] for row in model.seen] == [(epoch, batch) for epoch in range(2) for batch in range(6)]
    assert len({row[3] for row in model.seen[6:]}) == 6


def test_between_accumulated_batches_a_callback_that_must_see_them_all():
    path = broken_run(Break("on_validation_end", 1), accumulate_grad_batches=2, val_check_interval=3)
    trainer = quiet_trainer(RandomState(), Flooding(0.1), max_epochs=1, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="in the middle of 2 accumulated batches, which Flooding must see together"):
        trainer.fit(Noisy(), digits(), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["accumulated_gradients"]  # as Lightning alone writes it
    torch.save(checkpoint, path)
    trainer = quiet_trainer(ExactResume(), max_epochs=1, accumulate_grad_batches=2)
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
    trainer = quiet_trainer(RandomState(), max_epochs=1)
    with pytest.warns(UserWarning, match="a DataLoader cannot go on there: the rest of the epoch is of a new order"):
        trainer.fit(Noisy(), Loaders(torch_loader), ckpt_path=path)


def test_workers_that_live_on_are_named():
    def persistent():
        return torch_loader(1, persistent_workers=True)

    path = broken_run(Break("on_train_epoch_start", 5), data=Loaders(persistent))
    trainer = quiet_trainer(RandomState(), max_epochs=2, limit_val_batches=0)
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
    trainer = quiet_trainer(*callbacks, saver, **settings)
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
