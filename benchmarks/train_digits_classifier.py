"""Train the classifier whose features compare images of digits: ``lightning_plugins/metrics/embedded``.

    python benchmarks/train_digits_classifier.py [--seed 0] [--epochs 100] [--output PATH]

It learns from the 1,259 training images of ``Digits`` at 8 x 8 px alone, moved by up to one px. Neither enlarged images
nor smoothed labels: both teach features to overlook blur. The weights of the epoch with the lowest loss on the 179
validation images, at 8, 28 and 32 px, are kept. Prints the accuracy on the test images at these sizes.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins import Digits
from lightning_plugins.metrics.digits_classifier import DigitsClassifier

SIZES = (8, 28, 32)
WEIGHTS = Path(__file__).parents[1] / "lightning_plugins" / "metrics" / "embedded" / "digits_classifier.pt"


def split_at(size: int, split: str) -> tuple[Tensor, Tensor]:
    """All images, in [0, 1], and labels of a split."""
    data = Digits(image_size=size).require(split)
    return data.pixels.float() / 255, data.labels


@torch.no_grad()
def loss_and_accuracy(network: DigitsClassifier, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers, in evaluation mode."""
    logits = network.eval()(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train(seed: int, epochs: int) -> DigitsClassifier:
    """The network with its best weights on the validation images."""
    torch.manual_seed(seed)
    network, val = DigitsClassifier(), [split_at(size, "val") for size in SIZES]
    batches = Digits(image_size=8, batch_size=64, shift=1, seed=seed).train_dataloader()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(batches))
    best, weights = float("inf"), {}
    for epoch in range(epochs):
        network.train()
        batches.batch_sampler.set_epoch(epoch)
        for batch in batches:
            loss = F.cross_entropy(network(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        val_loss = sum(loss_and_accuracy(network, *part)[0] for part in val) / len(val)
        if val_loss < best:
            best, weights = val_loss, {name: value.clone() for name, value in network.state_dict().items()}
            print(f"epoch {epoch}: validation loss {val_loss:.4f}")
    network.load_state_dict(weights)
    return network


@torch.no_grad()
def scale_features(network: DigitsClassifier, images: Tensor) -> None:
    """Bring the features' variances on ``images`` to a mean of 1, and leave the logits as they are."""
    scale = network.features(images).var(0).mean().sqrt()
    dense = network.body[-2]
    for parameter in dense.parameters():
        parameter /= scale
    network.head.weight *= scale


def main() -> None:
    """Train, print the accuracies, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    network, images = train(args.seed, args.epochs), split_at(8, "train")[0]
    scale_features(network, images)
    for size in SIZES:
        print(f"test accuracy at {size} px: {loss_and_accuracy(network, *split_at(size, 'test'))[1]:.4f}")
    features = network.features(images)
    print(f"features alive: {int((features.std(0) > 1e-3).sum())} of {network.num_features}")
    torch.save(network.state_dict(), args.output)
    print(f"{args.output.stat().st_size / 1000:.0f} kB in {args.output}")


if __name__ == "__main__":
    main()
