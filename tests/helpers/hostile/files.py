"""Files and places that are no checkpoints, or not whole."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch.distributed import checkpoint as sharded

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
        "delete at an address": {"dirpath": "memory://bucket", "last_model_path": "memory://bucket/data"},
        "delete behind an address": {"dirpath": "/runs", "best_model_path": "simplecache::s3://bucket/data"},
        "delete beside it": {"dirpath": "/runs/checkpoints", "last_model_path": "/runs/thesis.txt"},
        "delete the best that climbs": {"dirpath": "/runs", "best_model_path": "/runs/checkpoints/../thesis.txt"},
        "delete by no name": {"dirpath": "/runs", "last_model_path": "/runs/a\0b"},
        "delete without a folder": {"last_model_path": "/runs/thesis.txt"},
    },
    lambda place, state: ["fit", save(eae(callbacks={"ModelCheckpoint{}": state})), *DIGITS, *CPU],
)


@CASES.one("a checkpoint whose callbacks delete through a link")
def _(place: Path) -> list[str]:
    checkpoints = place / "work" / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "link").symlink_to(place / "home")
    state = {"dirpath": str(checkpoints), "best_k_models": {str(checkpoints / "link" / ".bashrc"): torch.tensor(0.0)}}
    return ["fit", save(eae(callbacks={"ModelCheckpoint{}": state})), *DIGITS, *CPU]


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


@CASES.one("a sharded checkpoint with a pickle for a weight")
def _(place: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process alone
        sharded.save({"net.weight": Run()}, checkpoint_id="shards")
    (place / "home" / "canary").unlink(missing_ok=True)  # if torch has looked at what it wrote
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "shards/meta.pt")
    return ["test", "--ckpt_path=shards", *DIGITS, "--model=CapsNet", *CPU]


@CASES.one("a folder of DeepSpeed's")
def _(place: Path) -> list[str]:
    write({"deep/latest": "checkpoint", "deep/checkpoint/mp_rank_00_model_states.pt": pickle.dumps(Run())})
    return ["test", "--ckpt_path=deep", *DIGITS, "--model=CapsNet", *CPU]
