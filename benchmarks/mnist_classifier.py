"""The classifier of MNIST whose features compare its images, trained once and kept in a file."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins import IdxImages

EPOCHS = 2


class Classifier(nn.Module):
    """Two convolutions and 64 rectified features of 28 x 28 px, from which one dense layer tells ten classes.

    It learns without augmentation, so that it sees blur.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        second = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.body = nn.Sequential(first, second, nn.Linear(64 * 7**2, self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 1, 28, 28)`` to features ``(B, 64)``."""
        return self.body(images)


def mnist_classifier(folder: str, path: Path) -> Classifier:
    """Trained on the training images in ``folder``, always the same one, or read from ``path``."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_trained(IdxImages(folder, batch_size=64)).state_dict(), path)
    network = Classifier()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def _trained(data: IdxImages) -> Classifier:
    torch.manual_seed(0)
    network, loader = Classifier(), data.train_dataloader()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            loss = F.cross_entropy(network.head(network(batch["image"])), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network
