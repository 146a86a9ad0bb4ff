"""The recipe in a tiny setting: the student's folder draws, with diffusers alone, the images that its figure is of."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_plugins import FrechetDistance
from lightning_plugins.data.digits import embedded_digits

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "sid_distill.py"))
TINY = ["--teacher-steps", "2", "--updates", "4", "--every", "2", "--samples", "100"]


def drawn(folder, **options):
    """A hundred images of a folder, as its user draws them."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=100, generator=random, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_teacher_student_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    distances = RECIPE["main"](TINY)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == ["| images seen", "|---|---|---|", "| 128", "| 256"]
    assert f"student, 1 step {distances['student']:.2f}" in lines[4] and "sid_student" in lines[5]
    assert f" {distances['student']:.2f} " in lines[3], "the last row is of the finished student"
    with Image.open("sid_distill.png") as image:
        assert image.size == (1350, 720)

    reference = FrechetDistance("digits")
    reference.update(embedded_digits()[0][:, None].float() / 16, real=True)
    student = drawn("sid_student")
    reference.update(student, real=False)
    assert reference.compute().item() == pytest.approx(distances["student"], rel=1e-3)
    assert drawn("sid_teacher", num_inference_steps=2).shape == student.shape == (100, 1, 8, 8)


def test_the_judge_knows_real_digits():
    judge = RECIPE["Judge"]()
    real = embedded_digits()[0][:, None].float() / 16
    assert judge(real[::2]) < 0.05 * judge(torch.rand(898, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
