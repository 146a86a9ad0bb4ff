"""A user's own small project: a package with a model and data, beside which the command line is run."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from trainers import save

import lightning_plugins
from lightning_plugins.cli import main
from lightning_plugins.cli.app import PluginsCLI

PACKAGE = '''
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class ToyNet(LightningModule):
    """A linear classifier."""

    def __init__(self, lr: float = 0.1, kind: Literal["plain", "scaled"] = "plain", depth: int | None = None,
                 image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}.")
        if lr == 666:
            {}["not an argument error"]
        self.save_hyperparameters()
        self.net = torch.nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], num_classes)

    def forward(self, image):
        return self.net(image.flatten(1))

    def training_step(self, batch, index):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log("test/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, index):
        return {"logits": self(batch[0]), "batch": torch.tensor(index)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class ToyData(LightningDataModule):
    """Noise of any size."""

    def __init__(self, size: int = 8, num_classes: int = 5, batch_size: int = 16):
        super().__init__()
        self.image_shape = (1, size, size)
        self.num_classes = num_classes
        self.batch_size = batch_size

    def _loader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(40, *self.image_shape, generator=generator)
        labels = torch.randint(self.num_classes, (40,), generator=generator)
        return DataLoader(TensorDataset(images, labels), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class BareData(ToyData):
    """Data that says nothing about its shape."""

    def __init__(self):
        super().__init__(size=28, num_classes=10)
        self.__dict__["shape"] = self.__dict__.pop("image_shape")
        del self.num_classes

    def _loader(self):
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.rand(32, *self.shape, generator=generator), torch.arange(32) % 10)
        return DataLoader(data, batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class Independent(ToyNet):
    """A model that brings its own data."""

    def train_dataloader(self):
        return BareData().train_dataloader()

    def val_dataloader(self):
        return BareData().val_dataloader()
'''

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SAVE_LAST = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]


@pytest.fixture(scope="session")
def write_project():
    """Write the user's package into a folder."""

    def write(folder: Path) -> Path:
        (folder / "my_package").mkdir()
        (folder / "my_package" / "__init__.py").write_text(PACKAGE)
        return folder

    return write


@pytest.fixture(scope="session")
def whole_parser():
    """The command line's parser, made once: each ``main`` makes another."""

    class MadeError(Exception):
        pass

    for name in lightning_plugins._PUBLIC:
        getattr(lightning_plugins, name)  # as `run` does

    def keep(self, parser, args):
        raise MadeError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PluginsCLI, "parse_arguments", keep)
        with pytest.raises(MadeError) as made:
            PluginsCLI(["fit"])
    return made.value.args[0]


@pytest.fixture
def project(tmp_path, monkeypatch, write_project) -> Path:
    """The user's project as the current folder; the package itself stays imported between tests."""
    monkeypatch.chdir(write_project(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lightning-plugins", "words", "of", "another", "program"])
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def own_module(project):
    """Write a module of the user's own, and import it for the length of the test."""
    names = []

    def write(name, source):
        (project / f"{name}.py").write_text(source)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(project))
            names.append(name)
            return importlib.import_module(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def write_checkpoint(project):
    """Save a model as it is, as a Trainer made in Python does."""

    def write(model, path):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        save(model, path)

    return write


@pytest.fixture
def cli(project):
    """Run the command line in the project, quietly; for one epoch unless the test says otherwise."""

    def run(command: str, *words: str) -> None:
        epochs = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"] if command == "fit" else []
        main([command, *QUIET, *epochs, *words])

    return run


@pytest.fixture
def trained(cli, project) -> Path:
    """The last checkpoint of a finished run of the toy model."""
    cli("fit", *TOY, *SAVE_LAST)
    return project / "lightning_logs/version_0/checkpoints/last.ckpt"


@pytest.fixture
def mistake(cli, capsys):
    """Make a mistake in process: status 2, at most five lines, which are returned."""

    def run(command: str, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli(command, *words)
        error = capsys.readouterr().err
        told = error[error.index("error: ") :]
        assert stop.value.code == 2
        assert len(told.splitlines()) <= 5
        return told

    return run
