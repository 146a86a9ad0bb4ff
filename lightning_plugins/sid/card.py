"""The model cards of an exported student and of an exported teacher."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_plugins.core.markdown import markdown_table, markdown_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TESTED = {"diffusers": ("0.36.0", "0.42.1"), "transformers": ("4.57.6", "5.23.0")}
"""Oldest and newest versions in which ``make test-clients`` runs the folders; the latter are of text encoders."""

_SNIPPET = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".")  # this folder, or its id on the Hub
images = pipeline({call}, generator=torch.manual_seed(0)).images
images[0].save("sample.png")
"""
_CALLS = {
    "ConsistencyModelPipeline": "batch_size=4",
    "LDMPipeline": "batch_size=4, num_inference_steps=1",
    "DiTPipeline": "num_inference_steps=1, guidance_scale=1.0",
    "StableDiffusionPipeline": '["a photograph of a lighthouse"] * 4, num_inference_steps=1, guidance_scale=1.0',
}
_DEFAULTS = {
    "ConsistencyModelPipeline": "One step is this pipeline's default; other pipelines for the same network, such as "
    "`DDIMPipeline` with its\n  default of 50 steps, run without a word and give worse images.",
    "LDMPipeline": "Give `num_inference_steps=1`: the default of 50 runs without a word and gives worse images.",
    "DiTPipeline": "Give `num_inference_steps=1` and `guidance_scale=1.0`: the defaults, 50 and 4, run without a word "
    "and give worse\n  images.",
    "StableDiffusionPipeline": "Give `num_inference_steps=1` and `guidance_scale=1.0`: the defaults, 50 and 7.5, run "
    "without a word and give\n  worse images. No safety checker is included.",
}


def model_card(pipeline: "DiffusionPipeline", sigma_init: float, clips: bool, card: Mapping[str, Any]) -> str:
    """The text of README.md, with the Hub's header and an example that runs in the folder.

    Args:
        pipeline: the pipeline that the card stands beside.
        sigma_init: the generator's noise level in EDM scaling.
        clips: whether images were clamped in training.
        card: what is told of the training: ``teacher`` (a name), ``alpha``, ``images`` (seen), ``metrics`` (figures by
            name), and other ``settings``.
    """
    name, teacher = type(pipeline).__name__, str(card["teacher"])
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", teacher) and not Path(teacher).exists()
    teacher = teacher if hub_id else Path(teacher).name  # of a folder's path the card tells only the last part
    settings = {
        "teacher": teacher,
        "generator's noise level (EDM scaling)": f"{sigma_init:.6g}",
        "alpha": card["alpha"],
        "generated images seen": card["images"],
        "output clamped in training": "yes" if clips else "no",
        **card.get("settings", {}),
    }
    parts = [
        _front_matter(name, teacher if hub_id else None),
        "# A one-step generator (SiD)",
        f"Made from the diffusion model {markdown_text(teacher)} by score identity distillation without data\n"
        "(Zhou et al. 2024, arXiv 2404.04057): one call of the network turns noise into an image.",
        f"## Use\n\n```python\n{_SNIPPET.format(call=_call(pipeline))}```\n\n{_needs(name)}\n\n"
        f"- {_DEFAULTS[name]}\n- Keep the scheduler: its one step starts at the noise level that the generator was "
        "trained at.",
        "## Training\n\n" + markdown_table(("setting", "value"), [*settings.items()]),
    ]
    if card["metrics"]:
        results = [(name, f"{value:.4g}") for name, value in card["metrics"].items()]
        parts.append("## Results\n\n" + markdown_table(("metric", "value"), results))
    return "\n\n".join(parts) + "\n"


def _needs(name: str) -> str:
    """What the example needs, and the versions that were tried."""
    tried = {package: " and ".join(versions) for package, versions in TESTED.items()}
    if name == "StableDiffusionPipeline":
        both = f"diffusers {tried['diffusers']}, transformers {tried['transformers']}"
        return f"diffusers and transformers are all it needs: tested with {both}."
    return f"diffusers is all it needs: tested with {tried['diffusers']}."


def teacher_card(pipeline: "DiffusionPipeline", card: Mapping[str, Any]) -> str:
    """The text of a teacher's README.md, with the Hub's header and an example that runs in the folder.

    Args:
        pipeline: the pipeline that the card stands beside.
        card: what is told of the training: ``settings`` and ``metrics`` (figures), each by name.
    """
    name, classes = type(pipeline).__name__, pipeline.unet.config.get("num_class_embeds")
    call = "batch_size=4, num_inference_steps=50"
    call += f", class_labels={[index % classes for index in range(4)]}" if classes else ""
    lines = ["library_name: diffusers", "pipeline_tag: unconditional-image-generation", "tags:", "- ddpm"]
    steps = "1 (a step alone gives no image)" if classes else "1000 (no better here, and slower)"
    parts = [
        "\n".join(["---", *lines, "---"]),
        "# A diffusion model of images",
        "Trained by denoising (Ho, Jain, Abbeel 2020, arXiv 2006.11239); the weights are a running mean.\n"
        "It can be the teacher of a one-step generator (score identity distillation, arXiv 2404.04057).",
        f"## Use\n\n```python\n{_SNIPPET.format(call=call)}```\n\ndiffusers is all it needs.\n\n"
        f"- It is a `{name}`, whose default of `num_inference_steps` is {steps}.",
        "## Training\n\n" + markdown_table(("setting", "value"), [*card["settings"].items()]),
    ]
    if card["metrics"]:
        results = [(name, f"{value:.4g}") for name, value in card["metrics"].items()]
        parts.append("## Results\n\n" + markdown_table(("metric", "value"), results))
    return "\n\n".join(parts) + "\n"


def _call(pipeline: "DiffusionPipeline") -> str:
    """The arguments that the example gives, with classes where the network has some."""
    name = type(pipeline).__name__
    dit = name == "DiTPipeline"
    classes = pipeline.transformer.config.num_embeds_ada_norm if dit else pipeline.unet.config.get("num_class_embeds")
    labels = f", class_labels={[index % classes for index in range(4)]}" if classes else ""
    return _CALLS[name] + labels


def _front_matter(name: str, base_model: str | None) -> str:
    """The Hub's YAML header; JSON strings are YAML strings."""
    task = "text-to-image" if name == "StableDiffusionPipeline" else "unconditional-image-generation"
    lines = ["library_name: diffusers", f"pipeline_tag: {task}"]
    if base_model:
        lines.append(f"base_model: {json.dumps(base_model)}")
    return "\n".join(["---", *lines, "tags:", "- score-identity-distillation", "- one-step", "---"])
