"""Distil analytic mixtures in the plane, whose exact denoiser is the teacher, by every member of the family.

    python benchmarks/sid_mixtures.py [--mixtures ring uneven] [--methods ...] [--seeds 3] [--iterations 4000]
        [--workers 2] [--json PATH] [--picture PATH]

Generator and fake score are MLPs of 4 x 128 with EDM's preconditioning, from random weights: nothing is trained
beforehand. Mixtures are centred and scaled to the deviation 0.5 of EDM, so that the paper's settings hold as they are
(noise levels, generator at sigma 2.5, Adam with beta1 = 0); distances are told in the mixtures' own units. Runs take
turns over seeds, mixtures and methods, each on one thread. Prints one table, of 10,000 samples a run:

- energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| to 10,000 samples of the mixture; all pairs are counted, so that
  other samples of the mixture itself score its floor and not 0;
- the least and greatest weight of a mode in units of its own, samples counted with the nearest mean, and the total
  variation between these weights and the true ones;
- the least spread of a mode: the deviation of its samples along their narrowest direction, by the true one. It is 1 for
  the mixture itself and 0 for modes that have shrunk to a line, which the other figures hardly see.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from capsnet_step import cpu_model

from lightning_plugins.core.pictures import new_figure
from lightning_plugins.sid.losses import (
    fake_score_loss,
    fisher_divergence,
    generator_loss,
    l1_weight,
    reverse_kl_loss,
)
from lightning_plugins.sid.noise_levels import fake_score_sigmas, generator_sigmas

SIGMA_DATA, SIGMA_INIT = 0.5, 2.5  # EDM's and SiD's
NUM_SAMPLES = 10_000
# mixture: greatest energy distance at alpha = 0.5, and least share of a mode's own weight (none missing)
BARS = {"ring": (0.006, 0.5), "uneven": (0.004, 0.5)}

# From x_g, x_t, sigma and both denoised to the loss of each sample.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Mixture:
    """Round Gaussians of one width: ``weights (K,)``, ``means (K, 2)``; ``unit``: one of ours in the mixture's own."""

    weights: Tensor
    means: Tensor
    std: float
    unit: float = 1.0

    def scaled(self) -> "Mixture":
        """Centred and shrunk to the mean deviation ``SIGMA_DATA`` per dimension."""
        centred = self.means - self.weights @ self.means
        variance = (self.weights @ centred.square()).mean().item() + self.std**2
        unit = math.sqrt(variance) / SIGMA_DATA
        return Mixture(self.weights, centred / unit, self.std / unit, unit)

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """``(num_samples, 2)``."""
        mode = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        return self.means[mode] + self.std * torch.randn(num_samples, 2, generator=generator)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean, exactly: each Gaussian's own, by its responsibility for x."""
        variance = self.std**2 + sigma.square()[:, None]
        offset = x[:, None] - self.means.to(x.dtype)
        share = (self.weights.to(x.dtype).log() - offset.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
        return (share * (self.means.to(x.dtype) + self.std**2 / variance[..., None] * offset)).sum(1)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.2) -> Mixture:
    """Equal Gaussians around a circle."""
    angle = torch.arange(modes) * 2 * math.pi / modes
    return Mixture(torch.full((modes,), 1 / modes), radius * torch.stack([angle.cos(), angle.sin()], 1), std)


def uneven() -> Mixture:
    """Three Gaussians, the rarest with a tenth of the weight."""
    return Mixture(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([[-1.5, -0.5], [1.5, -0.5], [0.0, 1.5]]), 0.3)


MIXTURES = {"ring": ring, "uneven": uneven}


def sid(alpha: float) -> Loss:
    """Score identity distillation with the paper's weight."""
    return lambda x_g, x_t, sigma, teacher, fake: generator_loss(x_g, teacher, fake, alpha)


def epsilon_generator_loss(noise: Tensor, eps_teacher: Tensor, eps_fake: Tensor, alpha: float = 1.2) -> Tensor:
    r"""Su's loss for networks that predict noise: ``generator_loss`` of images by sigma^2, without weight; ``(B,)``.

    .. math:: L_\alpha = \langle \epsilon_\phi - \epsilon_\psi, \epsilon_\phi - \epsilon \rangle
        - \alpha |\epsilon_\phi - \epsilon_\psi|^2

    Args:
        noise: ``(B, D)`` the unit noise in :math:`x_t = x_g + \sigma \epsilon`.
        eps_teacher: ``(B, D)`` predicted by the teacher, with gradient.
        eps_fake: ``(B, D)`` predicted by the fake score, with gradient.
        alpha: Su's lambda.

    Source: kexue.fm/archives/10085 and 10567.
    """
    delta = eps_teacher - eps_fake
    return (delta * (eps_teacher - noise)).sum(1) - alpha * delta.square().sum(1)


