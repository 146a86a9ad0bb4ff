"""Runs of the command line that are killed, signalled or out of room: each goes on to the end of one never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fault_runs
import pytest

SCRIPT = Path(__file__).parent / "scripts" / "kills.py"
STATUS = dict.fromkeys(fault_runs.KILLS, -signal.SIGKILL)
STATUS |= {"SIGTERM": 143, "SIGINT": 130, "worker": 1, "checkpoint": 1, "csv": 1, "pictures": 1}
TOLD = {
    "SIGTERM": "\nInterrupted. ",
    "SIGINT": "\nInterrupted.",  # there may be no checkpoint yet
    "worker": "error: a worker process of the data loader is gone: ",
    "checkpoint": ".ckpt' cannot be written: File too large. What had its name before is as it was.\n",
    "csv": "error: a file of the run cannot be written: File too large.\n",
    "pictures": " cannot be written: File too large.\n",
}
OTHERS = ("SIGTERM", "SIGINT", "worker", "checkpoint", "csv")


def meet(folder, module, *places, seed=0):
    """Each fault at a random batch of a run of its own."""
    answer = subprocess.run(
        [sys.executable, SCRIPT, folder, module, str(seed), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fault_runs.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    whole, *found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(found) == len(places)
    for run in found:
        check(run, whole["steps"] // fault_runs.BATCHES)


def check(run, steps):
    """What one run met, for a module that counts so many steps in a batch.

    Weights, optimizers and schedulers end as those of the whole run, bit for bit; the steps since the last checkpoint
    are all that was lost; the status tells the fault; and no half file is left where the run went on.
    """
    place, at = run["place"], run["at"]
    assert run["equal"], run
    assert run["status"] == STATUS[place], run
    assert TOLD.get(place, "") in run["said"] and "Traceback" not in run["said"], run
    assert run["left"] == []
    kept, every = run["kept"], fault_runs.SAVE_EVERY
    before = (at - 1) * steps // every * every  # the last checkpoint before the batch
    assert kept >= before, run
    if place == "SIGTERM":
        assert kept == at * steps, run
    if place == "step":
        assert kept == before, run


def test_a_network_killed_in_a_step_and_in_a_save(tmp_path):
    meet(tmp_path, "CapsNet", "step", "writing")


@pytest.mark.slow
@pytest.mark.parametrize("module", fault_runs.MODULES)
def test_killed_at_twenty_random_batches(tmp_path, module):
    meet(tmp_path, module, *(fault_runs.KILLS * 5), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("module", fault_runs.MODULES)
def test_other_faults(tmp_path, module):
    meet(tmp_path, module, *OTHERS, seed=2)


@pytest.mark.slow
def test_no_room_for_pictures(tmp_path):
    meet(tmp_path, "CapsNet", "pictures", seed=3)
