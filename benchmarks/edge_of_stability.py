"""The edge of stability, seen by ODEDiagnostics: full-batch descent sharpens until its step is as long as it may be.

    python benchmarks/edge_of_stability.py --picture docs/images/edge_of_stability.png --json edge_of_stability.json

A perceptron (64-64-64-10, tanh, squared error) learns 500 digits, 40 % of their labels wrong, from the whole batch at
once: gradient descent, momentum and Nesterov momentum. Sharpness times learning rate rises to each method's own limit,
2, 2(1+b) and 2(1+b)/(1+2b), and stays there while the loss goes on falling (Cohen et al. 2021,
https://arxiv.org/abs/2103.00065). About 20 seconds on one thread.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_plugins import ODEDiagnostics
from lightning_plugins.data import Digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, PROBES = 3000, 60
LATE = 1 / 3  # of training; by then every method has arrived


class Method(NamedTuple):
    """A member of the SGD family, and its limit on sharpness times learning rate."""

    name: str
    lr: float
    momentum: float
    nesterov: bool
    limit: float


METHODS = (
    Method("gradient descent", 0.07, 0.0, False, 2.0),
    Method("momentum 0.9", 0.05, 0.9, False, 3.8),
    Method("Nesterov 0.9", 0.02, 0.9, True, 3.8 / 2.8),
)


class Perceptron(LightningModule):
    """Two hidden layers; the squared error of one-hot targets, summed over classes and halved."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.method = method
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of all images."""
        x, y = batch
        return (self.net(x) - F.one_hot(y, 10)).square().sum(1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD as the method says."""
        method = self.method
        return torch.optim.SGD(self.parameters(), lr=method.lr, momentum=method.momentum, nesterov=method.nesterov)


def digits() -> tuple[Tensor, Tensor]:
    """500 standardised images and their labels, 40 % wrong: what has to be learnt by heart sharpens for long."""
    data = Digits(image_size=8, batch_size=500, num_train=500, label_noise=0.4)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    x = batch["image"].flatten(1)
    return (x - x.mean()) / x.std(), batch["label"]


def train(method: Method, steps: int = STEPS) -> list[dict[str, float]]:
    """The rows of ODEDiagnostics, from 60 probes."""
    every = steps // PROBES
    callback = ODEDiagnostics(every, sharpness_every_n_steps=every)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Perceptron(method), DataLoader([digits()] * steps, batch_size=None))
    return callback.history


def summary(method: Method, rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sharpness times learning rate at the first probe, and its median, least and greatest late in training."""
    values = [method.lr * row["ode/sharpness"] for row in rows]
    late = values[-round(LATE * len(values)) :]
    losses = {"loss at first": rows[0]["ode/loss"], "loss at last": rows[-1]["ode/loss"]}
    numbers = {"at first": values[0], "late": statistics.median(late), "least": min(late), "greatest": max(late)}
    return {"limit": method.limit, **numbers, **losses}


def draw(histories: dict[Method, list[dict[str, float]]]) -> "Figure":
    """Sharpness times learning rate against each limit, and the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = (("black", "-"), ("#D55E00", (0, (5, 2))), ("#0072B2", (0, (1, 1.2))))
    for (method, rows), (color, line) in zip(histories.items(), styles, strict=True):
        steps = [row["step"] for row in rows]
        style = {"color": color, "linestyle": line, "linewidth": 1.4, "label": f"{method.name}, h = {method.lr}"}
        left.axhline(method.limit, color="0.5", linewidth=0.8)
        place = {"transform": left.get_yaxis_transform(), "va": "center"}
        left.text(1.01, method.limit, f"{method.limit:.3g}", fontsize=7, **place)
        left.plot(steps, [method.lr * row["ode/sharpness"] for row in rows], **style)
        right.plot(steps, [row["ode/loss"] for row in rows], **style)
    left.set(ylabel=r"sharpness $\times$ learning rate", ylim=(0, 4.4))
    right.set(ylabel="training loss", yscale="log")
    left.set_title("each method stops at its own limit", fontsize=9)
    right.set_title("and goes on learning", fontsize=9)
    right.legend(fontsize=7, frameon=False, handlelength=2.6)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=8)
        axes.yaxis.label.set_size(8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, print a table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="file to draw to")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args(argv)
    histories = {method: train(method) for method in METHODS}
    results = {method.name: summary(method, rows) for method, rows in histories.items()}
    columns = list(results[METHODS[0].name])
    print("| sharpness x learning rate | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, numbers in results.items():
        print(f"| {name} | " + " | ".join(f"{number:.3g}" for number in numbers.values()) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(histories).savefig(arguments.picture)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
