"""One of two processes is killed or told to stop: the other does not wait for ever, and both go on exactly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fault_runs
import pytest

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=5"]


def run(root, *words):
    """The command line with two processes; its status and what it said, once both are gone and have closed the pipe."""
    paths = [str(Path(fault_runs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    answer = subprocess.run(
        [sys.executable, "-m", "lightning_plugins", *fault_runs.fit("CapsNet", root, *TWO, *words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * fault_runs.LIMIT,
    )
    return answer.returncode, answer.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status, said = run("whole")
    assert status == 0, said
    return folder


@pytest.mark.parametrize(("rank", "status"), [(0, -signal.SIGKILL), (1, 1)])
def test_a_lost_process(project, monkeypatch, rank, status):
    monkeypatch.chdir(project)
    root = f"rank{rank}"
    ended, said = run(root, *fault_runs.fault(7, "step"), f"--trainer.callbacks.rank={rank}")
    assert ended == status
    assert "error: another process of the run is gone: Connection " in said and "Traceback" not in said, said
    logs = Path(root) / "lightning_logs"
    assert fault_runs.last(logs / "version_0/checkpoints")["global_step"] == 6
    ended, said = run(root, "--ckpt_path=last")
    assert ended == 0, said
    assert_whole(logs / "version_1/checkpoints")


def assert_whole(folder):
    whole = fault_runs.last("whole/lightning_logs/version_0/checkpoints")
    assert fault_runs.same_end(fault_runs.last(folder), whole)


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 0), ("ddp", 1), ("ddp_fork", 1)])
def test_one_process_is_told_to_stop(project, monkeypatch, strategy, rank):
    """Both save the step of the signal and stop with its status, whichever of them was told."""
    monkeypatch.chdir(project)
    root = f"told-{strategy}-{rank}"
    words = [*fault_runs.fault(7, "SIGTERM"), f"--trainer.callbacks.rank={rank}", f"--trainer.strategy={strategy}"]
    ended, said = run(root, *words)
    assert ended == 143, said
    assert "Interrupted. Go on with the same command and --ckpt_path " in said and "Traceback" not in said, said
    logs = Path(root) / "lightning_logs"
    assert fault_runs.last(logs / "version_0/checkpoints")["global_step"] == 7
    ended, said = run(root, "--ckpt_path=last")
    assert ended == 0, said
    assert_whole(logs / "version_1/checkpoints")


def test_another_signal_that_the_command_line_names(project, monkeypatch):
    monkeypatch.chdir(project)
    words = ["--trainer.callbacks+=SaveOnSigterm", "--trainer.callbacks.signals=[SIGTERM,SIGUSR1]"]
    ended, said = run("usr1", *words, *fault_runs.fault(5, "SIGUSR1"), "--trainer.callbacks.rank=1")
    assert ended == 128 + signal.SIGUSR1, said
    assert fault_runs.last("usr1/lightning_logs/version_0/checkpoints")["global_step"] == 5
