"""``metrics.json`` beside a run's config."""

import json
import signal

import lightning
import pytest
import torch
from disks import little_room

import lightning_plugins
from lightning_plugins.cli.run_record import read_record

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
DATA = "--data=my_package.ToyData"
MONITOR = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"]


def read(project, version=0):
    return json.loads((project / f"lightning_logs/version_{version}/metrics.json").read_text())


def test_all_stages_the_best_checkpoint_versions_and_seconds(cli, project):
    cli("fit", *TOY, *MONITOR, "--test_after_fit=true", "--trainer.max_epochs=2")
    record = read(project)
    assert (project / "lightning_logs/version_0/config.yaml").is_file()
    assert (record["command"], record["status"], record["epochs"], record["steps"]) == ("fit", "finished", 2, 6)
    assert (record["model"], record["data"]) == ("my_package.ToyNet", "my_package.ToyData")
    assert record["metrics"].keys() == {"fit", "test"}
    assert {"train/loss", "val/loss"} <= record["metrics"]["fit"].keys()
    assert 0 <= record["metrics"]["test"]["test/accuracy"] <= 1
    best = record["best_checkpoint"]
    assert best["monitor"] == "val/loss"
    assert (project / "lightning_logs/version_0" / best["path"]).is_file()
    state = torch.load(project / "lightning_logs/version_0" / best["path"], weights_only=True)["callbacks"]
    (score,) = (kept["best_model_score"] for kept in state.values() if "best_model_score" in kept)
    assert best["score"] == score.item()
    assert record["last_checkpoint"] == "checkpoints/last.ckpt"
    assert record["versions"]["lightning_plugins"] == lightning_plugins.__version__
    assert record["versions"]["lightning"] == lightning.__version__
    assert 0 < record["seconds"] == record["total_seconds"] < 600
    assert record["earlier"] == []


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_have_theirs(cli, trained, project, command):
    cli(command, DATA, "--ckpt_path=last")
    record = read(project, 1)
    assert (record["command"], record["status"], record["checkpoint"]) == (
        command, "finished", "lightning_logs/version_0/checkpoints/last.ckpt",
    )  # fmt: skip
    expected = {"validate": {"val/loss"}, "test": {"test/accuracy"}, "predict": set()}[command]
    assert record["metrics"][command].keys() == expected


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_adds_to_what_it_goes_on_from(cli, trained, project):
    for epochs in (2, 3):
        cli("fit", *TOY, f"--trainer.max_epochs={epochs}", "--ckpt_path=last")
    record = read(project, 2)
    assert [run["steps"] for run in record["earlier"]] == [3, 6]
    assert [run["folder"] for run in record["earlier"]] == [f"lightning_logs/version_{run}" for run in (0, 1)]
    assert record["checkpoint"] == "lightning_logs/version_1/checkpoints/last.ckpt"
    seconds = [run["seconds"] for run in [*record["earlier"], record]]
    assert record["total_seconds"] == pytest.approx(sum(seconds), abs=2e-3)  # each is rounded to milliseconds
    assert all("val/loss" in run["metrics"]["fit"] for run in record["earlier"])
    assert not any("earlier" in run for run in record["earlier"])


def test_runs_that_share_a_folder(cli, project):
    cli("fit", *TOY, "--trainer.logger=false")
    cli("test", DATA, "--ckpt_path=last", "--trainer.logger=false")
    record = json.loads((project / "metrics.json").read_text())
    assert [run["command"] for run in [*record["earlier"], record]] == ["fit", "test"]


STOPS = """
import os, signal
from lightning.pytorch import Callback

class Stop(Callback):
    def __init__(self, how: str):
        self.how = how

    def on_train_batch_end(self, *_):
        if self.how == "error":
            raise KeyError("lost\\nand more")
        os.kill(os.getpid(), getattr(signal, self.how))
"""


@pytest.mark.parametrize(
    ("how", "status"), [("error", "stopped: KeyError: 'lost\\nand more'"), ("SIGTERM", "stopped: SIGTERMException"),
                        ("SIGINT", "stopped: KeyboardInterrupt")],
)  # fmt: skip
def test_a_run_that_was_stopped_says_so(cli, own_module, project, how, status):
    own_module("stops", STOPS)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises((KeyError, SystemExit)):
        cli("fit", *TOY, "--trainer.callbacks+=stops.Stop", f"--trainer.callbacks.how={how}")
    assert read(project)["status"] == status


def test_it_is_written_as_a_whole_or_not_at_all(cli, trained, project, capsys):
    file = project / "metrics.json"
    file.write_text(json.dumps({"command": "fit", "note": "a" * 2**16}))
    before = file.read_bytes()
    with little_room(), pytest.raises(SystemExit) as stop:
        cli("test", DATA, f"--ckpt_path={trained}", "--trainer.logger=false")
    assert stop.value.code == 1
    assert "cannot be written: File too large." in capsys.readouterr().err
    assert file.read_bytes() == before
    assert not list(project.glob(".saving-*"))


def test_a_link_is_replaced_and_not_followed(cli, project):
    (project / "outside").write_text("mine")
    (project / "metrics.json").symlink_to("outside")
    cli("fit", *TOY, "--trainer.logger=false")
    assert (project / "outside").read_text() == "mine"
    assert not (project / "metrics.json").is_symlink()


def test_what_is_not_finite_is_a_word(cli, own_module, project):
    own_module(
        "infinite",
        "from my_package import ToyNet\n\n\nclass Infinite(ToyNet):\n    def test_step(self, batch, index):\n"
        "        self.log('test/x', float('nan'))\n        self.log('test/y', float('-inf'))\n",
    )
    cli("fit", "--model=infinite.Infinite", DATA, "--test_after_fit=true")
    assert read(project)["metrics"]["test"] == {"test/x": "nan", "test/y": "-inf"}


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"command": 1}', b'{"command": "fit", "earlier": 3}',
                b'{"command": "fit", "earlier": [1, {}], "checkpoints": "s3://x", "checkpoint": []}'],
)  # fmt: skip
def test_a_file_from_elsewhere_is_data(cli, trained, project, content):
    (project / "lightning_logs/version_9").mkdir()
    (project / "lightning_logs/version_9/metrics.json").write_bytes(content)
    record = read_record(project / "lightning_logs/version_9")
    if record is None:
        cli("test", DATA, "--ckpt_path=last")
    else:
        assert (record.checkpoints, record.start) == (None, None)
        assert all(isinstance(run, dict) for run in record.content["earlier"])
