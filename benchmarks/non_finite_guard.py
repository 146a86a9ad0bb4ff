"""What NonFiniteGuard costs: a step of ``Trainer.fit`` with it against one without.

    python benchmarks/non_finite_guard.py --rounds 15 --json non_finite_guard.json

An MLP on 128 images 28x28, the paper's CapsNet on 32 of them, and a transformer of UniLM's kind on 16 sequences of 64
tokens, each with AdamW. The variants take turns in one process, in pairs; times are CPU seconds on one thread (on a GPU
wall seconds), ratios medians of the ratios within a round. "plain again" is the error of the measurement.
"""

import argparse
import json
import logging
import platform
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from interleaved import Task, ratios, take_turns, transformer
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_plugins import CapsNet, NonFiniteGuard

TARGETS = {"raise": 1.01, "skip": 1.01}
VARIANTS = {
    "plain": list,
    "raise": lambda: [NonFiniteGuard()],
    "skip": lambda: [NonFiniteGuard("skip")],
    "plain again": list,
}


class WithAdamW(Task):
    """As most are trained."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


def mlp() -> tuple[LightningModule, tuple[Tensor, Tensor]]:
    """784-1024-1024-10: most weights for its time, which is the worst case for a look at all gradients."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return WithAdamW(network), (torch.randn(128, 1, 28, 28), torch.randint(10, (128,)))


def capsnet() -> tuple[LightningModule, dict[str, Tensor]]:
    """The paper's sizes."""
    module = CapsNet(image_shape=(1, 28, 28), num_classes=10)
    return module, {"image": torch.rand(32, 1, 28, 28), "label": torch.randint(10, (32,))}


def unilm() -> tuple[LightningModule, tuple[Tensor, Tensor]]:
    """Four blocks of width 128."""
    network, batch = transformer(fused=True)
    return WithAdamW(network), batch


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="counted steps in a turn")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--subjects", nargs="+", default=["MLP", "CapsNet", "transformer"])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of data loading with one batch
    makers: dict[str, Any] = {"MLP": mlp, "CapsNet": capsnet, "transformer": unilm}
    results: dict[str, dict[str, float]] = {}
    for subject in args.subjects:
        times = take_turns(*makers[subject](), VARIANTS, args.rounds, args.steps, args.accelerator, args.precision)
        results[subject] = ratios(times, "plain") | {"seconds": statistics.median(times["plain"])}
    print(f"torch {torch.__version__}, {platform.machine()}, {args.accelerator}, {args.precision}, one thread\n")
    print(f"| step / plain step | {' | '.join(results)} | target |\n|---|{'---|' * len(results)}---|")
    for name in VARIANTS:
        cells = [f"{result[name]:.4f}" for result in results.values()]
        print(f"| {name} | {' | '.join(cells)} | {'' if name not in TARGETS else f'<= {TARGETS[name]}'} |")
    seconds = [f"{result['seconds']:.4f}" for result in results.values()]
    print(f"| seconds of a plain step | {' | '.join(seconds)} | |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
