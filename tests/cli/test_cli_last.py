"""``--ckpt_path last`` takes the newest run's checkpoint, names it, and says what it passed over."""

import json
import os

import pytest
import torch
from hostile import eae, shards

from lightning_plugins.cli.last_run import find_last
from lightning_plugins.cli.messages import UsageError

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
DATA = "--data=my_package.ToyData"


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
    return find_last(folder)


def damage(path, data):
    age = path.stat().st_mtime
    path.write_bytes(data)
    os.utime(path, (age, age))


def test_the_newest_run(checkpoints, tmp_path, capsys):
    assert last(tmp_path) == checkpoints[3]
    assert capsys.readouterr().err == f"--ckpt_path last takes {str(checkpoints[3])!r}.\n"


def test_what_cannot_be_read_is_passed_over(checkpoints, tmp_path, capsys):
    """First the same run's earlier checkpoints, then the run before it."""
    first, second, third, fourth = checkpoints
    damage(fourth, b"")
    assert last(tmp_path) == third
    empty = f"checkpoint {str(fourth)!r} is empty: the run that wrote it was cut off. Use an earlier one."
    assert capsys.readouterr().err.splitlines() == [
        f"--ckpt_path last passes over: {empty}",
        f"--ckpt_path last takes {str(third)!r}.",
    ]
    damage(third, third.read_bytes()[:-1])
    assert last(tmp_path) == second
    assert "version_1/checkpoints/epoch=0.ckpt' is truncated" in capsys.readouterr().err
    for path in (first, second):
        damage(path, b"\0" * 1000)
    with pytest.raises(UsageError) as error:
        last(tmp_path)
    assert error.value.lines[:2] == ["--ckpt_path last: none of 4 checkpoint(s) can be read.", empty]


def test_a_newest_run_without_a_last_checkpoint_is_refused(checkpoints, tmp_path):
    """Another run's would be tested, or gone on with, in its place."""
    checkpoints[3].unlink()
    with pytest.raises(UsageError) as error:
        last(tmp_path)
    assert error.value.lines == [
        f"--ckpt_path last: the newest run, {str(checkpoints[3].parent)!r}, has no last.ckpt.",
        f"It has {str(checkpoints[2])!r}.",
        f"To take a file, name it, such as --ckpt_path {checkpoints[2]}",
    ]


def test_a_link_that_leads_nowhere_and_half_a_folder(checkpoints, tmp_path, capsys):
    checkpoints[3].unlink()
    checkpoints[3].symlink_to("gone.ckpt")
    (checkpoints[3].parent / "last-v1.ckpt").mkdir()  # sharded, interrupted before its description
    assert last(tmp_path) == checkpoints[2]
    told = capsys.readouterr().err
    assert "last.ckpt' does not exist." in told
    assert "last-v1.ckpt' is a folder without a sharded checkpoint" in told
    shards(eae(), checkpoints[3].parent / "last-v1.ckpt")
    assert last(tmp_path).name == "last-v1.ckpt"
    (checkpoints[3].parent / "last-v1.ckpt" / "meta.pt").unlink()
    assert last(tmp_path) == checkpoints[2]
    assert "last-v1.ckpt' is damaged (it lacks 'meta.pt')." in capsys.readouterr().err


def test_another_file_by_the_name_of_a_checkpoint(checkpoints, tmp_path, capsys):
    torch.save([1], checkpoints[3])
    assert last(tmp_path) == checkpoints[2]
    assert "last.ckpt' is not a Lightning checkpoint." in capsys.readouterr().err


# Runs of the command line


