"""What metrics of two sets of images share: the extractor they do not train, and rows of features of all ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_plugins.core import arguments as must
from lightning_plugins.core.merging import Merging
from lightning_plugins.metrics.extractors import FeatureExtractor, feature_extractor


class FeatureMetric(Merging):
    """To stand before a metric whose ``update(features, real)`` takes rows, so that it takes images.

    The extractor is hidden from the modules around: it is in no ``parameters()``, ``state_dict()`` or DDP bucket, and
    no ``train()`` reaches it; it moves with the metric from device to device. Casting the module around, as
    ``precision="bf16-true"`` does, leaves the extractor and the sums as exact as they are.

    Args:
        feature: a name or module, see :func:`feature_extractor`, or ``None`` if ``update`` is given features.
    """

    extractor: FeatureExtractor | None

    def __init__(self, feature: str | nn.Module | None, /, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        extractor = None if feature is None else feature_extractor(feature)
        object.__setattr__(self, "extractor", extractor)  # past nn.Module's, which would make it a part

    def update(self, images: Tensor, real: bool) -> None:
        """Take more images.

        Args:
            images: ``(B, C, H, W)`` floating in [0, 1] with one channel or three; features ``(B, F)`` under
                ``feature=None``.
            real: whether they are real or generated.

        Raises:
            ValueError: another shape, dtype or range.
        """
        must.check(locals(), images=must.tensor(dtype="any"), real=must.flag)
        features = images.to(self.device)
        if self.extractor is None:
            _check_features(features)
        else:
            features = self.extractor(features)
        super().update(features, real)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a batch is real or generated, so that it has no value of its own."""
        raise TypeError(f"{type(self).__name__} has no value of one batch: call update(images, real) and compute().")

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take the images of another metric of this kind, as if its updates had followed this one's.

        Args:
            incoming_state: the other metric, or its states by name, whose features must be of the same extractor.

        Raises:
            ValueError: its features are of another extractor, or of another number.
        """
        if isinstance(incoming_state, FeatureMetric) and incoming_state.fingerprint() != self.fingerprint():
            raise ValueError(
                f"merge_state: the other {type(self).__name__} has features of {incoming_state.fingerprint()}, this "
                f"one of {self.fingerprint()}: merge metrics with the same feature."
            )
        super().merge_state(incoming_state)

    def reset(self) -> None:
        """Forget the generated images; the real ones too under ``reset_real_features``."""
        with torch.inference_mode(False):  # else sums made in Lightning's validation could not grow outside of it
            super().reset()

    def fingerprint(self) -> dict[str, str | int]:
        """What makes features comparable: the extractor's, see :meth:`FeatureExtractor.fingerprint`."""
        return {"name": "features"} if self.extractor is None else self.extractor.fingerprint()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        moved = super()._apply(lambda value: value.to(fn(value).device), exclude_state)
        if self.extractor is not None:
            self.extractor.to(self.device)
        return moved


class FeatureRows(Metric):
    """Keeps all rows ``(N, F)`` of both kinds: 4 N F bytes.

    torchmetrics gathers lists of one-dimensional tensors alone from ranks of which one has none; hence flat rows.

    Args:
        reset_real_features: whether ``reset()`` forgets the real rows, too.
    """

    is_differentiable, higher_is_better, full_state_update = False, None, False
    real_features: list[Tensor]
    fake_features: list[Tensor]
    num_features: Tensor

    def __init__(self, reset_real_features: bool = False) -> None:
        super().__init__()
        must.flag("reset_real_features", reset_real_features)
        self.reset_real_features = reset_real_features
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")
        self.add_state("num_features", tensor(0), dist_reduce_fx="max")

    def update(self, features: Tensor, real: bool) -> None:
        """Take rows ``(B, F)``."""
        if self.num_features not in (0, features.shape[1]):
            raise ValueError(f"features have {features.shape[1]} columns and had {self.num_features} before.")
        self.num_features = self.num_features.new_tensor(features.shape[1])
        (self.real_features if real else self.fake_features).append(features.float().flatten())

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take another's rows after the own: torchmetrics puts them before, and order decides what is drawn."""
        own = {name: len(getattr(self, name)) for name in ("real_features", "fake_features")}
        theirs: dict[str, Any] = incoming_state if isinstance(incoming_state, dict) else incoming_state.metric_state
        widths = {int(width) for width in (self.num_features, theirs.get("num_features", 0)) if width}
        if len(widths) > 1:
            raise ValueError(
                f"merge_state: one metric's features have {min(widths)} columns, the other's {max(widths)}."
            )
        super().merge_state(incoming_state)
        for name, count in own.items():
            joined = getattr(self, name)
            setattr(self, name, joined[len(joined) - count :] + joined[: len(joined) - count])

    def rows(self) -> tuple[Tensor, Tensor]:
        """Real ``(N, F)`` and generated ``(M, F)`` rows in double precision."""
        width = max(1, int(self.num_features))
        both = (self.real_features, self.fake_features)
        real, fake = (dim_zero_cat(flat) if len(flat) else self.num_features.new_zeros(0) for flat in both)
        return real.view(-1, width).double(), fake.view(-1, width).double()

    def reset(self) -> None:
        """Forget the generated rows, and the real ones if wanted."""
        real, num_features = list(self.real_features), self.num_features  # a copy: torchmetrics empties the list
        super().reset()
        if not self.reset_real_features:
            self.real_features, self.num_features = real, num_features


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        shape = tuple(features.shape)
        raise ValueError(f"feature=None: update takes floating features (B, F), got {features.dtype} of shape {shape}.")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity: look at the network that gave them.")
