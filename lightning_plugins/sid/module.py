"""SiD as a LightningModule. Shapes: B samples of a process, (C, H, W) of an image or latent."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_plugins.core.activation_checkpointing import checkpoint_activations
from lightning_plugins.core.checkpoint_data import read_as_data
from lightning_plugins.core.distributed import means_over_ranks, rank_of_process
from lightning_plugins.core.full_precision import widen
from lightning_plugins.core.hyperparameters import save_plain_hyperparameters
from lightning_plugins.core.launched import bring_home_whole
from lightning_plugins.core.lightning_internals import around_training, count_no_step, loss_scale, trainer_of
from lightning_plugins.core.logging import log_figures, measured_figures
from lightning_plugins.core.modes import evaluating
from lightning_plugins.core.pictures import pictures_are_due
from lightning_plugins.core.random_numbers import RowGenerator, rand
from lightning_plugins.core.random_state import draws_of_rank
from lightning_plugins.core.replaced_arguments import Replaced, refuse_replaced
from lightning_plugins.core.sample_keys import SampleKeys, row_keys
from lightning_plugins.core.sharding import gradient_sync, shard_networks
from lightning_plugins.sid import losses, plots
from lightning_plugins.sid.adversarial import Logits, encoder_logits, schedule
from lightning_plugins.sid.arguments import check_arguments
from lightning_plugins.sid.conditions import EqualBatches, as_dict, conditions, real_images
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.description import check_progress
from lightning_plugins.sid.export import check_exportable, export_student, refuse_sharded
from lightning_plugins.sid.guidance import guided
from lightning_plugins.sid.lora import lora_copy, merged
from lightning_plugins.sid.manual_optimization import (
    checkpoints_by_steps,
    clip_values_,
    finite_gradients_,
    refuse_broken_teacher,
    refuse_endless_decay,
    refuse_setup,
    warn_of_a_short_run,
)
from lightning_plugins.sid.networks import StudentNetworks, half_life_decay, update_average
from lightning_plugins.sid.noise_levels import Levels, draw_levels
from lightning_plugins.sid.objectives import Distillation, Draws, Generate, Loss, Score
from lightning_plugins.sid.sampling import many_steps, step_levels
from lightning_plugins.sid.teacher import Teacher


@read_as_data
class SiD(LightningModule):
    r"""Score identity distillation: a pretrained diffusion model becomes a one-step generator, without data.

    .. math:: L_\theta = \omega \left[(1 - \alpha) |\delta|^2 + \langle \delta, f_\psi - x_g \rangle\right],
              \quad \delta = f_\phi(x_t) - f_\psi(x_t), \quad x_t = x_g + \sigma n, \quad x_g = G_\theta(z)

    Three copies of the teacher's network: the frozen teacher :math:`f_\phi`; the generator, which is the network at the
    one noise level ``sigma_init``; and the fake score :math:`f_\psi`, which learns to denoise what the generator makes.
    A step of training updates the fake score ``fake_steps`` times and the generator once, and the running mean of the
    generator's weights, which is the student. Lightning's ``global_step`` and ``max_steps`` count generator updates,
    those that it waits for with ``generator_after_images`` among them.

    No data are needed. Conditions come with the batches: ``{"label": (B,)}`` or ``{"prompt": list of str}`` (see
    :class:`PromptData`), or any of this package's image data, whose images are then read for evaluation alone. Without
    data, a class-conditional teacher gets classes drawn uniformly.

    Both networks' updates of a step share the batch's conditions, each with noise of its own; the code of SiD-LSG takes
    another batch of prompts for each. The generator's input is :math:`\sqrt{1 + \sigma^2}\, z` in EDM's scaling, which
    for a VP network is unit noise, as its pipeline's first step is fed; the code of SiD and of SiD-LSG feeds
    :math:`\sigma z`, 7 % less at the level 2.5.

    **Reading the log**: ``train/generator_loss`` is :math:`(1 - \alpha)` times a divergence: near 0 and of either sign
    at :math:`\alpha = 1`, negative above. What falls as the student improves is ``train/divergence``,
    :math:`\omega |\delta|^2`.

    Args:
        teacher: a diffusers model: an id of the Hub (google/ddpm-cifar10-32), a folder, or in Python a loaded pipeline.
            It is not kept in checkpoints: a resumed run loads it again and refuses another.
        alpha: how far the loss pushes beyond the plain difference of scores; 1.2 in the paper (1.0 for AFHQ-v2). 0.5 is
            unbiased where the fake score is exact, and best at toy scale.
        sigma_init: the generator's noise level in EDM scaling; 2.5 in the paper. The teacher's nearest is taken. A
            teacher of flow matching is at the time s = sigma / (1 + sigma) then; its own pipelines begin at s = 1,
            pure noise, which is 2^24 here (16777216).
        lr: Adam's rate of the generator; 1e-5 in the paper on CIFAR-10 and FFHQ, 4e-6 on ImageNet, 5e-6 on AFHQ-v2.
        fake_lr: Adam's rate of the fake score; equal to the generator's in the paper.
        betas: Adam's momenta for generator and fake score, (0, 0.999) in the paper. A first one of 0.9 ruins training:
            the opponent moves.
        eps: number that Adam adds to its divisor, for generator and fake score; 1e-8 in the paper, 1e-6 with fp16.
        fake_steps: updates of the fake score before each of the generator; 1 in the paper.
        batch_size: images of one process in a step, where no data give the batches; the paper's 256 is of all.
        accumulate: parts that a batch is cut into for lack of memory, one after the other.
        gradient_clip: largest norm of each network's gradient; none in the paper.
        decay_from: share of the trainer's steps after which both rates fall linearly to 0. With the default 1 they
            never fall, as in the paper.
        ema_halflife_images: half-life of the student's running mean, in images; 500,000 in the paper (2,000,000 on
            ImageNet), 0 for no mean.
        ema_ramp_up: largest half-life of that mean as a share of the images seen so far; 0.05 in the paper's code.
        loss: what the generator is trained on: sid, or reverse_kl (Diff-Instruct, DMD) for comparison.
        weighting: weight of each sample in the generator's loss: l1, the paper's, divides by the mean distance of the
            image to the teacher's; none leaves every weight at 1.
        noise_levels: how the levels of the generator's loss are drawn. The paper's edm runs along EDM's schedule up to
            t_max, moved to the teacher's nearest levels; grid draws the teacher's own timesteps, each as likely, from
            t_min to t_max (SiD-LSG).
        fake_noise_levels: how the levels of the fake score's loss are drawn. The paper's edm is log-normal with EDM's
            weights; grid is plain noise prediction as in SiD-LSG, at all of the teacher's timesteps, where SiD-LSG
            draws 20 to 979 here too. By default it is what noise_levels is.
        t_min: first noise level of the generator's loss, in thousandths of the schedule; 0 in the paper, 20 in SiD-LSG.
        t_max: last noise level of the generator's loss, in thousandths of the schedule; 800 in the paper, 980 in
            SiD-LSG.
        guidance: classifier-free guidance of the teacher, where 1 is none; 1.5 to 4.5 in SiD-LSG.
        fake_guidance: classifier-free guidance of the fake score, in its training too; by default the teacher's
            (SiD-LSG).
        condition_dropout: share of the fake score's conditions that are dropped in training; 0.1 in SiD-LSG. Needs a
            teacher that knows no condition.
        adversarial: train as SiDA does: the fake score's encoder also tells generated images from the data's, which are
            then needed, and the generator learns from that, half and half. SiDA sets alpha to 1.
        generator_after_images: images for which the fake score trains alone before the generator's first update; by
            default 100,000 with adversarial, as in SiDA's code, and 0 for no waiting.
        adversarial_after_images: images after which the adversarial term joins the generator's loss, which is the
            distillation's alone before; by default 200,000 with adversarial, as in SiDA's code, and 0 for at once.
        fake_clip_value: largest size of each entry of the fake score's gradient; by default 1 with adversarial, as in
            SiDA's code for teachers of EDM, and 0 for no clipping (its code for EDM2).
        lora_rank: train low-rank adapters of this rank in place of the networks (needs the extra lora).
        activation_checkpointing: keep only the inputs of the blocks of generator, fake score and teacher and compute
            the blocks again in the backward pass: much less memory at the cost of a second forward pass through each,
            and the same gradients.
        clip_output: clamp generated images as the teacher's scheduler does (its clip_sample), in training too, so that
            the student learns what a pipeline emits. By default only if the teacher's scheduler does.
        teacher_steps: steps of the teacher's samples in pictures.
        num_pictures: student's and teacher's samples in a picture; 0 for none.
        updates_per_epoch: generator updates that count as an epoch where no data give the batches.
        seed: seed of all noise, with the step and the place in the batch of all processes. A resumed run draws what an
            uninterrupted one would, and several processes draw what one with the joined batch does.
        optimizer: replaces Adam for the generator; giving lr beside it is refused, and with both optimizers betas and
            eps.
        fake_optimizer: replaces Adam for the fake score; giving fake_lr beside it is refused.

    Raises:
        ValueError: an argument is out of range or does not fit the teacher.

    Source: Zhou et al. 2024, arXiv 2404.04057 and its code; SiD-LSG, arXiv 2406.01561; Su, kexue.fm/archives/10085.
    """

    # What optimizers of the user's take the place of: both of them, that of Adam's settings.
    replaced_by: ClassVar[Replaced] = {
        ("optimizer",): ("lr",),
        ("fake_optimizer",): ("fake_lr",),
        ("optimizer", "fake_optimizer"): ("betas", "eps"),
    }

    def __init__(
        self,
        teacher: str,
        alpha: float = 1.2,
        sigma_init: float = 2.5,
        lr: float = 1e-5,
        fake_lr: float = 1e-5,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        fake_steps: int = 1,
        batch_size: int = 256,
        accumulate: int = 1,
        gradient_clip: float | None = None,
        decay_from: float = 1.0,
        ema_halflife_images: float = 500_000,
        ema_ramp_up: float = 0.05,
        loss: Loss = "sid",
        weighting: losses.Weighting = "l1",
        noise_levels: Levels = "edm",
        fake_noise_levels: Levels | None = None,
        t_min: float = 0.0,
        t_max: float = 800.0,
        guidance: float = 1.0,
        fake_guidance: float | None = None,
        condition_dropout: float = 0.0,
        adversarial: bool = False,
        generator_after_images: int | None = None,
        adversarial_after_images: int | None = None,
        fake_clip_value: float | None = None,
        lora_rank: int | None = None,
        activation_checkpointing: bool = False,
        clip_output: bool | None = None,
        teacher_steps: int = 50,
        num_pictures: int = 32,
        updates_per_epoch: int = 1000,
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        fake_optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        bring_home_whole(self)
        check_arguments(locals())
        refuse_replaced(self, self.replaced_by, optimizer=optimizer, fake_optimizer=fake_optimizer)
        self.automatic_optimization = False
        self.alpha = alpha
        self.lr, self.fake_lr, self.betas, self.eps = lr, fake_lr, (float(betas[0]), float(betas[1])), eps
        self.fake_steps, self.batch_size, self.accumulate = fake_steps, batch_size, accumulate
        self.gradient_clip, self.decay_from = gradient_clip, decay_from
        self.ema_halflife_images, self.ema_ramp_up = ema_halflife_images, ema_ramp_up
        self.loss_kind, self.weighting, self.noise_levels = loss, weighting, noise_levels
        self.fake_noise_levels = fake_noise_levels or noise_levels
        self.t_min, self.t_max = t_min, t_max
        self.guidance = guidance
        self.fake_guidance = guidance if fake_guidance is None else fake_guidance
        self.condition_dropout, self.adversarial = condition_dropout, adversarial
        self.generator_after_images, self.adversarial_after_images, self.fake_clip_value = schedule(
            adversarial, generator_after_images, adversarial_after_images, fake_clip_value
        )
        self.lora_rank, self.activation_checkpointing = lora_rank, activation_checkpointing
        self.teacher_steps, self.num_pictures, self.updates_per_epoch = teacher_steps, num_pictures, updates_per_epoch
        self.seed = seed
        self._optimizer, self._fake_optimizer = optimizer, fake_optimizer
        self.networks = StudentNetworks(teacher, sigma_init, clip_output)
        self.images, self._updates = 0, 0
        self.left_out_all = torch.zeros((), dtype=torch.bool)  # of the last update's samples; NonFiniteGuard asks
        self._shown_teacher: Tensor | None = None
        self._results: dict[str, float] = {}
        self._marks: list[tuple[float, int]] = []
        self._keys = SampleKeys()

    # Networks.

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher, loaded at first use."""
        return self.networks.teacher

    @property
    def conditional(self) -> bool:
        """Whether samples have a class."""
        return self.num_classes is not None

    @property
    def num_classes(self) -> int | None:
        """Classes of the teacher; ``None`` for one without."""
        return self.networks.description["num_classes"]

    def build_network(self, network: nn.Module) -> nn.Module:
        """A trainable network that starts equal to the teacher's; called for the generator and for the fake score."""
        if self.lora_rank is not None:
            return lora_copy(network, self.lora_rank)
        copied = copy.deepcopy(network).requires_grad_(True).train()
        return copied.float() if network.dtype.itemsize < 4 else copied  # small updates are lost in a low precision

    def configure_model(self) -> None:
        """Build the networks; shard them and the teacher under ``ModelParallelStrategy`` (FSDP2).

        Raises:
            ValueError: a network whose class knows no activation checkpointing, or FSDP2 with tensor parallelism.
        """
        if trainer_of(self) is None:  # a checkpoint is being read, which says itself what to build
            return
        nets = self.networks
        if not nets.is_built:
            with torch.device("cpu"):  # the trainer makes new tensors on its device, and moves the networks there later
                nets.build(self.build_network)
        widen(self, trainer_of(self))
        if self.activation_checkpointing:  # gradients by the images flow through the teacher, too
            for denoiser in (nets.generator, nets.fake_score, self.teacher.denoiser):
                checkpoint_activations(nets.built(denoiser).network)
        if self.device_mesh is not None:
            shard_networks(self, nets.generator, nets.fake_score, nets.student, self.teacher.denoiser)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the networks are, the teacher's fingerprint, and how far training is."""
        self._results = {**self._results, **measured_figures(self.trainer)}
        checkpoint[_RECORD] = {
            **self.networks.description,
            "start_level": self.networks.start_level,
            "images": self.images,
            "updates": self._updates,
            "results": self._results,
        }
        if self.lora_rank is not None and self.device_mesh is None:  # the rest is the teacher's; FSDP2 loads all
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if "lora_" in name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the networks if there are none, and refuse another teacher than the one trained with.

        Raises:
            ValueError: the teacher has changed, adapters are missing, or the checkpoint is another module's.
        """
        record = checkpoint.get(_RECORD)
        if not record or not isinstance(record, Mapping):
            raise ValueError("The checkpoint describes no networks of SiD: it is another module's.")
        record = dict(record)
        check_progress(record)
        self.images, self._updates = record.pop("images"), record.pop("updates")
        self._results, level = record.pop("results"), record.pop("start_level")
        adapters = self.lora_rank is not None
        self.networks.use_description(record, needs_teacher=adapters or not record["in_pixels"])
        if not self.networks.is_built:
            self.networks.build(self.build_network) if adapters else self.networks.build_from_description()
        if abs(self.networks.start_level / level - 1) > 1e-6:
            raise ValueError(
                f"sigma_init={self.networks.sigma_init} is not the noise level that the checkpoint's generator was "
                f"trained at, {level:.6g}: leave it as it was."
            )
        state = checkpoint.get("state_dict")  # a sharded checkpoint's weights are in other files, and loaded by now
        if not adapters or state is None:
            return
        if not {name for name in self.state_dict() if "lora_" in name} <= state.keys():
            raise ValueError(
                f"lora_rank={self.lora_rank}: the checkpoint does not hold this module's adapters, and the teacher "
                "itself would be the student. Leave lora_rank as it was in training."
            )
        checkpoint["state_dict"] = {**self.state_dict(), **state}  # the file leaves the teacher's weights out

    # Samples.

    def forward(self, noise: Tensor, **conditioning: Any) -> Tensor:
        """The student's images or latents ``(B, C, H, W)`` of unit noise, in one step."""
        return self.networks.student_images(noise, conditioning)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the student, in one step.

        Args:
            num_samples: how many images, n.
            labels: ``(n,)`` int64 classes of a class-conditional teacher; uniform at random by default.
            prompts: n texts of a text-to-image teacher.
            generator: where the noise comes from, on any device; torch's global generator by default.

        Returns:
            ``(n, C, H, W)`` in [0, 1], float32.

        Raises:
            ValueError: classes or prompts for a teacher without, or missing ones.
        """
        noise = self.networks.noise(num_samples, generator, self.device)
        conditioning = self.networks.conditioning(num_samples, labels, prompts, generator, self.device)
        return self.networks.decode(self(noise, **conditioning))

    @torch.no_grad()
    def teacher_sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Draw images from the teacher, of the noise that :meth:`sample` takes.

        Args:
            num_samples: how many images, n.
            labels: ``(n,)`` int64 classes of a class-conditional teacher; uniform at random by default.
            prompts: n texts of a text-to-image teacher.
            generator: where the noise comes from, on any device; torch's global generator by default.
            num_steps: calls of the network; ``teacher_steps`` by default.

        Returns:
            ``(n, C, H, W)`` in [0, 1], float32.

        Raises:
            ValueError: classes or prompts for a teacher without, or missing ones; too many steps.
        """
        noise = self.networks.noise(num_samples, generator, self.device)
        conditioning = self.networks.conditioning(num_samples, labels, prompts, generator, self.device)
        null = self.networks.null_conditioning() if self.guidance != 1 else None
        steps = num_steps or self.teacher_steps
        samples = many_steps(self.teacher.denoiser, noise, steps, conditioning, null, self.guidance)
        return self.networks.decode(samples)

    # Training.

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Update the fake score, then the generator, then the student."""
        with draws_of_rank(self, self._updates):
            self._step(batch)

    def _step(self, batch: Any) -> None:
        generator_optimizer, fake_optimizer = self.optimizers()
        count_no_step(fake_optimizer)
        batch = as_dict(batch, type(self).__name__)
        n, labels, prompts = conditions(batch, self.conditional, type(self).__name__)
        seen = n * self.trainer.world_size
        conditioning = self.networks.conditioning(n, labels, prompts, self._random(n, self.fake_steps + 1), self.device)
        real = real_images(batch, self.networks.description, self.dtype) if self.adversarial else None
        if self._updates == 0:
            waits = {name: getattr(self, name) for name in ("generator_after_images", "adversarial_after_images")}
            warn_of_a_short_run(self.trainer, seen, waits)
        for turn in range(self.fake_steps):
            logs = self._update(fake_optimizer, n, conditioning, real, turn, self._fake_objective)
        logs |= self._update(generator_optimizer, n, conditioning, real, self.fake_steps, self._generator_objective)
        for scheduler in self.lr_schedulers() or ():
            scheduler.step()
        decay = half_life_decay(seen, self.images, self.ema_halflife_images, self.ema_ramp_up)
        update_average(self.networks.student, self.networks.generator, decay)
        self.images += seen
        self._updates += 1
        self._log_step(n, logs)

    def _update(
        self,
        optimizer: LightningOptimizer,
        n: int,
        conditioning: Mapping[str, Tensor],
        real: Tensor | None,
        turn: int,
        objective: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    ) -> dict[str, Tensor]:
        """One step of an optimizer on n samples, in ``accumulate`` parts; returns the means of what is logged."""
        draws, parts = self._draw(n, turn), min(n, self.accumulate)
        sums: dict[str, Tensor] = {}
        for k in range(parts):
            part = slice(k * n // parts, (k + 1) * n // parts)
            rows = {name: value[part] for name, value in conditioning.items()}
            with gradient_sync(self, now=k == parts - 1):
                values, logs = objective(
                    Draws(*(value[part] for value in draws)), rows, None if real is None else real[part]
                )
                self.manual_backward(values.sum() / n)
            for name, value in logs.items():
                sums[name] = sums.get(name, 0) + value.detach().float().sum() / n
        optimizer.step()
        optimizer.zero_grad()
        return sums

    def _fake_objective(
        self, draws: Draws, conditioning: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nets = self.networks
        G = self._generates(conditioning)
        f_psi = self._score(nets.fake_score, self._dropped(conditioning, draws.dropped), self.fake_guidance)
        with evaluating(nets.generator), self._discriminator(self.adversarial) as logits:
            loss = self._distillation().fake_score_loss(G, f_psi, draws, real, logits)
        return loss, {"fake_loss": loss}

    def _generator_objective(
        self, draws: Draws, conditioning: dict[str, Tensor], real: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nets = self.networks
        G = self._generates(conditioning)
        f_phi = self._score(self.teacher.denoiser, conditioning, self.guidance)
        f_psi = self._score(nets.fake_score, conditioning, self.fake_guidance)
        joined = self.adversarial and self.images >= self.adversarial_after_images
        with evaluating(nets.fake_score), self._discriminator(joined) as logits:  # in evaluation as the teacher is
            terms = self._distillation().generator_terms(G, f_phi, f_psi, draws, logits, loss_scale(self.trainer))
        lost = (~terms.finite).float()
        return terms.objective, {"generator_loss": terms.loss, "divergence": terms.divergence, "nonfinite": lost}

    def _distillation(self) -> Distillation:
        return Distillation(
            alpha=self.alpha,
            kind=self.loss_kind,
            weighting=self.weighting,
            fake_levels=self.fake_noise_levels,
            sigma_data=self.networks.fake_score.sigma_data,
        )

    def _generates(self, conditioning: Mapping[str, Tensor]) -> Generate:
        nets = self.networks
        return lambda z: nets.generate(nets.generator, z, conditioning)

    def _score(self, denoiser: Denoiser, conditioning: Mapping[str, Tensor], guidance: float) -> Score:
        null = self.networks.null_conditioning() if guidance != 1 else None
        return lambda x, sigma: guided(denoiser, x, sigma, conditioning, null, guidance)

    def _discriminator(self, reads: bool) -> AbstractContextManager[Logits | None]:
        return encoder_logits(self.networks.fake_score.network) if reads else nullcontext()

    def _dropped(self, conditioning: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """The conditions with some replaced by none, as classifier-free guidance is trained."""
        if not self.condition_dropout:
            return conditioning
        null = self.networks.null_conditioning()
        if null is None:
            raise ValueError(
                f"condition_dropout={self.condition_dropout} needs a condition that stands for none, which this "
                "teacher has not: set it to 0."
            )
        return {
            name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), null[name].to(value), value)
            for name, value in conditioning.items()
        }

    def _draw(self, n: int, turn: int) -> Draws:
        """Noise by seed, update, turn and row: a resumed run draws what an uninterrupted one does."""
        random = self._random(n, turn)
        latent, noise = (self.networks.noise(n, random, self.device) for _ in range(2))
        fake = turn < self.fake_steps
        denoiser = self.networks.generator
        limits = {"t_min": self.t_min, "t_max": self.t_max}
        kind = self.fake_noise_levels if fake else self.noise_levels
        sigma = draw_levels(denoiser, n, kind, random, fake=fake, **limits)
        dropped = rand((n,), random, self.device) < self.condition_dropout
        return Draws(latent, noise, sigma, dropped)

    def _random(self, n: int, turn: int) -> RowGenerator:
        """Random numbers of n rows, each by its place in the batch of all processes."""
        return RowGenerator(row_keys(self, n), self.seed, self._updates, turn)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make gradients finite, as the paper's code does, and clip them; a GradScaler skips such steps itself.

        A generator that still waits loses its gradient here: its step is counted, and its Adam remembers nothing of it.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        of_generator = optimizer is self.trainer.optimizers[0]
        if of_generator and self.images < self.generator_after_images:
            optimizer.zero_grad(set_to_none=True)
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            finite_gradients_(parameters)
        if self.fake_clip_value and not of_generator:
            clip_values_(parameters, self.fake_clip_value)
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)

    def configure_optimizers(self) -> Any:
        """Adam for the generator and for the fake score, with the last share of steps decayed if wanted."""
        settings = {"betas": self.betas, "eps": self.eps}
        optimizers = []
        for part, own, lr in (
            (self.networks.generator, self._optimizer, self.lr),
            (self.networks.fake_score, self._fake_optimizer, self.fake_lr),
        ):
            parameters = [p for p in part.parameters() if p.requires_grad]
            optimizers.append(own(parameters) if own else torch.optim.Adam(parameters, lr, **settings))
        if self.decay_from == 1:
            return optimizers
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, self._decay) for optimizer in optimizers]

    def _decay(self, step: int) -> float:
        if step == 0:  # the number of steps must not be asked for before a checkpoint is loaded
            return 1.0
        done = step / self.trainer.estimated_stepping_batches
        return min(1.0, max(0.0, (1 - done) / (1 - self.decay_from)))

    def _log_step(self, n: int, logs: dict[str, Tensor]) -> None:
        now = time.monotonic()
        self._marks = [*self._marks[-20:], (now, self.images)]
        (before, images), bar = self._marks[0], {"prog_bar": True, "batch_size": n}
        self.left_out_all = (n * logs["nonfinite"]).round() >= n
        means, rows = means_over_ranks(logs, weight=n)
        self.log("train/nonfinite_samples", (rows * means.pop("nonfinite")).round(), batch_size=n)
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=n)
        self.log("train/images", float(self.images), prog_bar=False, batch_size=n)
        if now > before:
            self.log("images/s", (self.images - images) / (now - before), **bar)

    # Loaders for a run without data, and rules.

    def train_dataloader(self) -> EqualBatches:
        """Batches that say how many images to make; a data module's batches take their place."""
        self._refuse_missing_prompts()
        return EqualBatches(self.batch_size, self.updates_per_epoch)

    def val_dataloader(self) -> EqualBatches:
        """One batch, so that an epoch ends with pictures and evaluation."""
        return EqualBatches(self.batch_size, 1)

    def test_dataloader(self) -> EqualBatches:
        """One batch."""
        return EqualBatches(self.batch_size, 1)

    def predict_dataloader(self) -> EqualBatches:
        """One batch of samples."""
        self._refuse_missing_prompts()
        return EqualBatches(self.batch_size, 1)

    def _refuse_missing_prompts(self) -> None:
        if self.networks.description["takes_text"]:
            raise ValueError("This teacher draws what a text says: give PromptData with a file of prompts as data.")

    def on_fit_start(self) -> None:
        """Refuse what would train something else, or hang.

        Raises:
            MisconfigurationException: a strategy that cannot train two networks in turn.
            ValueError: weights in half precision, a teacher without the condition that guidance or dropout needs, one
                whose output is not finite, or one of which no student can be exported.
        """
        refuse_setup(self, self.trainer)
        refuse_endless_decay(self.trainer, self.decay_from)
        denoiser, nets = self.teacher.denoiser, self.networks
        if not self._updates:  # what an earlier version began may go on
            level = nets.start_level
            check_exportable(nets.generator, sigma_init=level, clips=nets.clips, teacher=self.teacher)
        if self.num_pictures:
            step_levels(denoiser, self.teacher_steps)  # refuses more steps than levels
        n, prompts = 2, [""] * 2 if nets.description["takes_text"] else None
        conditioning = nets.conditioning(n, None, prompts, self._random(n, self.fake_steps + 2), self.device)
        draws = self._draw(n, self.fake_steps)
        self._dropped(conditioning, draws.dropped)
        for scale in {self.guidance, self.fake_guidance}:
            refuse_broken_teacher(self._score(denoiser, conditioning, scale), draws, nets.source)
        around_training(self.trainer, checkpoints_by_steps)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is learnt from data here; callbacks such as GenerativeEvaluation measure samples."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As validation."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``image`` ``(B, C, H, W)`` in [0, 1] for each of the batch's conditions.

        The noise of an image hangs on its number in the data, or on the ``"key"`` ``(B,)`` int64 that a batch may have.
        """
        n, labels, prompts = conditions(batch, self.conditional, type(self).__name__)
        draws = RowGenerator(self._keys(self, n, batch, batch_idx), self.seed, 0)
        output = {"image": self.sample(n, labels=labels, prompts=prompts, generator=draws)}
        return output if labels is None else {**output, "label": labels}

    def on_validation_epoch_end(self) -> None:
        """Draw the student's samples beside the teacher's, of the same noise."""
        if pictures_are_due(self, every=min(1, self.num_pictures)):
            self._log_pictures("val")

    def on_test_epoch_end(self) -> None:
        """Draw the student's samples beside the teacher's, of the same noise."""
        if self.num_pictures:
            self._log_pictures("test")

    def _log_pictures(self, stage: str) -> None:
        # Every rank computes, because a sharded forward is collective; rank zero writes.
        if self._shown_teacher is None:
            self._shown_teacher = self.teacher_sample(**plots.picture_options(self)).cpu()
        log_figures(self.trainer, stage, plots.sid_figures(self, self._shown_teacher), self.global_step)

    def export(self, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> Path:
        """Write the student as a diffusers pipeline that samples in one step, with no plugin installed.

        Of several processes the first writes, and the others go on at once, so that all may call it or the first alone.

        Args:
            folder: where to write; new or empty, and written whole or not at all.
            metrics: figures for the model card, such as ``{"FID": 1.92}``; by default those of the last validation or
                test before the checkpoint was written.

        Returns:
            The folder.
        """
        nets = self.networks
        student = nets.built(nets.student)
        refuse_sharded(student.network)
        if rank_of_process():
            return Path(folder).resolve()
        network = student.network if self.lora_rank is None else merged(student.network)
        pixels_alone = nets.description["in_pixels"] and not nets.description["takes_text"]
        needs_parts = self.lora_rank is not None or not pixels_alone
        card = {
            "teacher": nets.source if isinstance(nets.source, str) else type(nets.source).__name__,
            "alpha": self.alpha,
            "images": self.images,
            "metrics": dict(self._results if metrics is None else metrics),
            "settings": {name: value for name, value in self.hparams.items() if name in _ON_THE_CARD},
        }
        return export_student(
            student.sharing(network),
            folder,
            sigma_init=nets.start_level,
            clips=nets.clips,
            teacher=self.teacher if needs_parts else None,
            card=card,
        )


_RECORD = "sid"
_ON_THE_CARD = ("lr", "fake_lr", "fake_steps", "guidance", "ema_halflife_images", "lora_rank")
