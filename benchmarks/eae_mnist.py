"""EAE against autoencoders, VAEs and other regularisers on MNIST: the same networks, batches, steps and schedule.

    python benchmarks/eae_mnist.py --folder PATH [--seeds 1] [--models NAME ...] [--json PATH] [--cache eae_mnist]
        [--width 16] [--epochs 5] [--precision bf16-mixed] [--accelerator cpu]

``--folder`` holds MNIST's four idx files, plain or .gz. The convolutions of ``network="rae"``, the first of ``--width``
channels, d = 16, 55,000 training images in batches of 256, Adam at 2e-3, which falls to a twentieth by equal factors
per epoch: what two cores train in some minutes. With a GPU: ``--width 128 --epochs 70 --accelerator gpu``.

5,000 samples a model and prior are compared with every other test image; the rest of these are reconstructed, and tell
how far real images are from real ones. Columns are those of ``eae_digits.py``; the classifier, 64 features, learns here
once. It, checkpoints and finished runs (``--json``) stay, so that the same command goes on where it was killed.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from capsnet_step import cpu_model
from judge import (
    CODES,
    SAMPLES,
    Judge,
    Runs,
    judge_model,
    load_runs,
    mean,
    print_bars,
    print_table,
    save_runs,
)
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from mnist_classifier import mnist_classifier

from lightning_plugins import EAE, IdxImages, RandomState, entropy_gap

BETAS = (0.3, 1, 2)
MODELS: dict[str, dict[str, Any]] = {
    **{f"EAE {weight}": {"objective": "eae", "weight": weight} for weight in (3, 6)},
    "AE + BN": {"objective": "ae_bn"},
    **{f"VAE {beta}": {"objective": "vae", "weight": beta} for beta in BETAS},
    "AE": {"objective": "ae"},
    "SIGReg 10": {"objective": "sigreg", "weight": 10},
    "MMD 100": {"objective": "mmd", "weight": 100},
    "conditional EAE 3": {"objective": "eae", "weight": 3, "conditional": True},
    "WAE 10": {"objective": "wae", "weight": 10},
    "WAE 200": {"objective": "wae", "weight": 200},  # the authors'
    "RAE-L2": {"objective": "rae_l2"},
}
BATCH, LR, LR_LEFT, NUM_SAMPLES = 256, 2e-3, 0.05, 5_000


class Clock(Callback):
    """CPU seconds of all epochs, also of those before the process was killed."""

    def __init__(self) -> None:
        self.seconds, self.start = 0.0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark."""
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add, and say that it goes on."""
        self.seconds += time.process_time() - self.start
        loss = float(trainer.callback_metrics["train/loss"])
        print(f"  epoch {trainer.current_epoch}: loss {loss:.2f}, {self.seconds:.0f} CPU s", flush=True)

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """From the checkpoint."""
        self.seconds = state_dict["seconds"]


def train(model: str, seed: int, data: IdxImages, args: argparse.Namespace) -> tuple[EAE, float]:
    """The trained module on the CPU in evaluation mode, its priors fitted, and CPU seconds."""
    seed_everything(seed, verbose=False)
    decay = LR_LEFT ** (1 / max(args.epochs - 1, 1))
    module = EAE(width=args.width, lr=LR, lr_decay=decay, pictures_every_n_epochs=0, **MODELS[model])
    folder = args.cache / f"{model.replace(' ', '_')}-{args.width}-{args.epochs}-{seed}"
    clock, last = Clock(), folder / "last.ckpt"
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_epochs=args.epochs,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, ModelCheckpoint(folder, save_last=True, save_top_k=0), RandomState()],
    )
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    module.cpu().eval().fit_prior((data.require("train").pixels[:20_000] / 255).split(256))
    return module, clock.seconds


def bars_of(runs: Runs) -> dict[str, tuple[float, str, float]]:
    """What the models among ``runs`` allow to tell; means over the seeds."""
    eae, vaes = runs.get("EAE 3"), [runs[f"VAE {beta}"] for beta in BETAS if f"VAE {beta}" in runs]
    if not eae:
        return {}
    distance, bars = mean(eae, "normal/frechet"), {}
    if vaes:
        best = min(mean(own, "normal/frechet") for own in vaes)
        bars["FD of N(0, I): EAE / best VAE"] = (distance / best, "<=", 0.75)
        most = max(mean(own, "normal/coverage") for own in vaes)
        bars["coverage: EAE - best VAE"] = (mean(eae, "normal/coverage") - most, ">=", 0)
    if plain := runs.get("AE + BN"):
        bars["FD of N(0, I): EAE / AE + BN"] = (distance / mean(plain, "normal/frechet"), "<=", 0.65)
    if autoencoder := runs.get("AE"):
        bars["test error: EAE / AE"] = (mean(eae, "test_error") / mean(autoencoder, "test_error"), "<=", 1.5)
    bars["entropy gap of EAE, test, absolute"] = (abs(mean(eae, "test_gap")), "<=", 1.5)
    if conditional := runs.get("conditional EAE 3"):
        bars["conditional samples of the right class"] = (mean(conditional, "normal/accuracy"), ">=", 0.93)
    return bars


def main() -> None:
    """Train, judge, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("eae_mnist"))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    test = IdxImages(args.folder).require("test")
    images = test.pixels / 255
    real, rest, labels = images[::2], images[1::2], test.labels[1::2]
    judge = Judge(mnist_classifier(args.folder, args.cache / "classifier.pt"), real)
    right, floor = (judge.classify(rest) == labels).float().mean(), judge.frechet(rest)
    words = f"width {args.width}, {args.epochs} epochs in {args.precision} on the {args.accelerator}"
    print(
        f"{cpu_model()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; {words}; {args.seeds} seed(s)"
    )
    print(f"\nThe other test images: {right:.4f} classified right, FD {floor:.2f}", flush=True)
    runs = load_runs(args.json)
    for seed in range(args.seeds):
        for model in args.models:
            if len(own := runs.setdefault(model, [])) > seed:
                continue
            print(f"{model}, seed {seed}", flush=True)
            data = IdxImages(args.folder, batch_size=BATCH, seed=seed)
            module, seconds = train(model, seed, data, args)
            row = judge_model(module, rest, labels, judge, NUM_SAMPLES)
            with torch.no_grad():
                seen = data.require("train").pixels[: len(rest)] / 255
                codes = torch.cat([module.encode(part) for part in seen.split(256)])
            own.append({**row, "train_gap": entropy_gap(codes).item(), "seconds": seconds})
            save_runs(runs, args.json)
            print("  " + ", ".join(f"{name} {value:.4g}" for name, value in own[-1].items()), flush=True)
    runs = {model: runs[model] for model in args.models}
    print_table(runs, SAMPLES)
    print_table(runs, CODES)
    print_bars(bars_of(runs))


if __name__ == "__main__":
    main()
