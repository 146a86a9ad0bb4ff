"""EAE against autoencoders, VAEs and other regularisers on real digits: the same networks, batches, steps and schedule.

    python benchmarks/eae_digits.py [--seeds 3] [--models NAME ...] [--json PATH]

Digits of 8 x 8 px, 1,259 for training; d = 8, MLPs of 256 units, 300 epochs of four batches of 256, AdamW with a
one-cycle rate up to 2e-3. Weights of EAE, WAE, SIGReg and MMD were chosen on another seed by the kernel distance to
training images; the VAE's are all shown. 5,000 samples a model and prior are compared with all 1,797 digits:

- FD: Fréchet distance in the package's 32 ``"digits"`` features; the first line gives that of the test images;
- coverage by as many samples as there are digits; N_eff: different samples by :class:`BirthdayParadox`;
- reconstruction: squared error, summed over an image, and FD of test images; midpoints: FD of the images half-way
  between the codes of two test images (of one class, if conditional);
- entropy gap of the test images' codes, and of the training images', against as many Gaussian ones, in nats;
- CPU seconds of training, on one thread.

With ``--json`` each finished run is written there at once, and runs that are there already are not made again.
"""

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from capsnet_step import cpu_model
from interleaved import StepTimer
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
from lightning.pytorch import Trainer, seed_everything

from lightning_plugins import EAE, Digits, entropy_gap

BETAS = (0.03, 0.06, 0.1, 0.17, 0.3)
RIVALS: dict[str, dict[str, Any]] = {  # also with classes
    "AE + BN": {"objective": "ae_bn"},
    "VAE 0.1": {"objective": "vae", "weight": 0.1},
    "MMD 30": {"objective": "mmd", "weight": 30},
}
MODELS: dict[str, dict[str, Any]] = {
    "AE": {"objective": "ae"},
    "AE + BN": {"objective": "ae_bn"},
    "RAE-L2": {"objective": "rae_l2"},
    **{f"VAE {beta}": {"objective": "vae", "weight": beta} for beta in BETAS},
    "WAE 10": {"objective": "wae", "weight": 10},
    "WAE 200": {"objective": "wae", "weight": 200},  # the authors'
    "SIGReg 0.3": {"objective": "sigreg", "weight": 0.3},
    "MMD 30": {"objective": "mmd", "weight": 30},
    "EAE 0.3": {"objective": "eae", "weight": 0.3},
    **{f"conditional {name}": {**options, "conditional": True} for name, options in RIVALS.items()},
    "conditional EAE 0.3": {"objective": "eae", "weight": 0.3, "conditional": True},
}
EPOCHS, BATCH, LR, NUM_SAMPLES = 300, 256, 2e-3, 5_000
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def build(model: str) -> EAE:
    """A model of the table, untrained, with everybody's optimiser and schedule."""
    return EAE(
        image_shape=(1, 8, 8),
        latent_dim=8,
        network="mlp",
        optimizer=lambda groups: torch.optim.AdamW(groups, LR),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS),
        pictures_every_n_epochs=0,
        **MODELS[model],
    )


def train(model: str, seed: int) -> tuple[EAE, float]:
    """The trained module in evaluation mode, its priors fitted, and CPU seconds."""
    seed_everything(seed, verbose=False)
    module, data = build(model), Digits(image_size=8, batch_size=BATCH, seed=seed)
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, limit_val_batches=0, **QUIET)
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    module.eval().fit_prior([data.require("train").pixels / 255])
    return module, seconds


def step_ratio(rounds: int = 7) -> float:
    """CPU time of EAE's training step by the autoencoder's, in turns: the median over rounds of epochs' medians."""
    data, ratios = Digits(image_size=8, batch_size=BATCH), []
    modules = {name: build(name) for name in ("EAE 0.3", "AE")}
    for _ in range(rounds):
        medians = {}
        for name, module in modules.items():
            timer = StepTimer(time.process_time)
            trainer = Trainer(accelerator="cpu", max_epochs=10, limit_val_batches=0, callbacks=[timer], **QUIET)
            trainer.fit(module, datamodule=data)
            medians[name] = statistics.median(timer.steps)
        ratios.append(medians["EAE 0.3"] / medians["AE"])
    return statistics.median(ratios)


def bars_of(runs: Runs) -> dict[str, tuple[float, str, float]]:
    """What the models among ``runs`` allow to tell; means over the seeds."""
    eae, vaes = runs.get("EAE 0.3"), [runs[f"VAE {beta}"] for beta in BETAS if f"VAE {beta}" in runs]
    bars: dict[str, tuple[float, str, float]] = {}
    if not eae:
        return bars
    distance = mean(eae, "normal/frechet")
    if vaes:
        best = min(vaes, key=lambda own: mean(own, "normal/frechet"))
        bars["FD of N(0, I): EAE / best VAE"] = (distance / mean(best, "normal/frechet"), "<=", 0.75)
        most = max(mean(own, "normal/coverage") for own in vaes)
        bars["coverage: EAE - best VAE"] = (mean(eae, "normal/coverage") - most, ">=", 0)
    if plain := runs.get("AE + BN"):
        bars["FD of N(0, I): EAE / AE + BN"] = (distance / mean(plain, "normal/frechet"), "<=", 0.65)
        bars["entropy gap without the entropy (AE + BN), training"] = (mean(plain, "train_gap"), "<=", -2.5)
    if autoencoder := runs.get("AE"):
        ratio = mean(eae, "test_error") / mean(autoencoder, "test_error")
        bars["test error: EAE / AE"] = (ratio, "<=", 1.5)
    bars["entropy gap of EAE, test, absolute"] = (abs(mean(eae, "test_gap")), "<=", 1.5)
    bars["entropy gap of EAE, training, absolute"] = (abs(mean(eae, "train_gap")), "<=", 1.5)
    if conditional := runs.get("conditional EAE 0.3"):
        bars["conditional samples of the right class"] = (mean(conditional, "normal/accuracy"), ">=", 0.93)
    return bars


def main() -> None:
    """Train, judge, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    data = Digits(image_size=8)
    splits = {name: data.require(name) for name in ("train", "val", "test")}
    images, labels = ({name: getattr(split, part) for name, split in splits.items()} for part in ("pixels", "labels"))
    images = {name: pixels / 255 for name, pixels in images.items()}
    every, test = torch.cat([*images.values()]), images["test"]
    judge = Judge("digits", every)
    runs = load_runs(args.json)
    for seed in range(args.seeds):
        for model in args.models:
            if len(own := runs.setdefault(model, [])) > seed:
                continue
            module, seconds = train(model, seed)
            row = judge_model(module, test, labels["test"], judge, NUM_SAMPLES)
            with torch.no_grad():
                row |= {"train_gap": entropy_gap(module.encode(images["train"])).item(), "seconds": seconds}
            own.append(row)
            save_runs(runs, args.json)
    runs = {model: runs[model] for model in args.models}
    right = (judge.classify(test) == labels["test"]).float().mean()
    print(f"{cpu_model()}, 1 thread, torch {torch.__version__}; mean ± std of {args.seeds} seeds\n")
    print(f"Test images: {right:.4f} classified right, FD {judge.frechet(test):.2f}")
    print_table(runs, SAMPLES)
    print_table(runs, CODES)
    print_bars(bars_of(runs) | {"CPU time of a step: EAE / AE": (step_ratio(), "<=", 1.35)})


if __name__ == "__main__":
    main()
