"""The networks of a distillation: a frozen teacher beside three copies of it.

Shapes: n samples, ``(n, C, H, W)`` images in [-1, 1] or latents.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core import arguments as must
from lightning_plugins.core.modes import evaluating
from lightning_plugins.core.random_numbers import randint, randn
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.description import check_description
from lightning_plugins.sid.sampling import clip, clips
from lightning_plugins.sid.teacher import Teacher, load_teacher


class StudentNetworks(nn.Module):
    """Generator, fake score and student (the generator's running mean), all of the teacher's class.

    The teacher is a plain attribute: in no ``state_dict``, wrapped and synchronised by nobody, but it follows to a
    device or precision. The networks are built later, from the teacher by :meth:`build` or without it from a
    checkpoint's :attr:`description`.

    Args:
        source: what :func:`~lightning_plugins.sid.teacher.load_teacher` makes the teacher of.
        sigma_init: the generator's noise level in EDM scaling; the teacher's nearest is taken.
        clip_output: clamp what is generated; by default (None) only if the teacher's scheduler does.
    """

    def __init__(self, source: Any, sigma_init: float, clip_output: bool | None = None) -> None:
        super().__init__()
        self.source, self.sigma_init, self.clip_output = source, sigma_init, clip_output
        self.generator: Denoiser | None = None
        self.fake_score: Denoiser | None = None
        self.student: Denoiser | None = None
        self._teacher: Teacher | None = None
        self._description: dict[str, Any] | None = None
        self._null: dict[str, Tensor] | None = None
        self._start_level: float | None = None

    # The teacher.

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher, loaded at first use.

        Raises:
            ValueError: it is not the one that the checkpoint in use was trained with.
        """
        if self._teacher is None:
            with torch.inference_mode(False):  # loaded for a picture, it may be trained with later
                self._load()
        return self._teacher

    def _load(self) -> None:
        with torch.device("cpu"), _single_precision():  # whatever Lightning builds in: its fingerprint is of these
            teacher = load_teacher(self.source)
        self._refuse_another(teacher, self._description)
        self._teacher = teacher
        like = next(self.parameters(), None)
        if like is not None and like.device.type != "meta":
            for part in self._teacher_parts():
                part.to(like.device, torch.float64 if like.dtype == torch.float64 else None)

    def _refuse_another(self, teacher: Teacher, description: Mapping[str, Any] | None) -> None:
        if description is not None and (expected := description["fingerprint"]) != teacher.fingerprint:
            raise ValueError(
                f"teacher={self.source!r} is not the model that this checkpoint was trained with: its weights or "
                f"configuration differ (fingerprint {teacher.fingerprint[:8]}, not {expected[:8]}). Give the one it "
                "was."
            )

    def _teacher_parts(self) -> list[nn.Module]:
        teacher = self._teacher
        parts = (teacher.denoiser, teacher.vae, teacher.text_encoder) if teacher else ()
        return [part for part in parts if part is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StudentNetworks":
        super()._apply(fn, recurse)
        for part in self._teacher_parts():
            part._apply(fn)
        if self._null is not None:
            self._null = None  # made anew where the teacher is now
        return self

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint must say for the networks to be built without the teacher: plain data."""
        if self._description is None:
            teacher = self.teacher
            self._description = {
                "fingerprint": teacher.fingerprint,
                "network": type(teacher.network).__name__,
                "config": json.loads(teacher.network.to_json_string()),
                "scheduler": teacher.denoiser.scheduler_config,
                "sample_shape": list(teacher.sample_shape),
                "num_classes": teacher.num_classes,
                "in_pixels": teacher.vae is None,
                "takes_text": teacher.text_encoder is not None,
            }
        return self._description

    def use_description(self, description: Mapping[str, Any], needs_teacher: bool) -> None:
        """Take a checkpoint's description; refuse it if the teacher, now or when it is loaded, is another.

        Args:
            description: from :attr:`description`, of the run that wrote the checkpoint.
            needs_teacher: load the teacher now.

        Raises:
            ValueError: it is none, or the teacher is not the one trained with.
        """
        check_description(description)
        if self._teacher is not None or needs_teacher:
            self._refuse_another(self.teacher, description)
        self._description = dict(description)

    # The copies.

    @property
    def is_built(self) -> bool:
        """Whether there are networks."""
        return self.generator is not None

    def build(self, copy_network: Callable[[nn.Module], nn.Module]) -> None:
        """Copy the teacher.

        Args:
            copy_network: from the teacher's network to a trainable one that starts equal.

        Raises:
            ValueError: ``sigma_init`` lies outside of the teacher's levels, or it needs texts and cannot read them.
        """
        teacher = self.teacher
        kind = type(teacher.network).__name__
        if kind in ("UNet2DConditionModel", "SD3Transformer2DModel") and teacher.text_encoder is None:
            raise ValueError(
                f"teacher={self.source!r} is told texts by its {kind}, but has not the one text encoder and tokenizer "
                "that make something of them: give a whole pipeline of Stable Diffusion's kind."
            )
        teacher.denoiser.input_scale(self.sigma_init)
        self.generator = teacher.denoiser.sharing(_without_label_dropout(copy_network(teacher.network)))
        self.fake_score = teacher.denoiser.sharing(_without_label_dropout(copy_network(teacher.network)))
        shared = {id(parameter): parameter for parameter in teacher.network.parameters()}  # what adapters sit on
        self.student = copy.deepcopy(self.generator, shared).requires_grad_(False)

    def build_from_description(self) -> None:
        """Networks with weights that a checkpoint brings."""
        import diffusers

        cls = getattr(diffusers, self.description["network"])
        config, scheduler = self.description["config"], self.description["scheduler"]
        made = [Denoiser(_without_label_dropout(cls.from_config(config)), scheduler) for _ in range(3)]
        self.generator, self.fake_score, self.student = made
        self.student.requires_grad_(False)

    def built(self, denoiser: Denoiser | None) -> Denoiser:
        """The network, or one sentence if it has not been built.

        Args:
            denoiser: one of the three, or None.

        Raises:
            ValueError: there are no networks yet.
        """
        if denoiser is None:
            raise ValueError(
                "This SiD has no networks yet: they are built when a trainer starts; outside of one, load a checkpoint "
                "by SiD.load_from_checkpoint(path)."
            )
        return denoiser

    # What they generate.

    @property
    def start_level(self) -> float:
        """The teacher's noise level nearest to ``sigma_init``."""
        if self._start_level is None:  # once: reading it from the grid waits for the device
            grid = self.built(self.generator).sigmas
            distance = None if grid is None else (grid.log() - math.log(self.sigma_init)).abs()
            self._start_level = float(self.sigma_init if grid is None else grid[distance.argmin()])
        return self._start_level

    @property
    def clips(self) -> bool:
        """Whether generated images are clamped to [-1, 1], or what the scheduler says."""
        if self.clip_output is not None:
            return self.clip_output
        return clips(self.built(self.generator))

    def generate(self, denoiser: Denoiser | None, noise: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        r""":math:`x_g = G(z) = D(s z, \sigma_{init})`, as a pipeline of one step feeds its network.

        Args:
            denoiser: the generator, or the student.
            noise: ``(n, C, H, W)`` of unit variance, z; its scale s is :meth:`Denoiser.input_scale`.
            conditioning: the network's keyword arguments.

        Returns:
            ``(n, C, H, W)`` images in [-1, 1] or latents, clamped where :attr:`clips` says so.
        """
        denoiser, level = self.built(denoiser), self.start_level
        images = denoiser(noise * denoiser.input_scale(level), noise.new_full((len(noise),), level), **conditioning)
        return clip(denoiser, images) if self.clips else images

    def student_images(self, noise: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """What the student generates of noise, without dropout.

        Args:
            noise: ``(n, C, H, W)`` of unit variance.
            conditioning: the network's keyword arguments.
        """
        student = self.built(self.student)
        with evaluating(student):
            return self.generate(student, noise, conditioning)

    def noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Unit noise ``(n, C, H, W)``, drawn where the generator is.

        Args:
            n: number of samples.
            generator: where the random numbers come from; torch's global generator by default.
            device: where the noise is wanted.
        """
        return randn((n, *self.description["sample_shape"]), generator, device)

    def conditioning(
        self,
        n: int,
        labels: Tensor | None,
        prompts: Sequence[str] | None,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """The network's keyword arguments for n classes or prompts; classes are drawn uniformly if none are given.

        Args:
            n: number of samples.
            labels: ``(n,)`` int64 classes, or None.
            prompts: n texts, or None.
            generator: where classes are drawn from; torch's global generator by default.
            device: where the arguments are wanted.

        Raises:
            ValueError: classes or prompts for a teacher without, or too few, others, or none for one that needs them.
        """
        if prompts is not None:
            if not self.description["takes_text"]:
                raise ValueError("prompts were given, but the teacher reads no text: leave them out.")
            if len(prompts) != n:
                raise ValueError(f"prompts must be {n} texts, one for each image, got {len(prompts)}.")
            return {name: value.to(device) for name, value in self.teacher.encode_prompts(list(prompts)).items()}
        classes = self.description["num_classes"]
        if classes is None and labels is not None:
            raise ValueError("labels were given, but the teacher has no classes: leave them out.")
        if classes is None and self.description["takes_text"]:
            raise ValueError("This teacher draws what a text says: give prompts, or PromptData with a file of them.")
        if classes is None:
            return {}
        if labels is None:
            return {"class_labels": randint(classes, (n,), generator, device)}
        must.class_labels(labels, n, classes)  # a DiT would take the class beyond for none
        return {"class_labels": labels.to(device)}

    def null_conditioning(self) -> dict[str, Tensor] | None:
        """The keyword arguments for no condition, or ``None`` where the teacher knows none."""
        if self._null is None:
            self._null = self.teacher.null_conditioning()
        return self._null

    def decode(self, x: Tensor) -> Tensor:
        """Generated samples as images in [0, 1]; latents need the teacher's VAE.

        Args:
            x: ``(n, C, H, W)`` images in [-1, 1], or latents.
        """
        if self.description["in_pixels"]:
            return (x.float() / 2 + 0.5).clamp(0, 1)
        return self.teacher.decode(x)


def _without_label_dropout(network: nn.Module) -> nn.Module:
    """Let a DiT in training see the classes it is given.

    Each of its blocks would forget one in ten by itself: the generator would then make anything where both scores are
    told a class; the fake score's share is ``condition_dropout``. Their random numbers could not be drawn again either.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0
    return network


@contextmanager
def _single_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def half_life_decay(batch_images: int, images_seen: int, half_life: float, ramp_up: float = 0.05) -> float:
    r"""Share of the old mean that stays after a batch.

    .. math:: \beta = 2^{-b / \min(h, r n)}

    Args:
        batch_images: images in the batch of all processes, b.
        images_seen: images before this batch, n.
        half_life: images after which weights count half, h; 0 keeps no mean.
        ramp_up: share of the images seen that the memory is at most, r, so that the first are soon forgotten; 0.05 in
            the code of SiD and EDM.

    Returns:
        In [0, 1): 0 at the first batch.

    Example:
        >>> round(half_life_decay(256, 10_000_000, 500_000) ** (500_000 / 256), 6)
        0.5
    """
    memory = min(half_life, ramp_up * images_seen)
    return 0.5 ** (batch_images / memory) if memory > 0 else 0.0


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the trained parameters of ``average`` towards those of ``network``; its buffers become the network's.

    Args:
        average: a copy of ``network``; sharded alike if that is sharded (FSDP2).
        network: the network in training; frozen parameters are left alone.
        decay: share of the old values, from :func:`half_life_decay`.
    """
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    old, new = dict(average.named_parameters()), dict(network.named_parameters())
    torch._foreach_lerp_([old[name] for name in names], [new[name].detach() for name in names], 1 - decay)
    for ours, theirs in zip(average.buffers(), network.buffers(), strict=True):
        ours.copy_(theirs)
