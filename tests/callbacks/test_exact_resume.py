"""A run that is stopped anywhere, and again, ends as one that never was: steps, batches, validations, hooks, bits."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from chains import Runs, StoppedError, quiet
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from noisy import Break, Counting, Noisy, digits, quiet_trainer

from lightning_plugins.callbacks import RandomState

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("one_thread"),
]
CHAINS = int(os.environ.get("CHAINS", "2"))  # `make test-chains` runs more


@pytest.fixture
def one_thread(clean_process):
    torch.set_num_threads(1)
    quiet()


class OnPlateau(Noisy):
    """Its rate follows the validation, epoch by epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


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
        with pytest.raises(StoppedError):
            fit(folder, writer, path, Break(hook, step))
        path = max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    resumed = fit(tmp_path / "end", writer, path)
    assert resumed.seen == whole.seen
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def fit(folder, writer, path, *callbacks):
    seed_everything(1 if path is None else 99, verbose=False)
    model = Counting()
    saver = ModelCheckpoint(folder, "{step}-{epoch}", **WRITERS[writer])
    trainer = quiet_trainer(RandomState(), *callbacks, saver, max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`|The dirpath has changed")
        trainer.fit(model, digits(), ckpt_path=path)
    return model
