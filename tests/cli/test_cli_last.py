"""``--ckpt_path last`` takes the newest checkpoint that can be read, and says what it passed over."""

import os

import pytest
import torch

from lightning_plugins.cli.checkpoint import checkpoint_folders, find_last
from lightning_plugins.cli.messages import UsageError


@pytest.fixture
def checkpoints(tmp_path):
    """Two runs, each with an earlier and a last checkpoint; the clock goes on with each file."""
    paths = []
    for run in (0, 1):
        for name in ("epoch=0.ckpt", "last.ckpt"):
            path = tmp_path / f"lightning_logs/version_{run}/checkpoints/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)
            paths.append(path)
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    return paths


def last(folder):
    return find_last(folder, checkpoint_folders(folder))


def damage(path, data):
    age = path.stat().st_mtime
    path.write_bytes(data)
    os.utime(path, (age, age))


def test_the_newest_run(checkpoints, tmp_path, capsys):
    assert last(tmp_path) == checkpoints[3]
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_is_passed_over(checkpoints, tmp_path, capsys):
    """First the same run's earlier checkpoints, then the run before it."""
    first, second, third, fourth = checkpoints
    damage(fourth, b"")
    assert last(tmp_path) == third
    empty = f"checkpoint {str(fourth)!r} is empty: the run that wrote it was cut off. Use an earlier one."
    assert capsys.readouterr().err.splitlines() == [
        f"--ckpt_path last passes over: {empty}",
        f"It takes {str(third)!r}.",
    ]
    damage(third, third.read_bytes()[:-1])
    assert last(tmp_path) == second
    assert "version_1/checkpoints/epoch=0.ckpt' is truncated" in capsys.readouterr().err
    for path in (first, second):
        damage(path, b"\0" * 1000)
    with pytest.raises(UsageError) as error:
        last(tmp_path)
    assert error.value.lines[:2] == ["--ckpt_path last: none of 4 checkpoint(s) can be read.", empty]


def test_a_run_without_a_last_checkpoint_is_none(checkpoints, tmp_path):
    checkpoints[3].unlink()
    assert last(tmp_path) == checkpoints[1]


def test_a_link_that_leads_nowhere_and_half_a_folder(checkpoints, tmp_path, capsys):
    checkpoints[3].unlink()
    checkpoints[3].symlink_to("gone.ckpt")
    (checkpoints[3].parent / "last-v1.ckpt").mkdir()  # sharded, interrupted before its description
    assert last(tmp_path) == checkpoints[2]
    told = capsys.readouterr().err
    assert "last.ckpt' does not exist." in told
    assert "last-v1.ckpt' is a folder without its meta.pt." in told
    (checkpoints[3].parent / "last-v1.ckpt" / "meta.pt").touch()
    assert last(tmp_path).name == "last-v1.ckpt"


def test_another_file_by_the_name_of_a_checkpoint(checkpoints, tmp_path, capsys):
    torch.save([1], checkpoints[3])
    assert last(tmp_path) == checkpoints[2]
    assert "last.ckpt' is not a Lightning checkpoint." in capsys.readouterr().err
