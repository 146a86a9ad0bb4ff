"""CapsNet as a LightningModule. Shapes: B images, L labels per image, J classes, K pose dimensions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelExactMatch

from lightning_plugins.capsnet import plots
from lightning_plugins.capsnet.layers import CapsuleDecoder, RoutingCapsules, SelfAttentionRouting
from lightning_plugins.capsnet.losses import align_labels, margin_loss, multi_hot
from lightning_plugins.capsnet.networks import (
    EfficientFeatures,
    Preset,
    PresetName,
    SabourFeatures,
    SuFeatures,
    initialize_as_efficient,
    initialize_as_official,
    resolve_preset,
)
from lightning_plugins.capsnet.routing import GradientKind, RoutingKind, compute_dtype
from lightning_plugins.capsnet.routing import lengths as pose_lengths
from lightning_plugins.capsnet.trace import RoutingTrace
from lightning_plugins.core import arguments as must
from lightning_plugins.core.batches import image_batch, warn_of_range
from lightning_plugins.core.checkpoint_data import read_as_data
from lightning_plugins.core.full_precision import widen
from lightning_plugins.core.hyperparameters import save_plain_hyperparameters
from lightning_plugins.core.launched import bring_home_whole
from lightning_plugins.core.lightning_internals import trainer_of
from lightning_plugins.core.logging import log_figures, log_losses
from lightning_plugins.core.lr_schedules import exponential_decay, optimizer_or_own
from lightning_plugins.core.modes import evaluating
from lightning_plugins.core.pictures import pictures_are_due
from lightning_plugins.core.random_state import draws_of_rank
from lightning_plugins.core.replaced_arguments import Replaced, refuse_replaced
from lightning_plugins.core.sharding import gather_for, shard_parts
from lightning_plugins.replay.recorder import is_replaying


@read_as_data
class CapsNet(LightningModule):
    r"""Capsule network: convolution, primary capsules, routed class capsules, reconstruction by a decoder.

    .. math:: L = w_m \sum_j T_j \max(0, m^+ - \|v_j\|)^2 + \lambda (1 - T_j) \max(0, \|v_j\| - m^-)^2
              + w_r \|x - \hat x\|^2

    Batches are dicts ``{"image": (B, C, H, W) in [0, 1], "label": (B,) or (B, L) int64}`` or pairs of these two; with
    several labels per image dicts with ``"parts": (B, L, C, H, W)``, too, the clean image of each label. A class is
    present when its capsule is long; the decoder sees the true classes' capsules in training and the predicted ones
    otherwise.

    Args:
        preset: published network with its constants, which every argument that is None takes from it:
            "sabour2017_paper", "sabour2017_official" (the authors' released code: loss scale, initialisation, biases
            and lowest rate of its own), "su2018" (kexue.fm/archives/5112) or "efficient" (Efficient-CapsNet, Mazzia et
            al. 2021; its batch norm makes DDP differ from one process).
        image_shape: shape (C, H, W) of the images; a batch of another one is refused.
        num_classes: number of classes J, 2 or more, whose labels are 0 to J - 1.
        num_labels: different classes shown in one image, L; 2 for MultiMNIST. Accuracy is then of the exact set.
        routing: how the couplings of capsules are found, "dynamic", "kmeans", "kmeans_squash", "uniform" or, in
            "efficient" only, "self_attention"; by default the preset's: "dynamic" in both of Sabour's, "kmeans" in
            "su2018", "self_attention" in "efficient".
        iterations: how often couplings are computed, the uniform first time included; by default 3, and 1 for
            self-attention.
        gradient: whether gradients pass through all routing iterations ("full", as in the papers' code) or the last
            weighted sum only ("last", cheaper and another training algorithm).
        share_weights: whether one vote transform serves all input capsules, in place of one for each pair; by default
            only in "su2018".
        squash_scale: constant c, above 0, in the squash's factor n^2 / (c + n^2) for length n; by default 1, and 0.5 in
            "su2018".
        leaky: whether an input capsule may vote for no class (CIFAR-10 in Sabour et al. 2017); no by default.
        channels: width of the first convolution; by default 256, in "su2018" 64, in "efficient" 32.
        kernel_size: side in pixels of the kernels, 9 by default for the first and the primary convolution; in "su2018"
            3 for all four, in "efficient" 9 for the depthwise one.
        num_types: number of primary capsule types T; by default 32, in "su2018" 1, in "efficient" 16.
        primary_dim: dimensions D of a primary capsule; by default 8, in "su2018" 128.
        capsule_dim: dimensions K of a class capsule; 16 in all presets.
        decoder_hidden: widths of the decoder's hidden layers; 512 and 1024 in Sabour et al. 2017, figure 2.
        downweight: weight, 0 or more, of the absent classes in the margin loss; by default 0.5, in "su2018" 0.25.
        margin_weight: factor, 0 or more, on the margin loss; by default 1, in "sabour2017_official" 0.05.
        reconstruction_weight: factor, 0 or more, on the squared error summed over an image; by default 0.0005, in
            "su2018" 0. With 0 no decoder is built.
        lr: learning rate of Adam; by default 0.001, in "efficient" 0.0005.
        lr_decay: factor in (0, 1] on the learning rate in every lr_decay_steps steps, applied smoothly, 1 for none; by
            default 0.96, in "su2018" 1, in "efficient" 0.97.
        lr_decay_steps: optimiser steps in which lr_decay is reached once; by default 2000, in "efficient" 3750.
        lr_min: lowest learning rate of the decay; by default 0, in "sabour2017_official" 1e-6.
        pictures_every_n_epochs: validation epochs from one set of logged pictures to the next; 0 for none.
        features: a network of your own from images to capsules of shape (B, N, D), in place of the preset's.
        optimizer: a factory of an optimizer in place of Adam; it has a rate of its own, and giving lr or the decay
            beside it is refused.
        scheduler: a factory of a learning-rate scheduler in place of the decay, stepped once per epoch.

    Raises:
        ValueError: an argument is out of range, contradicts the preset, or leaves no capsule for the image size.

    Example:
        >>> model = CapsNet()
        >>> sum(p.numel() for p in model.parameters())
        8215568
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10, 16])

    A subclass that overrides a ``build_*`` method sets what that method reads before ``super().__init__()``.

    Source: Sabour, Frosst, Hinton 2017, arXiv 1710.09829.
    """

    # What an optimizer or a scheduler of the user's takes the place of.
    replaced_by: ClassVar[Replaced] = {
        ("optimizer",): ("lr", "lr_decay", "lr_decay_steps", "lr_min"),
        ("scheduler",): ("lr_decay", "lr_decay_steps", "lr_min"),
    }
    gradient: GradientKind
    __call__: Callable[..., Tensor]  # of forward; torch says Any

    def __init__(
        self,
        preset: PresetName = "sabour2017_paper",
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        num_labels: int = 1,
        routing: RoutingKind | Literal["self_attention"] | None = None,
        iterations: int | None = None,
        gradient: GradientKind = "full",
        share_weights: bool | None = None,
        squash_scale: float | None = None,
        leaky: bool | None = None,
        channels: int | None = None,
        kernel_size: int | None = None,
        num_types: int | None = None,
        primary_dim: int | None = None,
        capsule_dim: int | None = None,
        decoder_hidden: Sequence[int] = (512, 1024),
        downweight: float | None = None,
        margin_weight: float | None = None,
        reconstruction_weight: float | None = None,
        lr: float | None = None,
        lr_decay: float | None = None,
        lr_decay_steps: int | None = None,
        lr_min: float | None = None,
        pictures_every_n_epochs: int = 1,
        features: nn.Module | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments = locals()
        super().__init__()
        save_plain_hyperparameters(self)
        bring_home_whole(self)
        must.check(
            arguments,
            image_shape=must.image_shape,
            num_classes=must.whole(2, why="capsules compete for the classes"),
            gradient=must.one_of(GradientKind),
            decoder_hidden=must.each(must.count, of="the layers' widths", empty=True),
            pictures_every_n_epochs=must.whole(0, why="0 is for none"),
            features=must.optional(must.module),
            optimizer=must.optional(must.function),
            scheduler=must.optional(must.function),
        )
        refuse_replaced(self, self.replaced_by, optimizer=optimizer, scheduler=scheduler)
        most = num_classes - 1
        must.whole(1, most, why=f"at most num_classes - 1 = {most}, as some class must be absent")(
            "num_labels", num_labels
        )
        overrides = {field.name: arguments[field.name] for field in fields(Preset) if field.name in arguments}
        self.preset = resolve_preset(preset, gradient=gradient, **overrides)
        self.image_shape, self.num_classes, self.num_labels = tuple(image_shape), num_classes, num_labels
        self.gradient, self.decoder_hidden = gradient, tuple(decoder_hidden)
        self.pictures_every_n_epochs = pictures_every_n_epochs
        self._optimizer, self._scheduler = optimizer, scheduler

        self.features = self.build_features() if features is None else features
        self.capsules = self.build_capsules(*self._capsule_shape())
        self.decoder = self.build_decoder() if self.preset.reconstruction_weight > 0 else None
        if self.preset.official_init:
            own = self.features if isinstance(self.features, SabourFeatures) else None  # the user's keep their weights
            initialize_as_official(own, self.capsules, self.decoder)
        self._build_metrics()
        self._shown: dict[str, Tensor] | None = None  # the images whose pictures are drawn

    # Networks: override any of these three in a subclass.

    def build_features(self) -> nn.Module:
        """The network from images to input capsules ``(B, N, D)``; give it ``grid = (T, H', W')`` for coupling maps."""
        kinds = {"sabour": SabourFeatures, "su": SuFeatures, "efficient": EfficientFeatures}
        return kinds[self.preset.network](self.image_shape, self.preset)

    def build_capsules(self, num_inputs: int, in_dim: int) -> nn.Module:
        """The layer from input capsules to class capsules ``(B, J, K)``; coupling pictures need its ``trace(u)``."""
        p = self.preset
        if p.routing == "self_attention":
            return SelfAttentionRouting(in_dim, self.num_classes, p.capsule_dim, num_inputs)
        return RoutingCapsules(
            in_dim,
            self.num_classes,
            p.capsule_dim,
            None if p.share_weights else num_inputs,
            p.routing,
            p.iterations,
            self.gradient,
            p.squash_scale,
            bias=p.official_init,
            leaky=p.leaky,
        )

    def build_decoder(self) -> nn.Module:
        """The network from poses ``(B, J, K)`` and labels to images; built only when reconstruction is trained."""
        decoder = CapsuleDecoder(self.num_classes, self.preset.capsule_dim, self.image_shape, self.decoder_hidden)
        if self.preset.network == "efficient":
            initialize_as_efficient(decoder)
        return decoder

    def configure_model(self) -> None:
        """Shard the parts under ``ModelParallelStrategy`` (FSDP2); no effect otherwise.

        Raises:
            ValueError: the strategy asks for tensor parallelism, which the capsules are not written for.
        """
        widen(self, trainer_of(self))
        if shard_parts(self, self.features, self.capsules, self.decoder):
            gather_for(self, "routing_trace")
            if hasattr(self.capsules, "trace"):
                gather_for(self.capsules, "trace")

    @torch.no_grad()
    def _capsule_shape(self) -> tuple[int, int]:
        """Number and dimensions of the input capsules, from one blank image."""
        with evaluating(self.features):
            u = self.features(torch.zeros(1, *self.image_shape))
        if u.ndim != 3:
            raise ValueError(f"features must give capsules of shape (B, N, D), got {tuple(u.shape)} for one image.")
        return u.shape[1], u.shape[2]

    def _build_metrics(self) -> None:
        if self.num_labels == 1:
            accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        else:
            accuracy = MultilabelExactMatch(self.num_classes, validate_args=False)
        metrics = MetricCollection({"accuracy": accuracy})
        self.metrics = nn.ModuleDict({f"{stage}_metrics": metrics.clone(f"{stage}/") for stage in _STAGES})

    # What the network computes.

    def forward(self, image: Tensor) -> Tensor:
        """Poses ``(B, J, K)`` of the class capsules; a pose's length is its class's score in [0, 1)."""
        self._check_image(image)
        return self.capsules(self.features(image))

    def predict_labels(self, poses: Tensor) -> Tensor:
        """The longest capsule's class ``(B,)``, or the L longest ones' in ascending order ``(B, L)``."""
        lengths = pose_lengths(poses)
        if self.num_labels == 1:
            return lengths.argmax(-1)
        return lengths.topk(self.num_labels).indices.sort(-1).values

    def reconstruct(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        """Rebuild images from the capsules of ``labels``, or of the predicted classes.

        Args:
            image: ``(B, C, H, W)`` in [0, 1].
            labels: ``(B,)`` or ``(B, L)`` classes whose capsules are decoded; the predicted ones by default.

        Returns:
            ``(B, C, H, W)``, or ``(B, L, C, H, W)`` with one image per label.
        """
        poses = self(image)
        return self._need_decoder()(poses, self.predict_labels(poses) if labels is None else labels)

    def perturb(self, image: Tensor, values: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Rebuild images with a value added to one pose dimension at a time (figure 4 of Sabour et al. 2017).

        Args:
            image: ``(B, C, H, W)`` in [0, 1].
            values: ``(V,)`` what is added; -0.25 to 0.25 in steps of 0.05 by default.
            labels: ``(B,)`` classes whose capsules are perturbed; the longest ones by default.

        Returns:
            ``(B, K, V, C, H, W)`` images, one for each dimension and value.
        """
        decoder = self._need_decoder()
        poses: Tensor = self(image)
        values = plots.perturbation_values() if values is None else values
        B, J, K = poses.shape
        labels = pose_lengths(poses).argmax(-1) if labels is None else labels
        deltas = torch.eye(K, dtype=poses.dtype, device=poses.device)[:, None] * values.to(poses)[:, None]  # (K, V, K)
        moved = poses[:, None, None] + deltas[None, :, :, None]  # (B, K, V, J, K); the decoder masks the others
        rows = labels.repeat_interleave(K * len(values))
        return decoder(moved.reshape(-1, J, K), rows).unflatten(0, (B, K, len(values)))

    def routing_trace(self, image: Tensor) -> RoutingTrace:
        """Every routing iteration's couplings ``(R, B, N, J)``, poses, k-means objective and coupling entropy."""
        self._check_image(image)
        capsules: Any = self.capsules  # of a kind that has a trace
        return capsules.trace(self.features(image))

    def _need_decoder(self) -> nn.Module:
        if self.decoder is None:
            raise ValueError("This CapsNet has no decoder (reconstruction_weight=0); train one with a positive weight.")
        return self.decoder

    def _check_image(self, image: Tensor) -> None:
        if tuple(image.shape[1:]) != self.image_shape:
            raise ValueError(
                f"CapsNet was built for image_shape={self.image_shape}, got images {tuple(image.shape[1:])}."
            )

    def _check_labels(self, labels: Tensor) -> None:
        """Once per epoch, as it waits for the device; a wrong class would end in an assertion of a kernel."""
        low, high = labels.aminmax()
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} but a batch has labels from {low} to {high}; they must be "
                f"0 to {self.num_classes - 1}."
            )

    # Training.

    def loss(self, batch: Mapping[str, Tensor], poses: Tensor | None = None) -> dict[str, Tensor]:
        """The named terms whose sum is trained: ``margin`` and, with a decoder, ``reconstruction``.

        Args:
            batch: images, labels and, with several labels, parts, as the class documents them.
            poses: ``self(batch["image"])`` where it has been computed already.
        """
        batch = image_batch(batch, type(self).__name__, labels=True)
        v: Tensor = self(batch["image"]) if poses is None else poses
        terms = {"margin": self.preset.margin_weight * self._margin_loss(v, batch["label"])}
        if self.decoder is not None:
            sse = self._reconstruction_sse(v, batch)
            terms["reconstruction"] = self.preset.reconstruction_weight * sse
        return terms

    def _margin_loss(self, poses: Tensor, labels: Tensor) -> Tensor:
        if labels.numel() != len(poses) * self.num_labels:
            raise ValueError(
                f"num_labels={self.num_labels} but the batch has labels of shape {tuple(labels.shape)} for "
                f"{len(poses)} images; set num_labels to the labels per image."
            )
        return margin_loss(pose_lengths(poses), labels, downweight=self.preset.downweight)

    def _reconstruction_sse(self, poses: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Squared error summed over an image (and over its parts), averaged over the batch."""
        labels, target = batch["label"], batch["image"] if self.num_labels == 1 else batch.get("parts")
        if target is None:
            raise ValueError(
                "A CapsNet with num_labels > 1 and a decoder needs batches with 'parts', the clean images."
            )
        if not self.training:
            predictions = self.predict_labels(poses)
            labels = predictions if self.num_labels == 1 else align_labels(predictions, labels)
        error = self._need_decoder()(poses, labels) - target
        return error.to(compute_dtype(error)).square().sum() / len(poses)

    def _step(self, batch: Any, batch_idx: int, stage: str) -> Tensor:
        batch = image_batch(batch, type(self).__name__, labels=True)
        if batch_idx == 0:
            self._check_labels(batch["label"])
            warn_of_range(batch["image"], type(self).__name__)
        poses = self(batch["image"])
        terms = self.loss(batch, poses)
        loss = torch.stack([*terms.values()]).sum()
        if not is_replaying():
            log_losses(self, stage, loss, terms if len(terms) > 1 else {}, rows=len(poses))
        metrics: Any = self.metrics[f"{stage}_metrics"]
        metrics.update(*self._scores(poses.detach(), batch["label"]))
        self.log_dict(metrics, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def _scores(self, poses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        predicted = self.predict_labels(poses)
        if self.num_labels == 1:
            return predicted, labels
        return multi_hot(predicted, self.num_classes), multi_hot(labels, self.num_classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum the terms of :meth:`loss` and log them."""
        with draws_of_rank(self, self.current_epoch, batch_idx):
            return self._step(batch, batch_idx, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the accuracy; keep the first images for the pictures."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the accuracy; keep the first images for the pictures."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        batch = image_batch(batch, type(self).__name__, labels=True)
        self._step(batch, batch_idx, stage)
        if batch_idx == 0:
            self._shown = {key: batch[key][:_NUM_SHOWN] for key in ("image", "label", "parts") if key in batch}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``prediction`` (see :meth:`predict_labels`), its length as ``score``, all ``lengths``, ``poses``, images."""
        poses = self(image_batch(batch, type(self).__name__)["image"])
        prediction = self.predict_labels(poses)
        lengths = pose_lengths(poses)
        score = lengths.gather(1, prediction.view(len(poses), -1)).view(prediction.shape)
        output = {"prediction": prediction, "score": score, "lengths": lengths, "poses": poses}
        if self.decoder is not None:
            output["reconstruction"] = self.decoder(poses, prediction)
        return output

    def configure_optimizers(self) -> Any:
        """Adam with the preset's smooth exponential decay, unless ``optimizer`` or ``scheduler`` is given."""
        p = self.preset

        def decay(adam: Optimizer) -> dict[str, Any]:
            scheduler = exponential_decay(adam, p.lr_decay, p.lr_decay_steps, p.lr_min)
            return {"scheduler": scheduler, "interval": "step"}

        schedule = None if p.lr_decay == 1 else decay
        return optimizer_or_own(
            self.parameters(), lambda own: Adam(own, p.lr), schedule, self._optimizer, self._scheduler
        )

    # Pictures.

    def on_validation_epoch_end(self) -> None:
        """Draw the pictures on their cadence, and whenever validation was asked for by itself."""
        self._log_pictures("val")

    def on_test_epoch_end(self) -> None:
        """Draw the pictures of the test images."""
        self._log_pictures("test")

    def _log_pictures(self, stage: str) -> None:
        if self._shown is None or not pictures_are_due(self, self.pictures_every_n_epochs):
            return  # None: a subclass with evaluation steps of its own
        # Every rank computes, because a sharded forward is collective; rank zero writes.
        log_figures(self.trainer, stage, plots.capsnet_figures(self, self._shown), self.global_step)
        self._shown = None


_STAGES = ("train", "val", "test")
_NUM_SHOWN = 10
