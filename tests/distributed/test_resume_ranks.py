"""A run goes on with another number of processes: the data exactly, random numbers of no two processes the same."""

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("resume_ranks")
SENTENCE = "RandomState: the checkpoint holds the random states of {} process(es) and this run has {}, "


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: one process to the end, two to step 3, one to two and two to one from there."""
    folder = tmp_path_factory.mktemp("resume_ranks")
    script.run(folder / "one", 1)
    with torchrun("resume_ranks", folder, folder / "one" / "step=3.ckpt", cwd=folder):
        pass
    script.run(folder / "two-to-one", 1, folder / "two" / "step=3.ckpt")
    return folder


def test_from_one_process_to_two(runs):
    whole, first, second = load(runs / "one"), *(load(runs / "one-to-two", rank) for rank in (0, 1))
    assert whole["steps"] == first["steps"] == script.STEPS
    assert first["drawn"][0] == whole["drawn"][3]  # the process that there was goes on, with half of the dropout
    assert not {*second["drawn"]} & {*whole["drawn"], *first["drawn"]}
    joined = [a + b for a, b in zip(first["images"], second["images"], strict=True)]
    assert joined == pytest.approx(whole["images"][3:], abs=2)  # rounded by each


def test_from_two_processes_to_one(runs):
    first, second, resumed = load(runs / "two"), load(runs / "two", 1), load(runs / "two-to-one")
    assert not {*first["drawn"]} & {*second["drawn"]}
    assert len(resumed["drawn"]) == 3
    assert not {*resumed["drawn"]} & {*first["drawn"], *second["drawn"]}
    assert resumed["images"] == pytest.approx(load(runs / "one")["images"][3:], abs=2)


@pytest.mark.parametrize(("name", "before", "now"), [("one-to-two", 1, 2), ("two-to-one", 2, 1)])
def test_it_is_said_once(runs, name, before, now):
    said = load(runs / name)["said"]
    assert len(said) == 1
    assert said[0].startswith(SENTENCE.format(before, now))
    if now == 2:
        assert load(runs / name, 1)["said"] == []
