"""Which checkpoint a run was given is known before Lightning reads it."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_plugins.core.lightning_internals import checkpoint_to_load

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
ENTRIES = ("fit", "validate", "test", "predict")


class Curious(LightningModule):
    """Notes what it is told where networks are built, and in ``setup``."""

    def __init__(self, other=None):
        super().__init__()
        self.layer, self.other, self.told = nn.Linear(1, 1), other, []

    def note(self):
        trainer = self._trainer if self.other is None else self.other
        self.told.append(checkpoint_to_load(trainer))

    def setup(self, stage):
        self.note()

    def configure_model(self):
        self.note()

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    validation_step = test_step = predict_step = training_step

    def train_dataloader(self):
        return DataLoader(torch.zeros(1, 1))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_in(folder, max_epochs=1):
    return Trainer(accelerator="cpu", max_epochs=max_epochs, default_root_dir=folder, **QUIET)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer = trainer_in(folder)
    trainer.fit(Curious())
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_path_is_known_before_it_is_read(tmp_path, checkpoint, entry):
    module = Curious()
    getattr(trainer_in(tmp_path, 2), entry)(module, ckpt_path=checkpoint, weights_only=True)
    assert module.told == [str(checkpoint)] * 2


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_checkpoint_there_is_none(tmp_path, entry):
    module = Curious()
    getattr(trainer_in(tmp_path), entry)(module)
    assert module.told == [None, None]


def test_another_trainers_run_is_not_meant(tmp_path, checkpoint):
    module = Curious(other=trainer_in(tmp_path))
    trainer_in(tmp_path).validate(module, ckpt_path=checkpoint, weights_only=True)
    assert module.told == [None, None]


def test_outside_of_a_run_there_is_none(tmp_path):
    assert checkpoint_to_load(None) is None
    assert checkpoint_to_load(trainer_in(tmp_path)) is None
