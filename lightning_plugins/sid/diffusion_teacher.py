"""A diffusion model from scratch, for whoever has no teacher. Shapes: B images of a process, (C, H, W) of one."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core import random_numbers
from lightning_plugins.core.activation_checkpointing import checkpoint_activations
from lightning_plugins.core.batches import image_batch, warn_of_range
from lightning_plugins.core.checkpoint_data import read_as_data
from lightning_plugins.core.distributed import means_over_ranks
from lightning_plugins.core.full_precision import FullPrecisionMean, widen
from lightning_plugins.core.hyperparameters import save_plain_hyperparameters
from lightning_plugins.core.launched import bring_home_whole
from lightning_plugins.core.lightning_internals import trainer_of
from lightning_plugins.core.logging import log_image, measured_figures
from lightning_plugins.core.lr_schedules import WARMUP, linear_warmup_decay, optimizer_or_own
from lightning_plugins.core.modes import evaluating
from lightning_plugins.core.new_folder import new_folder
from lightning_plugins.core.pictures import image_grid, pictures_are_due
from lightning_plugins.core.random_state import draws_of_rank
from lightning_plugins.core.replaced_arguments import Replaced, refuse_replaced
from lightning_plugins.core.sample_keys import SampleKeys, row_keys
from lightning_plugins.core.sharding import shard_networks
from lightning_plugins.replay.recorder import is_replaying
from lightning_plugins.sid.card import teacher_card
from lightning_plugins.sid.conditions import conditions
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.networks import update_average
from lightning_plugins.sid.sampling import many_steps

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Prediction = Literal["epsilon", "v_prediction"]
BetaSchedule = Literal["linear", "squaredcos_cap_v2"]


@read_as_data
class DiffusionTeacher(LightningModule):
    r"""Train a diffusers UNet2DModel on images, and write it as a pipeline that SiD takes as its teacher.

    .. math:: L = \|n - \hat n(x_t, t)\|^2, \qquad x_t = \bar a_t x_0 + \bar b_t n, \qquad t \sim U\{0, \dots, T - 1\}

    or the same of the velocity :math:`v = \bar a_t n - \bar b_t x_0`, averaged over pixels. What samples, is validated
    and is written is a running mean of the weights. Noise depends on (seed, epoch, batch, place in the batch of all
    processes) alone, so that a run that is resumed draws what an uninterrupted one would, and several processes draw
    what one with the joined batch does.

    Batches are dicts ``{"image": (B, C, H, W) in [0, 1], "label": (B,) int64}``, pairs of these two, or images; labels
    are read only with ``conditional``. ``val/loss`` is the loss of the running mean with the same noise every time:
    that of a sample hangs on its number in the split, or on the ``"key"`` ``(B,)`` int64 that a batch may have.

    Args:
        image_shape: channels, height and width of the images; height and width must be divisible by 2 once for each
            level but the first (by 4 with three levels).
        num_classes: number of classes; read only if the model is conditional.
        conditional: tell the network the class, and choose it when sampling.
        block_out_channels: channels of each level, multiples of 8; the feature maps of each have half the height and
            width of those before. (128, 256, 256, 256) for the 32 x 32 px of CIFAR-10 in Ho et al. 2020.
        layers_per_block: residual blocks on the way down of a level; 2 in Ho et al. 2020.
        attention_levels: levels with self-attention, counted from the smallest feature maps; the blocks between the
            way down and up have it always.
        prediction_type: what the network predicts: epsilon, the noise, or v_prediction, the velocity.
        beta_schedule: how the noise grows from step to step: linear, or squaredcos_cap_v2 (Nichol and Dhariwal 2021).
        num_train_timesteps: number of noise levels; 1000 in the papers. The linear schedule's ends scale with 1000 over
            it, so that the last level is noise.
        lr: AdamW's highest rate, reached by a linear warm-up and followed by a linear decay to 0.
        warmup: optimiser steps of the warm-up, or below 1 their share of all; 0 for none.
        weight_decay: AdamW's decay of all weights; 0.01 is torch's default.
        ema_decay: share of the running mean that stays in a step; in the first ones it is smaller, (1 + n) / (10 + n)
            after n steps. 0.999 for some thousand steps, 0.9999 for some hundred thousand.
        seed: seed of all noise, with the epoch, the batch and the place in the batch of all processes.
        activation_checkpointing: keep only the inputs of the network's blocks in training and compute the blocks again
            in the backward pass: much less memory at the cost of a second forward pass, and the same gradients.
        pictures_every_n_epochs: log samples after every so many validation epochs; 0 for none.
        export_to: folder that the pipeline is written to at the end of training; none by default, nor under
            fast_dev_run. A relative one is below the current folder.
        optimizer: replaces AdamW and its schedule; giving lr, weight_decay or warmup beside it is refused.
        scheduler: replaces the schedule, stepped once per epoch.

    Raises:
        ValueError: an argument is out of range or does not fit another.

    Example:
        >>> teacher = DiffusionTeacher(image_shape=(1, 8, 8), block_out_channels=(8, 16))
        >>> teacher.sample(3, generator=torch.Generator().manual_seed(0), num_steps=2).shape
        torch.Size([3, 1, 8, 8])

    Source: Ho, Jain, Abbeel 2020 (arXiv 2006.11239), eq. 14; Salimans & Ho 2022 (arXiv 2202.00512) for v.
    """

    # What an optimizer or a scheduler of the user's takes the place of.
    replaced_by: ClassVar[Replaced] = {("optimizer",): ("lr", "warmup", "weight_decay"), ("scheduler",): ("warmup",)}

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        num_classes: int = 10,
        conditional: bool = False,
        block_out_channels: Sequence[int] = (16, 32),
        layers_per_block: int = 1,
        attention_levels: int = 1,
        prediction_type: Prediction = "epsilon",
        beta_schedule: BetaSchedule = "linear",
        num_train_timesteps: int = 1000,
        lr: float = 2e-3,
        warmup: int | float = 0.1,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
        seed: int = 0,
        activation_checkpointing: bool = False,
        pictures_every_n_epochs: int = 1,
        export_to: str | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        bring_home_whole(self)
        _check_arguments(locals())
        refuse_replaced(self, self.replaced_by, optimizer=optimizer, scheduler=scheduler)
        self.image_shape, self.num_classes, self.conditional = tuple(image_shape), num_classes, conditional
        self.block_out_channels, self.layers_per_block = tuple(block_out_channels), layers_per_block
        self.attention_levels = attention_levels
        self.prediction_type, self.beta_schedule = prediction_type, beta_schedule
        self.num_train_timesteps = num_train_timesteps
        self.lr, self.warmup, self.weight_decay, self.ema_decay = lr, warmup, weight_decay, ema_decay
        self.seed, self.pictures_every_n_epochs, self.export_to = seed, pictures_every_n_epochs, export_to
        self.activation_checkpointing = activation_checkpointing
        self._results: dict[str, float] = {}  # of the latest validation and test, for the model card
        self._steps = 0  # trained, for the same
        self._optimizer, self._scheduler = optimizer, scheduler

        self.denoiser = Denoiser(self.build_network(), self.build_scheduler())
        self.average = self.denoiser.sharing(copy.deepcopy(self.denoiser.network)).requires_grad_(False)
        self._keys = SampleKeys()
        self.losses = nn.ModuleDict({f"{stage}_loss": FullPrecisionMean() for stage in ("val", "test")})

    # The model: override any of these two in a subclass.

    def build_network(self) -> nn.Module:
        """The network in training, of a class of diffusers."""
        from diffusers import UNet2DModel

        channels, height, width = self.image_shape
        levels = len(self.block_out_channels)
        attends = [levels - level <= self.attention_levels for level in range(levels)]
        common = math.gcd(*self.block_out_channels)
        return UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
            up_block_types=tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)),
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=math.gcd(32, common // 4),  # four channels a group and 32 groups at most, as Ho et al.
            num_class_embeds=self.num_classes if self.conditional else None,
        )

    def build_scheduler(self) -> "DDPMScheduler":
        """The noise levels and the prediction, as the exported pipeline's scheduler."""
        from diffusers import DDPMScheduler

        scale = 1000 / self.num_train_timesteps
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=1e-4 * scale,
            beta_end=0.02 * scale,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            timestep_spacing="trailing",  # few steps begin at the last level too
        )

    def configure_model(self) -> None:
        """Shard the networks under ``ModelParallelStrategy`` (FSDP2); no effect otherwise."""
        widen(self, trainer_of(self))
        if self.activation_checkpointing:  # not when it is made: diffusers' switch cannot be pickled to new processes
            checkpoint_activations(self.denoiser.network)
        if self.device_mesh is not None:
            shard_networks(self, self.denoiser, self.average)

    # Samples.

    def forward(self, x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        """The mean clean images of noisy ``(B, C, H, W)`` in EDM scaling and [-1, 1], by the running mean."""
        return self.average(x, sigma, **conditioning)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int = 50,
    ) -> Tensor:
        """Draw images by the running mean.

        Args:
            num_samples: how many images, n.
            labels: ``(n,)`` int64 classes of a conditional model; uniform at random by default.
            generator: where the noise comes from, on any device; torch's global generator by default.
            num_steps: calls of the network in :func:`~lightning_plugins.sid.sampling.many_steps`.

        Returns:
            ``(n, C, H, W)`` in [0, 1], float32.

        Raises:
            ValueError: classes for a model that has none.
        """
        noise = random_numbers.randn((num_samples, *self.image_shape), generator, self.device)
        if self.conditional and labels is None:
            labels = random_numbers.randint(self.num_classes, (num_samples,), generator, self.device)
        with evaluating(self.average):
            images = many_steps(self.average, noise, num_steps, self._conditioning(labels, num_samples))
        return (images / 2 + 0.5).clamp(0, 1)

    def _conditioning(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        """The network's keyword arguments."""
        if not self.conditional:
            if labels is not None:
                raise ValueError(
                    "labels were given, but this DiffusionTeacher is not conditional: train one with conditional=True."
                )
            return {}
        must.class_labels(labels, count, self.num_classes)
        return {"class_labels": labels.to(self.device)}

    # Training.

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The mean error of the noise or the velocity, as ``denoising``, at random levels.

        Args:
            batch: images ``(B, C, H, W)`` in [0, 1] as ``image``, and ``label`` ``(B,)`` of a conditional model.
            generator: where levels and noise come from, on the module's device; in training by rows.
        """
        return {"denoising": self._errors(self.denoiser, batch, generator).mean()}

    def _errors(self, denoiser: Denoiser, batch: Any, generator: torch.Generator) -> Tensor:
        """``(B,)``: the squared error of D, weighed as that of what the network predicts."""
        batch = image_batch(batch, type(self).__name__, labels=self.conditional)
        image = batch["image"]
        if tuple(image.shape[1:]) != self.image_shape:
            raise ValueError(
                f"DiffusionTeacher was built for image_shape={self.image_shape}, got images {tuple(image.shape[1:])}."
            )
        clean, n = 2 * image.float() - 1, len(image)
        index = random_numbers.randint(self.num_train_timesteps, (n,), generator, image.device)
        noise = random_numbers.randn(clean.shape, generator, image.device)
        sigma = denoiser.sigmas[index]
        conditioning = self._conditioning(batch["label"] if self.conditional else None, n)
        denoised = denoiser(clean + sigma.view(-1, 1, 1, 1) * noise, sigma, **conditioning)
        weight = 1 / sigma**2 if self.prediction_type == "epsilon" else 1 + 1 / sigma**2
        return weight * (denoised - clean).square().flatten(1).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum the terms of :meth:`loss` and log the sum."""
        batch = image_batch(batch, type(self).__name__, labels=self.conditional)
        if batch_idx == 0:
            warn_of_range(batch["image"], type(self).__name__)
        n = len(batch["image"])
        draws = random_numbers.RowGenerator(row_keys(self, n, batch), self.seed, 1 + self.current_epoch, batch_idx)
        with draws_of_rank(self, self.current_epoch, batch_idx):
            terms = self.loss(batch, draws)
        loss = torch.stack([*terms.values()]).sum()
        if not is_replaying():
            means, _ = means_over_ranks({"train/loss": loss}, weight=n)
            self.log_dict(means, prog_bar=True, batch_size=n)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Then move the running mean; here, because a checkpoint of this step is written right after."""
        super().optimizer_step(*args, **kwargs)
        n = self.global_step
        update_average(self.average, self.denoiser, min(self.ema_decay, (1 + n) / (10 + n)))

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and decay, unless ``optimizer`` or ``scheduler`` is given."""
        return optimizer_or_own(
            self.denoiser.parameters(),
            lambda parameters: torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay),
            self._schedule,
            self._optimizer,
            self._scheduler,
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        schedule = linear_warmup_decay(optimizer, self.warmup, lambda: self.trainer.estimated_stepping_batches)
        return {"scheduler": schedule, "interval": "step"}

    def setup(self, stage: str) -> None:
        """Refuse before training what would fail after it.

        Raises:
            FileExistsError: ``export_to`` exists and is not empty.
            ValueError: weights in half precision, in which the running mean would stand still.
        """
        if stage != "fit":
            return
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            precision = self.trainer.precision
            raise ValueError(
                f"precision={precision!r} keeps the weights in half precision, where a running mean of decay "
                f"{self.ema_decay} rounds to no change: use {precision.replace('true', 'mixed')!r}."
            )
        if self.export_to is not None and not self.trainer.fast_dev_run:
            _checked_folder(self.export_to)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the figures for the model card."""
        self._keep_progress()
        checkpoint[_RECORD] = {"results": self._results}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the figures; a checkpoint may be anyone's, or of a version that kept none."""
        record = checkpoint.get(_RECORD)
        results = record.get("results") if isinstance(record, Mapping) else None
        if isinstance(results, Mapping) and all(isinstance(value, int | float) for value in results.values()):
            self._results = {str(name): float(value) for name, value in results.items()}
        self._steps = int(checkpoint.get("global_step") or 0)

    def _keep_progress(self) -> None:
        """What the model card tells of the run under way, if there is one."""
        if trainer_of(self) is not None:
            self._results = {**self._results, **measured_figures(self.trainer)}
            self._steps = self.global_step or self._steps

    def on_fit_end(self) -> None:
        """Write the pipeline, if ``export_to`` says where."""
        if self.export_to is not None and not self.trainer.fast_dev_run:
            self.export(self.export_to)

    # Evaluation.

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sum up the losses of the running mean."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Sum up the losses of the running mean."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        batch = image_batch(batch, type(self).__name__, labels=self.conditional)
        errors = self._errors(self.average, batch, self._draws(len(batch["image"]), batch, batch_idx))
        self.losses[f"{stage}_loss"].update(errors)

    def _draws(self, rows: int, batch: Any, batch_idx: int) -> random_numbers.RowGenerator:
        """Random numbers that a sample has whatever its batch and its process."""
        return random_numbers.RowGenerator(self._keys(self, rows, batch, batch_idx), self.seed, 0)

    def on_validation_epoch_end(self) -> None:
        """Log the loss; draw samples on their cadence."""
        self.log("val/loss", self._mean_loss("val"), prog_bar=True, sync_dist=True)  # equal on all ranks
        if pictures_are_due(self, self.pictures_every_n_epochs):
            self._log_pictures("val")

    def on_test_epoch_end(self) -> None:
        """Log the loss and samples."""
        self.log("test/loss", self._mean_loss("test"), sync_dist=True)
        if self.pictures_every_n_epochs:
            self._log_pictures("test")

    def _mean_loss(self, stage: str) -> Tensor:
        metric = self.losses[f"{stage}_loss"]
        loss = metric.compute()
        metric.reset()
        return loss

    def _log_pictures(self, stage: str) -> None:
        # Every rank computes, because a sharded forward is collective; rank zero writes. The same noise each time.
        images = self.sample(_NUM_SHOWN, generator=random_numbers.generator(self.device, self.seed))
        grid = image_grid(_visible(images), zoom=max(1, 32 // images.shape[-1]))
        log_image(self.trainer, f"{stage}/samples", grid, self.global_step)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``image`` ``(B, C, H, W)`` in [0, 1]: a sample for each row of the batch, of its class if conditional."""
        rows, labels, _ = conditions(batch, self.conditional, type(self).__name__)
        return {"image": self.sample(rows, labels=labels, generator=self._draws(rows, batch, batch_idx))}

    # Export.

    def export(self, folder: str | Path) -> Path:
        """Write the running mean as a diffusers pipeline with a model card; on several processes all must call it.

        ``DiffusionPipeline.from_pretrained(folder)()`` then draws images: a ``DDPMPipeline``, or for a conditional
        model a ``ConsistencyModelPipeline`` with DDIM, as the former takes no ``class_labels``; give that one
        ``num_inference_steps=50``.

        Args:
            folder: where to write; new or empty.

        Returns:
            The folder.

        Raises:
            FileExistsError: ``folder`` exists and is not empty.
        """
        folder = _checked_folder(folder)
        network = self.average.network
        state = network.state_dict()
        weights = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
        if self.global_rank == 0:
            whole = type(network).from_config(network.config)
            whole.load_state_dict({name: value.cpu() for name, value in weights.items()})
            self._keep_progress()
            pipeline = self._pipeline(whole.eval())
            settings = {name: value for name, value in self.hparams.items() if name in _ON_THE_CARD}
            card = {"settings": {"steps": self._steps, **settings}, "metrics": self._results}
            with new_folder(folder) as partial:
                pipeline.save_pretrained(partial)
                (partial / "README.md").write_text(teacher_card(pipeline, card), encoding="utf-8")
        return folder

    def _pipeline(self, network: nn.Module) -> Any:
        from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline

        scheduler = self.build_scheduler()
        if self.conditional:
            return ConsistencyModelPipeline(network, DDIMScheduler.from_config(scheduler.config))
        return DDPMPipeline(network, scheduler)


def _visible(images: Tensor) -> Tensor:
    """As many channels as a picture has: one or three."""
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True)


def _checked_folder(folder: str | Path) -> Path:
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty: move it away, or export to a new folder (export_to, or export(folder))."
        )
    return folder


_RECORD = "diffusion_teacher"
_ON_THE_CARD = ("image_shape", "block_out_channels", "layers_per_block", "attention_levels", "prediction_type")
_ON_THE_CARD += ("beta_schedule", "num_train_timesteps", "lr", "ema_decay")
_RULES = {
    "image_shape": must.image_shape,
    "num_classes": must.count,
    "conditional": must.flag,
    "block_out_channels": must.each(must.count, of="the channels of each level, multiples of 8"),
    "layers_per_block": must.count,
    "attention_levels": must.whole(0),
    "prediction_type": must.one_of(Prediction),
    "beta_schedule": must.one_of(BetaSchedule),
    "num_train_timesteps": must.whole(50),
    "lr": must.positive,
    "warmup": WARMUP,
    "weight_decay": must.non_negative,
    "ema_decay": must.number(0, below=1, why="the share that stays in a step"),
    "seed": must.seed,
    "activation_checkpointing": must.flag,
    "pictures_every_n_epochs": must.whole(0, why="0 is for none"),
    "export_to": must.optional(must.path),
    "optimizer": must.optional(must.function),
    "scheduler": must.optional(must.function),
}


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what no other check sees, in one sentence."""
    must.check(arguments, **_RULES)
    channels, levels = list(arguments["block_out_channels"]), len(arguments["block_out_channels"])
    if any(number % 8 for number in channels):
        raise ValueError(f"block_out_channels={channels} must be multiples of 8, one number for each level.")
    if arguments["attention_levels"] > levels:
        raise ValueError(
            f"attention_levels={arguments['attention_levels']} is more than the {levels} levels of "
            f"block_out_channels={channels}."
        )
    _, height, width = arguments["image_shape"]
    if height % (unit := 2 ** (levels - 1)) or width % unit:
        raise ValueError(
            f"image_shape={tuple(arguments['image_shape'])} cannot be halved {levels - 1} times, as the "
            f"{levels} levels of block_out_channels={channels} need: give images of multiples of {unit} px (by the "
            "data's image_size, for example), or fewer levels."
        )
    if arguments["conditional"] and height != width:
        raise ValueError(
            f"image_shape={tuple(arguments['image_shape'])}: a conditional model needs square images, as the only "
            "pipeline that takes classes (diffusers' ConsistencyModelPipeline) draws no others."
        )


_NUM_SHOWN = 64
