"""Two processes train the EAE that one process trains on the joined batches: weights, codes, priors, pictures."""

from types import SimpleNamespace

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_eae")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("eae")
    one, two = folder / "one", folder / "two"
    with torchrun("train_eae", two, cwd=folder) as log:
        for name in script.CASES:
            script.run(name, one / name)
    return SimpleNamespace(one=one, two=two, log=log.read_text())


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def in_order(prior):
    """Codes of a batch stand in the order of ranks: only their set is the same for any number of processes."""
    count = min(int(prior["num_seen"]), len(prior["memory"]))
    codes = prior["memory"][:count]
    return codes[codes[:, 0].argsort()]


@pytest.mark.parametrize("name", script.CASES)
def test_two_processes_equal_one(runs, name):
    one, two = load(runs.one / name), load(runs.two / name)
    assert two["strategy"] == ("ModelParallelStrategy" if name == "sharded" else "DDPStrategy")
    float64 = script.CASES[name][1] == script.FLOAT64
    exact = {"rtol": 1e-9, "atol": 1e-9} if float64 else {"rtol": 1e-6, "atol": 1e-6}
    for part in "weights", "norm":
        torch.testing.assert_close(two[part], one[part], **exact)
    torch.testing.assert_close(in_order(two["prior"]), in_order(one["prior"]), rtol=1e-4, atol=1e-5)
    for part in "prior", "refitted":
        for key in "mean", "factor":
            torch.testing.assert_close(two[part][key], one[part][key], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(two["prior"]["factor"], two["refitted"]["factor"], atol=1e-3)


@pytest.mark.parametrize("name", [*script.CASES, "resumed"])
def test_processes_are_alike(runs, name):
    """Bit for bit, without the memory of codes being sent round at each step."""
    first, second = (load(runs.two / name, rank) for rank in (0, 1))
    for part in "weights", "norm", "prior", "refitted":
        assert [key for key, value in first[part].items() if not torch.equal(value, second[part][key])] == []
    assert torch.equal(first["samples"], second["samples"])
    assert first["prior"]["fitted"] and first["prior"]["num_seen"] > 600
    assert not [key for key in first["broadcasts"] if key.startswith("prior.")]
    if name in ("pictures", "conditional"):
        assert first["broadcasts"] == ["batch_norm.running_mean", "batch_norm.running_var"]


@pytest.mark.parametrize("name", script.CASES)
def test_metrics_are_of_all_images(runs, name):
    """Of 179 and 359 images, which two processes cannot share equally."""
    one, *ranks = load(runs.one / name), load(runs.two / name), load(runs.two / name, rank=1)
    assert {"test/loss", "val/loss", "val/entropy_gap", "train/reconstruction"} <= one["metrics"].keys()
    for two in ranks:
        assert two["metrics"].keys() == one["metrics"].keys()
        for key, value in one["metrics"].items():
            if key != "train/loss":  # of the last batch of each rank
                assert two["metrics"][key].item() == pytest.approx(value.item(), rel=1e-5, abs=2e-5), key
    means = torch.stack([two["metrics"]["train/loss"] for two in ranks]).mean()
    assert means.item() == pytest.approx(one["metrics"]["train/loss"].item(), abs=1e-5)


@pytest.mark.parametrize("name", ["pictures", "sharded"])
def test_pictures_are_written_once(runs, name):
    def pictures(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}

    found = pictures(runs.two / name)
    assert found == pictures(runs.one / name)
    assert len(found) == 12  # four names, two validations and a test
    assert {path.split("/")[1] for path in found} == {"version_0"}


def test_sharded_checkpoint_resumes(runs):
    """From the folder of step 8, in the middle of the second epoch, to the end of the uninterrupted run."""
    assert (runs.two / "sharded" / "ckpt" / "step=8.ckpt" / "meta.pt").is_file()
    whole, resumed = load(runs.two / "sharded"), load(runs.two / "resumed")
    for part in "weights", "norm", "prior":
        assert [key for key, value in whole[part].items() if not torch.equal(value, resumed[part][key])] == []


def test_no_warning_asks_for_a_repair(runs):
    for text in ("sync_dist", "find_unused", "view tensor", "does not have many workers"):
        assert text not in runs.log
