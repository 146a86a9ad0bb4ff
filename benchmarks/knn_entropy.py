"""``knn_entropy``, forward and backward, against autograd through ``cdist`` and ``topk`` and against scikit-learn.

    python benchmarks/knn_entropy.py [--rounds 5] [--threads 1] [--accelerator cpu] [--json PATH]

All variants take turns in one process: CPU time, or wall time on a GPU. scikit-learn finds the neighbours by brute
force, forward alone, always on the CPU. Extra memory is the highest growth of a fresh process's resident set while the
entropy of 8192 codes is differentiated (CPU), or the allocator's peak (GPU).
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from capsnet_step import cpu_model

from lightning_plugins.eae.entropy import knn_entropy

SIZES = (512, 2048, 8192)
DIMENSIONS = (16, 64)
SMALLEST_TURN = 0.05  # seconds: a turn repeats what is shorter
# (what, N, bound, whether it is the largest allowed): over both dimensions
TARGETS = [
    ("cdist + topk / knn_entropy", 2048, 4.0, False),
    ("cdist + topk / knn_entropy", 8192, 3.0, False),
    ("knn_entropy / scikit-learn forward", 8192, 1.2, True),
]


def train_ours(k: int, z: Tensor) -> None:
    """Forward and backward."""
    knn_entropy(z, k).backward()


def train_autograd(z: Tensor) -> None:
    """The same term by what one would write first."""
    distances = torch.cdist(z, z).topk(2, largest=False).values[:, 1]
    (z.shape[1] * (distances + 1e-6).log().mean()).backward()


def search_sklearn(z: Tensor) -> None:
    """Neighbours alone."""
    codes = z.detach().cpu().numpy()
    NearestNeighbors(n_neighbors=1, algorithm="brute").fit(codes).kneighbors()


VARIANTS: dict[str, Callable[[Tensor], None]] = {
    "knn_entropy": functools.partial(train_ours, 1),
    "knn_entropy, k = 3": functools.partial(train_ours, 3),
    "cdist + topk": train_autograd,
    "scikit-learn forward": search_sklearn,
}


def seconds(run: Callable[[Tensor], None], z: Tensor, device: str) -> float:
    """Of one call, averaged over a turn."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    count, total = 0, 0.0
    while total < SMALLEST_TURN:
        z.grad = None
        start = clock()
        run(z)
        if device == "cuda":
            torch.cuda.synchronize()
        count, total = count + 1, total + clock() - start
    return total / count


def measure(num_codes: int, dim: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant, one number per round."""
    z = torch.randn(num_codes, dim, device=device).requires_grad_()
    for run in VARIANTS.values():
        run(z)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, run in VARIANTS.items():
            times[name].append(seconds(run, z, device))
    return times


def peak_mib(variant: str, num_codes: int, dim: int, device: str) -> float:
    """Highest memory during one forward and backward beyond what stood before it; call it in a fresh process."""
    VARIANTS[variant](torch.randn(64, dim, device=device).requires_grad_())  # libraries load their code
    z = torch.randn(num_codes, dim, device=device).requires_grad_()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        VARIANTS[variant](z)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status("VmRSS")
    VARIANTS[variant](z)
    return (_status("VmHWM") - before) / 1024


def peak_in_child(variant: str, num_codes: int, dim: int, device: str, threads: int) -> float:
    """:func:`peak_mib` of a process of its own."""
    command = [sys.executable, __file__, "--peak", variant, str(num_codes), str(dim), "--accelerator", device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def _status(key: str) -> int:
    """KiB of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def ratio(times: dict[str, list[float]], words: str) -> float:
    """``"a / b"``: median over rounds of one variant's time by the other's."""
    a, b = (times[name] for name in words.split(" / "))
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def report(results: dict[tuple[int, int], dict[str, list[float]]], peaks: dict[str, float]) -> list[dict]:
    """Print the tables; return the targets with what was measured."""
    print("| N, d | " + " | ".join(f"{name} ms" for name in VARIANTS) + " |")
    print("|---" * (len(VARIANTS) + 1) + "|")
    for (num_codes, dim), times in results.items():
        cells = [f"{1000 * statistics.median(own):.2f}" for own in times.values()]
        print(f"| {num_codes}, {dim} | " + " | ".join(cells) + " |")
    rows = []
    for words, size, bound, is_largest in TARGETS:
        for dim in DIMENSIONS:
            value = ratio(results[size, dim], words)
            rows.append({"what": f"{words}, N = {size}, d = {dim}", "value": value, "bound": bound, "max": is_largest})
    for name, value in peaks.items():
        is_ours = name.startswith("knn_entropy")
        row = {"what": f"extra memory MiB, {name}", "value": value, "bound": 64.0 if is_ours else None, "max": True}
        rows.append(row)
    print("\n| figure | measured | target | held |\n|---|---|---|---|")
    for row in rows:
        bound, value = row["bound"], row["value"]
        row["held"] = None if bound is None else (value <= bound if row["max"] else value >= bound)
        target = "" if bound is None else f"{'<=' if row['max'] else '>='} {bound}"
        print(f"| {row['what']} | {value:.3g} | {target} | {'' if bound is None else 'yes' if row['held'] else 'no'} |")
    return rows


def main() -> None:
    """Measure, print the tables, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.accelerator
    if args.peak:
        variant, num_codes, dim = args.peak
        print(peak_mib(variant, int(num_codes), int(dim), device))
        return
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {args.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}; {args.rounds} rounds\n")
    cells = [(num_codes, dim) for num_codes in SIZES for dim in DIMENSIONS]
    results = {cell: measure(*cell, args.rounds, device) for cell in cells}
    cases = [(name, dim) for name in ("knn_entropy", "cdist + topk") for dim in DIMENSIONS]
    peaks = {
        f"{name}, N = 8192, d = {dim}": peak_in_child(name, 8192, dim, device, args.threads) for name, dim in cases
    }
    rows = report(results, peaks)
    if args.json:
        times = {f"{num_codes}, {dim}": own for (num_codes, dim), own in results.items()}
        args.json.write_text(json.dumps({"device": where, "seconds": times, "figures": rows}, indent=1))


if __name__ == "__main__":
    main()
