"""Runs of one module that meet a fault at a random batch and are resumed: ``kills.py FOLDER MODULE SEED PLACE...``.

Prints a line of JSON for each. Runs are forked from this process, which imports everything once.
"""

import json
import os
import random
import sys
from pathlib import Path

import fault_runs
import torch

QUIET = ["--trainer.log_every_n_steps=100"]
OPTIONS = {"worker": ["--data.num_workers=1"], "checkpoint": QUIET, "pictures": QUIET}


def meet_and_go_on(module: str, root: str, at: int, place: str) -> dict:
    """A run in a root of its own meets a fault, another goes on from what it left."""
    options = OPTIONS.get(place, [])
    status, said = fault_runs.forked(fault_runs.fit(module, root, *options, *fault_runs.fault(at, place)))
    found = {path.name: torch.load(path, weights_only=True) for path in fault_runs.checkpoints(root)}
    resume = []
    if found:  # a run killed before its first last.ckpt has its name may have another
        newest = fault_runs.checkpoints(root)[-1]
        resume = ["--ckpt_path=last"] if "last.ckpt" in found else [f"--ckpt_path={newest}"]
    ended, told = fault_runs.forked(fault_runs.fit(module, root, *options, *resume))
    assert ended == 0, told
    folders = sorted(Path(root).glob("lightning_logs/version_*/checkpoints"))
    end = fault_runs.last(folders[-1])
    return {
        "place": place,
        "at": at,
        "status": status,
        "said": said[-2000:],
        "kept": max((content["global_step"] for content in found.values()), default=0),
        "equal": fault_runs.same_end(end, fault_runs.last("whole/lightning_logs/version_0/checkpoints")),
        "left": [path.name for path in folders[-1].glob(".*")],
    }


def main(folder: str, module: str, seed: str, *places: str) -> None:
    """The uninterrupted run, then one for each place."""
    torch.set_num_threads(1)
    os.chdir(folder)
    fault_runs.write_inputs()
    status, said = fault_runs.forked(fault_runs.fit(module, "whole"))
    assert status == 0, said
    whole = fault_runs.last("whole/lightning_logs/version_0/checkpoints")
    print(json.dumps({"steps": whole["global_step"]}), flush=True)
    draw = random.Random(int(seed))
    for number, place in enumerate(places):
        at = draw.randint(1, fault_runs.BATCHES - 1) | (place == "csv")  # odd: before a checkpoint
        print(json.dumps(meet_and_go_on(module, f"run{number}", at, place)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
