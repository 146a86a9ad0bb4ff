"""What GradientPenalty and Flooding cost: a step of ``Trainer.fit`` with them against one without.

    python benchmarks/gradient_penalty.py --rounds 9 --json gradient_penalty.json

A CNN with batch norm on 64 images 28x28 and a 4-layer transformer on 16 sequences of 64 tokens, with attention written
out and by PyTorch's fused kernel (which cannot be differentiated twice). All variants take turns in one process; times
are CPU seconds on one thread (on a GPU wall seconds), ratios medians of the ratios within a round.
"""

import argparse
import json
import logging
import platform
import statistics
import warnings
from pathlib import Path

import torch
from interleaved import Task, cnn, ratios, take_turns, transformer
from lightning.pytorch import Callback

from lightning_plugins import Flooding, GradientPenalty

TARGETS = {
    "flooding": 1.02,
    "finite difference, forward": 2.15,
    "finite difference, central": 3.1,
    "exact": 4.8,
    "coefficient 0": 1.01,
}


class Unchecked(GradientPenalty):
    """A turn is short: the checks of its first, second, fourth and eighth step would be most of it."""

    def _check(self, *args: object) -> None:
        """Nothing."""


def penalty(**arguments: object) -> list[Callback]:
    """A small penalty, with nothing checked: the jumps of its strength are still looked for."""
    return [Unchecked(**({"coefficient": 1e-3} | arguments))]


VARIANTS = {
    "plain": list,
    "plain again": list,
    "flooding": lambda: [Flooding(0.1)],
    "coefficient 0": lambda: penalty(coefficient=0.0),
    "finite difference, forward": lambda: penalty(difference="forward"),
    "finite difference, central": lambda: penalty(difference="central"),
    "exact": lambda: penalty(engine="exact"),
}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="counted steps in a turn")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of data loading with one batch
    subjects = {"CNN": cnn(), "transformer": transformer(False), "transformer, fused attention": transformer(True)}
    results: dict[str, dict[str, float]] = {}
    for subject, (network, batch) in subjects.items():
        variants = {name: make for name, make in VARIANTS.items() if name != "exact" or "fused" not in subject}
        torch.manual_seed(0)
        times = take_turns(Task(network), batch, variants, args.rounds, args.steps, args.accelerator, args.precision)
        results[subject] = ratios(times, "plain") | {"seconds": statistics.median(times["plain"])}
    print(f"torch {torch.__version__}, {platform.machine()}, {args.accelerator}, {args.precision}, one thread\n")
    print(f"| step / plain step | {' | '.join(subjects)} | target |\n|---|{'---|' * len(subjects)}---|")
    for name in VARIANTS:
        cells = [f"{results[s][name]:.3f}" if name in results[s] else "impossible" for s in subjects]
        print(f"| {name} | {' | '.join(cells)} | {'' if name not in TARGETS else f'<= {TARGETS[name]}'} |")
    seconds = [f"{results[s]['seconds']:.4f}" for s in subjects]
    print(f"| seconds of a plain step | {' | '.join(seconds)} | |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
