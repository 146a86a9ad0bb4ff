"""A run that is stopped anywhere, and again, ends as one that never was: steps, batches, validations, hooks, bits."""

import pytest
import torch
from chains import Runs
from lightning.pytorch import LightningModule

from lightning_plugins.data import Digits

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


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


def make():
    return Noisy(), Digits(image_size=8, batch_size=200, shift=1)  # 6 batches an epoch


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
def test_every_place(tmp_path, name):
    """Of every place where a checkpoint can be written."""
    runs = Runs(make, tmp_path, **SETTINGS[name])
    for path in runs.paths:
        runs.assert_resumes(path)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(5))
def test_chains(tmp_path, name, seed):
    Runs(make, tmp_path, **SETTINGS[name]).assert_chain(seed)
