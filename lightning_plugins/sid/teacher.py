"""Pretrained diffusion models as teachers: loaded by diffusers, frozen, recognised again by a fingerprint."""

import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.pretrained import pretrained_folder, reason_of
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.pipeline_folder import check_files, is_scheduler, load_pipeline, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NETWORKS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "Transformer2DModel",
    "SD3Transformer2DModel",
)
_HINT = (
    "Give an id of the Hub (its first use needs the network), a folder that save_pretrained() of a diffusers pipeline "
    "wrote, a folder with unet/ (or transformer/) and scheduler/, or a loaded pipeline."
)
_DECODED_AT_ONCE = 4
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Teacher:
    """A frozen diffusion model and what belongs to it.

    Attributes:
        network: the network that denoises, in eval mode, without gradients of its parameters.
        scheduler: the pipeline's scheduler, which says how noise and network belong together.
        denoiser: the network in EDM's scaling, by the scheduler.
        sample_shape: channels, height and width of its images or latents.
        num_classes: labels 0 to num_classes - 1, for the keyword ``class_labels``; None for a teacher without.
        vae: turns latents into images; None in pixel space.
        text_encoder: reads the prompts of a text-to-image model; None otherwise.
        tokenizer: cuts the prompts of a text-to-image model into tokens; None otherwise.
        source: what it was loaded from; None for a loaded pipeline.
        fingerprint: a text that equal configs and weights have in common, on every device.
    """

    network: nn.Module
    scheduler: "SchedulerMixin"
    denoiser: Denoiser
    sample_shape: tuple[int, int, int]
    num_classes: int | None
    vae: nn.Module | None
    text_encoder: "PreTrainedModel | None"
    tokenizer: "PreTrainedTokenizerBase | None"
    source: str | None
    fingerprint: str

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Clean ``(B, C, H, W)`` samples as images ``(B, channels, height, width)`` in [0, 1], float32.

        Images in [-1, 1] are shifted and clamped; latents go through the VAE first, four at a time: Stable
        Diffusion's has feature maps of 256 channels at 512 x 512, 268 MB each for every image that it is decoding.

        Args:
            x: ``(B, C, H, W)`` samples without noise, as the network makes them.
        """
        if self.vae is not None:
            x = torch.cat([_decode_latents(self.vae, few) for few in x.split(_DECODED_AT_ONCE)])
        return (x.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts as the network's keyword arguments: ``encoder_hidden_states``, ``(B, tokens, width)``.

        As in Stable Diffusion's pipeline: padded or cut to the tokenizer's length, the encoder's last hidden states.

        Args:
            prompts: B texts.

        Raises:
            ValueError: this teacher takes no prompts, or wants more than one encoder's.
        """
        if self.text_encoder is None or self.tokenizer is None or class_name(self.network) != "UNet2DConditionModel":
            raise ValueError(
                f"prompts: the teacher {self.source or type(self.network).__name__} has no text encoder of Stable "
                "Diffusion's kind (one encoder, one tokenizer): give its conditioning as tensors instead."
            )
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", None) else None
        return {"encoder_hidden_states": self.text_encoder(tokens.input_ids, attention_mask=mask)[0]}

    def null_conditioning(self) -> dict[str, Tensor] | None:
        """No condition, for guidance, as keyword arguments of one row; None where the teacher knows no such thing.

        The empty prompt, or a DiT's class beyond its own.
        """
        if self.text_encoder is not None:
            return self.encode_prompts([""])
        if self.num_classes is not None and "Transformer" in type(self.network).__name__:
            return {"class_labels": torch.tensor([self.num_classes], device=next(self.network.parameters()).device)}
        return None


def load_teacher(source: "str | Path | DiffusionPipeline") -> Teacher:
    """Load a diffusion model and freeze it.

    Args:
        source: an id of the Hub; a folder with a diffusers pipeline, or with unet/ (or transformer/) and scheduler/
            alone; ``package:NAME/FOLDER``; or a loaded pipeline, whose modules are frozen where they are.

    Returns:
        The teacher, on the CPU unless the pipeline was elsewhere.

    Raises:
        FileNotFoundError: nothing that can be loaded.
        ValueError: a model that is not understood: several networks, an unknown scheduler or network, other channels.
    """
    from diffusers import DiffusionPipeline

    loaded = isinstance(source, DiffusionPipeline)
    if not loaded and not isinstance(source, str | Path):
        raise ValueError(f"teacher={type(source).__name__} is no diffusion model. {_HINT}")
    name = type(source).__name__ if loaded else str(source)
    parts = source.components if loaded else _load(name)
    network = _network(parts, name)
    if parts.get("scheduler") is None:
        raise ValueError(f"teacher={name!r} has no scheduler, which says what its network predicts. {_HINT}")
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    vae = parts.get("vae", parts.get("vqvae"))
    only_encoder = not any(part.startswith("text_encoder_") and parts[part] is not None for part in parts)
    return Teacher(
        network=network,
        scheduler=parts["scheduler"],
        denoiser=Denoiser(network, parts["scheduler"]),
        sample_shape=_sample_shape(network, vae, name),
        num_classes=_num_classes(network),
        vae=vae,
        text_encoder=parts.get("text_encoder") if only_encoder else None,
        tokenizer=parts.get("tokenizer") if only_encoder else None,
        source=None if loaded else name,
        fingerprint=fingerprint(network, parts["scheduler"]),
    )


