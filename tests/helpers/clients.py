"""Exported folders in other versions of the libraries that load them: ``make test-clients`` (needs a package index)."""

import os
import subprocess
import sys

import pytest

asked_for = pytest.mark.skipif("CLIENTS" not in os.environ, reason="installs other versions: make test-clients")


def run_client(folder, packages, script, *arguments):
    """Run a script beside packages put into ``folder``, which come before the present ones; torch stays."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder), *packages]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=500)
    assert installed.returncode == 0, installed.stderr[-3000:]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout
