"""Checkpoints of models that take nothing from the data: what the command line links is in them all the same."""

import pytest
import torch

from lightning_plugins.cli import main

SHORT = ["--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]
SHIPPED = ["--config=callbacks/label_noise", "--test_after_fit=false", *SHORT]  # which saves every ten epochs
LAST = "lightning_logs/version_{}/checkpoints/last.ckpt"

OWN = """
import torch
from lightning.pytorch import LightningModule
from my_package import ToyNet


class Foreign(LightningModule):
    INIT
        super().__init__()
        self.save_hyperparameters()
        self.net, self.found = torch.nn.Linear(64, 5), kwargs if "kwargs" in locals() else dict()

    def forward(self, image):
        return self.net(image.flatten(1))

    def on_fit_start(self):
        print("found", self.found)

    on_test_start = on_fit_start

    def sample(self, num_samples, generator):
        print("found", self.found)
        return torch.rand(num_samples, 1, 8, 8, generator=generator)

    training_step, validation_step, test_step = ToyNet.training_step, ToyNet.validation_step, ToyNet.test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for value in state.values()])


def test_the_shipped_config_is_tested_and_resumed_from_its_checkpoint(cli, project, capsys):
    cli("fit", *SHIPPED, "--trainer.max_epochs=20")
    cli("fit", *SHIPPED, "--trainer.max_epochs=10")
    cli("fit", *SHIPPED, "--trainer.max_epochs=20", "--ckpt_path=last")
    whole, half, resumed = (weights(LAST.format(version)) for version in range(3))
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, half)
    capsys.readouterr()
    for model in ([], ["--config=callbacks/label_noise"]):
        cli("test", *model, "--data=Digits", "--data.image_size=8", "--ckpt_path=last")
        assert "test/accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("init", ["def __init__(self):", "def __init__(self, lr=0.1, **kwargs):"])
def test_a_module_of_ones_own(cli, project, capsys, init):
    """One that takes anything is given again only what it was given at first."""
    name = f"own_{'kwargs' in init}"
    (project / f"{name}.py").write_text(OWN.replace("INIT", init))
    words = [f"--model={name}.Foreign", "--data=my_package.ToyData"]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    cli("fit", *words, *SHORT, *save)
    hparams = torch.load(LAST.format(0), weights_only=True)["hyper_parameters"]
    assert hparams["image_shape"] == (1, 8, 8)  # else this test looks at nothing
    cli("fit", *words, *SHORT, f"--ckpt_path={LAST.format(0)}", "--trainer.max_epochs=2")
    cli("test", *words[1:], f"--ckpt_path={LAST.format(0)}")
    main(["sample", f"--ckpt_path={LAST.format(0)}", "--output=page.png"])
    told = capsys.readouterr().out
    assert told.count("found {}") == 4


def test_other_data_than_it_was_trained_on_is_refused(cli, project, mistake):
    cli("fit", *SHIPPED, "--trainer.max_epochs=10")
    assert mistake("test", "--data=Digits", "--data.image_size=12", "--ckpt_path=last").startswith(
        "error: model.image_shape (1, 8, 8) is the checkpoint's, but Digits's is (1, 12, 12)"
    )


OPTIMIZERS = """
import torch
from collections.abc import Iterable


def make(params: Iterable, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


class Own(torch.optim.SGD):
    pass
"""


@pytest.mark.parametrize("name", ["make", "Own"])
def test_an_optimizer_of_ones_own_is_named_again(cli, project, mistake, name):
    """The file alone imports nothing; a config that names the same goes on."""
    module = f"own_optimizers_{name.lower()}"
    (project / f"{module}.py").write_text(OPTIMIZERS)
    optimizer = f"{module}.{name}"
    (project / "own.yaml").write_text(f"model: {{init_args: {{optimizer: {optimizer}}}}}\n")
    words = ["--model=CapsNet", "--model.channels=8", "--model.kernel_size=3", "--model.num_types=2", "--data=Digits"]
    words += ["--model.pictures_every_n_epochs=0", "--data.image_size=14", "--trainer.limit_val_batches=0", *SHORT]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    cli("fit", *words, "--config=own.yaml", *save)
    cli("fit", *words, "--config=own.yaml", "--ckpt_path=last", "--trainer.max_epochs=2")
    if name == "make":  # of the user's, and imported by now, but no part of every model
        told = mistake("test", "--data=Digits", "--data.image_size=14", f"--ckpt_path={LAST.format(0)}")
        assert "no part of a model" in told and "name it in a --config, too" in told
