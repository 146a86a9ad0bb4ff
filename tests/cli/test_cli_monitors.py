"""A monitor that nobody logs is told with the nearest names, before training or before the epoch's work is lost."""

import pytest
import torch

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
STOPPING = ["--trainer.callbacks+=EarlyStopping"]
SAVING = ["--trainer.callbacks+=ModelCheckpoint"]


def saved(project):
    return sorted(path.name for path in project.rglob("*.ckpt"))


@pytest.mark.parametrize("callback", [STOPPING, SAVING], ids=["EarlyStopping", "ModelCheckpoint"])
@pytest.mark.parametrize("name", ["val_loss", "val/los", "val/losss"])
def test_a_slip_is_refused_before_training(project, mistake, callback, name):
    kind = callback[0].partition("=")[2]
    assert mistake("fit", *TOY, *callback, f"--trainer.callbacks.monitor={name}") == (
        f"error: {kind}(monitor={name!r}): nothing is logged by that name.\nDid you mean val/loss?\nLogged: val/loss\n"
    )
    assert saved(project) == []


def test_of_a_training_step_after_the_first(project, mistake):
    told = mistake("fit", *TOY, *STOPPING, "--trainer.callbacks.monitor=train/los", "--trainer.max_epochs=100000")
    assert told.splitlines() == [
        "error: EarlyStopping(monitor='train/los'): nothing is logged by that name.",
        "Did you mean train/loss?",
        "Logged: train/loss",
    ]


@pytest.mark.parametrize("callback", [STOPPING, SAVING], ids=["EarlyStopping", "ModelCheckpoint"])
@pytest.mark.parametrize(
    "words", [[], ["--trainer.num_sanity_val_steps=0"], ["--trainer.limit_val_batches=0"],
              ["--trainer.check_val_every_n_epoch=2", "--trainer.limit_val_batches=0"]],
)  # fmt: skip
def test_another_name_is_refused_when_it_is_first_looked_at_and_the_epoch_is_kept(
    cli, project, mistake, callback, words
):
    every = ["--trainer.callbacks+=RandomState"]
    told = mistake(
        "fit", *TOY, *callback, "--trainer.callbacks.monitor=elbow", *words, *every, "--trainer.max_epochs=2"
    )
    lines = told.splitlines()
    assert lines[0] == f"error: {callback[0].partition('=')[2]}(monitor='elbow'): nothing is logged by that name."
    assert lines[1].startswith("Logged: ") and "train/loss" in lines[1]
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert lines[2] == f"Go on with the right monitor and --ckpt_path {path}"
    assert torch.load(path, weights_only=True)["global_step"] == 3
    with pytest.warns(UserWarning):  # of the folder, and of the callback's state
        cli("fit", *TOY, *callback, "--trainer.callbacks.monitor=train/loss", *words, *every, f"--ckpt_path={path}",
            "--trainer.max_epochs=2")  # fmt: skip
    resumed = torch.load("lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    cli("fit", *TOY, *words, "--trainer.max_epochs=2")
    whole = torch.load("lightning_logs/version_2/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 6
    assert torch.equal(resumed["state_dict"]["net.weight"], whole["state_dict"]["net.weight"])


LATER = """
from my_package import ToyNet


class Later(ToyNet):
    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        if not self.trainer.sanity_checking and self.current_epoch % 2:
            self.log("val/loss2", 0.5)
"""


def test_what_is_logged_later_is_waited_for(cli, own_module, project):
    own_module("later", LATER)
    words = [*SAVING, "--trainer.callbacks.monitor=val/loss2", "--trainer.callbacks.every_n_epochs=2"]
    cli("fit", "--model=later.Later", TOY[1], *words, "--trainer.max_epochs=2")
    assert "epoch=1-step=6.ckpt" in saved(project)


def test_what_is_not_strict_is_let_pass(cli, project):
    cli("fit", *TOY, *STOPPING, "--trainer.callbacks.monitor=val_loss", "--trainer.callbacks.strict=false")


def test_a_trial_tells_a_slip_too(project, mistake):
    told = mistake("fit", *TOY, *STOPPING, "--trainer.callbacks.monitor=train/los", "--trainer.fast_dev_run=1")
    assert "Did you mean train/loss?" in told
    assert saved(project) == []
