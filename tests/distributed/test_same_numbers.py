"""No number depends on how many processes computed it: losses, metrics, predictions, what training logs, weights."""

from types import SimpleNamespace

import pytest
import torch
from ranks import load_script, torchrun
from tiny import save_teacher

pytestmark = pytest.mark.ddp

script = load_script("same_numbers")
OF_FOUR = ("teacher", "masked")
IN_FLOAT32 = ("eae", "vae", "sigreg", "capsnet")  # whose errors are measured in float32, whatever the weights are
RUNS = [pytest.param(name, precision, 2) for name in script.CASES for precision in script.PRECISIONS]
RUNS += [
    pytest.param(name, precision, 4, marks=pytest.mark.slow) for name in OF_FOUR for precision in script.PRECISIONS
]
PREDICTED = [run for run in RUNS if run.values[0] in script.WITH_PREDICTIONS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("numbers")
    save_teacher(folder / "teacher")
    (folder / "2").mkdir()
    with torchrun("same_numbers", folder / "2", folder / "teacher", cwd=folder / "2"):
        for name in script.CASES:
            for precision in script.PRECISIONS:
                script.run(name, folder / "1" / name / precision, folder / "teacher", precision=precision)
    return SimpleNamespace(folder=folder)


def load(runs, name, precision, processes):
    if processes == 4 and not (runs.folder / "4").exists():
        (runs.folder / "4").mkdir()
        with torchrun(
            "same_numbers", runs.folder / "4", runs.folder / "teacher", *OF_FOUR, cwd=runs.folder, processes=4
        ):
            pass
    folder = runs.folder / str(processes) / name / precision
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def tolerance(name, precision):
    return 1e-10 if precision == "64-true" and name not in IN_FLOAT32 else 1e-6


def without_perplexity(result):
    """The loss's exponential has as many times its relative error as the loss is large."""
    return {name: value for name, value in result["metrics"].items() if name != "val/perplexity"}


def approx(value, relative):
    return pytest.approx(value, rel=relative, abs=relative)


@pytest.mark.parametrize(("name", "precision", "processes"), RUNS)
def test_evaluation(runs, name, precision, processes):
    """Of 11 samples, which the processes cannot share equally, in batches of 3 of each process."""
    (one,), several = load(runs, name, precision, 1), load(runs, name, precision, processes)
    for result in several:
        assert without_perplexity(result) == approx(without_perplexity(one), tolerance(name, precision))
    assert bool(one["metrics"]) == (name != "sid")


@pytest.mark.parametrize(("name", "precision", "processes"), PREDICTED)
def test_predictions_are_those_of_one_process_in_the_input_s_order(runs, name, precision, processes):
    (one,), several = load(runs, name, precision, 1), load(runs, name, precision, processes)
    for key, expected in joined(one).items():
        found = torch.zeros_like(expected)
        for rank, result in enumerate(several):
            found[rank::processes] = joined(result)[key]
        assert len(expected) == script.HELD_OUT
        limit = 1e-5 if precision == "32-true" else 1e-10  # rounding of float32 in fifty steps of a sampler
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def joined(result):
    batches = result["predictions"]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize(("name", "precision", "processes"), RUNS)
def test_training(runs, name, precision, processes):
    """What each batch logs, on every process, and the weights in the end."""
    (one,), several = load(runs, name, precision, 1), load(runs, name, precision, processes)
    assert len(one["train"]) == 2
    for result in several:
        # SiD's loss is a small difference of large sums.
        limit = 1e-4 if (name, precision) == ("sid", "32-true") else tolerance(name, precision)
        for step, found in zip(one["train"], result["train"], strict=True):
            assert "train/loss" in step or "train/divergence" in step
            assert found == approx(step, limit)
        for key, value in one["weights"].items():
            torch.testing.assert_close(result["weights"][key], value, rtol=0, atol=tolerance(name, precision))


@pytest.mark.parametrize(("name", "precision", "processes"), RUNS)
def test_dropout_differs_between_processes_and_batches(runs, name, precision, processes):
    drawn = torch.cat([result["drawn"] for result in load(runs, name, precision, processes)])
    assert len(drawn) >= 2 * processes
    assert len(drawn.unique()) == len(drawn)
