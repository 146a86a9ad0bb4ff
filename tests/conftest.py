"""What every test starts from: a folder of its own, no network, nothing left behind; two threads over all workers.

``OMP_NUM_THREADS`` asks for another number of threads.
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from first_cases import is_first_case
from numerics import compares_numbers

_CACHE = tempfile.TemporaryDirectory(prefix="lightning_plugins_tests_")  # not the user's own
os.environ.update(HF_HOME=_CACHE.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read at import, later
_FEW = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
if "OMP_NUM_THREADS" not in os.environ or "TEST_THREADS_SHARED" in os.environ:  # nobody asked; workers come second
    os.environ.update(OMP_NUM_THREADS=str(_FEW), TEST_THREADS_SHARED="1")  # also for the processes that tests start
os.environ.setdefault("MPLBACKEND", "agg")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_LIGHTNING = logging.getLogger("lightning.pytorch")
_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]

pytest.register_assert_rewrite("wild.cells")  # here, before doctests import it

collect_ignore_glob = ["distributed/scripts/*.py"]  # started by tests, with paths of their own

# Whose slow tests are for make test-faults, test-support and test-wild, and the networks that ONNX needs seconds for.
_WITH_COMMAND = {"distributed", "faults", "wild", "test_onnx.py"}

# Folders and files of processes and whole runs, which take long and hold few numbers.
_APART = {"cli", "distributed", "faults", "gates", "recipes", "robustness", "wild"}
_APART |= {"test_learning.py", "test_mixtures.py", "test_sid_export.py", "test_export.py"}


def _is_apart(item):
    """Outside of the parts, or one of those that take long, as drawing and compiling do."""
    inside = Path(__file__).parent in item.path.parents and _APART.isdisjoint(item.path.parts[-2:])
    other = "plots" in item.path.name or "figure" in item.path.name or "compile" in item.name
    return not inside or other or any(item.iter_markers("ddp")) or any(item.iter_markers("slow"))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    """Mark tests in the folders of the parts, unless they take long.

    As ``numerics`` what compares floating-point results (others may say so), as ``fast`` the first case of each test
    that neither draws nor goes through the modes of training. Long ones with a command of their own are left out
    unless ``-m`` chooses.
    """
    if not config.option.markexpr:
        long = [item for item in items if _WITH_COMMAND & {*item.path.parts} and item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    for item in items:
        if not isinstance(item, pytest.Function) or _is_apart(item):
            continue
        if compares_numbers(item.function):
            item.add_marker("numerics")
        if is_first_case(item) and "_modes" not in item.path.name and "picture" not in item.name:
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch):
    """Run in an empty folder; put environment, signal handlers, argv, threads, logs and process groups back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-plugins"])  # LightningCLI warns about the test runner's arguments
    environment = os.environ.copy()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    threads = torch.get_num_threads()
    level = _LIGHTNING.level
    yield
    _LIGHTNING.setLevel(level)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
