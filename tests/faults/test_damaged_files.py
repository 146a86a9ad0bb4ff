"""No command takes anything from a truncated or bit-flipped checkpoint: one sentence, status 2, nothing written."""

import pytest
import torch

from lightning_plugins.cli import main

DIGITS = ["--data=Digits"]
COMMANDS = {
    "fit": DIGITS,
    "validate": DIGITS,
    "test": DIGITS,
    "predict": DIGITS,
    "sample": [],
    "export": ["--output=exported"],
    "generate": ["--text=x"],
}


@pytest.fixture
def checkpoint(tmp_path):
    """Change the bytes of a good checkpoint."""

    def write(change):
        content = {"state_dict": {"x": torch.ones(5000)}, "pytorch-lightning_version": "2.6.6"}
        content["hyper_parameters"] = {"_class_path": "lightning_plugins.CapsNet"}
        path = tmp_path / "a.ckpt"
        torch.save(content, path)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return "a.ckpt"

    return write


def flip(data):
    data[len(data) // 2] ^= 4
    return data


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data[: len(data) // 2], "is truncated: the run that wrote it was cut off. Use an earlier one.\n"),
        (flip, "is damaged (the checksum of 'a/data/0' is wrong). Use an earlier one.\n"),
    ],
    ids=["truncated", "flipped"],
)
def test_a_damaged_checkpoint(checkpoint, command, change, told, tmp_path, capsys):
    path = checkpoint(change)
    with pytest.raises(SystemExit) as stop:
        main([command, f"--ckpt_path={path}", *COMMANDS[command]])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: checkpoint 'a.ckpt' {told}"
    assert [item.name for item in tmp_path.iterdir()] == ["a.ckpt"]
