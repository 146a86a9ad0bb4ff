"""The lines of docs/several_gpus.md, as they stand but for a short run: two processes on the CPU."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks, commands

pytestmark = [pytest.mark.ddp, pytest.mark.random_order(disabled=True)]  # the student needs its teacher
PAGE = (Path(__file__).parents[2] / "docs/several_gpus.md").read_text(encoding="utf-8")
SHORT = [
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
    *("--trainer.limit_test_batches=1", "--trainer.log_every_n_steps=1"),
]
LINES = [
    command for language, _, content in blocks(PAGE) if language in ("bash", "sh") for command in commands(content)
]
QUICK = [line for line in LINES if "--nnodes" in line]
LIMIT_S = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the page's configs, and scripts that start this interpreter."""
    root = tmp_path_factory.mktemp("launch")
    for language, _, content in blocks(PAGE):
        if language == "yaml":
            (root / re.match(r"# (\S+)\n", content)[1]).write_text(content, encoding="utf-8")
    for name, module in (("lightning-plugins", "lightning_plugins"), ("torchrun", "torch.distributed.run")):
        script = root / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return root


def start(command, folder, **environment):
    """The process, and the file it writes to."""
    number = len(list(folder.glob("*.log")))
    log = folder / f"{number}.log"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTEST_"))}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        process = subprocess.Popen(
            shlex.split(command), cwd=folder, stdout=file, stderr=file, env=inherited | variables | environment
        )
    return process, log


def ends_well(*started):
    """All processes end with status 0, and two have met."""
    try:
        for process, log in started:
            assert process.wait(LIMIT_S) == 0, log.read_text()[-5000:]
    finally:
        for process, _ in started:
            process.kill()
    told = "".join(log.read_text() for _, log in started)
    assert "MEMBER: 1/2" in told and "MEMBER: 2/2" in told, told[-5000:]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def short(command):
    return f"{command} {shlex.join(SHORT)}"


@pytest.mark.parametrize(
    "line", [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow], id=x[:100]) for x in LINES]
)
def test_line_runs(line, folder):
    if line.startswith("srun "):
        slurm = {
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "digits",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NODEID": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        command = short(line.removeprefix("srun "))
        tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
        ends_well(*[start(command, folder, **slurm, **task) for task in tasks])
    elif "HOST" in line:  # an agent a machine
        command = short(re.sub(r"HOST:\d+", f"127.0.0.1:{free_port()}", line))
        ends_well(*[start(command, folder) for _ in range(2)])
    else:
        ends_well(start(short(line), folder))


def test_each_part_and_kind_has_its_line():
    assert {line.split()[0] for line in LINES} == {"lightning-plugins", "torchrun", "srun"}
    for config in ("capsnet/digits", "eae/digits", "unilm/docstrings", "sid/digits_teacher", "sid/digits"):
        for end in (" --config fsdp2.yaml", " --trainer.devices 2 --trainer.strategy ddp"):
            assert [line for line in LINES if f"--config {config}{end}" in line], config + end