def _decode_latents(vae: nn.Module, x: Tensor) -> Tensor:
    """By the VAE, in its precision."""
    config, parameter = vae.config, next(vae.parameters())
    x = x / config.scaling_factor + (config.get("shift_factor") or 0.0)
    return vae.decode(x.to(parameter.device, parameter.dtype)).sample


@torch.no_grad()
def fingerprint(network: nn.Module, scheduler: "SchedulerMixin") -> str:
    """A hash of a diffusers network and scheduler: classes, settings other than the defaults, and all weights.

    The weights enter by the exact sums of their bits over rows and over columns, at the speed of memory.

    Args:
        network: a network of diffusers, in any precision and on any device.
        scheduler: its scheduler.
    """
    settings = [(type(part).__name__, _settings(part)) for part in (network, scheduler)]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in network.state_dict().items():
        bits = tensor.contiguous().view(_BITS[tensor.element_size()])
        bits = bits.flatten(1) if bits.ndim > 1 else bits.reshape(1, -1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for dim in (0, 1):
            digest.update(bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def class_name(network: nn.Module) -> str:
    """The name of a network's class in diffusers, of which FSDP2 makes one of its own.

    Args:
        network: a network of diffusers, sharded or not.
    """
    classes = [cls.__name__ for cls in type(network).__mro__ if cls.__module__.startswith("diffusers.")]
    return classes[0] if classes else type(network).__name__


def _settings(part: Any) -> dict[str, Any]:
    """The config without what is the default (a later diffusers has more of those) and without paths and versions."""
    defaults = {name: p.default for name, p in inspect.signature(type(part).__init__).parameters.items()}
    return {
        key: value
        for key, value in part.config.items()
        if not key.startswith("_") and (key not in defaults or _as_list(value) != _as_list(defaults[key]))
    }


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _load(source: str) -> dict[str, Any]:
    """The components by name."""
    name = pretrained_folder(source)
    folder = Path(name)
    pipeline = (folder / "model_index.json").is_file()
    if folder.exists() and not pipeline:
        inner = [part for part in ("unet", "transformer") if (folder / part / "config.json").is_file()]
        if not inner or not (folder / "scheduler" / "scheduler_config.json").is_file():
            raise FileNotFoundError(f"teacher={source!r} is no diffusers pipeline: no model_index.json there. {_HINT}")
    elif not folder.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"teacher={source!r}: there is no such folder, and no such id of the Hub. {_HINT}")
    try:
        if pipeline or not folder.exists():
            return load_pipeline(name).components
        return {part: _load_part(folder, part) for part in [*inner, "scheduler"]}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        raise FileNotFoundError(f"teacher={source!r} cannot be loaded: {reason_of(error)}. {_HINT}") from error


def _load_part(folder: Path, part: str) -> Any:
    import diffusers

    scheduler = part == "scheduler"
    check_files(folder, part)
    name = read_config(folder / part / ("scheduler_config.json" if scheduler else "config.json")).get("_class_name")
    if not (is_scheduler(name) if scheduler else name in NETWORKS):
        known = "" if scheduler else f"; known are {', '.join(NETWORKS)}"
        raise ValueError(f"its {part} is of the class {name!r}, which is not known{known}.")
    return getattr(diffusers, name).from_pretrained(str(folder), subfolder=part, local_files_only=True)


def _network(parts: dict[str, Any], name: str) -> nn.Module:
    """The one network that denoises; any other would be left out silently."""
    from diffusers import ModelMixin

    found = {key: part for key, part in parts.items() if isinstance(part, ModelMixin) and key not in ("vae", "vqvae")}
    said = ", ".join(f"{key}: {type(part).__name__}" for key, part in found.items())
    if len(found) != 1:
        raise ValueError(
            f"teacher={name!r} has {said or 'no network'}: a teacher needs exactly one network that denoises."
        )
    (network,) = found.values()
    if type(network).__name__ not in NETWORKS:
        raise ValueError(f"teacher={name!r} has {said}, which is not known; known are {', '.join(NETWORKS)}.")
    return network


def _num_classes(network: nn.Module) -> int | None:
    config = network.config
    if config.get("norm_type") == "ada_norm_zero":  # in other transformers the number counts time steps
        return config.num_embeds_ada_norm
    return config.get("num_class_embeds")


def _sample_shape(network: nn.Module, vae: nn.Module | None, name: str) -> tuple[int, int, int]:
    config = network.config
    size, channels, out = config.get("sample_size"), config.in_channels, config.get("out_channels")
    if size is None:
        raise ValueError(
            f"teacher={name!r}: its {type(network).__name__} names no sample_size: write it into the config.json of "
            "the network, as the height and width of its samples."
        )
    if out not in (None, channels, 2 * channels):
        raise ValueError(
            f"teacher={name!r} maps {channels} channels to {out}, as networks for inpainting or upscaling do: a "
            "teacher has as many outputs as inputs, or twice as many with a learned variance."
        )
    latent = vae.config.get("latent_channels") if vae is not None else None
    if latent not in (None, channels):
        raise ValueError(f"teacher={name!r}: its VAE has {latent} latent channels, but its network {channels}.")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width