def steps(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_a_plain_fit_keeps_its_last_checkpoint_to_its_end(cli, project, capsys):
    """Three steps an epoch; a ModelCheckpoint that looks every second epoch sees four of five."""
    cli("fit", *TOY)
    assert steps("lightning_logs/version_0/checkpoints/last.ckpt") == 3
    cli("fit", *TOY, "--model.lr=0.5", "--trainer.max_epochs=5", "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_epochs=2")  # fmt: skip
    assert steps("lightning_logs/version_1/checkpoints/last.ckpt") == 15
    cli("test", DATA, "--ckpt_path=last")
    taken = "lightning_logs/version_1/checkpoints/last.ckpt"
    assert f"--ckpt_path last takes {taken!r}.\n" in capsys.readouterr().err
    assert [path.name for path in (project / "lightning_logs/version_1/checkpoints").glob("last*")] == ["last.ckpt"]


def test_what_is_saved_at_the_end_goes_on_as_if_it_had_not_ended(cli, project):
    rare = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=2"]
    cli("fit", *TOY, *rare, "--trainer.max_epochs=4")
    cli("fit", *TOY, *rare, "--trainer.max_epochs=3")
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        cli("fit", *TOY, *rare, "--trainer.max_epochs=4", "--ckpt_path=last")
    whole, resumed = (
        torch.load(f"lightning_logs/version_{run}/checkpoints/last.ckpt", weights_only=True) for run in (0, 2)
    )
    assert whole["global_step"] == resumed["global_step"] == 12
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


@pytest.mark.parametrize("how", [["--trainer.enable_checkpointing=false"], ["--trainer.callbacks+=ModelCheckpoint",
                                 "--trainer.callbacks.save_last=false"]])  # fmt: skip
def test_a_fit_that_was_told_to_keep_none_is_not_passed_over(cli, trained, mistake, how):
    cli("fit", *TOY, *how)
    told = mistake("test", DATA, "--ckpt_path=last").splitlines()
    assert "the newest run, 'lightning_logs/version_1" in told[0] and told[0].endswith("has no last.ckpt.")


def test_a_checkpoint_of_weights_alone_is_not_the_last(cli, project, mistake):
    cli("fit", *TOY, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true")
    assert "has no last.ckpt." in mistake("fit", *TOY, "--ckpt_path=last")


def test_last_follows_the_newest_run_to_its_checkpoints(cli, trained, capsys):
    cli("fit", *TOY, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=mine")
    capsys.readouterr()
    cli("validate", DATA, "--ckpt_path=last")
    assert "mine/last.ckpt'.\n" in capsys.readouterr().err


def test_a_run_stopped_before_its_first_checkpoint_stands_where_it_began(cli, trained, project, mistake, capsys):
    folder = project / "lightning_logs/version_1"
    folder.mkdir()
    record = {"command": "fit", "status": "running", "checkpoint": str(trained), "checkpoints": "checkpoints"}
    (folder / "metrics.json").write_text(json.dumps(record))
    cli("test", DATA, "--ckpt_path=last")
    assert capsys.readouterr().err.splitlines()[:2] == [
        "--ckpt_path last passes over: the newest run, 'lightning_logs/version_1', which has no checkpoint yet.",
        f"--ckpt_path last takes {str(trained)!r}.",
    ]
    (folder / "metrics.json").write_text(json.dumps({**record, "checkpoint": None}))
    assert mistake("test", DATA, "--ckpt_path=last").splitlines() == [
        "error: --ckpt_path last: the newest run, 'lightning_logs/version_1', has no last.ckpt.",
        "It was stopped before it wrote one, or told to write none.",
        "To take a file, name it, such as --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt",
    ]


def test_a_trial_leaves_nothing_behind(cli, trained, project):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    for words in (TOY, [*TOY, *save], [*TOY, *save, "--trainer.callbacks.dirpath=mine"]):
        cli("fit", *words, "--trainer.fast_dev_run=1", "--test_after_fit=true")
    for command in ("validate", "test", "predict"):
        cli(command, DATA, "--ckpt_path=last", "--trainer.fast_dev_run=1")
    assert {
        path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.suffix != ".pyc"
    } == before
    assert not (project / "mine").exists()
