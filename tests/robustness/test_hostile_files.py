"""What a stranger sends is data: none of it runs or is imported, nothing is written elsewhere, one sentence is told."""

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import onnxruntime  # noqa: F401 (it writes a number into the home folder when diffusers imports it first)
import pytest
import torch
import yaml
from hostile import CPU, DIGITS, EAE_ARGUMENTS, HOSTILE, MODULE, eae, save, shards

from lightning_plugins.cli import main
from lightning_plugins.cli.checkpoint import read_hyperparameters
from lightning_plugins.cli.checkpoint_rules import sharded_content
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.core.checkpoint_shards import read_sharded
from lightning_plugins.core.pretrained import nobody_is_asked
from lightning_plugins.sid.pipeline_folder import check_parts


class Unread(io.StringIO):
    """Standard input that says yes to whoever asks, and remembers it."""

    def __init__(self):
        super().__init__("y\n" * 100)

    @property
    def was_read(self):
        return self.tell() > 0


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Home, current folder and folder for temporary files below one that is watched, with ``evil_module`` at hand."""
    for name in ("home", "work", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "evil_module.py").write_text(MODULE)
    (tmp_path / "home" / ".bashrc").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # where a new process finds the list of fonts
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "stdin", Unread())
    return tmp_path


def contents(folder):
    """What every path below the folder but ``out`` holds: bytes, a link's goal, or that it is neither."""
    paths = (path for path in folder.rglob("*") if folder / "work" / "out" not in (path, *path.parents))
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_told_in_a_sentence_and_nothing_else_happens(sandbox, capsys, name):
    words = HOSTILE[name](sandbox)
    before, modules = contents(sandbox), set(sys.modules)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    told = capsys.readouterr().err
    assert "error: " in told, told
    sentence = told[told.index("error: ") :]
    assert contents(sandbox) == before
    assert not sys.stdin.was_read
    assert [module for module in set(sys.modules) - modules if "evil" in module] == []
    assert stop.value.code == 2
    assert len(sentence.splitlines()) <= 5
    assert sentence.replace("\n", "").isprintable()
    assert "Traceback" not in sentence


def test_there_are_enough():
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("name", ["a tokenizer: code in a folder beside", "a class: a module beside"])
def test_in_a_process_of_its_own(sandbox, name):
    """What this process has imported already, and its standard input in Python, make no difference."""
    words = HOSTILE[name](sandbox)
    before = contents(sandbox)
    answer = subprocess.run(
        [sys.executable, "-m", "lightning_plugins", *words],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert contents(sandbox) == before
    assert answer.returncode == 2, answer.stderr
    sentence = answer.stderr[answer.stderr.index("error: ") :]
    assert len(sentence.splitlines()) <= 5 and "[y/N]" not in answer.stdout + answer.stderr


def refused(refuse, path):
    """The sentence of a rule by itself, before anything else that might refuse."""
    with pytest.raises((ValueError, UsageError)) as error:
        refuse(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "file"),
    [("a processor whose parts are code", "tokenizer_config"), ("a model whose parts are code", "config"),
     ("code in a list", "x")],
)  # fmt: skip
def test_code_of_parts_within_parts(sandbox, case, file):
    HOSTILE[f"a pipeline: with {case}"](sandbox)
    assert refused(check_parts, Path("folder")) == f"its part 'unet' names code of its own (auto_map in {file}.json)."


def test_a_pickle_among_the_weights_of_a_sharded_checkpoint(sandbox):
    HOSTILE["a sharded checkpoint with a pickle for a weight"](sandbox)
    assert "holds an object of posix.system; it is not opened" in refused(sharded_content, Path("shards"))
    assert not (sandbox / "home" / "canary").exists()


# What is good is still taken.


def own_class(place):
    """A checkpoint of a class in a module of the user's own, which nothing has imported yet."""
    (place / "work" / "mine.py").write_text("from lightning_plugins import EAE\n\n\nclass Mine(EAE):\n    pass\n")
    return save(eae({"_class_path": "mine.Mine"}))


@pytest.fixture
def forgotten():
    """The user's module is forgotten again."""
    yield
    sys.modules.pop("mine", None)


def test_a_class_of_ones_own_is_imported_by_ones_own_word(sandbox, forgotten, capsys):
    words = ["sample", own_class(sandbox), "--num_samples=2", "--output=out.png"]
    with pytest.raises(SystemExit):
        main(words)
    assert "is of the class 'mine.Mine', which is not imported" in capsys.readouterr().err
    assert "mine" not in sys.modules
    main([*words, "--model=mine.Mine"])
    assert (sandbox / "work" / "out.png").is_file()


def test_a_class_of_ones_own_may_stand_in_a_config(sandbox, forgotten):
    path = own_class(sandbox)
    model = {"class_path": "mine.Mine", "init_args": EAE_ARGUMENTS}
    (sandbox / "work" / "mine.yaml").write_text(yaml.safe_dump({"model": plain(model)}))
    main(["validate", "--config=mine.yaml", path, *DIGITS, *CPU, "--trainer.limit_val_batches=1"])


def plain(value):
    """Lists for tuples."""
    return json.loads(json.dumps(value))