def sid_epsilon(alpha: float) -> Loss:
    """The paper's loss from predictions of noise."""

    def loss(x_g: Tensor, x_t: Tensor, sigma: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
        weight = sigma**2 * l1_weight(x_g, teacher)
        noise, teacher, fake = ((x_t - image) / sigma[:, None] for image in (x_g, teacher, fake))
        return weight * epsilon_generator_loss(noise, teacher, fake, alpha)

    return loss


METHODS: dict[str, Loss] = {
    "alpha 0.5": sid(0.5),
    "alpha 1": sid(1.0),
    "alpha 1.2": sid(1.2),
    "alpha 0.5, epsilon": sid_epsilon(0.5),
    "reverse KL": lambda x_g, x_t, sigma, teacher, fake: reverse_kl_loss(x_g, teacher, fake),
    "naive L1": lambda x_g, x_t, sigma, teacher, fake: fisher_divergence(teacher, fake, l1_weight(x_g, teacher)),
}


class Network(nn.Module):
    """An MLP that denoises points of the plane, with EDM's preconditioning."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        sizes = [3] + [width] * depth
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``(B, 2)`` noisy points and ``(B,)`` levels to clean points."""
        sigma = sigma[:, None]
        norm = (sigma**2 + SIGMA_DATA**2).sqrt()
        out = self.body(torch.cat([x / norm, sigma.log() / 4], 1))
        return (SIGMA_DATA / norm) ** 2 * x + sigma * SIGMA_DATA / norm * out


def distil(
    mixture: Mixture,
    loss: Loss,
    seed: int,
    iterations: int,
    batch: int = 512,
    lr: float = 1e-3,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Train; samples of the generator, ``(NUM_SAMPLES, 2)`` in the scaled mixture's units."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    student, fake = Network().to(dtype), Network().to(dtype)
    optimizers = [torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999)) for net in (student, fake)]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, iterations) for o in optimizers]

    def normal(n: int) -> Tensor:
        return torch.randn(n, 2, generator=noise).to(dtype)

    def generate(n: int) -> Tensor:
        return student(SIGMA_INIT * normal(n), torch.full((n,), SIGMA_INIT, dtype=dtype))

    def step(optimizer: torch.optim.Optimizer, values: Tensor) -> None:
        optimizer.zero_grad()
        values.mean().backward()
        optimizer.step()

    for _ in range(iterations):
        with torch.no_grad():
            x_g = generate(batch)
        sigma = fake_score_sigmas(batch, generator=noise).to(dtype)
        d_fake = fake(x_g + sigma[:, None] * normal(batch), sigma)
        step(optimizers[1], fake_score_loss(d_fake, x_g, sigma, SIGMA_DATA))

        fake.requires_grad_(False)
        x_g = generate(batch)
        sigma = generator_sigmas(batch, generator=noise).to(dtype)
        x_t = x_g + sigma[:, None] * normal(batch)
        step(optimizers[0], loss(x_g, x_t, sigma, mixture.denoise(x_t, sigma), fake(x_t, sigma)))
        fake.requires_grad_(True)
        for schedule in schedules:
            schedule.step()
    with torch.no_grad():
        return generate(NUM_SAMPLES)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Of two samples ``(n, 2)`` and ``(m, 2)``: 2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs."""

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(torch.cdist(rows, b).sum(dtype=torch.float64).item() for rows in a.split(1000)) / (len(a) * len(b))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def score(mixture: Mixture, samples: Tensor) -> dict[str, float]:
    """Energy distance and weights of the modes."""
    samples = samples.float()
    truth = mixture.sample(NUM_SAMPLES, torch.Generator().manual_seed(1234))
    nearest = torch.cdist(samples, mixture.means).argmin(1)
    weights = torch.bincount(nearest, minlength=len(mixture.means)) / len(samples)
    relative = weights / mixture.weights
    return {
        "energy_distance": mixture.unit * energy_distance(samples, truth),
        "least_mode": relative.min().item(),
        "greatest_mode": relative.max().item(),
        "total_variation": ((weights - mixture.weights).abs().sum() / 2).item(),
        "least_spread": min(narrowest(samples[nearest == k]) for k in range(len(weights))) / mixture.std,
    }


def narrowest(samples: Tensor) -> float:
    """Deviation along the direction in which it is least; 0 for fewer than ten samples."""
    return torch.linalg.eigvalsh(samples.T.cov())[0].clamp(min=0).sqrt().item() if len(samples) >= 10 else 0.0


def one_run(name: str, method: str, seed: int, iterations: int) -> dict:
    """Distil and score, with some samples for the picture; what a worker does."""
    torch.set_num_threads(1)
    mixture = MIXTURES[name]().scaled()
    start = time.process_time()
    samples = distil(mixture, METHODS[method], seed, iterations)
    seconds = time.process_time() - start
    figures = {"mixture": name, "method": method, "seed": seed, "cpu_seconds": seconds, **score(mixture, samples)}
    return figures | {"samples": (mixture.unit * samples[:2000]).tolist()}


def floor(name: str, seeds: int) -> list[dict]:
    """The same figures of samples of the mixture itself."""
    mixture = MIXTURES[name]().scaled()
    rows = [score(mixture, mixture.sample(NUM_SAMPLES, torch.Generator().manual_seed(seed))) for seed in range(seeds)]
    return [{"mixture": name, "method": "the mixture itself", "seed": seed, **row} for seed, row in enumerate(rows)]


def print_table(rows: list[dict]) -> None:
    """One line for each mixture and method, over its seeds."""
    print(
        "| mixture | method | energy distance | modes' weights by their own | total variation | least spread | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    for mixture, method in dict.fromkeys((row["mixture"], row["method"]) for row in rows):
        own = [row for row in rows if (row["mixture"], row["method"]) == (mixture, method)]
        distances = " ".join(f"{row['energy_distance']:.4f}" for row in own)
        modes = f"{min(row['least_mode'] for row in own):.2f} to {max(row['greatest_mode'] for row in own):.2f}"
        variation = " ".join(f"{row['total_variation']:.3f}" for row in own)
        spread = " ".join(f"{row['least_spread']:.2f}" for row in own)
        seconds = sum(row.get("cpu_seconds", 0) for row in own) / len(own)
        print(f"| {mixture} | {method} | {distances} | {modes} | {variation} | {spread} | {seconds:.0f} |")


def print_bars(rows: list[dict]) -> None:
    """Whether the bars held for every seed."""
    print("\n| bar | measured | target | held |\n|---|---|---|---|")
    for mixture, (distance, share) in BARS.items():
        own = [row for row in rows if row["mixture"] == mixture and row["method"].startswith("alpha 0.5")]
        if own:
            worst, least = max(row["energy_distance"] for row in own), min(row["least_mode"] for row in own)
            print(f"| {mixture}, alpha 0.5: energy distance | {worst:.4f} | <= {distance} | {worst <= distance} |")
            print(
                f"| {mixture}, alpha 0.5: least mode by its own weight | {least:.2f} | >= {share} | {least >= share} |"
            )


def draw(rows: list[dict], path: Path) -> None:
    """Samples of seed 0: a row of panels for each mixture, a column for each method."""
    shown = [row for row in rows if row["seed"] == 0 and "samples" in row]
    mixtures, methods = ([*dict.fromkeys(row[key] for row in shown)] for key in ("mixture", "method"))
    figure = new_figure(2.4 * (len(methods) + 1), 2.6 * len(mixtures))
    axes = figure.subplots(len(mixtures), len(methods) + 1, squeeze=False)
    for line, name in zip(axes, mixtures, strict=True):
        truth = MIXTURES[name]()
        truth.means = truth.means - truth.weights @ truth.means
        points = {"the mixture itself": truth.sample(2000, torch.Generator().manual_seed(0))}
        points |= {row["method"]: torch.tensor(row["samples"]) for row in shown if row["mixture"] == name}
        for axis, (title, xy) in zip(line, points.items(), strict=True):
            axis.scatter(*xy.T, s=1, alpha=0.4, linewidths=0)
            axis.set(title=f"{name}: {title}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
            axis.title.set_fontsize(8)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> list[dict]:
    """Distil all, print the tables, write JSON and the picture on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    jobs = [(m, method, seed) for seed in range(args.seeds) for m in args.mixtures for method in args.methods]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(one_run, *job, args.iterations) for job in jobs]
        for done, future in enumerate(futures, 1):
            row = {key: value for key, value in future.result().items() if key != "samples"}
            print(f"{done} of {len(jobs)}: {row}", file=sys.stderr, flush=True)
    rows = sorted((future.result() for future in futures), key=lambda row: args.mixtures.index(row["mixture"]))
    table = [row for m in args.mixtures for row in [*floor(m, args.seeds), *(r for r in rows if r["mixture"] == m)]]
    print(f"{cpu_model()}, one thread a run, torch {torch.__version__}; {args.iterations} iterations of 512\n")
    print_table(table)
    print_bars(rows)
    if args.json:
        args.json.write_text(json.dumps([{k: v for k, v in row.items() if k != "samples"} for row in table], indent=1))
    if args.picture:
        draw(rows, args.picture)
    return table


if __name__ == "__main__":
    main()
