"""The checkpoint at SIGTERM: exact where it is written, and not written where it would not be exact."""

import os
import signal
from functools import partial

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from toys import ImageClassifier
from trainers import fit

from lightning_plugins.callbacks import RandomState, SaveOnSigterm
from lightning_plugins.data import Digits

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

PER_EPOCH = 6  # batches of 200 of 1,259 images


class Noisy(ImageClassifier):
    """Dropout and batches that remember their place; sends a signal to its own process in a chosen step."""

    def __init__(self, signal_at=None, in_validation=False, number=signal.SIGTERM):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 10))
        super().__init__(net, partial(torch.optim.Adam, lr=1e-2))
        self.signal_at, self.in_validation, self.number = signal_at, in_validation, number
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx))
        if not self.in_validation and len(self.seen) == self.signal_at:
            os.kill(os.getpid(), self.number)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        if self.in_validation and len(self.seen) == self.signal_at:
            os.kill(os.getpid(), self.number)


def trained(folder, model, ckpt_path=None, accumulate=1, signals=("SIGTERM",), **checkpoint):
    seed_everything(1, verbose=False)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    callbacks = [RandomState(), SaveOnSigterm(signals), ModelCheckpoint(folder, **checkpoint)]
    options = {"default_root_dir": folder, "num_sanity_val_steps": 0, "accumulate_grad_batches": accumulate}
    data = Digits(image_size=8, batch_size=200, shift=1, seed=5)
    fit(model, data, *callbacks, ckpt_path=ckpt_path, max_epochs=3, **options)
    return model


def files(folder):
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, by the number of batches in a step."""
    return {n: trained(tmp_path_factory.mktemp("whole"), Noisy(), accumulate=n) for n in (1, 2)}


def assert_resumes(folder, whole, done, **arguments):
    """From ``last.ckpt`` with ``done`` batches behind it to the end of the whole run."""
    resumed = trained(folder, Noisy(), folder / "last.ckpt", **arguments)
    assert resumed.seen == whole.seen[done:]
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters(), strict=True))


EVERY_4 = {"every_n_train_steps": 4, "save_last": True}


@pytest.mark.parametrize(
    ("step", "checkpoint"),
    [(1, {}), (8, EVERY_4), (9, EVERY_4), (9, {}), (PER_EPOCH, {}), (PER_EPOCH, EVERY_4), (3 * PER_EPOCH, EVERY_4)],
)
def test_resumed_run_is_the_whole_run(tmp_path, whole, step, checkpoint):
    """In the first step, mid-epoch, at a step that is saved anyway, at the end of an epoch and of the run."""
    with pytest.raises(SIGTERMException):
        trained(tmp_path, Noisy(step), **checkpoint)
    assert files(tmp_path)["last.ckpt"] == step
    assert_resumes(tmp_path, whole[1], step, **checkpoint)


@pytest.mark.parametrize(("batch", "step"), [(5, 2), (9, 4), (10, 5)])
def test_accumulated_batches_are_not_cut(tmp_path, whole, batch, step):
    """Two batches make a step: after an odd one the checkpoint of two whole steps before stays."""
    arguments = {"accumulate": 2, "every_n_train_steps": 2, "save_last": True}
    with pytest.raises(SIGTERMException):
        trained(tmp_path, Noisy(batch), **arguments)
    assert files(tmp_path)["last.ckpt"] == step
    assert_resumes(tmp_path, whole[2], 2 * step, **arguments)


def test_validation_is_not_cut(tmp_path):
    """A signal in validation leaves the checkpoint that was there."""
    with pytest.raises(SIGTERMException):
        trained(tmp_path, Noisy(PER_EPOCH, in_validation=True), every_n_train_steps=4, save_last=True)
    assert files(tmp_path)["last.ckpt"] == 4


def test_ctrl_c_leaves_the_newest_checkpoint(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit):
        trained(tmp_path, Noisy(6, number=signal.SIGINT), every_n_train_steps=4, save_last=True)
    assert files(tmp_path)["last.ckpt"] == 4


def test_no_checkpoint_of_another_name_is_touched(tmp_path):
    """A fixed file name, as for the best weights so far, is not the place of an interrupted run."""
    trained(tmp_path, Noisy(), filename="best")
    before = (tmp_path / "best.ckpt").read_bytes()
    with pytest.raises(SIGTERMException):
        trained(tmp_path, Noisy(3), filename="best")
    assert (tmp_path / "best.ckpt").read_bytes() == before
    assert files(tmp_path) == {"best.ckpt": 3 * PER_EPOCH, "last.ckpt": 3}
    with pytest.raises(SIGTERMException):  # another run in the same folder
        trained(tmp_path, Noisy(2), filename="best")
    assert files(tmp_path) == {"best.ckpt": 3 * PER_EPOCH, "last.ckpt": 3, "last-v1.ckpt": 2}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_status_tells_the_signal(tmp_path, whole, number):
    signals = ["SIGTERM", "SIGUSR1"]
    with pytest.raises(SIGTERMException) as stop:
        trained(tmp_path, Noisy(4, number=number), signals=signals)
    assert stop.value.code == 128 + number
    assert files(tmp_path)["last.ckpt"] == 4
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # as it was
    assert_resumes(tmp_path, whole[1], 4, signals=signals)


def test_a_handler_of_the_user_is_called_too(tmp_path):
    called = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with pytest.raises(SIGTERMException):
            trained(tmp_path, Noisy(2, number=signal.SIGUSR2), signals=["SIGUSR2"])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [signal.SIGUSR2]


def test_no_signal_of_another_name():
    with pytest.raises(ValueError, match=r"signals=\['SIGKILL'\] must be names of signals, each one of SIGTERM, "):
        SaveOnSigterm(["SIGKILL"])


def test_the_signal_of_slurm_stays_lightnings(monkeypatch):
    for name, value in {"NTASKS": "1", "JOB_NAME": "job", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    callbacks = [SaveOnSigterm(["SIGTERM", "SIGUSR1"])]
    refused = r"signals=\['SIGTERM', 'SIGUSR1'\], but at SIGUSR1 Lightning saves and queues this SLURM job again"
    data, few = Digits(image_size=8, batch_size=200), {"max_steps": 1, "limit_val_batches": 0}
    with pytest.raises(MisconfigurationException, match=refused):
        fit(Noisy(), data, *callbacks, plugins=SLURMEnvironment(auto_requeue=True), **few)
    run = fit(Noisy(), data, *callbacks, plugins=SLURMEnvironment(auto_requeue=False), **few)
    assert run.global_step == 1
