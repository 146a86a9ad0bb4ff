"""Strategies that start processes from Python: the one that called ``fit`` has what each process of DDP has then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import SCRIPTS, load_script, torchrun
from trainers import fit, save

from lightning_plugins import DiffusionTeacher, UniLMSeq2Seq

pytestmark = pytest.mark.ddp

PARTS = ("capsnet", "eae", "teacher", "unilm", "sid")
LAUNCHERS = {"ddp_fork": PARTS, "ddp_notebook": ("unilm",), "ddp_spawn": PARTS}
SPEED = {"images/s", "train/tokens_per_second"}


script = load_script("train_launched")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all run, with the teacher of SiD."""
    folder = tmp_path_factory.mktemp("spawned")
    DiffusionTeacher(**script.TEACHER).export(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def ddp(folder):
    """Folder of what two processes under torchrun have."""
    (folder / "ddp").mkdir()
    with torchrun("train_launched", folder / "ddp", "ddp", cwd=folder):
        pass
    return folder / "ddp"


@pytest.fixture(scope="module")
def launched(folder, ddp):
    """Folders of what the process that called ``fit`` has, by strategy; run at the first question."""
    done = {}

    def run(strategy):
        if strategy not in done:
            done[strategy] = folder / strategy
            done[strategy].mkdir()
            paths = [str(Path(__file__).parents[1] / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
            answer = subprocess.run(
                [sys.executable, SCRIPTS / "train_launched.py", folder / strategy, strategy, *LAUNCHERS[strategy]],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=900,
            )
            assert answer.returncode == 0, answer.stdout[-5000:]
        return done[strategy]

    return run


def load(folder, part):
    return torch.load(folder / f"{part}.pt", weights_only=True)


CASES = [
    pytest.param(strategy, part, marks=[pytest.mark.slow] * (strategy == "ddp_spawn"), id=f"{strategy}-{part}")
    for strategy, parts in LAUNCHERS.items()
    for part in parts
]


@pytest.mark.parametrize(("strategy", "part"), CASES)
def test_the_trained_module_comes_back_whole(launched, ddp, strategy, part):
    found, expected = load(launched(strategy), part), load(ddp, part)
    assert found["weights"].keys() == expected["weights"].keys() and found["weights"]
    for name, value in expected["weights"].items():
        assert found["weights"][name].dtype == value.dtype, name
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=0, msg=name)
    saved = torch.load(launched(strategy) / part / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in saved.items():  # what the processes wrote themselves; EAE fits its prior after that
        assert name.startswith("prior.") or torch.equal(found["weights"][name], value), name
    if part == "unilm":
        assert found["sample"] == found["again"] == expected["sample"] and all(found["sample"])
    else:
        assert torch.equal(found["sample"], expected["sample"])


@pytest.mark.parametrize(("strategy", "part"), CASES)
def test_so_do_figures_and_the_record_of_training(launched, ddp, strategy, part):
    found, expected = load(launched(strategy), part), load(ddp, part)
    assert found["metrics"].keys() == expected["metrics"].keys() and found["metrics"]
    for name in found["metrics"].keys() - SPEED:
        assert torch.equal(found["metrics"][name], expected["metrics"][name]), name
    assert found["record"] == expected["record"] or part in ("teacher", "unilm")
    assert Path(found["best"]).name == Path(expected["best"]).name and Path(found["best"]).is_file()
    if part == "teacher":
        assert found["record"]["_steps"] == 2
    if part in ("teacher", "unilm"):  # for the model card
        assert found["record"]["_results"]["val/loss"] == pytest.approx(float(found["metrics"]["val/loss"]))
    if part == "sid":
        assert found["record"]["images"] == 3 * 2 * 2 and found["record"]["_updates"] == 3


@pytest.mark.parametrize(("strategy", "part"), [case for case in CASES if case.values[1] != "sid"])
def test_it_is_evaluated_by_one_process(launched, strategy, part):
    found = load(launched(strategy), part)
    loss = float(found["metrics"]["val/loss"])
    close = 1e-4 if part != "teacher" else 0.2  # whose noise is drawn by each process
    assert found["validated"]["val/loss"] == pytest.approx(loss, rel=close)


@pytest.mark.parametrize(("strategy", "part"), [case for case in CASES if case.values[1] in ("unilm", "teacher")])
def test_it_is_exported(launched, strategy, part):
    card = (launched(strategy) / f"{part}-export" / "README.md").read_text()
    assert "val/loss" in card


def test_weights_of_a_run_in_this_process_carry_nothing_more():
    """The record is for the way home; files and ``state_dict()`` are what they were."""
    module, _, _ = script.capsnet()
    assert not any("launched" in name for name in module.state_dict())
    module.load_state_dict(module.state_dict())


def test_a_module_of_before_reads_weights_that_came_home(tmp_path):
    """A record is read by ``on_load_checkpoint``, which builds the network, before the weights are loaded."""
    module, data, _ = script.unilm()
    fit(module, data, max_steps=1, limit_val_batches=0)
    save(module, tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    weights = checkpoint.pop("state_dict")
    home = UniLMSeq2Seq(config=script.BERT, generation={"max_new_tokens": 6, "min_new_tokens": 4})
    home.load_state_dict({**weights, "launched_fit": {**checkpoint, "dtype": torch.float64}}, strict=False)
    assert home.dtype == torch.float64
    assert home.double().generate_text(["one two"]) == module.double().generate_text(["one two"])
