"""Runs of the real command line that are stopped in mid-epoch go on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

# a network of the user's with random numbers of its own, which writes down what it was given
NOISY = """
import time
from pathlib import Path

import torch

from lightning_plugins import CapsNet


class Noisy(CapsNet):
    def __init__(self, wait_at: int = -1, **arguments):
        super().__init__(**arguments)
        self.wait_at = wait_at

    def training_step(self, batch, batch_idx):
        image = (batch["image"] + 0.1 * torch.randn_like(batch["image"])).clamp(0, 1)
        with open("steps.txt", "a") as file:
            sums = batch["image"].double().sum().item(), image.double().sum().item()
            print(self.current_epoch, batch_idx, self.global_step, *sums, batch["label"].tolist(), file=file)
        while self.global_step == self.wait_at and Path("wait").exists():
            time.sleep(0.01)
        return super().training_step(batch | {"image": image}, batch_idx)
"""

SMALL = {"channels": 4, "kernel_size": 3, "num_types": 1, "decoder_hidden": [8], "pictures_every_n_epochs": 0}
DATA = {"class_path": "Digits", "init_args": {"image_size": 14, "batch_size": 100, "shift": 1}}  # 12 batches an epoch
CONFIG = {
    "seed_everything": 1,
    "model": {"class_path": "noisy.Noisy", "init_args": SMALL},
    "data": DATA,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 9, "save_last": True}},
            {"class_path": "RandomState"},
        ],
    },
}
STOP_AT = 22  # the tenth batch of the second epoch; checkpoints are at 9, 18, 27 and 36


def make_project(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "noisy.py").write_text(NOISY)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def start(folder, *words):
    command = [sys.executable, "-m", "lightning_plugins", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def finish(process):
    out, _ = process.communicate(timeout=600)
    assert "Traceback" not in out, out
    return process.returncode, out


def steps(folder):
    path = folder / "steps.txt"
    return path.read_text().splitlines() if path.exists() else []


def interrupt(folder, number, *words):
    """Start a run, which waits for the signal in its 22nd step; returns status and output."""
    (folder / "wait").touch()
    process = start(folder, "fit", "--config", "config.yaml", "--model.wait_at", str(STOP_AT - 1), *words)
    while len(steps(folder)) < STOP_AT and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    (folder / "wait").unlink()
    return finish(process)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder, version):
    return torch.load(folder / "lightning_logs" / version / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run's folder."""
    folder = make_project(tmp_path_factory.mktemp("whole"))
    status, out = finish(start(folder, "fit", "--config", "config.yaml"))
    assert status == 0, out
    assert len(steps(folder)) == 36
    return folder


def assert_goes_on(folder, whole, done, *words):
    """Resume from the last checkpoint: the batches, noise and weights of the whole run, in a folder of its own."""
    before = contents(folder / "lightning_logs")
    (folder / "steps.txt").unlink()
    status, out = finish(start(folder, "fit", "--config", "config.yaml", "--ckpt_path", *words))
    assert status == 0, out
    assert steps(folder) == steps(whole)[done:]
    expected, found = read(whole, "version_0"), read(folder, "version_1")
    assert found["global_step"] == 36
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert torch.equal(found["random_state"][0]["torch"], expected["random_state"][0]["torch"])
    assert before.items() <= contents(folder / "lightning_logs").items()  # the first run's files are as they were


def test_sigterm(tmp_path, whole):
    """The step at hand is saved, the process leaves at once and says how to go on."""
    folder = make_project(tmp_path)
    status, out = interrupt(folder, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert out.endswith(f"\nInterrupted. Go on with the same command and --ckpt_path {path}\n")
    assert len(steps(folder)) == read(folder, "version_0")["global_step"] == STOP_AT
    assert_goes_on(folder, whole, STOP_AT, path, "--data.num_workers", "2")


def test_kill(tmp_path, whole):
    """Nothing can be written; the checkpoint of step 18 stands, and no temporary file takes its place."""
    folder = make_project(tmp_path)
    status, _ = interrupt(folder, signal.SIGKILL, "--data.num_workers", "2")
    assert status == -signal.SIGKILL
    assert read(folder, "version_0")["global_step"] == 18
    assert_goes_on(folder, whole, 18, "last", "--data.num_workers", "2")
