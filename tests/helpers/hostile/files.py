"""Files and places that are no checkpoints, or not whole."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as sharded

from hostile.parts import CPU, DIGITS, Cases, Run, eae, save, shards, write

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


def change_index(place: Path, change: Callable[[Any], Any]) -> list[str]:
    """A sharded checkpoint of EAE whose index, of torch's own classes, is changed."""
    option, index = shards(eae()), Path("shards/.metadata")
    metadata = pickle.loads(index.read_bytes())
    index.write_bytes(pickle.dumps(change(metadata) or metadata))
    return ["sample", option, "--output=out.png"]


def change_places(**changes: Any) -> Callable[[Any], None]:
    """Of all that an index says of where the weights lie."""
    return lambda metadata: [vars(place).update(changes) for place in metadata.storage_data.values()] and None


def some_tensor(metadata: Any) -> Any:
    return next(value for value in metadata.state_dict_metadata.values() if len(value.size) == 2)


def far_away(name: str) -> Callable[[Any], None]:
    """Weights in a file that lies there, outside of the folder."""

    def change(metadata: Any) -> None:
        shutil.copy("shards/__0_0.distcp", "elsewhere")
        change_places(relative_path=name)(metadata)

    return change


def linked(name: str) -> Callable[[Any], None]:
    """A file of the folder is a link out of it."""

    def change(metadata: Any) -> None:
        os.replace(f"shards/{name}", "elsewhere")
        os.symlink("../elsewhere", f"shards/{name}")

    return change


INDICES: dict[str, Callable[[Any], Any]] = {
    "that runs a command": lambda metadata: {"state_dict_metadata": Run()},
    "with a command beside": lambda metadata: setattr(metadata, "storage_meta", Run()),
    "with a class of torch's that starts a process": lambda metadata: setattr(
        metadata, "storage_meta", sharded.FileSystemWriter
    ),
    "with a function of torch's": lambda metadata: setattr(metadata, "storage_meta", torch.load),
    "that names a file above": far_away("../elsewhere"),
    "that names a file by its whole path": lambda metadata: far_away(os.path.abspath("elsewhere"))(metadata),
    "that names a file by a way round": far_away("../shards/../elsewhere"),
    "that names a device": change_places(relative_path="/dev/zero"),
    "that names itself": change_places(relative_path="."),
    "that is packed by an extension": change_places(transform_descriptors=["evil"]),
    "that begins before its file": change_places(offset=-1),
    "with a text for a place": change_places(offset="0"),
    "with the same bytes for all": change_places(offset=0, length=2000),
    "of a tensor that fills the memory": lambda metadata: setattr(
        some_tensor(metadata), "size", torch.Size([10**9] * 2)
    ),
    "of chunks that are not the tensor": lambda metadata: some_tensor(metadata).chunks.clear(),
    "of a chunk outside of its tensor": lambda metadata: setattr(
        some_tensor(metadata).chunks[0], "offsets", torch.Size([1, 1])
    ),
    "of other numbers than its file has": lambda metadata: setattr(
        some_tensor(metadata).properties, "dtype", torch.float16
    ),
    "whose names are in each other": lambda metadata: metadata.planner_data.update(
        dict.fromkeys(metadata.planner_data, ("state_dict", "a"))
    ),
    "of something else": lambda metadata: metadata.planner_data.update(
        {name: ("callbacks", *path[1:]) for name, path in metadata.planner_data.items()}
    ),
    "whose weights have numbers for names": lambda metadata: metadata.planner_data.update(
        {name: ("state_dict", number) for number, name in enumerate(metadata.planner_data)}
    ),
    "that is a list": lambda metadata: [1],
    "that is a link": linked(".metadata"),
    "of a shard that is a link": linked("__0_0.distcp"),
    "of a description that is a link": linked("meta.pt"),
}
CASES.every("an index", INDICES, change_index)


def flip(path: Path) -> None:
    """Change a bit of the first record, which is no filling between two."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\x80\x02") + 4] ^= 1
    path.write_bytes(data)


def checksums(content: Any) -> Callable[[], object]:
    return lambda: Path("shards/checksums.json").write_text(json.dumps(content))


DAMAGE: dict[str, Callable[[], object]] = {
    "without a shard": lambda: Path("shards/__0_0.distcp").unlink(),
    "without a description": lambda: Path("shards/meta.pt").unlink(),
    "with half a shard": lambda: os.truncate("shards/__0_0.distcp", os.path.getsize("shards/__0_0.distcp") // 2),
    "with half an index": lambda: os.truncate("shards/.metadata", os.path.getsize("shards/.metadata") // 2),
    "with an empty index": lambda: os.truncate("shards/.metadata", 0),
    "with a flipped bit": lambda: flip(Path("shards/__0_0.distcp")),
    "with a flipped bit in its description": lambda: flip(Path("shards/meta.pt")),
    "with a pickle for a description": lambda: torch.save({"callbacks": Run()}, "shards/meta.pt"),
    "with a list for a description": lambda: torch.save([1], "shards/meta.pt"),
    "with no description's version": lambda: torch.save({"epoch": 1}, "shards/meta.pt"),
    "with checksums of other files": checksums({"../../home/.bashrc": 1}),
    "with a list of checksums": checksums([1]),
    "with wrong checksums": checksums({"meta.pt": 1}),
    "with a pipe for a shard": lambda: (Path("shards/__0_0.distcp").unlink(), os.mkfifo("shards/__0_0.distcp")),
}


def damaged(damage: Callable[[], object], *words: str) -> list[str]:
    """The words, when the folder ``shards`` has been damaged."""
    shards(eae())
    damage()
    return [*words]


SHARDS = "--ckpt_path=shards"
CASES.every("a folder", DAMAGE, lambda place, damage: damaged(damage, "sample", SHARDS, "--output=out.png"))
CASES.every("a folder in a test", DAMAGE, lambda place, damage: damaged(damage, "test", SHARDS, *DIGITS, *CPU))
CASES.every("a folder made one file", DAMAGE, lambda place, damage: damaged(damage, "consolidate", "shards", "x.ckpt"))


@CASES.one("a sharded checkpoint with a pickle for a weight")
def _(place: Path) -> list[str]:
    shards({"state_dict": {"net.weight": Run()}, "pytorch-lightning_version": "2.6.6"})
    (place / "home" / "canary").unlink(missing_ok=True)  # if torch has looked at what it wrote
    return ["test", "--ckpt_path=shards", *DIGITS, "--model=CapsNet", *CPU]


@CASES.one("a sharded checkpoint whose class is in a module beside")
def _(place: Path) -> list[str]:
    return ["sample", shards(eae({"_class_path": "evil_module.Thing"})), "--output=out.png"]


@CASES.one("a sharded checkpoint whose callbacks would delete a file")
def _(place: Path) -> list[str]:
    state = {"ModelCheckpoint{}": {"dirpath": "/run", "last_model_path": "/elsewhere/x.ckpt"}}
    return ["fit", shards(eae(callbacks=state)), *DIGITS, *CPU]


@CASES.one("a folder of DeepSpeed's")
def _(place: Path) -> list[str]:
    write({"deep/latest": "checkpoint", "deep/checkpoint/mp_rank_00_model_states.pt": pickle.dumps(Run())})
    return ["test", "--ckpt_path=deep", *DIGITS, "--model=CapsNet", *CPU]
