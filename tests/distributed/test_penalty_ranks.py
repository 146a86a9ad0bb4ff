"""Two processes train on the penalised loss of the joined batches: gradients of every step, weights, statistics."""

import functools

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_penalty")
reference = functools.cache(script.reference)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of all cases under torchrun."""
    folder = tmp_path_factory.mktemp("penalty")
    with torchrun("train_penalty", folder, cwd=folder):
        pass
    return folder


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def largest_error(found, expected):
    """Of all steps, relative to the step's gradient."""
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", script.CASES)
def test_gradients_are_those_of_the_written_objective(runs, name):
    expected, tolerance = reference(name), script.CASES[name].tolerance
    first, second = load(runs / name), load(runs / name, rank=1)
    for key in ("gradients", "weights"):
        assert torch.equal(first[key], second[key]), f"the ranks' {key} differ"
    assert first["gradients"].shape == expected["gradients"].shape
    assert largest_error(first["gradients"], expected["gradients"]) < tolerance
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=3 * tolerance, check_dtype=False)
    for found, right in zip(first["buffers"], expected["buffers"], strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=3 * tolerance)


@pytest.mark.parametrize("name", script.CASES)
def test_the_penalty_can_be_seen(name):
    """Else the test above could not fail."""
    plain, penalised = reference(name, coefficient=0.0), reference(name)
    assert largest_error(plain["gradients"][:1], penalised["gradients"][:1]) > 0.2


def test_the_levels_are_straddled():
    """Signs differ between steps, and between the ranks of one step."""
    assert {sign for (sign,) in reference("flooded-exact")["signs"]} == {1.0, -1.0}
    assert [1.0, -1.0] in reference("flooded-micro-exact")["signs"]


def test_scopes_are_other_objectives():
    assert largest_error(reference("micro")["gradients"], reference("central")["gradients"][:1]) > 0.1


@pytest.mark.parametrize("name", ["central", "exact", "norm", "clip", "synced", "flooded", "flooded-exact-window"])
def test_one_process_with_the_joined_batch_is_the_same(runs, name, tmp_path):
    script.run(name, tmp_path, processes=1)
    one, two = load(tmp_path), load(runs / name)
    tolerance = script.CASES[name].tolerance
    assert largest_error(two["gradients"], one["gradients"]) < tolerance
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=tolerance)


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    """In the middle of warm-up and schedule."""
    whole, resumed = load(runs / "whole"), load(runs / "resumed")
    assert len(whole["gradients"]) == 2 * script.MICRO_BATCHES
    assert torch.equal(whole["gradients"][script.MICRO_BATCHES :], resumed["gradients"])
    assert torch.equal(whole["weights"], resumed["weights"])


def test_what_one_rank_needs_all_take(runs):
    """Kinks and precision are found in each rank's own graph; steps of different length would part the replicas."""
    assert [load(runs / "forward", rank)["largest"] for rank in (0, 1)] == [11, 11]
