"""Files and places that are no checkpoints, or not whole."""

import os
import pickle
import zipfile
from pathlib import Path

import torch

from hostile.parts import CPU, DIGITS, Cases, Run, eae, save, write

CASES = Cases()

CASES.every(
    "a checkpoint",
    {
        "without weights": {"state_dict": None},
        "with a list of weights": {"state_dict": [1]},
        "with texts for weights": {"state_dict": {"a": "b"}},
        "with numbered weights": {"state_dict": {1: torch.zeros(1)}},
        "with other weights": {"state_dict": {"a": torch.zeros(1).expand(10**12)}},
        "with a list of arguments": {"hyper_parameters": [1]},
        "with numbered arguments": {"hyper_parameters": {1: 2}},
        "of a version of no number": {"pytorch-lightning_version": "evil"},
        "of a version that is a number": {"pytorch-lightning_version": 7},
    },
    lambda place, changes: ["sample", save(eae(**changes)), "--output=out.png"],
)
CASES.every(
    "a checkpoint whose callbacks",
    {
        "delete what climbs": {"best_k_models": {"/runs/checkpoints/../../home/.bashrc": torch.tensor(0.0)}},
        "delete by another protocol": {"kth_best_model_path": "local:///home/.bashrc"},
    },
    lambda place, state: ["fit", save(eae(callbacks={"ModelCheckpoint{}": state})), *DIGITS, *CPU],
)
CASES.every(
    "a checkpoint in a test",
    {"without weights": {"state_dict": None}, "with a list of arguments": {"hyper_parameters": [1]}},
    lambda place, changes: ["test", save(eae(**changes)), *DIGITS, *CPU],
)
CASES.every(
    "a file in place of a checkpoint",
    {
        "a pickle": pickle.dumps(Run()),
        "an empty one": b"",
        "a text": b"evil",
        "half a zip": b"PK\3\4",
        "a list": pickle.dumps([1]),
    },
    lambda place, content: [write({"evil.ckpt": content}), "sample", "--ckpt_path=evil.ckpt", "--output=out.png"][1:],
)


@CASES.one("a checkpoint with a pickle in it")
def _(place: Path) -> list[str]:
    return ["sample", save(eae({"hook": Run()})), "--output=out.png"]


@CASES.one("a checkpoint of the old form with a pickle in it")
def _(place: Path) -> list[str]:
    torch.save(eae({"hook": Run()}), "evil.ckpt", _use_new_zipfile_serialization=False)
    return ["test", "--ckpt_path=evil.ckpt", *DIGITS, *CPU]


@CASES.one("a zip of other files")
def _(place: Path) -> list[str]:
    with zipfile.ZipFile("evil.ckpt", "w") as archive:
        archive.writestr("evil/data.pkl", b"evil")
        archive.writestr("evil/version", "3\n")
        archive.writestr("../../home/x", "evil")
    return ["sample", "--ckpt_path=evil.ckpt", "--output=out.png"]


PLACES = {"nothing": "", "a folder": "folder", "a pipe": "pipe", "a device": "/dev/zero", "no file": "\x1b[31m.ckpt"}


def place_of(place: Path, name: str) -> str:
    """The option with such a path."""
    Path("folder").mkdir()
    os.mkfifo("pipe")
    return f"--ckpt_path={name}"


CASES.every("a path", PLACES, lambda place, name: ["sample", place_of(place, name), "--output=out.png"])
CASES.every(
    "a path in a test", PLACES, lambda place, name: ["test", place_of(place, name), *DIGITS, "--model=CapsNet", *CPU]
)
CASES.every(
    "a path in training", PLACES, lambda place, name: ["fit", place_of(place, name), *DIGITS, "--model=CapsNet", *CPU]
)


@CASES.one("a sharded checkpoint")
def _(place: Path) -> list[str]:
    write({"shards/.metadata": pickle.dumps(Run()), "shards/__0_0.distcp": b"evil"})
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "shards/meta.pt")
    return ["test", "--ckpt_path=shards", *DIGITS, "--model=CapsNet", *CPU]
