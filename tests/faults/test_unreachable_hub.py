"""The Hub does not answer: one sentence, status 2, and no longer than a few tries take."""

import os
import subprocess
import sys

import fault_runs
import pytest

pytestmark = pytest.mark.slow

COMMANDS = {
    "model_name_or_path": ["--model=UniLMSeq2Seq", "--model.model_name_or_path=no/such", *fault_runs.PAIRS],
    "teacher": ["--model=SiD", "--model.teacher=no/such"],
    "path": ["--model=EAE", "--data=HFImages", "--data.path=no/such"],
}


@pytest.mark.parametrize("argument", COMMANDS)
def test_the_hub_is_unreachable(tmp_path, argument):
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "a b\tA B\n" * 10)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}  # a port that refuses
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    answer = subprocess.run(
        [sys.executable, "-m", "lightning_plugins", "fit", *COMMANDS[argument]],
        cwd=tmp_path,
        env={**os.environ, **nowhere, **online},
        capture_output=True,
        text=True,
        timeout=2 * fault_runs.LIMIT,
    )
    assert answer.returncode == 2, answer.stderr
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert "no/such" in line and "(its first use needs the network)" in line
    assert "Traceback" not in answer.stderr
