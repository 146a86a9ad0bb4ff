"""Draw digits from N(0, I) by an entropic autoencoder, beside a VAE and an autoencoder with batch norm.

Same networks, images, steps and schedule for all. Each model's 2,000 samples are compared with the 1,797 real digits:
Fréchet distance of the package's features, and coverage. From N(0, I) the entropic autoencoder draws the best digits. A
mixture of ten Gaussians fitted to the codes afterwards is better for every model without classes, and best for the one
without an entropy term: N(0, I) is for those who want normal codes and no second model to fit. The conditional model,
with the entropy within its classes, needs none. Writes eae_vs_vae.png.

    lightning-plugins copy eae_vs_vae . && python eae_vs_vae.py
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lightning_plugins import EAE, Digits, FrechetDistance, PrecisionRecallDensityCoverage, entropy_gap

MODELS = {
    "AE + batch norm": {"objective": "ae_bn"},
    "VAE": {"objective": "vae", "weight": 0.1},
    "EAE": {"objective": "eae", "weight": 0.3},
    "conditional EAE": {"objective": "eae", "weight": 0.3, "conditional": True},
}
PRIORS = {"normal": "N(0, I)", "mixture": "mixture"}
LR = 2e-3


def train(name: str, epochs: int, seed: int) -> tuple[EAE, float]:
    """A trained model with its priors fitted, and seconds."""
    torch.set_num_threads(1)  # the networks are too small to share
    seed_everything(seed, verbose=False)
    data = Digits(image_size=8, batch_size=256, seed=seed)
    model = EAE(
        image_shape=(1, 8, 8),
        latent_dim=8,
        network="mlp",
        lr=LR,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs),
        **MODELS[name],
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    start = time.perf_counter()
    Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, **quiet).fit(model, datamodule=data)
    model.eval().fit_prior([images_of(data, "train")])
    return model, time.perf_counter() - start


def images_of(data: Digits, split: str) -> Tensor:
    """All images ``(N, 1, 8, 8)`` in [0, 1] of a split."""
    return data.require(split).pixels / 255


class Judge:
    """What samples are compared by; the real images are shown to it once."""

    def __init__(self, real: Tensor) -> None:
        self.metrics = [FrechetDistance("digits"), PrecisionRecallDensityCoverage("digits")]
        self.update(real, real=True)

    def update(self, images: Tensor, real: bool) -> None:
        """Show images to every metric."""
        for metric in self.metrics:
            metric.update(images, real=real)

    def figures(self, images: Tensor) -> list[float]:
        """Fréchet distance and coverage."""
        self.update(images, real=False)
        distance, neighbours = (metric.compute() for metric in self.metrics)
        for metric in self.metrics:
            metric.reset()
        return [distance.item(), neighbours["coverage"].item()]


def draw(rows: dict[str, Tensor], path: str) -> None:
    """Samples ``(60, 1, 8, 8)`` of each model, in blocks of 6 rows of 10, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.1), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(2, -(-len(rows) // 2)).flat, rows.items(), strict=False):
        framed = nn.functional.pad(images[:, 0], (1, 1, 1, 1), value=0.4)  # a line around each
        page = framed.view(6, 10, 10, 10).transpose(1, 2).reshape(60, 100).numpy()
        axes.imshow(page, cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train, print the table, draw the picture; returns ``{"EAE, N(0, I)": [FD, coverage], ...}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="eae_vs_vae.png")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    data = Digits(image_size=8)
    test, labels = images_of(data, "test"), data.require("test").labels
    real = torch.cat([images_of(data, split) for split in ("train", "val", "test")])
    judge, results, pictures = Judge(real), {}, {"real digits": real[:60]}
    print("| model | codes from | FD | coverage | test error | entropy gap | s |\n" + "|---" * 7 + "|")
    for name in MODELS:
        model, seconds = train(name, args.epochs, args.seed)
        with torch.no_grad():
            error = (model(test, labels if model.conditional else None) - test).square().sum((1, 2, 3)).mean()
            gap = entropy_gap(model.encode(test))  # 0 for Gaussian codes
        for prior, words in PRIORS.items():
            samples = model.sample(args.samples, prior=prior, generator=torch.Generator().manual_seed(0))
            key = f"{name}, {words}"
            results[key] = judge.figures(samples)
            cells = " | ".join(f"{value:.2f}" for value in results[key])
            print(f"| {name} | {words} | {cells} | {error:.2f} | {gap:.2f} | {seconds:.0f} |", flush=True)
            if prior == "normal" or name == "AE + batch norm":
                pictures[key] = samples[:60]
    draw(pictures, args.picture)
    return results


if __name__ == "__main__":
    main()
