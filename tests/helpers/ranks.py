"""Scripts of tests/distributed/scripts, in this process and in several under torchrun."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

SCRIPTS = Path(__file__).parents[1] / "distributed" / "scripts"


def load_script(name):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def torchrun(name, *arguments, cwd, processes=2):
    """Run a script while this process, on one thread, does what stands in the block; gives the path of its log."""
    log = cwd / f"{name}.log"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # scripts import rank_script
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launch, SCRIPTS / f"{name}.py", *arguments],
            cwd=cwd,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield log
        assert process.wait(timeout=900) == 0, log.read_text()[-5000:]
    finally:
        process.terminate()
        torch.set_num_threads(threads)
