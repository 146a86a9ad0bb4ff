"""``consolidate``: one file of a folder, whole or not at all, and never over another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from disks import little_room
from hostile import eae, save, shards

from lightning_plugins import EAE
from lightning_plugins.cli import consolidate as command
from lightning_plugins.cli import main

CONTENT = {"epoch": 1, "global_step": 7, "callbacks": {}, "lr_schedulers": [], "loops": {}}


def optimizer(*groups):
    """States of an Adam by parameters' names, in an order that is not the alphabet's."""
    state = {name: {"step": torch.tensor(3.0), "exp_avg": torch.full((2,), 0.5)} for group in groups for name in group}
    return {
        "state": state,
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [*group]} for group in groups],
    }


@pytest.fixture
def folder():
    """A sharded checkpoint with two optimizers in the current folder, and its content."""
    content = eae(**CONTENT, optimizer_states=[optimizer(["zb"]), optimizer(["c", "a"])])
    shards(content, "run/checkpoints/last.ckpt")
    return Path("run/checkpoints/last.ckpt"), content


def told(capsys, *words):
    """The sentence of a refused command."""
    with pytest.raises(SystemExit) as stop:
        main(["consolidate", *map(str, words)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_file_holds_all_of_the_folder(folder, capsys):
    path, content = folder
    main(["consolidate", str(path), "new/whole.ckpt"])
    assert capsys.readouterr().out == "Checkpoint: new/whole.ckpt (step 7, 22 weights, 2 optimizers)\n"
    whole = torch.load("new/whole.ckpt", weights_only=True)
    assert whole.keys() == content.keys()
    assert whole["state_dict"].keys() == content["state_dict"].keys()
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in content["state_dict"].items())
    assert {key: whole[key] for key in CONTENT} == CONTENT
    assert whole["hyper_parameters"] == content["hyper_parameters"]
    for found, wanted in zip(whole["optimizer_states"], content["optimizer_states"], strict=True):
        assert found["param_groups"] == wanted["param_groups"]
        assert found["state"].keys() == wanted["state"].keys()
        assert all(torch.equal(found["state"][name]["exp_avg"], torch.full((2,), 0.5)) for name in found["state"])
    assert os.listdir("new") == ["whole.ckpt"]


def test_torch_takes_its_states_by_their_order(folder):
    """As ``Trainer.fit`` gives them to a plain optimizer."""
    main(["consolidate", str(folder[0]), "whole.ckpt"])
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    adam = torch.optim.Adam(parameters)
    state = torch.load("whole.ckpt", weights_only=True)["optimizer_states"][1]
    state["state"]["a"]["exp_avg"] = torch.ones(2)
    adam.load_state_dict(state)
    assert adam.state[parameters[0]]["exp_avg"].tolist() == [0.5, 0.5]
    assert adam.state[parameters[1]]["exp_avg"].tolist() == [1, 1]
    assert adam.state_dict()["param_groups"][0]["params"] == [0, 1]


def test_the_file_is_a_checkpoint_like_any_other(folder, tmp_path):
    path, _ = folder
    main(["consolidate", str(path), "whole.ckpt"])
    first, second = (EAE.load_from_checkpoint(each).state_dict() for each in (path, "whole.ckpt"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for each in (path, "whole.ckpt"):
        main(["sample", f"--ckpt_path={each}", "--num_samples=2", f"--output={Path(each).name}.png"])
    assert Path("last.ckpt.png").read_bytes() == Path("whole.ckpt.png").read_bytes()


def test_weights_alone_and_no_optimizer(capsys):
    """Lightning refuses to go on from the first, and goes on from the second."""
    shards(eae(), "weights")
    shards(eae(**CONTENT), "none")
    for name in ("weights", "none"):
        main(["consolidate", name, f"{name}.ckpt"])
    assert "optimizer_states" not in torch.load("weights.ckpt", weights_only=True)
    assert torch.load("none.ckpt", weights_only=True)["optimizer_states"] == []
    assert capsys.readouterr().out.splitlines() == [
        "Checkpoint: weights.ckpt (22 weights, no optimizer)",
        "Checkpoint: none.ckpt (step 7, 22 weights, no optimizer)",
    ]


def test_the_last_of_a_run(folder, monkeypatch, capsys):
    monkeypatch.chdir("run")
    main(["consolidate", "last", "whole.ckpt"])
    streams = capsys.readouterr()
    assert streams.err == "--ckpt_path last takes 'checkpoints/last.ckpt'.\n"
    assert streams.out.startswith("Checkpoint: whole.ckpt (step 7, ")


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nothing"])
def test_nothing_is_replaced(folder, capsys, kind):
    target = Path("there.ckpt")
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        Path("mine").write_text("mine")
        target.symlink_to("mine" if kind == "link" else "nothing")
    sentence = "error: 'there.ckpt' exists and is not overwritten; choose another name.\n"
    assert told(capsys, folder[0], target) == sentence
    assert kind != "file" or target.read_text() == "mine"
    assert not Path("nothing").exists()


def test_what_is_no_folder_of_shards(capsys):
    save(eae(), "one.ckpt")
    Path("other").mkdir()
    want = "give the folder of a sharded checkpoint.\n"
    assert told(capsys, "one.ckpt", "x") == f"error: checkpoint 'one.ckpt' is one file already; {want}"
    assert told(capsys, "gone", "x") == f"error: checkpoint 'gone' does not exist; {want}"
    assert (
        told(capsys, "other", "x") == "error: 'other' is a folder without a sharded checkpoint: it has no .metadata.\n"
    )
    assert told(capsys, "one.ckpt").splitlines()[-1] == "All options: lightning-plugins consolidate --help"


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_full_disk_leaves_nothing(folder, capsys):
    before = sorted(Path().rglob("*"))
    with little_room(2**12):
        sentence = told(capsys, folder[0], "whole.ckpt")
    assert sentence == "error: 'whole.ckpt' cannot be written: File too large.\n"
    assert sorted(Path().rglob("*")) == before


def test_progress_is_told_to_a_terminal_when_it_takes_long(folder, monkeypatch, capsys):
    main(["consolidate", str(folder[0]), "soon.ckpt"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(command, "_SOON", -1.0)
    main(["consolidate", str(folder[0]), "piped.ckpt"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["consolidate", str(folder[0]), "told.ckpt"])
    lines = capsys.readouterr().err.removesuffix("\n").split("\r")[1:]
    shares = [int(line.removeprefix("Reading:").removesuffix("%")) for line in lines]
    assert shares == sorted(set(shares)) and shares[-1] == 100 and len(shares) > 5


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["consolidate", "--help"])
    text = capsys.readouterr().out
    assert "lightning-plugins consolidate last whole.ckpt" in text and "Nothing is left out" in text


def test_the_shell_completes_it(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "lightning_plugins", "--print_completion", "shtab-bash"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "consolidate" in script
    assert "_shtab_lightning_plugins_consolidate_pos_0_COMPGEN=_shtab_compgen_dirs" in script
    assert "_shtab_lightning_plugins_consolidate_pos_1_COMPGEN=_shtab_compgen_files" in script
