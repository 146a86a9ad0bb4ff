"""A run that stops and resumes equals one that does not: weights and batches, bit for bit."""

from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Squares
from trainers import fit

from lightning_plugins.data import Digits, MultiMNIST

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

PER_EPOCH = 12  # batches of 100 of 1,259 images


class Linear(Squares):
    """A linear classifier that remembers its batches."""

    def __init__(self, pixels=64, fail_at=None):
        super().__init__(torch.nn.Linear(pixels, 10), partial(torch.optim.Adam, lr=1e-2))
        self.fail_at = fail_at
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt  # the kernel's or the user's
        self.seen.append((self.current_epoch, batch_idx, batch["image"].clone(), batch["label"].clone()))
        label = batch["label"] if batch["label"].ndim == 1 else batch["label"][:, 0]
        return torch.nn.functional.cross_entropy(self.net(batch["image"].flatten(1)), label)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch["image"].flatten(1)))


def trained(model, data, *callbacks, ckpt_path=None, **options):
    fit(model, data, *callbacks, ckpt_path=ckpt_path, **({"max_epochs": 3} | options))
    return model


def digits(num_workers=0, **arguments):
    return Digits(image_size=8, batch_size=100, num_workers=num_workers, shift=1, **arguments)


def assert_same_end(whole, resumed, first):
    assert len(whole.seen) - first == len(resumed.seen) > 0
    for x, y in zip(whole.seen[first:], resumed.seen, strict=True):
        assert x[:2] == y[:2]
        assert torch.equal(x[2], y[2]) and torch.equal(x[3], y[3])
    for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(x, y)


def every(folder, steps):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


@pytest.fixture(scope="module")
def uninterrupted():
    seed_everything(1, verbose=False)
    return trained(Linear(), digits())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [3, 12, 17, 24])
def test_interrupted_run_equals_uninterrupted(tmp_path, uninterrupted, num_workers, step):
    """Steps 3 and 17 are in mid-epoch, 12 and 24 the last batch of an epoch."""
    seed_everything(1, verbose=False)
    with pytest.raises(SystemExit):  # Lightning's answer to KeyboardInterrupt
        trained(Linear(fail_at=step + 2), digits(num_workers), every(tmp_path, step))

    path = tmp_path / f"step={step}.ckpt"
    resumed = trained(Linear(), digits(num_workers), every(tmp_path, step), ckpt_path=path)
    assert_same_end(uninterrupted, resumed, first=step)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_end_of_epoch_checkpoint(tmp_path, num_workers):
    def checkpoint():
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    seed_everything(1, verbose=False)
    whole = trained(Linear(), digits(num_workers), checkpoint())
    resumed = trained(Linear(), digits(num_workers), checkpoint(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same_end(whole, resumed, first=PER_EPOCH)


def test_limited_epochs(tmp_path):
    """The loader of a limited epoch stops in its middle; the next epoch starts at its own start all the same."""
    seed_everything(1, verbose=False)
    whole = trained(Linear(), digits(), every(tmp_path, 7), limit_train_batches=8)
    for step in (7, 14, 21):
        path = tmp_path / f"step={step}.ckpt"
        resumed = trained(Linear(), digits(), every(tmp_path, 7), ckpt_path=path, limit_train_batches=8)
        assert_same_end(whole, resumed, first=step)


def test_validation_in_mid_epoch_and_accumulation(tmp_path):
    def run(ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)
        often = {"val_check_interval": 4, "accumulate_grad_batches": 2}
        return trained(Linear(), digits(), checkpoint, ckpt_path=ckpt_path, **often)

    seed_everything(1, verbose=False)
    whole = run()
    for step in (2, 6, 8):
        resumed = run(tmp_path / f"step={step}.ckpt")
        assert_same_end(whole, resumed, first=2 * step)


def test_pairs_resume(tmp_path):
    def data():
        return MultiMNIST(base=Digits(image_size=8), shift=2, pad=2, batch_size=100)

    seed_everything(1, verbose=False)
    whole = trained(Linear(144), data(), every(tmp_path, 17))
    resumed = trained(Linear(144), data(), every(tmp_path, 17), ckpt_path=tmp_path / "step=17.ckpt")
    assert_same_end(whole, resumed, first=17)


def test_overfit_batches_repeats_the_same_batches():
    model = trained(Linear(), digits(), overfit_batches=2)
    assert len(model.seen) == 6
    for n in (2, 4):
        assert torch.equal(model.seen[0][2], model.seen[n][2]) and torch.equal(model.seen[1][2], model.seen[n + 1][2])


def test_no_validation_images_trains():
    class NoValidation(Digits):
        def read(self, split):
            return None if split == "val" else super().read(split)

    model = trained(Linear(), NoValidation(image_size=8, batch_size=100), max_epochs=1)
    assert len(model.seen) == PER_EPOCH
