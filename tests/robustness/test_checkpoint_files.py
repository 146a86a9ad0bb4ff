"""Checkpoints of the command line load safely; what is no checkpoint is told in a sentence and left as it is."""

import os
import subprocess
import sys

import pytest
import torch
from toys import Squares
from trainers import save

from lightning_plugins import CapsNet
from lightning_plugins.cli import main

SMALL = ["--model.channels", "4", "--model.kernel_size", "3", "--model.num_types", "1", "--model.decoder_hidden", "[8]"]
DATA = ["--data", "Digits", "--data.image_size", "14"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
QUIET += ["--trainer.log_every_n_steps", "1"]
FIT = ["fit", "--model", "CapsNet", *SMALL, "--model.pictures_every_n_epochs", "0", *DATA, *QUIET]
FIT += ["--trainer.max_steps", "1", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last", "true"]
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with one run of the command line."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-plugins"])
        main(FIT)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_command_twice(project, monkeypatch):
    """The second run has a folder of its own."""
    monkeypatch.chdir(project)
    before = contents(project)
    main(FIT)
    after = contents(project)
    assert before.items() <= after.items()
    folders = {path.relative_to(project).parts[:2] for path in after.keys() - before.keys()}
    assert len(folders) == 1 and folders.isdisjoint(path.relative_to(project).parts[:2] for path in before)


def test_checkpoint_of_the_command_line_loads_safely(project):
    content = torch.load(project / LAST, weights_only=True)
    model = CapsNet.load_from_checkpoint(project / LAST, weights_only=True)
    assert model.preset.channels == 4 and model.image_shape == (1, 14, 14)
    assert model.state_dict().keys() == content["state_dict"].keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, content["state_dict"][key])
    assert model(torch.zeros(2, *model.image_shape)).shape == (2, 10, 16)


def test_what_is_no_checkpoint_is_told_and_left(project, tmp_path):
    """Three mistakes, each in a process of its own, all at the same time."""
    good = (project / LAST).read_bytes()
    last = tmp_path / LAST
    last.parent.mkdir(parents=True)
    last.write_bytes(good[: len(good) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    save(Squares(torch.nn.Linear(2, 2)), tmp_path / "other.ckpt")  # another network, without hyperparameters

    mistakes = [  # the words, and what is told about them
        (
            [*FIT, "--ckpt_path", "last"],
            "--ckpt_path last: none of 1 checkpoint(s) can be read.\n"
            f"checkpoint '{LAST}' is truncated: the run that wrote it was cut off. Use an earlier one.",
        ),
        (
            ["test", "--ckpt_path", "foreign.pt", *DATA],
            "'foreign.pt' is not a Lightning checkpoint (it holds weights).",
        ),
        (
            ["test", "--ckpt_path", "other.ckpt", "--model", "CapsNet", *SMALL, *DATA, *QUIET],
            "the weights in 'other.ckpt' do not fit this CapsNet.",
        ),
    ]
    before = contents(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lightning_plugins", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words, _ in mistakes
    ]
    for process, (_, told) in zip(processes, mistakes, strict=True):
        _, err = process.communicate(timeout=600)
        assert process.returncode == 2, err
        assert "Traceback" not in err
        error = err[err.index("error:") :]
        assert error.startswith(f"error: {told}\n") and len(error.splitlines()) <= 5, err
    assert before.items() <= contents(tmp_path).items()
