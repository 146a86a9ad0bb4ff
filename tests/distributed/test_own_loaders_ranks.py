"""Loaders without their data module: two processes share what one draws, and none has all of it."""

from itertools import zip_longest

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("own_loaders")
NAMES = {"digits": "image", "classes": "label", "texts": "input_ids"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two ranks saw of batches of 8, and what one process sees of batches of 16."""
    folder = tmp_path_factory.mktemp("own_loaders")
    with torchrun("own_loaders", folder, cwd=folder):
        one = script.seen(16)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)], one


def rows(batch, name):
    """The samples of a batch; texts without padding, which is 0."""
    return [row[row > 0].tolist() if name == "texts" else row.tolist() for row in batch[NAMES[name]]]


@pytest.mark.parametrize("stage", ["train", "test"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_share_the_batches_of_one(runs, name, stage):
    ranks, one = runs
    batches = [[rows(batch, name) for batch in run[name][stage]] for run in (*ranks, one)]
    assert len(batches[2]) == {"train": 6, "test": 2}[stage]
    for first, second, whole in zip(*batches, strict=True):
        assert whole == [row for pair in zip_longest(first, second) for row in pair if row is not None]
