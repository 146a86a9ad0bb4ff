"""Any value for any argument of anything public: a sentence that names the argument, or one step without NaN."""

import math
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from argument_subjects import RECORDS, public_names, subjects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_plugins

PACKAGE = str(Path(lightning_plugins.__file__).parent)
NASTY = [
    math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3, -0.5, 0.5, 1.0, 1e-12, 1e6, 2**63, 10**30, 10**5000, True, False,
    None, "x", "", b"x", [], [1], [1, "x"], [math.nan], [-1, 2], (1, 2), (0, 0, 0), {}, {"x": 1}, object(), 1j,
    torch.tensor(0.5), torch.ones(2, dtype=torch.int64),
]  # fmt: skip
NUMBERS = st.floats(-1e6, 1e6) | st.integers(-3, 5) | st.text(max_size=3)
SUBJECTS = subjects(Path())
# What was accepted once, and what came out wrong: kept whatever is drawn.
KEPT = [
    ("UniLMSeq2Seq", "lr", -1),
    ("UniLMSeq2Seq", "weight_decay", math.nan),
    ("DiffusionTeacher", "warmup", -2),
    ("SiD", "alpha", math.nan),
    ("KNNEntropy", "k", -1),
    ("LatentDiagnostics", "k", 0),
    ("KNNEntropyLoss", "chunk_size", 0),
    ("KNNEntropyLoss", "eps", math.nan),
    ("PrimaryCapsules", "squash_scale", -1),
    ("RoutingCapsules", "dim", 0),
    ("IdxImages", "val_size", math.nan),
    ("HFImages", "val_size", math.nan),
    ("Seq2SeqData", "val_size", math.nan),
    ("fake_score_loss", "sigma_data", 2.7e-20),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Names that nobody has are not asked for on the Hub."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def holds_nan(result):
    """Whether a tensor, a number, or several of them do."""
    if isinstance(result, Tensor):
        return result.is_floating_point() and bool(result.isnan().any())
    if isinstance(result, dict):
        return any(map(holds_nan, result.values()))
    if isinstance(result, list | tuple):
        return any(map(holds_nan, result))
    return isinstance(result, float) and math.isnan(result)


def try_value(subject, name, value):
    """Whether the value is taken; fails unless it is refused by a sentence of ours or does a step without NaN."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a working combination warns of is not asked here
            result = subject.step(subject.call(**{**subject.base(), name: value}))
    except (ValueError, FileNotFoundError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        assert where.startswith(PACKAGE), f"{where} raised {error}"
        assert subject.told_as.get(name, name) in str(error), f"the sentence does not name {name}: {error}"
        return False
    assert not holds_nan(result), "the step gave NaN"
    return True


@pytest.mark.parametrize("what", SUBJECTS)
def test_any_value_is_refused_or_works(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subject = subjects(tmp_path)[what]
    assert not holds_nan(subject.step(subject.call(**subject.base())))
    if not subject.arguments:
        return

    @settings(
        max_examples=subject.examples * len(subject.arguments),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(subject.arguments), st.sampled_from(NASTY) | NUMBERS)
    def anything(name, value):
        try_value(subject, name, value)

    anything()


@pytest.mark.parametrize(("what", "name", "value"), KEPT)
def test_once_accepted(what, name, value):
    assert not try_value(SUBJECTS[what], name, value)


def test_nothing_public_is_left_out():
    assert public_names() - RECORDS == SUBJECTS.keys()


def test_there_are_enough_cases():
    assert sum(subject.examples * len(subject.arguments) for subject in SUBJECTS.values()) >= 2000
