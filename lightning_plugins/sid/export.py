"""A folder that plain diffusers loads and samples from in one step: student, cut scheduler and a model card."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_plugins.core.new_folder import new_folder
from lightning_plugins.sid.card import model_card
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.teacher import Teacher, class_name

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

ONE_STEP = "_one_step"
"""Key of ``model_index.json``, which diffusers ignores, by which the ``sample`` command knows an exported student."""

_INPUTS = {  # settings that give a network further inputs, and their values whose inputs it gets
    "UNet2DModel": {"class_embed_type": (None, "timestep")},
    "UNet2DConditionModel": {
        "time_cond_proj_dim": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None, "text"),
        "encoder_hid_dim_type": (None, "text_proj"),
    },
}


def export_student(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    sigma_init: float,
    clips: bool,
    teacher: Teacher | None,
    card: Mapping[str, Any],
) -> Path:
    r"""Write a one-step generator for plain diffusers.

    ``DiffusionPipeline.from_pretrained(folder)`` then makes, of the noise :math:`z` that it draws,

    .. math:: G(z) = D(s z, \sigma_{init})

    with s from :meth:`~lightning_plugins.sid.denoiser.Denoiser.input_scale`. The network and its timestep stay; the
    scheduler is cut so that its one step starts at sigma_init:

    ======================  ==========================================  ==========================================
    teacher                 scheduler                                   pipeline
    ======================  ==========================================  ==========================================
    epsilon, v, sample      DDIM, trained_betas up to t, trailing       by the network: see below
    EDM                     EDMDPMSolver++, sigma_max = sigma_init      the same, but not DiT's
    flow                    DPMSolver++ of flow_prediction, flow_shift  the same
                            such that its first level is sigma_init
    ======================  ==========================================  ==========================================

    UNet2DModel becomes a ConsistencyModelPipeline, whose default is one step (with a VAE an LDMPipeline);
    DiTTransformer2DModel a DiTPipeline; UNet2DConditionModel a StableDiffusionPipeline with the teacher's text encoder,
    tokenizer and VAE. The last three need ``num_inference_steps=1`` (and ``guidance_scale=1.0``), as the model card
    shows. A U-Net's second half of outputs, a learned variance, is left out; DiT's stays, as its pipeline skips it.

    The files are written to a folder beside it, called ``<folder>.partial-...``, which becomes ``folder`` when it is
    complete: after an error nothing is left, after a crash nothing under the name.

    Args:
        denoiser: the student's network in EDM's scaling; not changed.
        folder: where to write; new, or empty.
        sigma_init: the generator's noise level, one of the denoiser's.
        clips: whether images were clamped to [-1, 1] (the scheduler's ``clip_sample_range``) in training.
        teacher: the model whose VAE, text encoder and tokenizer are written; None in pixel space.
        card: what the model card tells: ``teacher`` (a name), ``alpha``, ``images`` (seen), ``metrics`` (figures by
            name), and other ``settings``.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
        OSError: it cannot be written.
        ValueError: diffusers has no pipeline that samples this student exactly.
    """
    folder = Path(folder).resolve()
    refuse_sharded(denoiser.network)
    name, scheduler = check_exportable(denoiser, sigma_init=sigma_init, clips=clips, teacher=teacher)
    pipeline = _pipeline(name, _plain_network(denoiser.network), scheduler, teacher)
    with new_folder(folder) as partial:
        pipeline.save_pretrained(partial)
        if name == "StableDiffusionPipeline":
            _write_text_parts(pipeline, partial)
        for path in partial.rglob("*.json"):
            _leave_out_paths(path)
        index = partial / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text(encoding="utf-8")), ONE_STEP: True}, indent=2) + "\n")
        (partial / "README.md").write_text(model_card(pipeline, sigma_init, clips, card), encoding="utf-8")
    return folder


def check_exportable(
    denoiser: Denoiser, *, sigma_init: float, clips: bool, teacher: Teacher | None
) -> tuple[str, "SchedulerMixin"]:
    """How a student will be exported; asked before training, too, so that no run ends in a student nobody can use.

    Args:
        denoiser: the student's network in EDM's scaling, or the teacher's; it may be sharded (FSDP2).
        sigma_init: the generator's noise level, one of the denoiser's.
        clips: whether generated images are clamped.
        teacher: the model whose VAE, text encoder and tokenizer will be written; None in pixel space.

    Returns:
        The name of diffusers' pipeline, and its scheduler of one step.

    Raises:
        ValueError: diffusers has no pipeline that samples this student exactly.
    """
    _refuse_other_inputs(denoiser.network)
    name = _pipeline_name(denoiser.network, teacher)
    _refuse_other_results(name, denoiser, clips, teacher)
    return name, _one_step_scheduler(denoiser, sigma_init, clips)


def _one_step_scheduler(denoiser: Denoiser, sigma_init: float, clips: bool) -> "SchedulerMixin":
    """A scheduler whose only step starts at sigma_init and ends at the denoised image."""
    import diffusers

    config, level = denoiser.scheduler_config, torch.tensor([sigma_init], dtype=torch.float32)
    level = level.to(next(denoiser.network.parameters()).device)
    nearest = float(denoiser.nearest(level))
    if abs(nearest / sigma_init - 1) > 1e-6:
        raise ValueError(f"sigma_init={sigma_init} is none of the network's noise levels; the nearest is {nearest}.")
    if denoiser.kind == "edm":  # EDMEuler goes to 0 by the noise taken off, which rounds sigma_init times as much
        levels = {"sigma_min": denoiser.sigma_min, "sigma_max": sigma_init, "sigma_data": denoiser.sigma_data}
        return diffusers.EDMDPMSolverMultistepScheduler(**levels, prediction_type=denoiser.prediction)
    if denoiser.kind == "flow":
        steps = config["num_train_timesteps"]
        _refuse_broken_timestep(denoiser, float(denoiser.timesteps(level)), steps)
        return diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=steps + 1,  # this class rounds (steps + 1) s down, to steps * s
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=sigma_init / steps,
            steps_offset=1,  # as below
        )
    length = int(denoiser.timesteps(level)) + 1
    betas = getattr(diffusers, config["_class_name"]).from_config(config).betas
    return diffusers.DDIMScheduler(
        num_train_timesteps=length,
        trained_betas=betas[:length].tolist(),
        prediction_type=denoiser.prediction,
        timestep_spacing="trailing",
        clip_sample=clips,
        clip_sample_range=config.get("clip_sample_range", 1.0),
        steps_offset=1,  # not used with trailing steps, but StableDiffusionPipeline complains of any other
    )


def _refuse_broken_timestep(denoiser: Denoiser, timestep: float, steps: int) -> None:
    """The one-step flow schedulers of diffusers tell the network a whole number."""
    if abs(timestep - round(timestep)) < 1e-3:
        return
    times = denoiser.timesteps(denoiser.sigmas)
    whole = denoiser.sigmas[(times - times.round()).abs() < 1e-3]
    cure = "give a teacher with FlowMatchEulerDiscreteScheduler, whose last level is one"
    if len(whole):
        best = float(whole[(whole.log() - torch.tensor(timestep / (steps - timestep)).log()).abs().argmin()])
        cure = f"distil with sigma_init={best:.6g}"
    raise ValueError(
        f"sigma_init is the network's timestep {timestep:.2f}, but diffusers has no one-step scheduler of flow "
        f"matching whose timestep is no whole number: {cure}."
    )


def _plain_network(network: nn.Module) -> nn.Module:
    """The network with the same weights, as the pipelines want it: a size that is a number, no learned variance."""
    plain = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    size, channels = plain.config.get("sample_size"), plain.config.in_channels
    if not isinstance(size, int) and size is not None and len(set(size)) == 1:
        plain.register_to_config(sample_size=size[0])
    if plain.config.get("out_channels") == 2 * channels and isinstance(getattr(plain, "conv_out", None), nn.Conv2d):
        last = plain.conv_out
        last.weight, last.out_channels = nn.Parameter(last.weight[:channels].detach().clone()), channels
        if last.bias is not None:
            last.bias = nn.Parameter(last.bias[:channels].detach().clone())
        plain.register_to_config(out_channels=channels)
    return plain


def _pipeline_name(network: nn.Module, teacher: Teacher | None) -> str:
    """The class of diffusers' pipeline for such a network.

    Raises:
        ValueError: there is none.
    """
    name, vae = class_name(network), teacher is not None and teacher.vae is not None
    text = teacher is not None and teacher.text_encoder is not None and teacher.tokenizer is not None
    if name == "UNet2DModel":
        return "LDMPipeline" if vae else "ConsistencyModelPipeline"
    if name == "DiTTransformer2DModel" and vae:
        return "DiTPipeline"
    if name == "UNet2DConditionModel" and vae and text:
        return "StableDiffusionPipeline"
    raise ValueError(
        f"This student cannot be exported: diffusers has no pipeline for a {name} with what the teacher has "
        f"({'a' if vae else 'no'} VAE, {'a' if text else 'no'} text encoder). "
        "There are ones for UNet2DModel, for DiTTransformer2DModel with a VAE, and for UNet2DConditionModel with a "
        "VAE, one text encoder and its tokenizer: give such a teacher."
    )


def _pipeline(name: str, network: nn.Module, scheduler: "SchedulerMixin", teacher: Teacher | None) -> Any:
    import diffusers

    if name == "ConsistencyModelPipeline":
        return diffusers.ConsistencyModelPipeline(network, scheduler)
    if name == "LDMPipeline":
        return diffusers.LDMPipeline(teacher.vae, network, scheduler)
    if name == "DiTPipeline":
        return diffusers.DiTPipeline(network, teacher.vae, scheduler)
    parts = {"vae": teacher.vae, "text_encoder": teacher.text_encoder, "tokenizer": teacher.tokenizer}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(unet=network, scheduler=scheduler, **parts, **none)


def _write_text_parts(pipeline: Any, folder: Path) -> None:
    """Tokenizer and CLIP's weights as every version of transformers reads them.

    transformers 4 wants the tokenizer's vocabulary in files of its own; and before CLIP's weights lost a prefix, a text
    encoder without it was left random, with no more than a warning. Released models have the files and the prefix.
    """
    from safetensors.torch import load_file, save_file

    if pipeline.tokenizer.is_fast:
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    path, prefix = folder / "text_encoder" / "model.safetensors", "text_model."
    if type(pipeline.text_encoder).__name__ == "CLIPTextModel" and path.is_file():
        weights = {prefix + name.removeprefix(prefix): weight for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def refuse_sharded(network: nn.Module) -> None:
    """Refuse a network of which this process holds a part alone.

    Raises:
        ValueError: it is sharded (FSDP2).
    """
    if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        raise ValueError(
            "The student's weights are sharded over processes: load its checkpoint in one process, and export there."
        )


def _refuse_other_inputs(network: nn.Module) -> None:
    """Inputs that a network asks for beyond noise, time, classes of a UNet2DModel or DiT, and one encoder's texts.

    Without them diffusers ends in an error of its own, but for a guidance embedding (``time_cond_proj_dim``): training
    would leave it out without a word, and StableDiffusionPipeline add that of no guidance, which is not zero.
    """
    config: Any = network.config
    for setting, known in _INPUTS.get(name := class_name(network), {}).items():
        value, classes = config.get(setting), config.get("num_class_embeds")
        if value not in known or (value == "timestep" and not classes):
            raise ValueError(
                f"The teacher's {name} has {setting}={value!r}, and so an input that SiD does not give it: give a "
                f"teacher with {setting}=None."
            )


def _refuse_other_results(name: str, denoiser: Denoiser, clips: bool, teacher: Teacher | None) -> None:
    """What the pipeline would do otherwise, most of it without a word."""
    config: Any = denoiser.network.config
    if name == "ConsistencyModelPipeline":  # clamps its pixels anyway
        clips = False
    if clips and (denoiser.kind != "vp" or name == "StableDiffusionPipeline"):
        raise ValueError(
            f"clip_output=True cannot be exported: {name} clips no latents of this kind. Train with clip_output=False "
            "(the default is the clip_sample of the teacher's scheduler)."
        )
    if name == "DiTPipeline" and denoiser.kind == "edm":
        raise ValueError(
            "A DiT in EDM's scaling cannot be exported: DiTPipeline starts from noise of variance 1. Give a teacher "
            "with another scheduler."
        )
    if name == "LDMPipeline" and config.get("num_class_embeds") is not None:
        raise ValueError(
            "A UNet2DModel with a VAE and classes (num_class_embeds) cannot be exported: LDMPipeline tells its network "
            "no class. Give a teacher without classes, or without a VAE, or a DiT."
        )
    vae: Any = None if teacher is None else teacher.vae
    if vae is not None and vae.config.get("shift_factor"):
        raise ValueError(
            f"A VAE with a shift_factor cannot be exported: {name} knows none. Give a teacher whose VAE has none."
        )
    size = config.get("sample_size")
    if name != "StableDiffusionPipeline" and not isinstance(size, int) and len(set(size)) > 1:
        raise ValueError(
            f"Samples of size {tuple(size)} cannot be exported: {name} makes squares. Give a teacher of squares."
        )


def _leave_out_paths(path: Path) -> None:
    """Take out where the teacher was on this machine, which diffusers writes into the configs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