def test_an_optimizer_of_torch_is_taken(sandbox, capsys):
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    path = save(eae({"optimizer": optimizer, "scheduler": "torch.optim.lr_scheduler.ConstantLR"}))
    main(["sample", path, "--num_samples=2", "--output=out.png"])
    assert (sandbox / "work" / "out.png").is_file()


HEALTHY = {
    "a user's callback": {"Mine": {"source": "../data/x.csv", "last": "..", "text": "file: a.c"}},
    "the run before's best": {
        "ModelCheckpoint{}": {"dirpath": "/new", "best_model_path": "/old/a.ckpt", "last_model_path": "/new/b/c.ckpt"}
    },
    "a folder above": {"ModelCheckpoint{}": {"dirpath": "../run", "last_model_path": "../run/a.ckpt"}},
    "nothing yet": {"ModelCheckpoint{}": {"dirpath": None, "best_k_models": {}, "last_model_path": ""}},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_states_of_callbacks_are_taken(sandbox, name):
    read_hyperparameters(Path(save(eae(callbacks=HEALTHY[name])).removeprefix("--ckpt_path=")), resumes=True)


def test_a_checkpoint_that_lay_at_an_address_is_sampled_from(sandbox):
    state = {"dirpath": "s3://mine", "best_model_path": "s3://mine/a.ckpt"}
    main(["sample", save(eae(callbacks={"ModelCheckpoint{}": state})), "--num_samples=2", "--output=out.png"])
    assert (sandbox / "work" / "out.png").is_file()


def test_transformers_asks_nobody(sandbox):
    """Whatever reaches its question: it refuses, and asks again afterwards."""
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    ask = ("folder", False, True)
    with nobody_is_asked(), pytest.raises(ValueError, match="trust_remote_code=True"):
        resolve_trust_remote_code(None, *ask)
    assert not sys.stdin.was_read


# Links in a folder that somebody sent, and in one's own.


def test_a_picture_beside_a_run_goes_through_no_link(sandbox):
    run = sandbox / "work" / "run"
    (run / "checkpoints").mkdir(parents=True)
    target = sandbox / "home" / ".bashrc"
    for name in ("samples.png", ".samples.png.part", "drawn"):
        (run / name).symlink_to(target)
    main(["sample", save(eae(), "run/checkpoints/last.ckpt"), "--num_samples=2"])
    assert target.read_text() == "mine"
    assert (run / "samples.png").is_file() and not (run / "samples.png").is_symlink()


@pytest.mark.parametrize("command", ["sample", "copy"])
def test_a_new_file_is_not_made_where_a_link_points(sandbox, capsys, command):
    work, outside = sandbox / "work", sandbox / "home" / "new"
    (work / "drawn").mkdir()
    (work / "drawn" / "sample_00001.png").symlink_to(outside)
    (work / "digits.yaml").symlink_to(outside)
    sample = ["sample", save(eae()), "--num_samples=2", "--output=drawn"]
    with pytest.raises(SystemExit) as stop:
        main(sample if command == "sample" else ["copy", "capsnet/digits", "digits.yaml"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) <= 5
    assert not outside.exists()
    assert [path.name for path in (work / "drawn").iterdir()] == ["sample_00001.png"]


def test_predictions_go_through_no_link(sandbox):
    (sandbox / "work" / "out").mkdir()
    target = sandbox / "home" / ".bashrc"
    (sandbox / "work" / "out" / "predictions.pt").symlink_to(target)
    main(["predict", save(eae()), *DIGITS, *CPU, "--trainer.limit_predict_batches=1"])
    assert target.read_text() == "mine"
    assert torch.load(sandbox / "work" / "out" / "predictions.pt", weights_only=True)


def test_what_torch_calls_in_an_index_is_not_called(sandbox):
    """One that puts a function in the place of an attribute of torch's own class, as a pickle may."""
    from torch.distributed.checkpoint.metadata import Metadata

    index = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(N}\x8c\x07versionK\x01su\x86b."
    index = index.replace(b"(N}", b"N}").replace(b"su\x86b", b"s\x86b")
    shards(eae())
    Path("shards/.metadata").write_bytes(index)
    before = Metadata.version
    try:
        assert refused(sharded_content, Path("shards")).startswith("sharded checkpoint 'shards' holds ")
        assert Metadata.version is before
        pickle.loads(index)  # so that what is refused is what changes it
        assert Metadata.version == 1
    finally:
        Metadata.version = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_sharded_checkpoint_is_read(sandbox, dtype):
    """Torch's own passes, so that what refuses a hostile one is not that nothing passes."""
    weights = {"a.b": torch.ones(2, 2).to(dtype), "a.empty": torch.zeros(0, 3), "a.number": torch.tensor(1.0)}
    shards({"state_dict": {**weights, "a._extra_state": {"epoch": 1, "name": ["x"]}}, "epoch": 3})
    content = read_sharded(Path("shards"))
    assert content["epoch"] == 3 and content["state_dict"].keys() == {*weights, "a._extra_state"}
    assert content["state_dict"]["a._extra_state"] == {"epoch": 1, "name": ["x"]}
    for name, value in weights.items():
        found = content["state_dict"][name]
        assert found.dtype == value.dtype and torch.equal(found.float(), value.float())
