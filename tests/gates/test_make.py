"""The two commands and the continuous-integration entry, without installing anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_python(checkout):
    """An interpreter that notes how it is called; its ``venv`` makes an environment holding another of its kind."""
    log = checkout / "calls"
    note = [f'echo "$@" >> {log}', f'[ -e {checkout}/break ] && [ "$3" = install ] && exit 1']
    inner = script(checkout / "inner", *note, "exit 0")
    outer = script(
        checkout / "python",
        *note,
        f'[ "$2" = venv ] && mkdir -p "$3/bin" && cp {inner} "$3/bin/python"',
        f'[ "$2" = venv ] && cp {inner} "$3/bin/lightning-plugins"',
        "exit 0",
    )
    return f"PYTHON={outer}", log


def test_demo_and_test_install_once_and_run(checkout, fake_python):
    python, log = fake_python
    assert make(checkout, "demo", python).returncode == 0
    calls = log.read_text().splitlines()
    assert "-m venv .venv" in calls
    assert calls[-2:] == [
        "-m pip install --disable-pip-version-check -c constraints.txt -e .",
        "fit --config capsnet/digits",
    ]
    log.unlink()
    assert make(checkout, "demo", python).returncode == 0
    assert log.read_text().splitlines() == ["fit --config capsnet/digits"]
    log.unlink()
    assert make(checkout, "test", python, "PYTEST_ARGS=-k squash").returncode == 0
    assert log.read_text().splitlines() == [
        "-m pip install --disable-pip-version-check -c constraints.txt -e .[test]",
        "-m pytest -n 2 --dist loadfile -k squash",
    ]
    log.unlink()
    assert make(checkout, "test", python).returncode == 0
    assert log.read_text().splitlines() == ["-m pytest -n 2 --dist loadfile"]
    log.unlink()
    later = (checkout / ".venv/installed-test").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert make(checkout, "test", python).returncode == 0
    assert "pip install" in log.read_text()


def test_mutants_are_installed_apart_and_take_a_file(checkout, fake_python):
    python, log = fake_python
    assert make(checkout, "test-mutants", python, "FILE=a.py", "MUTANTS_ARGS=--num 3").returncode == 0
    assert log.read_text().splitlines()[-2:] == [
        "-m pip install --disable-pip-version-check -c constraints.txt -e .[test,mutants]",
        "-m mutants a.py --num 3",
    ]


def test_an_interrupted_installation_is_taken_up_again(checkout, fake_python):
    python, log = fake_python
    (checkout / "break").touch()
    assert make(checkout, "test", python).returncode != 0
    (checkout / "break").unlink()
    log.unlink()
    assert make(checkout, "test", python).returncode == 0
    assert [line for line in log.read_text().splitlines() if "pip install" in line or "pytest" in line] == [
        "-m pip install --disable-pip-version-check -c constraints.txt -e .[test]",
        "-m pytest -n 2 --dist loadfile",
    ]


def test_the_oldest_versions_have_an_environment_of_their_own(checkout, fake_python):
    python, log = fake_python
    install = "-m pip install --disable-pip-version-check -c constraints-oldest.txt -e .[test]"
    (checkout / "break").touch()
    assert make(checkout, "test-oldest", python).returncode != 0
    calls = log.read_text().splitlines()
    assert "-m venv .venv-oldest" in calls and calls[-1] == install
    (checkout / "break").unlink()
    assert make(checkout, "test-oldest", python).returncode == 0
    assert log.read_text().splitlines()[-2:] == [install, "-m pytest -n 2 --dist loadfile -m not slow and not ddp"]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("target", "body", "words"),
    [
        ("demo", None, "not found: install Python 3.10 or newer"),
        ("demo", 'case "$2" in *version_info*) exit 1;; esac', "is not Python 3.10 or newer: install one"),
        ("demo", 'case "$2" in *ensurepip*) exit 1;; esac', "sudo apt install python3-venv"),
        ("test-oldest", 'case "$2" in *"== (3, 11)"*) exit 1;; esac', "is not Python 3.11: install one"),
    ],
    ids=["missing", "old", "without venv", "not 3.11"],
)
def test_an_unfit_python_is_named_in_one_line(checkout, target, body, words):
    python = checkout / "nowhere" if body is None else script(checkout / "python", body, "exit 0")
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


def test_help_is_the_default():
    assert make(ROOT).stdout == make(ROOT, "help").stdout
    assert "make demo" in make(ROOT).stdout


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
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(f"test:\n\t@{recipe}\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "Makefile", ".ci"], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "Makefile").write_text("test:\n\t@echo '99 passed in 1.0s'\n")  # not committed: must not count
    answer = run([tmp_path / ".ci/run"], "/")
    assert bool(answer.returncode) == bool(code)
    assert words in answer.stdout + answer.stderr
    assert "99 passed" not in answer.stdout
