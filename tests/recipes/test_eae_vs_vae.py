"""The recipe in a tiny setting: what it compares by can tell images apart, and its table says what was measured."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "eae_vs_vae.py"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    data = RECIPE["Digits"](image_size=8)
    return {split: RECIPE["images_of"](data, split) for split in ("train", "val", "test")}


def test_the_judge_tells_good_from_bad_images_and_forgets_samples(digits):
    judge = RECIPE["Judge"](torch.cat([*digits.values()]))
    itself = judge.figures(digits["train"])
    blurred = judge.figures(torch.nn.functional.avg_pool2d(digits["train"], 3, stride=1, padding=1))
    noise = judge.figures(torch.rand(1259, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert itself[0] < 0.05 and itself[1] > 0.95
    assert noise[0] > 20 * itself[0] and blurred[0] > 20 * itself[0] and noise[1] < 0.1
    assert judge.figures(digits["train"]) == itself


def test_table_and_picture(digits, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    results = RECIPE["main"](["--epochs", "2", "--samples", "100", "--picture", str(picture)])
    assert list(results) == [f"{m}, {p}" for m in RECIPE["MODELS"] for p in ("N(0, I)", "mixture")]
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(results) and all(row.count("|") == header.count("|") for row in rows)
    for row, figures in zip(rows, results.values(), strict=True):
        assert " | ".join(f"{value:.2f}" for value in figures) in row
    grey = (digits["test"] - 0.5).square().sum((1, 2, 3)).mean()  # what an untrained decoder gives
    errors = [float(row.split("|")[5]) for row in rows]
    assert 0 < max(errors) < grey and errors[::2] == errors[1::2]
    with Image.open(picture) as image:
        assert image.size == (1350, 615)
