"""Train the classifier whose features compare images of digits: ``lightning_plugins/metrics/embedded``.

    python benchmarks/train_digits_classifier.py [--seed 0] [--epochs 120] [--output PATH]

It learns from the 1,259 training images of ``Digits`` at 8 x 8 px alone, moved by up to one px; two batches in three
are enlarged and brought back, as images of other sizes are. The weights of the epoch with the lowest loss on the 179
validation images are kept. Prints the accuracy on the test images, at 8, 28 and 32 px.
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
    network = DigitsClassifier()
    batches = Digits(image_size=8, batch_size=64, shift=1, seed=seed).train_dataloader()
    val = [split_at(size, "val") for size in SIZES]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(batches))
    best, weights = float("inf"), {}
    for epoch in range(epochs):
        network.train()
        batches.batch_sampler.set_epoch(epoch)
        for index, batch in enumerate(batches):
            images = batch["image"]
            if size := (0, *SIZES[1:])[index % len(SIZES)]:
                images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
            loss = F.cross_entropy(network(images), batch["label"], label_smoothing=0.05)
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


def main() -> None:
    """Train, print the accuracies, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    network = train(args.seed, args.epochs)
    for size in SIZES:
        print(f"test accuracy at {size} px: {loss_and_accuracy(network, *split_at(size, 'test'))[1]:.4f}")
    features = network.features(split_at(8, "train")[0])
    print(f"features alive: {int((features.std(0) > 1e-3).sum())} of {network.num_features}")
    torch.save(network.state_dict(), args.output)
    print(f"{args.output.stat().st_size / 1000:.0f} kB in {args.output}")


if __name__ == "__main__":
    main()
