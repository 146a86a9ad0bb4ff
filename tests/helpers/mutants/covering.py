"""Which tests run which line of a file."""

import itertools
import json
import re
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "lightning_plugins"


def candidates(root: Path, file: str, near: bool = False) -> list[str]:
    """Test files worth a look, those first that name the file's module themselves, and the file's own doctests.

    Args:
        root: of the tree.
        file: of the package.
        near: only those that name it or are named like it, and those of its part's folder that name, or whose fixtures
            do, what is public in it or in a module using it.
    """
    module, part = _module(file), Path(file).parent.relative_to(PACKAGE)
    texts = dict(_texts(root, PACKAGE))
    users = [path for path, text in texts.items() if _names(text, module) and path != f"{PACKAGE}/__init__.py"]
    inner = [path for path in users if not path.endswith("__init__.py")]
    public = re.compile(rf"\b({'|'.join(name for path in (file, *inner) for name in _public(texts[path])) or ' '})\b")
    found: dict[str, tuple[bool, bool]] = {}
    tests = dict(_texts(root, "tests"))
    fixtures = tests.get(f"tests/{part}/conftest.py", "")
    for path, text in tests.items():
        far, like = not _names(text, module), f"{part}/test_{Path(file).stem}" in path
        here = Path(path).parent == Path("tests") / part and public.search(text + fixtures)
        wanted = like or not far or here or (not near and any(_names(text, _module(user)) for user in users))
        if wanted and Path(path).name.startswith("test_") and not path.startswith("tests/gates"):
            found[path] = not like, far
    # the doctests last: collected first they would import the file a second time
    return [*sorted(found, key=lambda path: (found[path], path)), file]


def _texts(root, folder):
    return [(str(path.relative_to(root)), path.read_text()) for path in sorted((root / folder).rglob("*.py"))]


def _module(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _public(text):
    """The public classes and functions of a module."""
    return re.findall(r"^(?:class|def) ([A-Za-z]\w*)", text, re.MULTILINE)


def _names(text, module):
    """Whether it imports the module, or says its name."""
    package, name = module.rsplit(".", 1)
    together = re.search(rf"^from {re.escape(package)} import .*\b{name}\b", text, re.MULTILINE)
    own = rf"\b{re.escape(module)}(?!\w|\.\w+ import|\.[a-z_]+\.)"  # not of a package's file
    return bool(together or re.search(own, text))


class Covering(NamedTuple):
    """What one unchanged run of the candidates shows.

    ``seconds`` of processor time of every test that passed; ``lines`` it runs of each file; ``failed`` ones, which
    judge nothing; ``modules`` of others that were imported.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[int]]]
    failed: list[str]
    modules: list[str]

    def tests_of(self, mutant, candidates: list[str], budget: float) -> list[str]:
        """Of the candidates' tests those that run its line; all that run its file for a line run by an import.

        Args:
            mutant: its file and line count.
            candidates: test files, in order.
            budget: seconds, unchanged, beyond which the slower of them are left out.
        """
        known = [test for test in self.seconds if test.split("::")[0] in candidates]
        touching = [test for test in known if mutant.file in self.lines[test]]
        chosen = [test for test in touching if mutant.line in self.lines[test][mutant.file]] or touching or known
        quick = sorted(chosen, key=self.seconds.get)
        spent = itertools.accumulate(self.seconds[test] for test in quick)
        chosen = [test for test, total in zip(quick, spent, strict=True) if total <= budget] or quick[:1]
        order = {file: index for index, file in enumerate(candidates)}
        return sorted(chosen, key=lambda test: (order[test.split("::")[0]], self.seconds[test]))


class Tracer:
    """A pytest plugin that writes a :class:`Covering` of a run.

    Args:
        root: of the tree.
        files: of the package, that are traced.
        output: JSON file.
        limit: seconds of processor time after which a test is given up, and judges nothing.
    """

    def __init__(self, root: Path, files: list[str], output: Path, limit: float) -> None:
        self.names, self.output, self.limit = {str(root / file): file for file in files}, output, limit
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.shared: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.now: dict[str, set[int]] | None = None

    def _call(self, frame, event, argument):
        name = self.names.get(frame.f_code.co_filename)
        if name is None or self.now is None:
            return None
        self.now[name].add(frame.f_lineno)
        return self._line

    def _line(self, frame, event, argument):
        if self.now is not None:
            self.now[self.names[frame.f_code.co_filename]].add(frame.f_lineno)
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """Trace a test with what is set up for it."""
        self.now, start = self.lines[item.nodeid], time.process_time()
        before = sys.gettrace()  # of `make cov`, when these hooks are tested
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(before)
            self.seconds[item.nodeid] = time.process_time() - start
            for name in getattr(item, "fixturenames", ()):
                for file, lines in self.shared[item.nodeid.split("::")[0], name].items():
                    self.lines[item.nodeid][file] |= lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Give up a test that is too slow to be run for each mutant."""
        signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("too slow for mutants"))
        signal.setitimer(signal.ITIMER_VIRTUAL, self.limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        """What a fixture of several tests runs counts for all of them."""
        if fixturedef.scope == "function":
            return (yield)
        before, self.now = self.now, self.shared[request.node.nodeid.split("::")[0], fixturedef.argname]
        try:
            return (yield)
        finally:
            self.now = before

    def pytest_runtest_logreport(self, report):
        """Note what failed, or was skipped."""
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        """Write all down."""
        passed = {test: round(value, 3) for test, value in self.seconds.items() if test not in self.failed}
        lines = {test: {file: sorted(found) for file, found in self.lines[test].items()} for test in passed}
        modules = [name for name, module in list(sys.modules.items()) if _is_library(name, module)]
        self.output.write_text(json.dumps([passed, lines, sorted(self.failed), modules]))


def _is_library(name, module):
    own = name.split(".")[0] in (PACKAGE, "tests", "mutants", "__main__") or name.rpartition(".")[2] == "conftest"
    return not own and "-packages" in (getattr(module, "__file__", None) or "")
