"""CapsNet of ``configs/capsnet/digits.yaml`` against an equal-parameter CNN trained the same way, three seeds each.

    python benchmarks/capsnet_digits.py [--seeds 3] [--json PATH]

Both train through the command line with the shipped config: same data, batches, optimiser, schedule and epochs. The CNN
has the same two convolutions with ReLU in place of squashing, then two dense layers (with as many parameters as the
capsules and the decoder together) under cross-entropy, which is what one would use without capsules.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # for the command line, and for the sibling below
from capsnet_step import cpu_model

from lightning_plugins import CapsNet
from lightning_plugins.cli import main as cli


class PlainCNN(CapsNet):
    """The same convolutions, then dense layers; a class's score is its probability."""

    def build_features(self) -> nn.Module:
        """Convolutions as the config's, one flat feature vector ``(B, 1, D)``."""
        p = self.preset
        return nn.Sequential(
            nn.Conv2d(self.image_shape[0], p.channels, p.kernel_size),
            nn.ReLU(),
            nn.Conv2d(p.channels, p.num_types * p.primary_dim, p.kernel_size, stride=2),
            nn.ReLU(),
            nn.Flatten(1),
            nn.Unflatten(1, (1, -1)),
        )

    def build_capsules(self, num_inputs: int, in_dim: int) -> nn.Module:
        """Dense layers with about the parameters of the config's capsules and decoder."""
        p = self.preset
        reference = CapsNet(
            image_shape=self.image_shape, channels=p.channels, kernel_size=p.kernel_size, num_types=p.num_types
        )
        budget = sum(p.numel() for part in (reference.capsules, reference.decoder) for p in part.parameters())
        hidden = (budget - self.num_classes) // (in_dim + 1 + self.num_classes)
        return DenseHead(in_dim, hidden, self.num_classes)

    def loss(self, batch: dict[str, Tensor], poses: Tensor | None = None) -> dict[str, Tensor]:
        """Cross-entropy."""
        poses = self(batch["image"]) if poses is None else poses
        return {"cross_entropy": nn.functional.nll_loss(poses.squeeze(-1).log(), batch["label"])}


class DenseHead(nn.Module):
    """Two dense layers to class probabilities ``(B, J, 1)``."""

    def __init__(self, in_dim: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, u: Tensor) -> Tensor:
        """Features ``(B, 1, D)`` to probabilities."""
        return self.layers(u.flatten(1)).softmax(-1).clamp_min(1e-30).unsqueeze(-1)


def train(model: str, seed: int) -> dict[str, float]:
    """One run of the shipped config in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        cli(
            f"fit --config capsnet/digits --seed_everything {seed} --data.seed {seed} {model} "
            f"--trainer.default_root_dir {folder} --trainer.enable_progress_bar false "
            f"--model.pictures_every_n_epochs 0 "
            f"--trainer.logger.class_path CSVLogger --trainer.logger.save_dir {folder}".split()
        )
        seconds = time.perf_counter() - start
        rows = next(Path(folder).rglob("metrics.csv")).read_text().splitlines()
        column = rows[0].split(",").index("test/accuracy")
        accuracy = float(rows[-1].split(",")[column])
        weights = torch.load(next(Path(folder).rglob("last.ckpt")), weights_only=True)["state_dict"]
    return {"accuracy": accuracy, "seconds": seconds, "parameters": sum(w.numel() for w in weights.values())}


def main() -> None:
    """Train, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = {
        "CapsNet": "",
        "CapsNet, kmeans": "--model.routing kmeans",
        "CNN": "--model.class_path capsnet_digits.PlainCNN --model.reconstruction_weight 0",
    }
    results = {name: [train(words, seed) for seed in range(args.seeds)] for name, words in models.items()}
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| model | parameters | test accuracy, mean | per seed | seconds per run |\n|---|---|---|---|---|")
    for name, runs in results.items():
        mean = sum(run["accuracy"] for run in runs) / len(runs)
        each = " ".join(f"{run['accuracy']:.4f}" for run in runs)
        seconds = max(run["seconds"] for run in runs)
        print(f"| {name} | {runs[0]['parameters']:,} | {mean:.4f} | {each} | {seconds:.0f} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
