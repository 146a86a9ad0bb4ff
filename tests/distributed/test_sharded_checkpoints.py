"""Folders that two processes wrote under FSDP2 are read wherever a file is, and say the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile import shards
from PIL import Image
from ranks import load_script, torchrun

import lightning_plugins
from lightning_plugins import AtomicCheckpointIO
from lightning_plugins.cli import main
from lightning_plugins.cli.load import load_model
from lightning_plugins.core.checkpoint_shards import describe_sharded, read_sharded

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]
script = load_script("train_shards")
CASES = {"capsnet": "CapsNet", "eae": "EAE", "unilm": "UniLMSeq2Seq", "sid": "SiD", "teacher": "DiffusionTeacher"}
DRAW = ("eae", "sid", "teacher")
BESIDE = {"loops", "callbacks", "lr_schedulers", "hyper_parameters", "epoch", "global_step"}
ONE = ["--trainer.devices=1", "--trainer.strategy=auto"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, by two processes."""
    folder = tmp_path_factory.mktemp("shards")
    with torchrun("train_shards", folder, cwd=folder):
        pass
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(runs, monkeypatch):
    monkeypatch.chdir(runs)


def folder_of(name):
    return Path(name) / "checkpoints" / "last.ckpt"


def read(path):
    return read_sharded(path) if path.is_dir() else torch.load(path, weights_only=True)


