"""What ODEDiagnostics costs: steps of ``Trainer.fit`` with it against steps without.

    python benchmarks/ode_diagnostics.py --rounds 7 --json ode_diagnostics.json

A CNN with batch norm, a 4-layer transformer with fused attention, and the CapsNet of capsnet/digits, all trained by SGD
with momentum. Variants take turns in one process on one thread; times are CPU seconds, ratios medians of those within a
round. "First-order rows" are logged in every step, for an optimizer the callback does not know, so that it does
nothing else; "probe" is the mean over 50 steps of which one is probed (with the check of a first probe); a search for
the sharpness is counted in plain steps beyond its own, with the Hessian products (two passes each) that it took.
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
from interleaved import Task, cnn, ratios, take_turns, transformer
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_plugins import CapsNet, Digits, ODEDiagnostics

EVERY = 50
TARGETS = {"first-order rows, every step": 1.05, f"probe every {EVERY} steps": 1.06}


class OtherSGD(torch.optim.SGD):
    """SGD, unknown to the callback by a step of its own."""

    def step(self, closure: Any = None) -> Any:
        """The parent's."""
        return super().step(closure)


class Unknown(Task):
    """The task with the unknown optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return OtherSGD(self.parameters(), lr=1e-4, momentum=0.9)


def capsules(optimizer: type[torch.optim.Optimizer]) -> tuple[LightningModule, Any]:
    """A small CapsNet and a batch of digits."""
    data = Digits(image_size=28, batch_size=32, shift=1)
    data.setup("fit")
    model = CapsNet(channels=64, num_types=8, image_shape=data.image_shape, pictures_every_n_epochs=0)
    model.configure_optimizers = lambda: optimizer(model.parameters(), lr=1e-4, momentum=0.9)
    return model, next(iter(data.train_dataloader()))


def measure(subject: str, rounds: int) -> dict[str, float]:
    """All ratios of one subject."""
    torch.manual_seed(0)
    if subject == "CapsNet":
        (known, batch), (unknown, _) = capsules(torch.optim.SGD), capsules(OtherSGD)
    else:
        network, batch = cnn() if subject == "CNN" else transformer(True)
        known, unknown = Task(network), Unknown(network)
    diagnostics: list[ODEDiagnostics] = []

    def callback(**arguments: Any) -> list[ODEDiagnostics]:
        diagnostics.append(ODEDiagnostics(picture=False, **arguments))
        return diagnostics[-1:]

    def turns(module: LightningModule, arguments: dict[str, int], steps: int, statistic: Any) -> dict[str, list[float]]:
        options = {"logger": DummyLogger(), "log_every_n_steps": 1 if module is unknown else EVERY}
        variants = {"plain": list, "with": lambda: callback(**arguments)}
        return take_turns(module, batch, variants, rounds, steps, statistic=statistic, **options)

    first = turns(unknown, {"every_n_steps": 1}, 8, statistics.median)
    probe = turns(known, {"every_n_steps": EVERY}, EVERY, statistics.mean)
    search = turns(known, {"every_n_steps": 8, "sharpness_every_n_steps": 8}, 8, max)
    names = list(TARGETS)
    return {
        names[0]: ratios(first, "plain")["with"],
        names[1]: ratios(probe, "plain")["with"],
        "search for sharpness, plain steps": ratios(search, "plain")["with"] - 1,
        "search for sharpness, products": statistics.median(c.sharpness_products for c in diagnostics[-rounds:]),
        "seconds of a plain step": statistics.median(first["plain"]),
    }


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of data loading with one batch, and of the unknown optimizer, which is meant
    results = {subject: measure(subject, args.rounds) for subject in ("CNN", "transformer", "CapsNet")}
    print(f"torch {torch.__version__}, {platform.machine()}, one thread\n")
    print(f"| step / plain step | {' | '.join(results)} | target |\n|---|{'---|' * len(results)}---|")
    for name in next(iter(results.values())):
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        print(f"| {name} | {' | '.join(f'{numbers[name]:.4g}' for numbers in results.values())} | {target} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
