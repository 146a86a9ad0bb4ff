"""Two processes train the CapsNet that one process trains on the joined batches: weights, metrics, pictures, files."""

from types import SimpleNamespace

import pytest
import torch
from ranks import load_script, torchrun

from lightning_plugins import CapsNet

pytestmark = pytest.mark.ddp

script = load_script("train_capsnet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("capsnet")
    one, two = folder / "one", folder / "two"
    with torchrun("train_capsnet", two, cwd=folder) as log:
        for name in script.CASES:
            script.run(name, one / name)
    return SimpleNamespace(one=one, two=two, log=log.read_text())


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def assert_same_weights(expected, folder, tolerance):
    first, second = (load(folder, rank)["weights"] for rank in (0, 1))
    assert expected.keys() == first.keys()
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), f"the ranks differ in {key}"
        torch.testing.assert_close(first[key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", script.CASES)
def test_two_processes_equal_one(runs, name):
    one, two = load(runs.one / name), load(runs.two / name)
    assert two["strategy"] == ("ModelParallelStrategy" if name == "sharded" else "DDPStrategy")
    assert_same_weights(one["weights"], runs.two / name, 1e-12 if name.endswith("float64") else 1e-6)
    steps = 6 if name == "accumulate-clip" else 12
    assert len(one["norms"]) == len(two["norms"]) == steps
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    if name in ("accumulate-clip", "sharded"):
        assert min(one["norms"]) > 0.2  # all of them were clipped


@pytest.mark.parametrize("name", script.CASES)
def test_metrics_are_of_all_images(runs, name):
    """Accuracy and losses of 179 and 359 images, which two processes cannot share equally."""
    one, *ranks = load(runs.one / name), load(runs.two / name), load(runs.two / name, rank=1)
    assert {"test/accuracy", "test/loss", "val/accuracy", "val/loss", "train/accuracy"} <= one["metrics"].keys()
    correct = one["metrics"]["test/accuracy"] * 359
    assert correct == pytest.approx(round(correct.item()), abs=1e-3)
    for two in ranks:
        for key, value in one["metrics"].items():
            if key != "train/loss":  # of the last batch of each rank
                assert two["metrics"][key].item() == pytest.approx(value.item(), abs=2e-6), key
    means = torch.stack([two["metrics"]["train/loss"] for two in ranks]).mean()
    assert means.item() == pytest.approx(one["metrics"]["train/loss"].item(), abs=2e-6)


@pytest.mark.parametrize("name", ["pictures", "sharded"])
def test_pictures_are_written_once(runs, name):
    def pictures(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}

    found = pictures(runs.two / name)
    assert found == pictures(runs.one / name)
    assert len(found) == 8
    assert {path.split("/")[1] for path in found} == {"version_0"}


def test_sharded_checkpoint_resumes(runs):
    """From the folder of step 8, in the middle of the second epoch, to the end of the uninterrupted run."""
    assert (runs.two / "sharded" / "ckpt" / "step=8.ckpt" / "meta.pt").is_file()
    assert len(load(runs.two / "resumed")["norms"]) == 4
    assert_same_weights(load(runs.two / "sharded")["weights"], runs.two / "resumed", 0.0)


def test_no_warning_asks_for_a_repair(runs):
    for text in ("sync_dist", "find_unused", "view tensor", "does not have many workers"):
        assert text not in runs.log


def test_tensor_parallelism_is_refused():
    model = CapsNet(image_shape=(1, 14, 14), **script.SMALL)
    model._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match=r"no tensor parallelism, got tensor_parallel_size=2: shard it over data-par"):
        model.configure_model()
