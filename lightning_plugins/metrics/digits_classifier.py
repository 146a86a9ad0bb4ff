"""A small network that knows handwritten digits, with its weights in the package."""

from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZE = 8  # px: height and width of the images it was trained on
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"


class DigitsClassifier(nn.Module):
    """Three convolutions and 32 features, from which one dense layer tells the ten digits.

    Trained by ``benchmarks/train_digits_classifier.py`` on the training part of ``Digits`` alone, which prints its
    accuracy. Images of any size are brought to 8 x 8 px by means over areas, colours to grey. The features' variances
    over the training images are 1 on average.
    """

    num_features: int = 32
    num_classes: int = 10

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(1, 32),
            _convolution(32, 48),
            nn.MaxPool2d(2),
            _convolution(48, 48),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * (_SIZE // 2) ** 2, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, self.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1], C = 1 or 3, to ``(B, 32)``, zero or more."""
        return self.body(_small_and_grey(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of the digits."""
        return self.head(self.features(images))


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU())


def _small_and_grey(images: Tensor) -> Tensor:
    if images.shape[1] == 3:
        images = (images * images.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    if images.shape[-2:] == (_SIZE, _SIZE):
        return images
    return F.interpolate(
        images, size=(_SIZE, _SIZE), mode="area"
    )  # as the data set was made; less blur than antialiasing


def trained_digits_classifier() -> DigitsClassifier:
    """The classifier with the weights that ship with the package, in evaluation mode."""
    with torch.device("meta"):  # no weights are drawn, so that a run's random numbers stay what they were
        network = DigitsClassifier()
    with (files("lightning_plugins.metrics") / "embedded" / "digits_classifier.pt").open("rb") as file:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
    return network.eval()
