"""Two processes, replicated or sharded, log the rows that one process logs on the joined batches."""

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_ode")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("ode")
    one, two = folder / "one", folder / "two"
    with torchrun("train_ode", two, cwd=folder):
        for name in script.CASES:
            script.run(name, one / name, processes=1)
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
