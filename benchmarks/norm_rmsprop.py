"""``NormRMSprop`` against SGD, RMSprop and Adam on the capsule network of ``configs/capsnet/digits.yaml``.

    python benchmarks/norm_rmsprop.py [--epochs 5] [--seeds 2] [--json PATH]

Each optimiser trains for the same epochs at a constant rate, through the command line with the shipped config: same
data, batches and start. Its rate is the best of three on the validation images with seed 0 (accuracy, then loss); the
test images, looked at with that rate alone, are averaged over the seeds.
"""

import argparse
import contextlib
import csv
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from capsnet_step import cpu_model

from lightning_plugins.cli import main as cli

# name: words of the command line, three rates a factor of about three apart around the best of a shorter search
OPTIMIZERS = {
    "SGD, momentum 0.9": ("SGD --model.optimizer.momentum 0.9", (0.03, 0.1, 0.3)),
    "RMSprop": ("RMSprop", (1e-4, 3e-4, 1e-3)),
    "Adam": ("Adam", (5e-4, 1.5e-3, 4e-3)),
    "NormRMSprop": ("NormRMSprop", (0.03, 0.1, 0.3)),
    "NormRMSprop, momentum 0.9": ("NormRMSprop --model.optimizer.momentum 0.9", (0.01, 0.03, 0.1)),
}


def train(optimizer: str, lr: float, seed: int, epochs: int) -> dict[str, float]:
    """One run in a folder of its own: the last figures of validation and test, and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        cli(
            f"fit --config capsnet/digits --seed_everything {seed} --data.seed {seed} "
            f"--model.optimizer {optimizer} --model.optimizer.lr {lr} --trainer.max_epochs {epochs} "
            f"--model.pictures_every_n_epochs 0 --trainer.default_root_dir {folder} "
            f"--trainer.enable_progress_bar false --trainer.enable_model_summary false "
            f"--trainer.logger.class_path CSVLogger --trainer.logger.save_dir {folder}".split()
        )
        seconds = time.process_time() - start
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            rows = list(csv.DictReader(file))
    last = {key: float(row[key]) for row in rows for key in row if row[key]}
    return {key: last[key] for key in ("val/accuracy", "val/loss", "test/accuracy")} | {"cpu_seconds": seconds}


def compare(words: str, rates: tuple[float, ...], seeds: int, epochs: int) -> dict:
    """Choose the rate with seed 0, then train with the other seeds."""
    search = {rate: train(words, rate, 0, epochs) for rate in rates}
    best = max(rates, key=lambda rate: (search[rate]["val/accuracy"], -search[rate]["val/loss"]))
    runs = [search[best], *(train(words, best, seed, epochs) for seed in range(1, seeds))]
    return {"search": {str(rate): run for rate, run in search.items()}, "lr": best, "runs": runs}


def main() -> None:
    """Train, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {name: compare(*setting, args.seeds, args.epochs) for name, setting in OPTIMIZERS.items()}
    threads = torch.get_num_threads()
    print(f"{cpu_model()}, {threads} threads, torch {torch.__version__}; {args.epochs} epochs\n")
    print("| optimiser | rate | validation at the three rates | test accuracy, mean | per seed | CPU s per run |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        accuracies = [run["test/accuracy"] for run in result["runs"]]
        tried = ", ".join(f"{rate}: {run['val/accuracy']:.3f}" for rate, run in result["search"].items())
        seconds = sum(run["cpu_seconds"] for run in result["runs"]) / len(result["runs"])
        each = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        mean = sum(accuracies) / len(accuracies)
        print(f"| {name} | {result['lr']} | {tried} | {mean:.4f} | {each} | {seconds:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
