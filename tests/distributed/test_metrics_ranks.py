"""Two processes with different numbers of images, or one with none, compute what one process with all of them does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "compare_images.py"

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:FrechetDistance of 25 generated images"),  # fewer than features
]


def load_script():
    spec = importlib.util.spec_from_file_location("compare_images", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_compute_what_one_does(tmp_path):
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    one.mkdir()
    two.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, two]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        answer = subprocess.run(launch, cwd=tmp_path, stdout=file, stderr=file, env=environment, timeout=120)
    assert answer.returncode == 0, log.read_text()[-5000:]
    load_script().run(one)
    expected = torch.load(one / "rank0.pt", weights_only=True)
    for rank in (0, 1):
        found = torch.load(two / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys() and len(found) == 8
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {found[name]}, {value}")
    assert expected["reference count"] == 75
