"""Rules for arguments: what is taken, and the one form of sentence for what is not."""

import enum
import math
from typing import Literal

import numpy as np
import pytest
import torch

from lightning_plugins.core import arguments as must

Mode = Literal["a", "b"]


class Letter(str, enum.Enum):
    A = "a"


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (must.whole(1), 1),
        (must.whole(1), np.int64(3)),
        (must.whole(-2, 2), -2),
        (must.number(0, below=1), np.float32(0.5)),
        (must.number(0, below=1), 0),
        (must.positive, 1e-300),
        (must.share, 1),
        (must.one_of(Mode), "a"),
        (must.one_of([1, 3]), 3),
        (must.one_of(Mode), np.str_("a")),
        (must.one_of(Mode), Letter.A),
        (must.optional(must.count), None),
        (must.several(must.count), range(1, 3)),
        (must.each(must.count, 2), (1, 2)),
        (must.each(must.text, empty=True), []),
        (must.tensor("(B, ..., D)"), torch.ones(1, 2, 3, 4)),
        (must.tensor(dtype="integer"), torch.ones(2, dtype=torch.bool)),
    ],
)
def test_taken(rule, value):
    rule("x", value)


@pytest.mark.parametrize(
    ("rule", "value", "sentence"),
    [
        (must.whole(1, why="why"), 0, "x=0 must be 1 or more: why."),
        (must.whole(1), 1.0, "x=1.0 must be a whole number of 1 or more."),
        (must.whole(1), True, "x=True must be a whole number of 1 or more."),
        (must.whole(1), 2**63, f"x={2**63} must be a whole number of 1 or more."),
        (must.whole(1, 3), 4, "x=4 must lie in [1, 3]."),
        (must.number(0, below=1), 1, "x=1 must lie in [0, 1)."),
        (must.number(above=0, most=1), 0, "x=0 must lie in (0, 1]."),
        (must.number(below=2), 2, "x=2 must be below 2."),
        (must.number(most=2), 3, "x=3 must be 2 or less."),
        (must.positive, math.nan, "x=nan must be a finite number above 0."),
        (must.positive, -0.0, "x=-0.0 must be positive."),
        (must.finite, math.inf, "x=inf must be a finite number."),
        (must.finite, 10**400, "x=a whole number of 1329 bits must be a finite number."),
        (must.flag, 1, "x=1 must be True or False."),
        (must.one_of(Mode), [], "x=[] must be one of a, b."),
        (must.one_of([1, 3]), True, "x=True must be one of 1, 3."),
        (must.optional(must.count), 0, "x=0 must be 1 or more."),
        (must.several(must.count), [0], "x=[0] must be a whole number of 1 or more, or several such numbers."),
        (must.each(must.count, 3, of="(C, H, W)"), [1, 2], "x=[1, 2] must be (C, H, W), each a whole number of 1 or"),
        (must.each(must.text), "ab", "x='ab' must be a list, each a text."),
        (
            must.codes,
            torch.ones(3),
            "x must be floating-point codes (N, d), got (3,) torch.float32: flatten and widen.",
        ),
        (must.one_of([0, 1]), True, "x=True must be one of 0, 1."),
        (must.positive, torch.tensor([0.5]), "x must be a finite number above 0, got (1,) torch.float32 of 0.5."),
        (must.text, 5, "x=5 must be a text."),
        (must.whole(1), "a\nb" * 200, "x='a\\nba\\nb"),
    ],
)
def test_refused(rule, value, sentence):
    with pytest.raises(ValueError) as error:
        rule("x", value)
    assert str(error.value).startswith(sentence)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 3]), "labels run from 0 to 3: they must be 0 to 2"),
        (torch.tensor([0.0, 1.0]), r"labels must be \(2,\) int64, a class for each image, got \(2,\) torch.float32"),
        ("x", "got 'x'"),
    ],
)
def test_class_labels(labels, words):
    must.class_labels(torch.tensor([0, 2], dtype=torch.int32), 2, 3)
    with pytest.raises(ValueError, match=words):
        must.class_labels(labels, 2, 3)
