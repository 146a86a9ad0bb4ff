"""Two processes distil as one does with the joined draws: under DDP, and sharded by FSDP2."""

from types import SimpleNamespace

import pytest
import torch
from ranks import load_script, torchrun
from tiny import save_teacher

from lightning_plugins.sid.teacher import load_teacher

ONE = ("accumulate", "spoilt", "adversarial", "sharded")
TOLERANCE = 1e-6  # weights of order 0.1 in float32, after four steps of sums in another order

pytestmark = pytest.mark.ddp

script = load_script("train_sid")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("sid")
    one, two, teacher = folder / "one", folder / "two", folder / "teacher"
    save_teacher(teacher)
    two.mkdir()
    with torchrun("train_sid", two, teacher, cwd=folder) as log:
        for name in ONE:
            script.run(name, one / name, teacher)
    return SimpleNamespace(one=one, two=two, teacher=load_teacher(teacher).network.state_dict(), log=log.read_text())


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def assert_same(expected, folder, tolerance):
    for rank in (0, 1):
        found = load(folder, rank)
        assert found["weights"].keys() == expected["weights"].keys()
        for key, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=tolerance)
        torch.testing.assert_close(found["sample"], expected["sample"], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", ONE)
def test_two_processes_equal_one(runs, name):
    one, two = load(runs.one / name), load(runs.two / name)
    assert two["strategy"] == ("ModelParallelStrategy" if name == "sharded" else "DDPStrategy")
    assert one["counted"] == two["counted"] == [4, 32]
    assert_same(one, runs.two / name, TOLERANCE)
    for part in ("generator", "fake_score", "student"):
        moved = max(
            (value - runs.teacher[key.split(".network.")[1]]).abs().max()
            for key, value in one["weights"].items()
            if key.startswith(f"networks.{part}.")
        )
        assert moved > 20 * TOLERANCE, part  # so that a wrong gradient would show


def test_all_processes_may_export(runs):
    """One folder, written once: by the module that was trained, and by one of its checkpoint."""
    weights = load(runs.two / "accumulate")["weights"]
    for name in ("student", "reloaded"):
        assert [path.name for path in runs.two.glob(f"{name}*")] == [name]
        for key, value in load_teacher(runs.two / name).network.state_dict().items():
            assert torch.equal(value, weights[f"networks.student.network.{key}"])


@pytest.mark.parametrize("name", script.CASES)
def test_ranks_agree_and_the_teacher_stays(runs, name):
    first, second = (load(runs.two / name, rank) for rank in (0, 1))
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
        assert value.isfinite().all()
    for key, value in runs.teacher.items():
        assert torch.equal(first["teacher"][key], value)
    assert torch.equal(first["sample"], second["sample"])


def test_a_sample_lost_on_one_process_hangs_nobody_and_is_counted_by_all(runs):
    assert load(runs.one / "spoilt")["lost"] == [0, 1, 0, 0]
    for rank in (0, 1):
        assert load(runs.two / "spoilt", rank)["lost"] == [0, 1, 0, 0]
        assert load(runs.two / "accumulate", rank)["lost"] == [0, 0, 0, 0]


def test_all_four_networks_are_sharded(runs):
    for name in ("sharded", "sharded-adam"):
        result = load(runs.two / name)
        assert result["sharded"] == ["fake_score", "generator", "student"]
        assert result["sharded_teacher"]
    pictures = [path.relative_to(runs.two / "sharded-adam") for path in (runs.two / "sharded-adam").rglob("*.png")]
    assert sorted(path.name for path in pictures) == ["000002.png", "000004.png"]  # once, by one process


def test_a_sharded_run_goes_on_from_its_checkpoint(runs):
    """From the folder of step 2 to the end of the uninterrupted run: equal bit for bit."""
    assert (runs.two / "sharded-adam" / "ckpt" / "step=2.ckpt" / "meta.pt").is_file()
    assert len(load(runs.two / "resumed")["lost"]) == 2
    assert_same(load(runs.two / "sharded-adam"), runs.two / "resumed", 0.0)


def test_plain_ddp_is_refused(runs):
    for rank in (0, 1):
        assert (runs.two / f"refused{rank}.txt").read_text() == (
            "SiD has two optimizers, each of which trains a part of the parameters: under DDP use "
            "strategy='ddp_find_unused_parameters_true'."
        )


def test_no_warning_asks_for_a_repair(runs):
    for text in ("sync_dist", "view tensor", "does not have many workers", "in eval mode at", "pre-optimization"):
        assert text not in runs.log
