"""Two processes, replicated or sharded, log the rows that one process logs on the joined batches."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "train_ode.py"

pytestmark = pytest.mark.ddp


def load_script():
    spec = importlib.util.spec_from_file_location("train_ode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_ode"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("ode")
    one, two, log = folder / "one", folder / "two", folder / "two.log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, two]
    with log.open("w") as file:
        process = subprocess.Popen(
            launch, cwd=folder, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in script.CASES:
            script.run(name, one / name, processes=1)
        assert process.wait(timeout=300) == 0, log.read_text()[-5000:]
    finally:
        process.terminate()
        torch.set_num_threads(threads)
    return one, two


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", script.CASES)
def test_rows_are_of_all_ranks(runs, name):
    one, two = runs
    expected, *ranks = load(one / name), load(two / name), load(two / name, rank=1)
    steps = -(-script.MICRO_BATCHES // script.CASES[name].accumulate)
    assert len(expected["rows"]) == steps
    assert "ode/sharpness" in expected["rows"][1]
    for found in ranks:
        assert [row.keys() for row in found["rows"]] == [row.keys() for row in expected["rows"]]
        for own, row in zip(found["rows"], expected["rows"], strict=True):
            for key, value in row.items():
                tolerance = 1e-5 if key in ("ode/sharpness", "ode/edge_ratio", "ode/stiffness") else 1e-7
                assert own[key] == pytest.approx(value, rel=tolerance), key
    assert ranks[0]["rows"] == ranks[1]["rows"]


@pytest.mark.parametrize("name", script.CASES)
def test_weights_are_those_of_an_unwatched_run(runs, name):
    _, two = runs
    for rank in (0, 1):
        watched, plain = load(two / name, rank)["weights"], load(two / f"{name}-unwatched", rank)["weights"]
        assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
