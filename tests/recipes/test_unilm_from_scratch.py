"""Learnt tasks, and the control that a leak would fail, held by numbers: the recipe's own runs are the test."""

import runpy
from pathlib import Path

import pytest
import torch

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "unilm_from_scratch.py"))


def test_the_task_is_learnt_the_control_is_not_and_the_export_answers_alike(tmp_path, capsys):
    threads, folder = torch.get_num_threads(), tmp_path / "copier"
    words = ["--tasks", "copy", "unrelated", "--pairs", "2400", "--epochs", "4", "--export", str(folder)]
    table = RECIPE["main"](words)
    torch.set_num_threads(threads)  # the recipe takes one
    assert table["copy"]["val/exact_match"] >= 0.9
    assert table["copy"]["val/loss"] <= 0.1
    assert table["unrelated"]["val/loss"] == pytest.approx(RECIPE["CHANCE"], abs=0.03)
    assert table["unrelated"]["val/exact_match"] == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and printed[3].startswith("| unrelated | ")
    answer = printed[2].split("| ")[4].removesuffix(" |")
    assert printed[4] == f"{folder} in plain transformers: {answer}"


def test_targets_are_what_the_tasks_say():
    for task, answer in RECIPE["TASKS"].items():
        pairs = RECIPE["make_pairs"](task, 50, seed=3)
        assert pairs == RECIPE["make_pairs"](task, 50, seed=3)
        assert len({source for source, _ in pairs}) == 50
        right = [target == " ".join(map(str, answer([*map(int, source.split())]))) for source, target in pairs]
        assert sum(right) == (0 if task == "unrelated" else 50)
