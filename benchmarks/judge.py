"""How generated images are judged in the benchmarks of generative models: distances, tables, and what is kept."""

import json
import os
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_plugins import EAE, BirthdayParadox, FrechetDistance, PrecisionRecallDensityCoverage, entropy_gap
from lightning_plugins.metrics import feature_extractor

PRIORS = ("normal", "gaussian", "mixture")
Runs = dict[str, list[dict[str, float]]]  # of each model, one per seed


class Judge:
    """Compares images with real ones by the features of a network.

    Args:
        network: as :func:`feature_extractor` takes it.
        real: ``(N, C, H, W)`` in [0, 1].
    """

    def __init__(self, network: str | nn.Module, real: Tensor) -> None:
        self.extractor = feature_extractor(network)
        self.real = self.features(real)

    def features(self, images: Tensor) -> Tensor:
        """``(n, F)``, by parts that stay in the cache."""
        return torch.cat([self.extractor(part) for part in images.split(256)])

    def classify(self, images: Tensor) -> Tensor:
        """The class ``(n,)`` in each image, as the extractor itself tells, or by the ``head`` of its network."""
        if hasattr(self.extractor, "classify"):
            return self.extractor.classify(images)
        return self.extractor.network.head(self.features(images)).argmax(1)

    def frechet(self, images: Tensor) -> float:
        """Fréchet distance from the real images."""
        return self._distance(self.features(images))

    def figures(self, images: Tensor) -> dict[str, float]:
        """Fréchet distance, coverage by as many images as there are real ones, and N_eff by near-duplicates."""
        fake = self.features(images)
        coverage, birthday = PrecisionRecallDensityCoverage(feature=None), BirthdayParadox(feature=None)
        for metric, rows in ((coverage, fake[: len(self.real)]), (birthday, fake)):
            metric.update(self.real, real=True)
            metric.update(rows, real=False)
        scores = coverage.compute()
        return {
            "frechet": self._distance(fake),
            "coverage": scores["coverage"].item(),
            "precision": scores["precision"].item(),
            "support_size": birthday.compute()["support_size"].item(),
        }

    def _distance(self, fake: Tensor) -> float:
        metric = FrechetDistance(feature=None, num_features=fake.shape[1])
        metric.update(self.real, real=True)
        metric.update(fake, real=False)
        return metric.compute().item()


@torch.no_grad()
def judge_model(module: EAE, test: Tensor, labels: Tensor, judge: Judge, num_samples: int) -> dict[str, float]:
    """Samples of all priors, reconstructions and midpoints of test images, whatever the data set."""
    generator = torch.Generator().manual_seed(0)
    known = labels if module.conditional else None
    chosen = torch.randint(module.num_classes, (num_samples,), generator=generator) if module.conditional else None
    row: dict[str, float] = {}
    for prior in PRIORS:
        images = module.sample(num_samples, labels=chosen, prior=prior, generator=generator)
        row |= {f"{prior}/{name}": value for name, value in judge.figures(images).items()}
        if chosen is not None:
            row[f"{prior}/accuracy"] = (judge.classify(images) == chosen).float().mean().item()
    images = torch.cat([module(*part) for part in batches(test, known)])
    row["test_error"] = (images - test).square().flatten(1).sum(1).mean().item()
    row["reconstruction"] = judge.frechet(images)
    first = torch.randint(len(test), (num_samples,), generator=generator)
    partners = torch.ones(num_samples, len(test)) if known is None else (known[first][:, None] == known).float()
    second = partners.scatter_(1, first[:, None], 0).multinomial(1, generator=generator)[:, 0]
    ends = [test[first], test[second], *([] if known is None else [known[first]])]
    parts = zip(*(end.split(256) for end in ends), strict=True)
    paths = (module.interpolate(a, b, 3, labels=label[0] if label else None) for a, b, *label in parts)
    row["midpoints"] = judge.frechet(torch.cat([path[:, 1] for path in paths]))
    row["test_gap"] = entropy_gap(torch.cat([module.encode(part) for part, *_ in batches(test, None)])).item()
    return row


def batches(images: Tensor, labels: Tensor | None) -> list[tuple[Tensor, ...]]:
    """Images, and labels if there are any, by parts."""
    parts = [images.split(256)] if labels is None else [images.split(256), labels.split(256)]
    return list(zip(*parts, strict=True))


def load_runs(path: Path | None) -> Runs:
    """What an earlier, interrupted run has written."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def save_runs(runs: Runs, path: Path | None) -> None:
    """All or nothing."""
    if path:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(runs, indent=1))
        os.replace(part, path)


def mean(runs: list[dict[str, float]], name: str) -> float:
    """Over the seeds."""
    return statistics.mean(run[name] for run in runs)


def cell(runs: list[dict[str, float]], name: str, digits: int = 2) -> str:
    """Mean and standard deviation over the seeds, for a table."""
    if name not in runs[0]:
        return ""
    values = [run[name] for run in runs]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


# heading -> figures of a run: its name, and digits behind the point
SAMPLES = {
    "FD, N(0, I)": ("normal/frechet", 2),
    "Gaussian": ("gaussian/frechet", 2),
    "mixture": ("mixture/frechet", 2),
    "precision, N(0, I)": ("normal/precision", 2),
    "coverage, N(0, I)": ("normal/coverage", 2),
    "coverage, mixture": ("mixture/coverage", 2),
    "N_eff, N(0, I)": ("normal/support_size", 0),
    "N_eff, mixture": ("mixture/support_size", 0),
    "right class": ("normal/accuracy", 3),
}
CODES = {
    "test error": ("test_error", 2),
    "reconstruction FD": ("reconstruction", 2),
    "midpoints FD": ("midpoints", 2),
    "gap, test": ("test_gap", 2),
    "gap, training": ("train_gap", 2),
    "CPU s": ("seconds", 1),
}


def print_table(runs: Runs, columns: dict[str, tuple[str, int]]) -> None:
    """One row per model; columns that no model has are left out."""
    columns = {name: column for name, column in columns.items() if any(column[0] in own[0] for own in runs.values())}
    print(f"\n| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for model, own in runs.items():
        print(f"| {model} | {' | '.join(cell(own, *column) for column in columns.values())} |")


def print_bars(bars: dict[str, tuple[float, str, float]]) -> None:
    """Measured figures against what they are to hold."""
    print("\n| figure | measured | bar | held |\n|---|---|---|---|")
    for name, (value, sign, bar) in bars.items():
        print(f"| {name} | {value:.3g} | {sign} {bar:g} | {'yes' if (value <= bar) == (sign == '<=') else 'no'} |")
