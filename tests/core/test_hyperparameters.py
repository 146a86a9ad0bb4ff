"""A checkpoint describes its module, and loads with ``weights_only=True``, however the module was made."""

import copy
import enum
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins.core import hyperparameters
from lightning_plugins.core.hyperparameters import save_plain_hyperparameters


class Net(LightningModule):
    """A module as the parts write them: plain arguments first, a network and factories as optional overrides."""

    def __init__(
        self,
        width: int = 3,
        shape: tuple[int, ...] = (1, 2),
        lr: float = 0.1,
        encoder: nn.Module | None = None,
        optimizer: OptimizerCallable | None = None,
        squash: Callable | None = None,
    ):
        super().__init__()
        save_plain_hyperparameters(self)
        self.encoder = encoder if encoder is not None else nn.Linear(2, width)
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=float(lr)))
        self.width, self.shape, self.squash = width, tuple(shape), squash

    def training_step(self, batch, batch_idx):
        return self.encoder(batch).square().mean()

    test_step = validation_step = training_step

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 2), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


class Extended(Net):
    """A user's subclass: arguments of its own, one of the parent's fixed, the rest passed on."""

    def __init__(self, temperature: float = 1.0, names: tuple[str, ...] = ("a",), **kwargs):
        super().__init__(shape=(9, 9), **kwargs)
        self.temperature, self.names = temperature, names


