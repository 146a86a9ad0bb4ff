"""What the callbacks do to learning from wrong labels, held by numbers: the recipe's own runs are the test."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "label_noise.py"))
TRAIN, VAL, SLOPE, TEST = range(4)


@pytest.fixture(scope="module")
def histories():
    """``(5 seeds, 100 epochs, 4 measures)`` of each method."""
    threads, settings = torch.get_num_threads(), {"nothing": 0.0, "GradientPenalty": 3.0, "Flooding": 1.3}
    yield {
        method: torch.stack([RECIPE["run"](method, value, seed, epochs=100) for seed in range(5)])
        for method, value in settings.items()
    }
    torch.set_num_threads(threads)  # the recipe takes one


def test_gradient_penalty_lifts_final_test_accuracy_by_five_points(histories):
    gain = histories["GradientPenalty"][:, -1, TEST] - histories["nothing"][:, -1, TEST]
    assert gain.mean() >= 0.05
    assert gain.min() > 0


def test_gradient_penalty_leaves_flatter_places(histories):
    slope, without = (histories[name][:, -10:, SLOPE].mean() for name in ("GradientPenalty", "nothing"))
    assert slope <= 0.5 * without


def test_flooding_holds_the_training_loss_at_its_level(histories):
    held = histories["Flooding"][:, -10:, TRAIN].mean(1)  # (5,)
    assert held.min() >= 0.9 * 1.3 and held.max() <= 1.1 * 1.3
    assert (histories["nothing"][:, -1, TRAIN] < 0.97 * 1.3).all()  # without it the loss falls on


def test_all_methods_start_alike_within_a_seed(histories):
    """Flooding changes nothing before the loss reaches its level: the same weights, labels and batches until then."""
    first = histories["nothing"][:, :5]
    assert torch.equal(histories["Flooding"][:, :5], first)
    assert first[:, 0, TRAIN].unique().numel() == 5  # and seeds differ


def test_table_and_picture(tmp_path, capsys):
    picture = tmp_path / "label_noise.png"
    results = RECIPE["main"](["--seeds", "2", "--epochs", "2", "--picture", str(picture)])
    assert len(results) == 10 and all(history.shape == (2, 2, 4) for history in results.values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 10 and all(line.count("|") == 7 for line in lines)
    assert sum("**" in line for line in lines) == 4  # the choice of each method
    accuracy = results["weight decay 0.01"][:, -1, TEST]
    (line,) = (line for line in lines if "weight decay 0.01" in line)
    assert f"{accuracy.mean():.3f} ± {accuracy.std():.3f}" in line
    with Image.open(picture) as image:
        assert image.size == (1350, 960)


def test_one_seed_has_no_deviation(tmp_path, capsys):
    RECIPE["main"](["--seeds", "1", "--epochs", "1", "--picture", str(tmp_path / "label_noise.png")])
    out = capsys.readouterr().out
    assert "nan" not in out and "±" not in out
    assert all(line.count("|") == 7 for line in out.splitlines())
