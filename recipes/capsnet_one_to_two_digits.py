"""Train on single digits, read two side by side: what a capsule head can do and a pooled CNN cannot.

Su's experiment (kexue.fm/archives/4819 and 5112) on the 1,797 real 8 x 8 digits that ship with the package: one
convolutional network, five heads, three seeds, under a minute on two cores.

    lightning-plugins copy capsnet_one_to_two_digits . && python capsnet_one_to_two_digits.py

Every capsule head reads most pairs, the CNN head fewer than half, and hardly any with both scores above one half. But
look at the ``uniform`` row: summing votes, a transform for each class, vector lengths and the margin loss do nearly
all of it; iterating the routing adds little.
"""

import argparse
import logging
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_plugins import CapsNet, Digits

HEADS = {
    "cnn": {},
    "uniform": {"routing": "uniform"},
    "dynamic": {"routing": "dynamic", "iterations": 3},
    "kmeans_squash": {"routing": "kmeans_squash", "iterations": 3},
    "kmeans": {"routing": "kmeans", "iterations": 3},
}


class Places(nn.Sequential):
    """Layers whose output places ``(B, D, H, W)`` are read as capsules ``(B, H * W, D)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Images of any size to capsules."""
        return super().forward(x).flatten(2).transpose(1, 2)


class PooledHead(nn.Module):
    """The CNN's head: mean over all places, dense layers, a sigmoid score per class as a capsule of one dimension."""

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, 128), nn.ReLU(), nn.Linear(128, num_classes), nn.Sigmoid())

    def forward(self, u: Tensor) -> Tensor:
        """Features ``(B, N, D)`` to scores ``(B, J, 1)``."""
        return self.layers(u.mean(1)).unsqueeze(-1)


class Reader(CapsNet):
    """A small convolutional network with either head; its places are the capsules, so images may have any width."""

    def __init__(self, head: str, **arguments) -> None:
        self.head = head
        super().__init__(**arguments)

    def build_features(self) -> nn.Module:
        """Convolutions from ``(B, 1, H, W)`` to one 64-dimensional capsule per place, ``(B, H' * W', 64)``."""
        return Places(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
        )

    def build_capsules(self, num_inputs: int, in_dim: int) -> nn.Module:
        """The head."""
        pooled = self.head == "cnn"
        return PooledHead(in_dim, self.num_classes) if pooled else super().build_capsules(num_inputs, in_dim)

    def configure_optimizers(self) -> dict:
        """Adam under one cycle of the rate: eleven epochs are then enough."""
        optimizer = torch.optim.Adam(self.parameters())
        cycle = OneCycleLR(optimizer, max_lr=8e-3, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def scores(self, images: Tensor) -> Tensor:
        """Class scores ``(B, J)`` of images of any width."""
        return self.capsules(self.features(images)).norm(dim=-1)


def two_side_by_side(images: Tensor, labels: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs of different classes as images ``(count, 1, H, 2 W)`` with labels ``(count, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(len(images), (4 * count, 2), generator=generator)
    pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]][:count]
    return torch.cat([images[pairs[:, 0]], images[pairs[:, 1]]], dim=-1), labels[pairs]


@torch.no_grad()
def evaluate(model: Reader, data: Digits) -> tuple[float, float, float]:
    """Accuracy on one digit, on two digits, and on two digits with both scores above one half."""
    batches = list(data.test_dataloader())
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    one = (model.scores(images).argmax(-1) == labels).float().mean().item()
    pairs, truth = two_side_by_side(images, labels, count=1000)
    lengths, classes = model.scores(pairs).topk(2)
    right = (classes.sort(-1).values == truth.sort(-1).values).all(-1)
    return one, right.float().mean().item(), (right & (lengths > 0.5).all(-1)).float().mean().item()


def run(head: str, seed: int, epochs: int) -> tuple[float, float, float]:
    """Train one head on single digits with one seed and evaluate it."""
    seed_everything(seed, verbose=False)
    data = Digits(image_size=8, batch_size=32, seed=seed)
    model = Reader(
        head,
        preset="su2018",
        image_shape=(1, 8, 8),
        pictures_every_n_epochs=0,
        **HEADS[head],
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, **quiet)
    trainer.fit(model, datamodule=data)
    return evaluate(model.eval(), data)


def main(argv: Sequence[str] | None = None) -> dict[str, list[tuple[float, float, float]]]:
    """Run all heads and seeds and print the table; returns ``{head: [(one, two, two above 0.5) per seed]}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=11)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the network is too small to share
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print("| head | one digit | two digits | two digits, both scores > 0.5 |\n|---|---|---|---|")
    table = {}
    for head in args.heads:
        table[head] = [run(head, seed, args.epochs) for seed in range(args.seeds)]
        cells = [" ".join(f"{value:.3f}" for value in column) for column in zip(*table[head], strict=True)]
        print(f"| {head} | " + " | ".join(cells) + " |", flush=True)
    return table


if __name__ == "__main__":
    main()