class Positional(Net):
    def __init__(self, *args, extra=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra


class OldStyle(Net):
    def __init__(self, depth, width=4):
        Net.__init__(self, width=width)
        self.depth = depth


def decorated(init):
    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        return init(self, *args, **kwargs)

    return wrapper


class Decorated(Net):
    @decorated
    def __init__(self, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth


def saved(module, folder, epochs=1):
    """Train one epoch and save; returns the file, which must open with ``weights_only=True``."""
    run = quiet_trainer(default_root_dir=folder, max_epochs=epochs)
    run.fit(module)
    path = folder / "last.ckpt"
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)
    return path


def test_plain_arguments_rebuild_the_module(tmp_path):
    module = Net(5, shape=[2, 3], lr=0.01)
    path = saved(module, tmp_path)
    again = Net.load_from_checkpoint(path, weights_only=True)
    assert (
        again.hparams
        == module.hparams
        == dict(width=5, shape=[2, 3], lr=0.01, encoder=None, optimizer=None, squash=None)
    )
    assert torch.equal(again.encoder.weight, module.encoder.weight)
    assert again.configure_optimizers().defaults["lr"] == 0.01


OVERRIDES = {
    "network": {"encoder": nn.Linear(2, 7)},
    "partial": {"optimizer": functools.partial(torch.optim.Adam, lr=0.5)},
    "lambda": {"optimizer": lambda parameters: torch.optim.Adam(parameters)},
    "class": {"optimizer": torch.optim.Adagrad},
    "function": {"squash": torch.tanh},
    "object": {"squash": types.SimpleNamespace(a=1)},
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_an_override_is_asked_for_again(tmp_path, override):
    ((name, value),) = override.items()
    path = saved(Net(width=7, **override), tmp_path)
    with pytest.raises(
        ValueError, match=rf"does not hold Net's argument '{name}' .*load_from_checkpoint\(path, {name}="
    ):
        Net.load_from_checkpoint(path, weights_only=True)
    again = Net.load_from_checkpoint(path, weights_only=True, **{name: copy.deepcopy(value)})
    assert again.width == 7
    Net.load_from_checkpoint(path, weights_only=True, **{name: None})  # its default, said aloud


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_a_run_with_an_override_resumes(tmp_path, override):
    path = saved(Net(width=7, **override), tmp_path)
    module = Net(width=7, **override)
    run = quiet_trainer(default_root_dir=tmp_path, max_epochs=3)
    run.fit(module, ckpt_path=path)
    assert run.global_step == 6


def test_networks_are_never_copied_nor_warned_about(recwarn):
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    module = Net(encoder=Uncopyable(2, 3))
    assert module.hparams_initial["encoder"].endswith("Uncopyable")
    assert not [w for w in recwarn if "is an instance of `nn.Module`" in str(w.message)]


def test_near_plain_values_are_stored_as_plain_ones(tmp_path):
    module = Net(width=np.int64(4), lr=np.float32(0.5), squash=Path("a/b"), shape=(np.int32(1), 2))
    assert module.hparams == dict(width=4, lr=0.5, squash="a/b", shape=(1, 2), encoder=None, optimizer=None)
    assert [type(module.hparams[key]) for key in ("width", "lr", "squash")] == [int, float, str]
    saved(module, tmp_path)


def test_nested_values_are_plain_or_asked_for(tmp_path):
    assert Net(squash={"a": [1, {"b": None}]}).hparams["squash"] == {"a": [1, {"b": None}]}
    path = saved(Net(squash={"a": [torch.tanh]}), tmp_path)
    with pytest.raises(ValueError, match="'squash'"):
        Net.load_from_checkpoint(path)


def test_a_subclass_keeps_all_its_arguments(tmp_path):
    module = Extended(temperature=0.5, width=6, lr=0.2)
    assert module.hparams == dict(temperature=0.5, names=("a",), width=6, lr=0.2)
    again = Extended.load_from_checkpoint(saved(module, tmp_path), weights_only=True)
    assert (again.temperature, again.width, again.shape) == (0.5, 6, (9, 9))


def test_positional_arguments_get_their_names(tmp_path):
    module = Positional(6, (3, 3), extra=2)
    assert module.hparams == dict(extra=2, width=6, shape=(3, 3))
    again = Positional.load_from_checkpoint(saved(module, tmp_path), weights_only=True)
    assert (again.width, again.shape, again.extra) == (6, (3, 3), 2)


def test_other_ways_to_call_the_parent(tmp_path):
    again = OldStyle.load_from_checkpoint(saved(OldStyle(3, width=5), tmp_path), weights_only=True)
    assert (again.depth, again.width) == (3, 5)
    again = Decorated.load_from_checkpoint(saved(Decorated(depth=4, width=5), tmp_path), weights_only=True)
    assert (again.depth, again.width) == (4, 5)


def test_two_modules_built_inside_one_another_do_not_mix():
    class Outer(Net):
        def __init__(self, depth=1):
            inner = Net(width=8)
            super().__init__(width=2)
            self.inner = inner

    outer = Outer(depth=3)
    assert outer.hparams == dict(depth=3)
    assert outer.inner.hparams["width"] == 8


def test_a_data_module_keeps_its_arguments_too(tmp_path):
    class Data(LightningDataModule):
        def __init__(self, seed: int = 0):
            super().__init__()
            save_plain_hyperparameters(self)

    assert Data(seed=4).hparams == {"seed": 4}


def test_outside_a_constructor_it_says_so():
    with pytest.raises(RuntimeError, match="inside __init__"):
        save_plain_hyperparameters(Net())


# ---- made by the command line -----------------------------------------------------------------------------------


class Tiny(Extended):
    """Named by its full path on the command line, as a class of a user's project is."""


def run_cli(folder, *args):
    cli = LightningCLI(
        Net,
        subclass_mode_model=True,
        save_config_callback=None,
        run=True,
        trainer_defaults=dict(
            default_root_dir=folder,
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ),
        seed_everything_default=0,
        args=list(args),
    )
    return cli


def test_made_by_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "user_project", types.SimpleNamespace(Tiny=Tiny))
    monkeypatch.setattr(Tiny, "__module__", "user_project")
    made = [
        "--model=user_project.Tiny",
        "--model.temperature=0.25",
        "--model.encoder=torch.nn.Linear",
        "--model.encoder.in_features=2",
        "--model.encoder.out_features=4",
        "--model.optimizer=torch.optim.Adam",
        "--model.optimizer.lr=0.125",
    ]
    cli = run_cli(tmp_path, "fit", *made)
    path = tmp_path / "last.ckpt"
    cli.trainer.save_checkpoint(path)
    record = torch.load(path, weights_only=True)["hyper_parameters"]
    assert record["encoder"]["class_path"] == "torch.nn.Linear"  # the recipe, not a mark: `test` can build it

    again = Tiny.load_from_checkpoint(path, weights_only=True)
    assert again.temperature == 0.25
    assert torch.equal(again.encoder.weight, cli.model.encoder.weight)
    assert again.configure_optimizers().defaults["lr"] == 0.125

    tested = run_cli(tmp_path, "test", "--model=user_project.Tiny", f"--ckpt_path={path}")
    assert tested.model.temperature == 0.25
    assert torch.equal(tested.model.encoder.weight, cli.model.encoder.weight)


class Letter(str, enum.Enum):
    """A text that is more than one."""

    A = "a"


@pytest.mark.parametrize("value", [np.str_("a"), Letter.A])
def test_texts_of_other_libraries_are_kept_as_texts(value):
    assert type(hyperparameters._plain_or_mark(value)) is str
    assert hyperparameters._plain_or_mark({value: [value]}) == {"a": ["a"]}
