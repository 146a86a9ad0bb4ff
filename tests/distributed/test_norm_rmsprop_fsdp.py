"""NormRMSprop on parameters sharded over two processes: one process's weights, and resumed through every checkpoint."""

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_norm_rmsprop")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks computed under torchrun."""
    folder = tmp_path_factory.mktemp("norm_rmsprop")
    with torchrun("train_norm_rmsprop", folder, cwd=folder):
        pass
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", script.OPTIONS)
def test_shards_are_measured_as_one(ranks, name):
    """Weights and means of one process that holds everything; the same mean on both ranks."""
    one = script.run(name)
    for rank in ranks:
        for key, value in one["weights"].items():
            torch.testing.assert_close(rank[name]["weights"][key], value, rtol=0, atol=1e-12)
        for actual, expected in zip(rank[name]["means"], one["means"], strict=True):
            assert actual == pytest.approx(expected, rel=1e-12)
    assert ranks[0][name]["means"] == ranks[1][name]["means"]


def test_foreach_equals_the_loop(ranks):
    for key, value in ranks[0]["loop"]["weights"].items():
        assert torch.equal(ranks[0]["foreach"]["weights"][key], value)


RESUMED = [(f"{name} {route}", name) for name in script.OPTIONS for route in script.ROUTES]
RESUMED += [("lightning folder", "plain"), ("lightning file", "plain")]


@pytest.mark.parametrize(("resumed", "name"), RESUMED, ids=[resumed for resumed, _ in RESUMED])
def test_resumed_equals_uninterrupted_bit_for_bit(ranks, resumed, name):
    for rank in ranks:
        for key, value in rank[name]["weights"].items():
            assert torch.equal(rank[resumed]["weights"][key], value), key
        assert rank[resumed]["means"] == rank[name]["means"]
