"""The suite does not depend on order: random numbers are known, and a module's examples do not import it twice."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from first_cases import is_first_case
from hypothesis import given
from hypothesis import strategies as st
from numerics import compares_numbers

ROOT = Path(__file__).parents[2]


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.fixture(scope="module")
def shared():
    return draws()


@pytest.mark.parametrize("seen", [[]])
@pytest.mark.parametrize("time", range(3))
def test_each_test_starts_from_the_same_numbers(time, seen, request):
    if time == 1:
        request.getfixturevalue("shared")
    seen.append(draws())
    assert set(seen) == {seen[0]}


def test_workers_share_two_threads_unless_others_are_asked_for():
    asked = int(os.environ["OMP_NUM_THREADS"])
    assert torch.get_num_threads() == asked
    if "TEST_THREADS_SHARED" in os.environ:
        assert asked == max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def test_shared_fixtures_draw_other_numbers_than_tests(shared):
    assert not set(shared) & set(draws())


def helper():
    return draws() == pytest.approx(draws())


@given(st.integers())
def with_examples(number):
    helper()


def test_comparisons_of_numbers_are_seen():
    assert compares_numbers(helper)
    assert compares_numbers(with_examples)
    assert compares_numbers(lambda: [helper() for _ in range(2)])
    assert not compares_numbers(lambda: {1}.isdisjoint({2}))


@pytest.fixture(params=[1.0, 2.0])
def factor(request):
    return request.param


@pytest.mark.parametrize("letter", "ab")
@pytest.mark.parametrize(("number", "sign"), [(0, "+"), (1, "-")])
def test_the_first_case_is_seen(factor, letter, number, sign, request):
    assert is_first_case(request.node) == ((factor, letter, number, sign) == (1.0, "a", 0, "+"))


def test_a_test_without_cases_is_its_own_first(request):
    assert is_first_case(request.node)


TOY = {
    "lightning_plugins/__init__.py": "",
    "lightning_plugins/part/__init__.py": "from lightning_plugins.part.thing import Thing",
    "lightning_plugins/part/thing.py": """class Thing:
    '''
    >>> isinstance(Thing(), Thing)
    True
    '''
""",
    "test_thing.py": """from lightning_plugins.part import Thing
from lightning_plugins.part.thing import Thing as Same

def test_it_is_one():
    assert Thing is Same
""",
}


def test_an_example_before_the_tests_makes_no_second_class(tmp_path):
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("conftest.py", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "lightning_plugins/part/thing.py",
        "test_thing.py",
    ]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "2 passed" in answer.stdout, answer.stdout
