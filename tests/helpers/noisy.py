"""A module that draws random numbers everywhere, and how it is trained and broken off."""

from functools import partial

import torch
import trainers
from chains import StoppedError
from lightning.pytorch import Callback, LightningModule

from lightning_plugins.data import Digits


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


class Break(Callback):
    """Breaks the run off in a hook of a chosen step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.global_step >= self.step and not trainer.sanity_checking:
            raise StoppedError


def digits():
    return Digits(image_size=8, batch_size=200, shift=1)  # 6 batches an epoch


quiet_trainer = partial(trainers.quiet_trainer, num_sanity_val_steps=0)  # it would draw
