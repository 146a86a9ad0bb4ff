"""A run with random numbers in the model resumes bit for bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import ImageClassifier
from trainers import fit

from lightning_plugins.callbacks import RandomState
from lightning_plugins.core.random_state import get_random_state, set_random_state, state_for_rank
from lightning_plugins.data import Digits

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Noisy(ImageClassifier):
    """Draws from Python, NumPy and torch in training, in validation and at the start of epochs."""

    def __init__(self):
        super().__init__(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 10)))
        self.drawn = []

    def draw(self):
        return random.random() + np.random.rand() + torch.rand(()).item()

    def on_train_epoch_start(self):
        self.epoch_noise = self.draw()

    def training_step(self, batch, batch_idx):
        self.drawn.append(self.draw())
        x = batch["image"].flatten(1) + 0.1 * self.drawn[-1] * torch.randn(64)
        return torch.nn.functional.cross_entropy(self.net(x), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val/noise", self.draw())

    def on_train_epoch_end(self):
        self.draw()


class NoEpochHooks(Noisy):
    """Lightning resumes from an epoch's last batch with the next epoch's first: it calls no hook in between."""

    def on_train_epoch_start(self):
        pass

    def on_train_epoch_end(self):
        pass


class DrawsAtTheStart(Noisy):
    def on_train_start(self):
        self.draw()


def trained(folder, model, checkpoint, ckpt_path=None, callback=RandomState, **options):
    data = Digits(image_size=8, batch_size=100, shift=1)
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, **checkpoint)
    fit(model, data, callback(), saving, ckpt_path=ckpt_path, **({"max_epochs": 3} | options))
    return model


def assert_resumes(folder, steps, checkpoint, model=Noisy, **trainer):
    seed_everything(3, verbose=False)
    whole = trained(folder, model(), checkpoint, **trainer)
    for step in steps:
        seed_everything(99, verbose=False)
        resumed = trained(folder, model(), checkpoint, folder / f"step={step}.ckpt", **trainer)
        assert resumed.drawn == whole.drawn[step:] != []
        for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_checkpoints_between_steps(tmp_path, num_sanity_val_steps):
    """Every fifth step of epochs of twelve, with validation every fourth step."""
    settings = {"val_check_interval": 4, "num_sanity_val_steps": num_sanity_val_steps}
    assert_resumes(tmp_path, (5, 20), {"every_n_train_steps": 5}, **settings)


def test_checkpoints_at_a_validation_in_mid_epoch(tmp_path):
    assert_resumes(tmp_path, (8, 12), {"monitor": "val/noise"}, val_check_interval=4)


def test_checkpoints_before_the_validation_of_the_same_step(tmp_path):
    assert_resumes(tmp_path, (4, 8), {"every_n_train_steps": 4}, val_check_interval=4)


def test_checkpoints_after_the_last_batch_of_an_epoch(tmp_path):
    assert_resumes(tmp_path, (12, 24), {"every_n_train_steps": 12}, model=NoEpochHooks)


def test_checkpoints_at_the_end_of_an_epoch(tmp_path):
    assert_resumes(tmp_path, (12, 24), {"save_on_train_epoch_end": True}, model=DrawsAtTheStart)


def test_without_the_callback_the_numbers_differ(tmp_path):
    """The tests above could fail."""
    from lightning.pytorch import Callback

    with pytest.raises(AssertionError):
        assert_resumes(tmp_path, (5,), {"every_n_train_steps": 5}, callback=Callback)


def test_state_is_plain_data(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()
    state = get_random_state(torch.device("cpu"))
    torch.save(state, tmp_path / "state.pt")
    expected = [random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(()).item()]
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    set_random_state(loaded, torch.device("cpu"))
    assert [random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(()).item()] == expected


def drawn_by(state):
    """What a process with this state draws next: Python's, NumPy's and torch's numbers."""
    set_random_state(state, torch.device("cpu"))
    return [random.random(), np.random.rand(), torch.rand(()).item()]


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("alike", [False, True])
def test_no_two_processes_draw_the_same(before, now, alike):
    """States by seed, as ``seed_everything`` leaves them: one for each process, or the same for all."""
    states = []
    for rank in range(before):
        seed_everything(7 if alike else rank, verbose=False)
        states.append(get_random_state(torch.device("cpu")))
    seed_everything(99, verbose=False)
    here = drawn_by(get_random_state(torch.device("cpu")))
    seed_everything(99, verbose=False)
    given = [state_for_rank(states, rank, torch.device("cpu")) for rank in range(now)]
    assert drawn_by(get_random_state(torch.device("cpu"))) == here  # asking draws nothing
    numbers = [drawn_by(state) for state in given]
    for kind in zip(*numbers, strict=True):
        assert len(set(kind)) == now
    for rank, state in enumerate(given):
        set_random_state(state, torch.device("cpu"))
        assert torch.initial_seed() == (7 if alike else rank if rank < before else 0)
    kept = 1 if alike else min(before, now)
    assert numbers[:kept] == [drawn_by(state) for state in states[:kept]]
    again = [drawn_by(state_for_rank(states, rank, torch.device("cpu"))) for rank in range(now)]
    assert again == numbers


def test_another_number_of_processes_is_said(tmp_path):
    """From two to one: the first process's numbers, and a sentence."""
    steps = {"every_n_train_steps": 1}
    model = trained(tmp_path, Noisy(), steps, max_steps=1, limit_val_batches=0)
    path = tmp_path / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    whole = trained(tmp_path, Noisy(), steps, path, max_steps=2, limit_val_batches=0)
    seed_everything(5, verbose=False)
    checkpoint["random_state"].append(get_random_state(torch.device("cpu")))
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning) as warned:
        resumed = trained(tmp_path, Noisy(), steps, path, max_steps=2, limit_val_batches=0)
    assert [str(w.message) for w in warned if "RandomState" in str(w.message)] == [
        "RandomState: the checkpoint holds the random states of 2 process(es) and this run has 1, so that it does not "
        "draw what the interrupted one would have: processes go on with their states where there are any, and no two "
        "draw the same."
    ]
    assert len(model.drawn) == 1
    assert resumed.drawn == whole.drawn


def test_a_checkpoint_without_states_is_named(tmp_path):
    from lightning.pytorch import Callback

    trained(tmp_path, Noisy(), {"every_n_train_steps": 1}, callback=Callback, max_steps=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="written without RandomState: random numbers start afresh"):
        trained(
            tmp_path, Noisy(), {"every_n_train_steps": 1}, tmp_path / "step=1.ckpt", max_steps=2, limit_val_batches=0
        )
