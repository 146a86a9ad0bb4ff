"""NonFiniteGuard on two processes, one of which gets a NaN: both decide alike, in the same step."""

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_guard")
SENTENCE = f"NonFiniteGuard: in step {script.BAD} (epoch 0, batch {script.BAD}, rank 1) the loss is not finite."


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all cases, run by two processes under torchrun."""
    folder = tmp_path_factory.mktemp("guard")
    with torchrun("train_guard", folder, cwd=folder):
        pass
    return lambda name: [torch.load(folder / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["ddp", "ddp-accumulate", "ddp-loss", "sharded"])
def test_both_leave_the_step_out(runs, name):
    window = script.CASES[name][2].get("accumulate_grad_batches", 1)
    for rank, clean in zip(runs(name), runs(f"{name}-clean"), strict=True):
        assert rank["left_out"] == [script.BAD // window] and clean["left_out"] == []
        assert rank["global_step"] == script.BATCHES // window
        torch.testing.assert_close(rank["state"], clean["state"], rtol=0, atol=0)
    assert "rank 1) the loss is not finite" in runs(name)[0]["said"]  # rank zero warns, of the other


@pytest.mark.parametrize("name", ["ddp-raise", "sharded-raise"])
def test_both_raise(runs, name):
    for rank in runs(name):
        assert rank["said"].startswith(SENTENCE) and "batch[0] is not finite in row 2" in rank["said"]
        assert rank["global_step"] == script.BAD


def test_both_stop(runs):
    for rank in runs("sharded-stop"):
        assert rank["global_step"] == script.BAD + 1
        assert all(value.isfinite().all() for value in rank["state"].values())
