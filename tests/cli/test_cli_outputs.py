import json
import os
from types import SimpleNamespace

import pytest
import torch
from disks import little_room
from torch.utils.data import DataLoader

from lightning_plugins.cli.outputs import join_batches, picture_lines, save_predictions


def test_join_batches():
    joined = join_batches(
        [{"a": torch.ones(2, 3), "n": torch.tensor(1)}, {"a": torch.zeros(1, 3), "n": torch.tensor(2)}]
    )
    assert joined["a"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3]
    assert joined["n"].tolist() == [1, 2]
    ragged = [torch.ones(1, 3), torch.ones(1, 4)]
    assert join_batches(ragged) == ragged
    assert join_batches(["a", "b"]) == ["a", "b"]
    assert join_batches([]) == []


@pytest.fixture
def trainer(tmp_path):
    """What is asked of a trainer: rank one of two if the test says so."""
    return SimpleNamespace(
        predict_dataloaders=DataLoader([0]),
        global_rank=1,
        world_size=1,
        strategy=SimpleNamespace(broadcast=lambda path: path),
        loggers=[],
        default_root_dir=tmp_path / "run",
    )


RECORDS = [
    [{"source": "猫 “\u2028”\n", "prediction": "a", "score": 0.5}, {"source": "", "prediction": None, "ids": [1, [2]]}],
    [{"source": "b", "kept": True, "more": {"x": 1}}],
]


def test_records_are_a_line_each(trainer, tmp_path):
    path = save_predictions(trainer, RECORDS)
    assert path == tmp_path / "run/predictions.jsonl"
    lines = path.read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [*RECORDS[0], *RECORDS[1]]
    assert lines[0].startswith('{"source": "猫 “') and lines[-1] == ""

    trainer.world_size = 2
    assert save_predictions(trainer, RECORDS[:1]).name == "predictions_rank1.jsonl"

    trainer.predict_dataloaders = [DataLoader([0]), DataLoader([0])]
    lines = save_predictions(trainer, [RECORDS, RECORDS[1:]]).read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["dataloader"] for line in lines[:-1]] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "predictions",
    [
        [[{"source": "a", "logits": torch.ones(2)}]],
        [[{"source": "a"}], ["b"]],
        [{"source": ["a", "b"]}],
        [[{1: "a"}]],
    ],
)
def test_anything_else_is_kept_as_it_is(trainer, predictions):
    path = save_predictions(trainer, predictions)
    assert path.name == "predictions.pt"
    found, expected = torch.load(path, weights_only=True), join_batches(predictions)
    assert str(found) == str(expected)


@pytest.mark.parametrize("kind", ["records", "tensors"])
def test_a_full_disk_leaves_the_predictions_before(trainer, kind):
    """A file that has half of the new ones would look like all of them."""
    one, many = ([[{"source": "a"}]], [[{"source": "a" * 100}] * 1000])
    if kind == "tensors":
        one, many = ([torch.ones(2)], [torch.ones(50_000)])
    path = save_predictions(trainer, one)
    before = path.read_bytes()
    with little_room(), pytest.raises(OSError, match="File too large"):
        save_predictions(trainer, many)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_pictures_one_line_each_kind_newest_first_seen_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images/val/sweep/000001.png", "images/val/sweep/000007.png", "images/old/000001.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / "images/old/000001.png", (1, 1))
    assert picture_lines(tmp_path / "images", since=1000) == ["images/val/sweep/000007.png  (and 1 earlier)"]


def test_many_kinds_of_pictures_take_twelve_lines_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in range(30):
        (tmp_path / f"images/{kind:02}").mkdir(parents=True)
        (tmp_path / f"images/{kind:02}/1.png").touch()
    lines = picture_lines(tmp_path / "images", since=0)
    assert lines[0] == "images/00/1.png"
    assert lines[10:] == ["and 20 more kinds in images"]
