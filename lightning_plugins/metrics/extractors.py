"""Networks that turn images into features, frozen, for metrics that compare two sets of images."""

import hashlib
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3  # from torchmetrics.image it is missing without torch-fidelity

from lightning_plugins.core import arguments as must
from lightning_plugins.metrics.digits_classifier import DigitsClassifier, trained_digits_classifier


def feature_extractor(feature: str | nn.Module) -> "FeatureExtractor":
    """The frozen network behind a name, or a frozen copy of a module.

    Args:
        feature: what the network is: ``"digits"``, 32 features of a small classifier of digits in the package, see
            :class:`DigitsExtractor`; ``"inception"``, 2048 features of torchmetrics' InceptionV3, which torch-fidelity
            provides and whose weights are downloaded once; or a module with the attribute ``num_features`` (F) that
            takes images in [0, 1], of the size it wants, to ``(B, F)``. An extractor is passed through, so that
            several metrics can share one.

    Returns:
        A module ``(B, C, H, W) -> (B, F)`` with ``num_features`` and ``fingerprint``.

    Raises:
        ValueError: an unknown name, or a module without ``num_features``.
        ModuleNotFoundError: ``"inception"`` without torch-fidelity.
        RuntimeError: Inception's weights cannot be had.

    Example:
        >>> extractor = feature_extractor("digits")
        >>> extractor(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 32])
    """
    check_feature(feature)
    if isinstance(feature, FeatureExtractor):
        return feature
    if isinstance(feature, nn.Module):
        return FeatureExtractor(deepcopy(feature), cast(int, feature.num_features))  # check_feature has seen to it
    if feature == "digits":
        return DigitsExtractor()
    return FeatureExtractor(_Inception(), 2048)


def check_feature(feature: str | nn.Module) -> None:
    """Refuse what :func:`feature_extractor` does not know, without building anything.

    Raises:
        ValueError: an unknown name, or a module without ``num_features``.
    """
    if not isinstance(feature, nn.Module):
        if feature not in ("digits", "inception"):
            raise ValueError(
                f'feature={must.told(feature)} must be "digits", "inception", or a module with num_features.'
            )
    elif not must.count.holds(getattr(feature, "num_features", None)):
        raise ValueError(
            f"feature={type(feature).__name__} needs the attribute num_features, the number of its features: "
            "set it on the module, as in network.num_features = 512."
        )


class FeatureExtractor(nn.Module):
    """A network that is never trained: no gradient, always in evaluation mode, float32 under any autocast.

    Args:
        network: network from images in [0, 1] to ``(B, F)`` or ``(B, F, 1, 1)``; frozen in place.
        num_features: number of features F.
    """

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network = network.float().requires_grad_(False)
        self.num_features = num_features
        self.eval()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode: its owner's ``train()`` would switch normalisation and dropout on."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: ``(B, C, H, W)`` of any floating dtype in [0, 1].

        Returns:
            ``(B, F)`` float32.

        Raises:
            ValueError: other shapes, dtypes or values, or a network with other than F features.
        """
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            features = self.network(images.float()).flatten(1)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self.network).__name__} gave {features.shape[1]} features: set its num_features="
                f"{self.num_features} to that number."
            )
        return features.float()

    def fingerprint(self) -> dict[str, str | int]:
        """Class, number of features and a hash of the weights: what must be equal for features to compare."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        kind = type(self.network)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return {"name": name, "num_features": self.num_features, "weights": digest.hexdigest()}


class DigitsExtractor(FeatureExtractor):
    """32 features of a classifier of handwritten digits, and the digits themselves.

    Images of any size are brought to 8 x 8 px and grey, see :class:`DigitsClassifier`. It has learnt from sharp images
    alone, so that it sees blur: a classifier that has seen enlarged images, too, learns to overlook it. Enlarged images
    are blurred, too: compare images of one original size.

    Example:
        >>> DigitsExtractor().classify(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2])
    """

    network: "_Features"

    def __init__(self) -> None:
        classifier = trained_digits_classifier()
        super().__init__(_Features(classifier), classifier.num_features)

    def classify(self, images: Tensor) -> Tensor:
        """The digit in each image: ``(B,)`` int64; images as in :meth:`forward`."""
        return self.network.classifier.head(self(images)).argmax(1)


class _Features(nn.Module):
    """A classifier's features as its output."""

    def __init__(self, classifier: DigitsClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class _Inception(nn.Module):
    """torchmetrics' InceptionV3 for images in [0, 1], grey or in colour, which it brings to 299 x 299 px."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self.inception = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'feature="inception" needs torch-fidelity (pip install torch-fidelity); '
                'give feature="digits" or a module of your own without it.'
            ) from error
        except OSError as error:
            raise RuntimeError(
                f'feature="inception": torch-fidelity could not download its weights ({error}); connect once, or give '
                'feature="digits" or a module of your own.'
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        # rounded, not cut off as by torchmetrics' normalize=True: 254.99998 of a real image's byte is 255
        return self.inception((images.expand(-1, 3, -1, -1) * 255).round().byte())


def check_images(images: Tensor) -> None:
    """Refuse all but floating ``(B, C, H, W)`` in [0, 1] with one or three channels."""
    must.tensor(dtype="any")("images", images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, C, H, W) with one channel or three, got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating in [0, 1], got {images.dtype}: divide bytes by 255.")
    if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):  # so that NaN is refused, too
        low, high = images.amin().item(), images.amax().item()
        raise ValueError(f"images must lie in [0, 1], got [{low:.3g}, {high:.3g}]: rescale or clamp them.")
