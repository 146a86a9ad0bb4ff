"""The matrix of docs/support.md: every model in every mode of several processes is one process, or is refused."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ranks import SCRIPTS, torchrun
from support.cells import CELLS, MODES, begin, cell, distance
from support.table import PAGE, heads

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All cells, run once."""
    folder = tmp_path_factory.mktemp("support")
    for part, name in CELLS:
        if MODES[name].begun_by == 1:
            begin(part, name, folder)
    for processes in (2, 4):
        with torchrun("run_cells", folder, cwd=folder, processes=processes):
            pass
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RandomState: the checkpoint holds the random states of 2 process")
        for part, name in CELLS:
            if MODES[name].processes == 1:
                cell(part, name, folder)
    paths = [str(Path(__file__).parents[1] / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, SCRIPTS / "run_cells.py", folder, "launched"]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("part", "name"), CELLS, ids=[f"{part}: {name}" for part, name in CELLS])
def test_cell(part, name, root):
    found = distance(part, name, root)
    if results := os.environ.get("SUPPORT_RESULTS"):
        with Path(results).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, "mode": name, "found": found}) + "\n")
    words = MODES[name].refused.get(part)
    if isinstance(found, str):
        assert words is not None and words in found, found
    else:
        assert words is None and found <= MODES[name].tolerance


def test_the_page_has_every_part_and_mode():
    text = PAGE.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| |")] == [heads()]
    assert [name for name in MODES if f"| {name} |" not in text] == []
