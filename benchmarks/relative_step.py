"""How far finite differences should step: errors of Hessian products along the gradient, and what training makes of it.

    python benchmarks/relative_step.py

Digits of 8 x 8 px in batches of 100. Errors are ``|product - exact| / |exact|`` against differentiating twice, medians
over 12 batches, after 150 steps of training and (in brackets) before any. Test accuracy is that of the recipe
label_noise with GradientPenalty 2, three seeds, with its network's GELU, with ReLU in its place, and with a ReLU of
``torch.where``, whose kinks no name tells.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from lightning_plugins.recipes import label_noise
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plugins import Digits, GradientPenalty
from lightning_plugins.core.vectors import norm
from lightning_plugins.replay.window import displaced

STEPS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def mlp(activation: type[nn.Module]) -> nn.Module:
    """64-64-10 units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))


def cnn(activation: type[nn.Module]) -> nn.Module:
    """Two convolutions with batch norm and a max-pooling."""
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), activation(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), activation(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 10))


class Where(nn.Module):
    """ReLU whose kinks must be found by measuring."""

    def forward(self, x: Tensor) -> Tensor:
        """``max(x, 0)``."""
        return torch.where(x > 0, x, 0.0)


NETWORKS = {
    "MLP, GELU": (mlp, nn.GELU),
    "MLP, ReLU": (mlp, nn.ReLU),
    "CNN, GELU, max-pooling": (cnn, nn.GELU),
    "CNN, ReLU, max-pooling": (cnn, nn.ReLU),
}


def errors(network: nn.Module, images: Tensor, labels: Tensor) -> dict[tuple[str, float], float]:
    """Of forward and central differences on one batch, for each relative step."""
    params = list(network.parameters())

    def gradient(create_graph: bool = False) -> Sequence[Tensor]:
        return torch.autograd.grad(F.cross_entropy(network(images), labels), params, create_graph=create_graph)

    first = gradient(create_graph=True)
    here = [g.detach() for g in first]
    exact = torch.autograd.grad(first, params, here)
    found = {}
    for relative in STEPS:
        h = relative * (norm(params) / norm(here)).item()
        with displaced(params, here) as move:
            move(h)
            ahead = gradient()
            move(-h)
            behind = gradient()
        products = {
            "forward": [(a - g) / h for a, g in zip(ahead, here, strict=True)],
            "central": [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)],
        }
        for name, product in products.items():
            wrong = norm([p - e for p, e in zip(product, exact, strict=True)]) / norm(exact)
            found[name, relative] = wrong.item()
    return found


def medians(network: nn.Module, images: Tensor, labels: Tensor) -> dict[tuple[str, float], float]:
    """Over 12 random batches."""
    batches = [torch.randint(len(images), (100,)) for _ in range(12)]
    found = [errors(network, images[i], labels[i]) for i in batches]
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """150 steps of SGD with momentum."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(150):
        batch = torch.randint(len(images), (100,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()


def accuracies(activation: type[nn.Module], **penalty: object) -> str:
    """Final test accuracy of the recipe, for three seeds."""
    original = label_noise.DigitClassifier

    class Activated(original):
        def __init__(self, lr: float = 0.05, weight_decay: float = 0.0) -> None:
            super().__init__(lr, weight_decay)
            self.net[2] = activation()

    label_noise.DigitClassifier = Activated
    label_noise.GradientPenalty = partial(GradientPenalty, **penalty)
    runs = [label_noise.run("GradientPenalty", 2.0, seed, 100) for seed in range(3)]
    label_noise.DigitClassifier, label_noise.GradientPenalty = original, GradientPenalty
    return " ".join(f"{run[-1][label_noise.TEST]:.3f}" for run in runs)


def main() -> None:
    """Measure and print two Markdown tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = Digits(image_size=8, batch_size=100)
    data.setup("fit")
    split = data.images("train")
    images, labels = split.pixels / 255, split.labels
    print(f"| network, difference | {' | '.join(f'{step:g}' for step in STEPS)} |\n|---|{'---|' * len(STEPS)}")
    for name, (make, activation) in NETWORKS.items():
        torch.manual_seed(0)
        network = make(activation)
        before = medians(network, images, labels)
        train(network, images, labels)
        after = medians(network, images, labels)
        for difference in ("forward", "central"):
            cells = [f"{after[difference, step]:.2g} ({before[difference, step]:.2g})" for step in STEPS]
            print(f"| {name}, {difference} | {' | '.join(cells)} |")
    print("\n| engine | GELU | ReLU | torch.where |\n|---|---|---|---|")
    settings: dict[str, dict[str, object]] = {"exact": {"engine": "exact"}, "default": {}}
    settings["default, forward"] = {"difference": "forward"}
    settings["default, without a check"] = {"check": "off"}
    for difference in ("forward", "central"):
        steps = {f"{difference}, relative_step {step:g}": step for step in STEPS[:-1]}
        settings |= {name: {"difference": difference, "relative_step": step} for name, step in steps.items()}
    for name, penalty in settings.items():
        cells = [accuracies(activation, **penalty) for activation in (nn.GELU, nn.ReLU, Where)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
