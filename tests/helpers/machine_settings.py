"""Run the suite as other machines would: older instructions, more threads, other orders, other numbers, busy cores.

``python tests/helpers/machine_settings.py [--only WORDS] [ARGUMENTS of pytest]`` prints setting, passed, failed and
seconds, then the tests that failed. ``--only THREADS`` runs the settings whose name holds it, ``-m numerics`` only the
tests that compare floating-point results. It ends with status 1 unless tests ran under each setting and passed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CAPABILITIES = ["default", "avx2", "avx512"]
BUSY = "a job on each core"
ONE_OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}  # as in .ci/run


def settings():
    """Name, environment and pytest's arguments of each setting that this processor can take."""
    known = CAPABILITIES.index(torch.backends.cpu.get_cpu_capability().lower())
    variables = [("ATEN_CPU_CAPABILITY", name) for name in CAPABILITIES[: known + 1]]
    variables += [("ONEDNN_MAX_CPU_ISA", name) for name in ("SSE41", "AVX2", "AVX512_CORE")]  # an upper limit
    variables += [("OMP_NUM_THREADS", str(number)) for number in (1, 2, 4)]
    variables += [("TEST_SEED", str(number)) for number in (1, 2)]
    yield "as it is", {}, []
    for name, value in variables:
        yield f"{name}={value}", {name: value}, []
    yield "an old processor, one thread", ONE_OLD, []
    for seed in (1, 2, 3):
        yield f"random order {seed}", {}, ["--random-order", f"--random-order-seed={seed}"]
    yield BUSY, {}, []


@contextmanager
def busy(number):
    """Processes that compute for ever, as many as asked."""
    jobs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def run(environment, arguments):
    """Numbers of passed and failed tests, seconds, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *arguments]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL)
        if not report.exists():  # pytest itself broke down
            return 0, 1, 0.0, [" ".join(command)]
        suite = ElementTree.parse(report).find("testsuite")
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped"))
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return int(suite.get("tests")) - skipped - len(bad), len(bad), float(suite.get("time")), names


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="run the settings whose name holds these words")
    options, arguments = parser.parse_known_args(argv)
    print("| setting | passed | failed | seconds |\n| --- | ---: | ---: | ---: |", flush=True)
    failures, good = {}, True
    for name, environment, extra in settings():
        if options.only not in name:
            continue
        with busy(os.cpu_count() if name == BUSY else 0):
            passed, failed, seconds, failures[name] = run(environment, [*extra, *arguments])
        good = good and passed > 0 and not failed
        print(f"| {name} | {passed} | {failed} | {seconds:.0f} |", flush=True)
    for name, names in failures.items():
        print(*(f"\n{name}: {test}" for test in names), sep="", end="\n" if names else "")
    return 0 if good and failures else 1


if __name__ == "__main__":
    sys.exit(main())
