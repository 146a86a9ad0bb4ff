"""Optimisers of the package by their short names on the command line, wherever a model takes an ``optimizer:``."""

import pytest
import torch
import yaml

from lightning_plugins import NormRMSprop

CAPSNET = ["--model=CapsNet", "--model.channels=8", "--model.kernel_size=3", "--model.num_types=2"]
CAPSNET += ["--model.pictures_every_n_epochs=0", "--data=Digits", "--data.image_size=14", "--data.batch_size=32"]
OPTIMIZER = ["--model.optimizer=NormRMSprop", "--model.optimizer.lr=0.1"]
SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
SAVE_LAST = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
CHECKPOINT = "lightning_logs/version_{}/checkpoints/last.ckpt"


def optimizer_state(project, version=0):
    (state,) = torch.load(project / CHECKPOINT.format(version), weights_only=True)["optimizer_states"]
    return state


def test_by_its_short_name(cli, project):
    cli("fit", *CAPSNET, *SHORT, *SAVE_LAST, *OPTIMIZER)
    state = optimizer_state(project)
    assert all(group["lr"] == 0.1 and group["alpha"] == 0.99 for group in state["param_groups"])
    means = [saved["mean_square_norm"] for saved in state["state"].values()]
    assert means and all(torch.equal(mean, means[0]) and mean > 0 for mean in means)
    config = yaml.safe_load((project / "lightning_logs/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "lightning_plugins.NormRMSprop"


@pytest.mark.parametrize("name", ["NormRMSprop", "lightning_plugins.optim.NormRMSprop"])
def test_in_a_config(cli, project, name):
    arguments = {"lr": 0.2, "alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "weight_decay": 1e-3, "foreach": False}
    config = {"model": {"init_args": {"optimizer": {"class_path": name, "init_args": arguments}}}}
    (project / "own.yaml").write_text(yaml.safe_dump(config))
    cli("fit", *CAPSNET, *SHORT, *SAVE_LAST, "--config=own.yaml")
    (group,) = optimizer_state(project)["param_groups"]
    assert {key: group[key] for key in arguments} == arguments


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_equals_uninterrupted(cli, project):
    words = [*CAPSNET, *SHORT, *SAVE_LAST, *OPTIMIZER]
    words += ["--seed_everything=1", "--trainer.limit_val_batches=0"]
    cli("fit", *words, "--trainer.max_epochs=2")
    cli("fit", *words)
    cli("fit", *words, "--trainer.max_epochs=2", f"--ckpt_path={CHECKPOINT.format(1)}")
    whole, half, resumed = (
        torch.load(project / CHECKPOINT.format(version), weights_only=True)["state_dict"] for version in range(3)
    )
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)
    assert any(not torch.equal(half[name], value) for name, value in whole.items())


def test_help_lists_its_arguments(cli, capsys):
    with pytest.raises(SystemExit) as stop:
        cli("fit", *CAPSNET, "--model.optimizer.help=NormRMSprop")
    text = capsys.readouterr().out
    assert not stop.value.code
    assert all(f"--optimizer.{name} " in text for name in ("lr", "alpha", "eps", "momentum", "weight_decay"))


def test_a_misspelt_argument(mistake):
    told = mistake("fit", *CAPSNET, *OPTIMIZER, "--model.optimizer.momntum=0.9")
    assert "NormRMSprop has no argument 'momntum' (model.optimizer.momntum).\nDid you mean momentum?" in told


def test_an_argument_out_of_range(mistake):
    told = mistake("fit", *CAPSNET, *OPTIMIZER, "--model.optimizer.alpha=1")
    assert "alpha=1.0 must lie in [0, 1)." in told


def test_lr_must_be_given(mistake):
    assert "lr" in mistake("fit", *CAPSNET, "--model.optimizer=NormRMSprop")


def test_the_name_is_offered_after_a_slip(mistake):
    assert "Did you mean NormRMSprop" in mistake("fit", *CAPSNET, "--model.optimizer=NormRMSProp")


def test_the_class_is_the_public_one():
    from lightning_plugins import optim

    assert optim.NormRMSprop is NormRMSprop
