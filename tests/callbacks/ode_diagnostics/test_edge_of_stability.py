"""Full-batch descent on digits drives sharpness times learning rate to each method's own limit, and stays there."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "edge_of_stability.py"


def load_script():
    spec = importlib.util.spec_from_file_location("edge_of_stability", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_each_method_arrives_at_its_limit(tmp_path):
    torch.set_num_threads(1)
    script = load_script()
    results = script.main(["--picture", str(tmp_path / "edge.png")])
    limits = {"gradient descent": 2.0, "momentum 0.9": 3.8, "Nesterov 0.9": 3.8 / 2.8}
    assert results.keys() == limits.keys()
    for name, numbers in results.items():
        assert numbers["late"] == pytest.approx(limits[name], rel=0.1), name
        assert 0.85 * limits[name] < numbers["least"] <= numbers["greatest"] < 1.15 * limits[name], name
        assert numbers["at first"] < 0.5 * limits[name], name  # it has sharpened, and stopped
        assert numbers["loss at last"] < 0.7 * numbers["loss at first"], name
    assert abs(results["gradient descent"]["late"] - 2) < 0.2  # Cohen et al. 2021
    assert (tmp_path / "edge.png").stat().st_size > 10_000
