"""Commands that cannot write, each in a process of its own: ``no_room.py FOLDER``. Prints what came of each as JSON."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fault_runs
import torch

LAST = "--ckpt_path=made/lightning_logs/version_0/checkpoints/last.ckpt"


def full(*words: str) -> dict:
    """A command on a full disk."""
    before = {str(path) for path in Path().rglob("*")}
    status, said = fault_runs.forked(list(words), before=fault_runs.fill_disk)
    return {"status": status, "said": said, "new": sorted({str(path) for path in Path().rglob("*")} - before)}


def small_disk() -> dict:
    """A run whose checkpoints are all kept on a disk that is too small, and one that goes on from a larger one."""
    disk = Path("disk")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        return {"skipped": "no file system may be mounted here"}
    try:
        words = fault_runs.fit("CapsNet", "disk/run", "--trainer.callbacks.save_top_k=-1")
        (disk / "ballast").write_bytes(bytes(2**20 - 2**19))
        status, said = fault_runs.forked(words)
        shutil.copytree(disk / "run", "moved")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused = fault_runs.forked(words)
    finally:
        subprocess.run(["umount", disk], check=True)
    kept = [torch.load(path, weights_only=True)["global_step"] for path in fault_runs.checkpoints("moved")]
    ended, told = fault_runs.forked(fault_runs.fit("CapsNet", "moved", "--ckpt_path=last"))
    assert ended == 0, told
    end, whole = (fault_runs.last(f"{root}/lightning_logs/version_{n}/checkpoints") for root, n in RUNS)
    same = fault_runs.same_end(end, whole)
    return {"status": status, "said": said, "kept": max(kept), "equal": same, "read-only": refused}


RUNS = (("moved", 1), ("whole", 0))


def main(folder: str) -> None:
    """Make the models, then let the commands fail."""
    torch.set_num_threads(1)
    os.chdir(folder)
    for module, root in (("CapsNet", "whole"), ("DiffusionTeacher", "made")):
        status, said = fault_runs.forked(fault_runs.fit(module, root))
        assert status == 0, said
    found = {
        "export": full("export", LAST, "--output=exported"),
        "sample": full("sample", LAST, "--output=samples.png", "--num_samples=2"),
        "small disk": small_disk(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
