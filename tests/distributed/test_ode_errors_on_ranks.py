"""A replay that fails on one rank: all ranks leave its rows out, or raise, and none waits for another."""

import pytest
import torch
from ranks import torchrun

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ode_errors")
    with torchrun("train_ode_errors", folder, cwd=folder):
        pass
    return folder


def load(folder, rank):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


@pytest.mark.parametrize("engine", ["auto", "finite_difference"])
def test_all_leave_the_rows_out(runs, engine):
    found = [load(runs / engine, rank) for rank in (0, 1)]
    for rank, plain in ((0, load(runs / "plain", 0)), (1, load(runs / "plain", 1))):
        assert all(map(torch.equal, found[rank]["weights"], plain["weights"]))
    assert found[0]["rows"] == found[1]["rows"]
    assert ["ode/curvature_step" in row for row in found[0]["rows"]] == [True] * 3 + [False] + [True] * 2
    assert "ode/sharpness" in found[0]["rows"][1]
    assert any("on rank 1, KeyError: 'y'" in sentence for sentence in found[0]["said"])


def test_all_raise(runs):
    for rank in (0, 1):
        assert load(runs / "penalty", rank)["raised"] == "on rank 1, KeyError: 'y'"