def flat(value, path=()):
    """Every leaf by its place; tensors as they are."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {inner: leaf for key, item in items for inner, leaf in flat(item, (*path, key)).items()}
    return {path: value}


def unlike(first, second):
    """Places of what is not equal bit for bit."""
    one, two = flat(first), flat(second)
    assert one.keys() == two.keys()
    return [key for key, value in one.items() if not equal(value, two[key])]


def equal(value, other):
    return torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def by_order(states):
    """The numbers of optimizers by the order of their parameters, whatever these are called."""
    found = []
    for state in states:
        order = [name for group in state["param_groups"] for name in group["params"]]
        groups = [{**group, "params": len(group["params"])} for group in state["param_groups"]]
        found.append({"state": [state["state"].get(name) for name in order], "param_groups": groups})
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_folder_holds_what_one_file_does(name):
    """The file was gathered by the strategy itself, at the same step."""
    one, shards = read(Path(name) / "one.ckpt"), read(folder_of(name))
    assert one["global_step"] == shards["global_step"] > 0
    assert one.keys() == shards.keys() and set(shards) >= BESIDE
    assert unlike(one["state_dict"], shards["state_dict"]) == []
    assert unlike(by_order(one["optimizer_states"]), by_order(shards["optimizer_states"])) == []
    assert any(state["state"] for state in shards["optimizer_states"])


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_made_of_it(name):
    shards, whole = read(folder_of(name)), read(Path(name) / "whole.ckpt")
    assert unlike(shards, whole) == []


@pytest.mark.parametrize("name", CASES)
def test_load_from_checkpoint(name):
    cls = getattr(lightning_plugins, CASES[name])
    model = cls.load_from_checkpoint(folder_of(name))
    assert type(model) is cls
    state = cls.load_from_checkpoint(Path(name) / "one.ckpt").state_dict()
    assert unlike(state, model.state_dict()) == []


def test_arguments_of_the_caller_win_and_the_place_is_taken():
    model = lightning_plugins.EAE.load_from_checkpoint(str(folder_of("eae")), map_location="meta", lr=0.5)
    assert model.hparams.lr == 0.5
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


def test_a_file_of_arguments_is_refused():
    with pytest.raises(ValueError, match=r"hparams_file='x\.yaml' is not read for the folder of a sharded checkpoint"):
        lightning_plugins.EAE.load_from_checkpoint(folder_of("eae"), hparams_file="x.yaml")


@pytest.mark.parametrize("name", DRAW)
def test_the_same_is_drawn(name, tmp_path):
    drawn = []
    for path in (folder_of(name), Path(name) / "one.ckpt"):
        model = load_model(path, None, ("sample",), "draws no samples")
        with torch.inference_mode():
            drawn.append(model.sample(4, generator=torch.Generator().manual_seed(0)))
        main(["sample", f"--ckpt_path={path}", "--num_samples=4", f"--output={tmp_path / path.name}.png"])
    assert torch.equal(*drawn)
    pictures = [Image.open(tmp_path / f"{file}.ckpt.png").tobytes() for file in ("last", "one")]
    assert pictures[0] == pictures[1]


def test_last_may_be_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir("eae")
    main(["sample", "--ckpt_path=last", "--num_samples=2", f"--output={tmp_path / 'x.png'}"])
    assert "--ckpt_path last takes 'checkpoints/last.ckpt'." in capsys.readouterr().err
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("name", ["unilm", "sid"])
def test_the_same_is_exported(name, tmp_path):
    for path in (folder_of(name), Path(name) / "one.ckpt"):
        main(["export", f"--ckpt_path={path}", f"--output={tmp_path / path.stem}"])
    files = {path.relative_to(tmp_path / "last") for path in (tmp_path / "last").rglob("*.safetensors")}
    assert files
    for file in files:
        assert (tmp_path / "last" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_the_same_is_written(capsys):
    told = []
    for path in (folder_of("unilm"), Path("unilm") / "one.ckpt"):
        main(["generate", f"--ckpt_path={path}", "--text=3 one"])
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def run(command, name, path, folder, *words):
    """A command on one process, with data and no model; what it measured."""
    options = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    options += [f"--trainer.default_root_dir={folder}"]
    main([command, f"--ckpt_path={path}", *script.CASES[name][1], *options, *words])
    return json.loads((folder / "metrics.json").read_text())["metrics"]


@pytest.mark.parametrize("name", ["capsnet", "eae", "unilm", "teacher"])
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_same_is_measured(name, command, tmp_path):
    if (name, command) == ("teacher", "predict"):
        pytest.skip("a teacher predicts nothing")
    one, two = (run(command, name, path, tmp_path / path.stem) for path in (Path(name) / "one.ckpt", folder_of(name)))
    assert one == two
    assert command == "predict" or one[command]
    for file in (tmp_path / "one").glob("predictions.*"):
        if file.suffix != ".pt":
            assert file.read_text() == (tmp_path / "last" / file.name).read_text()


def goes_on(name, path, folder, *words):
    """The checkpoint of a run on one process that went on for an epoch."""
    main([*script.fit(name, folder, f"--ckpt_path={path}", epochs=2), *ONE, *words])
    return read(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on(name, tmp_path):
    """From a folder, from the file made of it and from the file that the strategy wrote: to the same bits."""
    shards, *files = (
        goes_on(name, path, tmp_path / path.stem)
        for path in (folder_of(name), Path(name) / "whole.ckpt", Path(name) / "one.ckpt")
    )
    assert shards["global_step"] == 2 * read(folder_of(name))["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        for file in files:
            assert unlike(shards[part], file[part]) == [], part
    assert shards["optimizer_states"][0]["param_groups"][0]["params"][0] == 0  # a file of its own is as ever


def test_one_process_goes_on_as_two_do(tmp_path):
    """On the joined batches, but for the rounding of sums in another order."""
    two = read(folder_of("capsnet-on"))
    one = goes_on("capsnet", folder_of("capsnet"), tmp_path, "--data.batch_size=40")
    before = read(folder_of("capsnet"))["state_dict"]
    moved = max((one["state_dict"][key] - value).abs().max().item() for key, value in before.items())
    assert moved > 1e-3
    for key, value in two["state_dict"].items():
        torch.testing.assert_close(one["state_dict"][key], value, rtol=0, atol=1e-2 * moved)
    for first, second in zip(one["lr_schedulers"], two["lr_schedulers"], strict=True):
        assert first == second


@pytest.mark.parametrize("name", script.TWICE)
def test_two_processes_go_on_from_a_file_made_of_a_folder(name):
    """As from the folder, bit for bit: of several groups of parameters, and of several optimizers."""
    shards, file = read(folder_of(f"{name}-on")), read(folder_of(f"{name}-on-from-file"))
    assert unlike(shards["state_dict"], file["state_dict"]) == []
    assert unlike(shards["optimizer_states"], file["optimizer_states"]) == []


@pytest.mark.parametrize("name", ["capsnet", "eae"])
def test_the_best_may_be_a_folder(name, tmp_path):
    """Two processes tested it after training; one process that has nothing left to train does, too."""
    two = json.loads((Path(name) / "metrics.json").read_text())["metrics"]["test"]
    main([*script.fit(name, tmp_path, f"--ckpt_path={folder_of(name)}", epochs=1), *ONE, "--test_after_fit=true"])
    one = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["test"]
    assert one.keys() == two.keys()
    for key, value in two.items():
        assert one[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_checkpoint_io_of_ones_own_that_reads_no_folders(tmp_path, capsys):
    words = ["--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO", "--trainer.plugins.checkpoint_io"]
    words[1] += "=lightning.pytorch.plugins.io.TorchCheckpointIO"
    with pytest.raises(SystemExit) as stop:
        run("test", "capsnet", folder_of("capsnet"), tmp_path, *words)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "is a folder, which the CheckpointIO of this run does not read." in told
    assert "Make a file of it: lightning-plugins consolidate " in told


def test_what_describes_a_folder_holds_no_numbers():
    described, whole = describe_sharded(folder_of("sid")), read(folder_of("sid"))
    assert described["hyper_parameters"] == whole["hyper_parameters"]
    assert {name: (value.shape, value.dtype) for name, value in described["state_dict"].items()} == {
        name: (value.shape, value.dtype) for name, value in whole["state_dict"].items()
    }
    assert all(value.is_meta for value in described["state_dict"].values())


def test_the_io_reads_it_by_text_and_path():
    for path in (folder_of("capsnet"), str(folder_of("capsnet"))):
        assert "optimizer_states" in AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_little_more_memory_than_the_weights_is_needed(tmp_path):
    """128 MB of weights in eight, and twice as much in the optimizer, which is not read."""
    code = """
import re, sys, torch
from pathlib import Path
from lightning_plugins.core.checkpoint_shards import read_sharded
read_sharded(Path(sys.argv[2]), optimizers=False)  # what is imported and set up
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
content = read_sharded(Path(sys.argv[1]), optimizers=False)
print(peak() - before, "optimizer_states" in content)
"""
    large, small = tmp_path / "large", tmp_path / "small"
    for folder, size in ((large, 4 * 2**20), (small, 4)):
        write_alone(folder, size)
    told = subprocess.run([sys.executable, "-c", code, large, small], capture_output=True, text=True, check=True).stdout
    grown, states = told.split()
    assert states == "False"
    assert 128 <= float(grown) < 128 + 3 * 16  # MB: the weights, and one of them twice more


def write_alone(folder, size):
    """A folder of one process, with eight weights and the states of an Adam."""
    names = [f"layer{number}" for number in range(8)]
    state = {name: {"exp_avg": torch.ones(size), "exp_avg_sq": torch.ones(size)} for name in names}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": names}]}
    content = {"state_dict": {name: torch.ones(size) for name in names}, "pytorch-lightning_version": "2.6.6"}
    shards({**content, "optimizer_states": [optimizer], "lr_schedulers": []}, folder)
