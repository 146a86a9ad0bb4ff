"""Judge mutants: a copy of the tree, one fork for each, its covering tests until one fails."""

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from configparser import ConfigParser
from pathlib import Path

from mutants.covering import PACKAGE, Covering, Tracer, candidates
from mutants.operators import Mutant

_OPTIONS = ["-q", "--no-header", "-p", "no:cacheprovider", "-m", "not ddp and not slow"]
_OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # libraries are imported already
_QUIET = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_QUIET |= {"TRANSFORMERS_VERBOSITY": "error"}
_BROKEN = 70  # exit status of a fork whose pytest raised


class Judge:
    """Holds the copy and what tests of ``files`` cover.

    Args:
        root: of the repository.
        files: of the package, that will be mutated.
        budget: seconds of tests for a mutant.
        near: see :func:`~mutants.covering.candidates`.
        limit: see :class:`~mutants.covering.Tracer`.
    """

    def __init__(self, root: Path, files: list[str], budget: float, near: bool, limit: float) -> None:
        self.budget, self.limit = budget, limit
        self._folder = tempfile.TemporaryDirectory(prefix="mutants_")
        self.copy = Path(self._folder.name).resolve() / "tree"
        _copy_tree(root, self.copy)
        os.environ.update(_QUIET, HF_HOME=str(self.copy.parent / "hf"), PYTHONPATH=str(self.copy))
        self.candidates = {file: candidates(self.copy, file, near) for file in files}
        self.covering = self._cover(files)
        for module in self.covering.modules:  # so that no fork has to import them again
            _import(module)
        for file in files:
            self._control(file)

    def _cover(self, files: list[str]) -> Covering:
        output = self.copy.parent / "covering.json"
        tests = list(dict.fromkeys(test for file in files for test in self.candidates[file]))
        _fork(self.copy, tests, Tracer(self.copy, files, output, self.limit), limit=3600)
        if not output.exists():
            raise RuntimeError(f"The unchanged tests did not run:\n{_tail(self.copy)}")
        return Covering(*json.loads(output.read_text()))

    def _control(self, file: str) -> None:
        """What changes nothing must survive; a few quick tests say so."""
        unchanged = Mutant(file, 0, "", "")
        tests = self.covering.tests_of(unchanged, self.candidates[file], min(self.budget, 3.0))
        if tests and (verdict := self._run(list(dict.fromkeys(map(_file, tests))), tests)) != "survived":
            raise RuntimeError(f"{file} does not pass in a fork, unchanged: {verdict}\n{_tail(self.copy)}")

    def judge(self, mutant: Mutant) -> str:
        """``killed by`` a test, ``timed out``, ``survived`` or ``not covered``."""
        tests = self.covering.tests_of(mutant, self.candidates[mutant.file], self.budget)
        if not tests and not mutant.also:
            return "not covered"
        path = self.copy / mutant.file
        original = path.read_text(encoding="utf-8")
        _write(path, mutant.source)
        try:
            files = list(dict.fromkeys(map(_file, tests)))
            verdict = "survived"
            for some in filter(None, (files[:2], files[2:])):  # few files are collected sooner, and mostly enough
                if verdict == "survived":
                    verdict = self._run(some, [test for test in tests if _file(test) in some])
            if verdict == "survived" and mutant.also:
                verdict = self._verdict(_fork(self.copy, list(mutant.also), None, 900, "-x", "-m", ""))
            return verdict
        finally:
            _write(path, original)

    def _run(self, files: list[str], tests: list[str]) -> str:
        limit = 20 + 2 * sum(self.covering.seconds[test] for test in tests)  # importing and collecting take some, too
        return self._verdict(_fork(self.copy, files, _Chosen(tests), limit, "-x"))

    def _verdict(self, status: int) -> str:
        if status == _BROKEN:
            raise RuntimeError(f"pytest did not run:\n{_tail(self.copy)}")
        if status < 0:
            return "timed out"
        return "survived" if status == 0 else f"killed by {_first_failure(self.copy)}"


class _Chosen:
    """A pytest plugin that runs some tests, in their order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: index for index, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        """Leave out the others."""
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])


def _fork(copy: Path, arguments: list[str], plugin: object | None, limit: float, *options: str) -> int:
    """Pytest's exit status in a fork; negative if it took more than ``limit`` seconds of processor time, or died."""
    child = os.fork()
    if child == 0:
        _run(copy, [*_OPTIONS, *options, *arguments], plugin, limit)
    deadline = time.monotonic() + 10 * limit  # for one that waits, on a busy machine
    status = None
    try:
        while status is None and time.monotonic() < deadline:
            time.sleep(0.02)
            ended, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
    finally:
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return -signal.SIGKILL if status is None else status


def _run(copy, arguments, plugin, limit):
    import pytest

    status = _BROKEN
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        log = os.open(_log(copy), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        status = pytest.main(arguments, plugins=[plugin] if plugin else [])
        sys.stdout.flush()
    except BaseException:  # a fork must not go on as its parent
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _copy_tree(root: Path, copy: Path) -> None:
    """Copy what git tracks or would, laid out as installed, so that nothing is imported from elsewhere."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.splitlines()):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)
    settings = ConfigParser()
    settings.read(copy / "setup.cfg")
    for line in settings.get("options", "package_dir", fallback="").splitlines():
        if line.strip():
            package, folder = (part.strip() for part in line.split("="))
            (copy / package.replace(".", "/")).symlink_to(copy / folder)


def _write(path: Path, source: str) -> None:
    """Write without leaving compiled code of what stood there: that is told by size and second alone."""
    path.write_text(source, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def _import(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except Exception as error:  # a fork then imports it, or not
            print(f"{module} is not imported ahead: {error}", file=sys.stderr)


def _file(test):
    return test.split("::")[0]


def _log(copy):
    return copy.parent / "log"


def _tail(copy):
    return _log(copy).read_text()[-2000:]


def _first_failure(copy):
    lines = [line for line in _log(copy).read_text().splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else f"{PACKAGE}'s import"
