"""The Makefile's commands and the continuous-integration entry, without installing anything."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DESCRIPTION = ("setup.cfg", "pyproject.toml", "constraints.txt", "constraints-oldest.txt")
OLD = "default SSE41 1 -m numerics"


def run(command, folder):
    # what the `make test` that runs this has set
    ours = ("MAKE", "MFLAGS", "PYTEST_ARGS", "PYTHON", "FILE", "MUTANTS_ARGS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def make(folder, *arguments):
    return run(["make", *arguments], folder)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile and what it depends on, and no environment yet."""
    for name in ("Makefile", *DESCRIPTION):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def would_run(checkout, *arguments):
    """What ``make`` would do, but for making an environment: lines that begin with ``.venv`` or touch a stamp."""
    answer = make(checkout, "--dry-run", *arguments)
    assert answer.returncode == 0, answer.stderr
    lines = [line.strip() for line in answer.stdout.splitlines()]
    ours = [line for line in lines if re.match(r"(PYTHONPATH=\S+ nice |touch )?\.venv", line)]
    return [line for line in ours if not re.match(r"\S+ -m pip --version|touch \S+/python$", line)]


def install(environment, extras, constraints="constraints.txt"):
    pip = f"{environment}/bin/python -m pip install --disable-pip-version-check"
    return f"{pip} -c {constraints} -e {extras}"


@pytest.mark.parametrize(
    ("arguments", "stamp", "installs", "command"),
    [
        (["demo"], ".venv/installed", install(".venv", "."), "lightning-plugins fit --config capsnet/digits"),
        (
            ["test", "PYTEST_ARGS=-k squash"],
            ".venv/installed-test",
            install(".venv", '".[test]"'),
            "python -m pytest -n 2 --dist loadfile -k squash",
        ),
        (["lint"], ".venv/installed-dev", install(".venv", '".[test,dev]"'), "pre-commit run --all-files"),
        (["types"], ".venv/installed-dev", install(".venv", '".[test,dev]"'), "python tests/helpers/type_errors.py"),
        (
            ["test-mutants", "FILE=a.py", "MUTANTS_ARGS=--num 3"],
            ".venv/installed-mutants",
            install(".venv", '".[test,mutants]"'),
            "python -m mutants a.py --num 3",
        ),
        (
            ["test-oldest"],
            ".venv-oldest/installed-test",
            install(".venv-oldest", '".[test]"', "constraints-oldest.txt"),
            'python -m pytest -n 2 --dist loadfile -m "not slow and not ddp"',
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_installs_once_and_runs(checkout, arguments, stamp, installs, command):
    assert f"{Path(stamp).parent}/python" in make(checkout, "--dry-run", *arguments).stdout
    *before, last = would_run(checkout, *arguments)
    assert before == [installs, f"touch {stamp}"]  # in this order: what pip did not finish is taken up again
    assert last.endswith(f"{Path(stamp).parent}/bin/{command}")
    (checkout / stamp).parent.mkdir()
    for path in (checkout / stamp, checkout / stamp.split("/")[0] / "python"):
        path.touch()
    assert would_run(checkout, *arguments) == [last]
    later = (checkout / stamp).stat().st_mtime + 10
    for name in DESCRIPTION:
        os.utime(checkout / name, (later, later))
    assert would_run(checkout, *arguments) == [*before, last]


@pytest.mark.parametrize(
    ("target", "python", "words"),
    [
        ("demo", "./nowhere", "./nowhere not found: install Python 3.10 or newer"),
        ("demo", "false", "false is not Python 3.10 or newer: install one"),
        ("test-oldest", "false", "false is not Python 3.11: install one"),
    ],
)
def test_an_unfit_python_is_named_in_one_line(checkout, target, python, words):
    answer = make(checkout, target, f"PYTHON={python}")
    assert answer.returncode != 0
    (line,) = answer.stdout.splitlines()
    assert words in line
    assert not list(checkout.glob(".venv*"))


def test_clean_keeps_runs(checkout):
    for name in (".venv", ".venv-oldest", "build", "lightning_logs"):
        (checkout / name / "x").mkdir(parents=True)
    assert make(checkout, "clean").returncode == 0
    assert sorted(path.name for path in checkout.iterdir() if path.is_dir()) == ["lightning_logs"]


def test_help_is_the_default_and_names_every_command():
    shown = make(ROOT).stdout
    assert shown == make(ROOT, "help").stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\S+)", shown, re.MULTILINE)) == set(phony.split()) - {"help"}


@pytest.mark.parametrize(
    ("recipe", "code", "words"),
    [
        ("echo '3 passed, 1 skipped in 1.2s'", 0, "3 passed, 1 skipped in 1.2s"),
        ("echo '1 failed, 3 passed in 1.2s'; exit 1", 1, "1 failed, 3 passed in 1.2s"),
        ("echo 'no tests ran in 0.1s'; exit 5", 1, "no tests ran"),
        ("echo '2 skipped in 0.1s'", 1, "no test ran"),
        ("echo '10 deselected in 0.1s'", 1, "no test ran"),
        ("exit 1", 1, "did not reach its end"),
        ("true", 1, "no test ran"),
        ('[ "$$PYTEST_ARGS" ] || echo "3 passed in 1.2s"', 1, "the numerics on an old processor: no test ran"),
        ('echo "3 passed in 1.2s"; [ -z "$$PYTEST_ARGS" ]', 1, "the numerics on an old processor: make test failed"),
        ('echo "3 passed in 1.2s $$ATEN_CPU_CAPABILITY $$ONEDNN_MAX_CPU_ISA $$OMP_NUM_THREADS $$PYTEST_ARGS"', 0, OLD),
    ],
)
def test_ci_fails_unless_tests_ran_and_passed(tmp_path, recipe, code, words):
    answer = run_ci(tmp_path, f"test:\n\t@{recipe}\n\nlint types:\n")
    assert bool(answer.returncode) == bool(code)
    assert words in answer.stdout + answer.stderr
    assert "99 passed" not in answer.stdout


@pytest.mark.parametrize("target", ["lint", "types"])
def test_ci_fails_unless_the_tools_find_nothing(tmp_path, target):
    others = {"lint", "types"} - {target}
    makefile = f"test:\n\t@echo '3 passed in 1.2s'\n\n{' '.join(others)}:\n\n{target}:\n\tfalse\n"
    assert run_ci(tmp_path, makefile).returncode != 0


def run_ci(folder, makefile):
    """``.ci/run`` on a repository whose committed Makefile is this one."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    (folder / "Makefile").write_text(makefile)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "Makefile", ".ci"], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "Makefile").write_text("test:\n\t@echo '99 passed in 1.0s'\n")  # not committed: must not count
    return run([folder / ".ci/run"], "/")
