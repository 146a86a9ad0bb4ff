"""What tests and the documentation's examples start from: known random numbers, and modules that are imported once.

``TEST_SEED`` chooses other numbers (0 if not given): a test that passes for one seed only was lucky.
"""

import os
import random
import zlib
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent
SEED = int(os.environ.get("TEST_SEED", "0"))

# the same examples in every run; none fails for being slow on a loaded machine
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


def seed(number):
    """Seed Python, NumPy and torch."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def numbers_of(name):
    """Numbers of its own for what ``name`` says; the stream outside goes on as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed(SEED + zlib.crc32(name.encode()))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def known_numbers():
    """Each test draws the same, alone and after any other."""
    seed(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """What several tests share draws the same, whichever of them asks first."""
    if fixturedef.scope == "function":
        return (yield)
    with numbers_of(fixturedef.argname):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """What a file draws when it is imported does not depend on the files before it."""
    with numbers_of(collector.nodeid):
        return (yield)


def pytest_collect_file(file_path):
    """Import the package's modules as Python does, before pytest does.

    For a module that is not known yet pytest imports the package around it, whose ``__init__`` imports the module, and
    then executes the module's file once more: two classes of one name, and tests that were given the wrong one.
    """
    inside = ROOT / "lightning_plugins" in file_path.parents
    if inside and file_path.suffix == ".py" and file_path.name != "__main__.py":
        import_module(".".join(file_path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
