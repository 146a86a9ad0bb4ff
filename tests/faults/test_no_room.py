"""A full, a small and a read-only disk: one sentence, a status, and nothing half-written; a later run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fault_runs
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "no_room.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of each command."""
    answer = subprocess.run(
        [sys.executable, SCRIPT, tmp_path_factory.mktemp("room")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fault_runs.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", ["export", "sample"])
def test_a_full_disk(found, command):
    run = found[command]
    assert run["status"] in (1, 2) and run["new"] == [], run
    (line,) = [line for line in run["said"].splitlines() if line.startswith("error: ")]
    assert "File too large" in line
    assert "Traceback" not in run["said"]


def test_a_disk_too_small_for_all_checkpoints(found):
    run = found["small disk"]
    if "skipped" in run:
        pytest.skip(run["skipped"])
    assert run["status"] == 1, run
    assert "cannot be written: No space left on device." in run["said"] and "Traceback" not in run["said"]
    assert 0 < run["kept"] < fault_runs.BATCHES
    assert run["equal"]


def test_a_read_only_disk(found):
    run = found["small disk"]
    if "skipped" in run:
        pytest.skip(run["skipped"])
    status, said = run["read-only"]
    assert status in (1, 2) and "Read-only file system" in said and "Traceback" not in said, said
