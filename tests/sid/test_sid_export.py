"""Exported students: a process with diffusers alone draws what the generator draws, from the same noise, in one step."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_plugins.sid.export import export_student
from lightning_plugins.sid.teacher import load_teacher

# numpy 2 about how diffusers 0.42's Euler and DPM schedulers make their levels
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CARD = {"teacher": "someone/model", "alpha": 1.2, "images": 1000, "metrics": {}}
FRESH = """
import json, re, sys, torch
from diffusers import DiffusionPipeline

for case, call in json.load(open("calls.json")).items():
    pipeline = DiffusionPipeline.from_pretrained(case)
    pipeline.set_progress_bar_config(disable=True)
    raw = []
    if type(pipeline).__name__ == "ConsistencyModelPipeline":
        assert len(pipeline().images) == 1
        call["callback"] = lambda i, t, sample: raw.append(sample)
    images = pipeline(**call, generator=torch.manual_seed(3), output_type="np").images
    card = re.search(r"```python\\n(.*?)```", open(case + "/README.md").read(), re.S).group(1)
    space = {}
    exec(card.replace('"."', repr(case)).replace('"sample.png"', repr(case + ".png")), space)
    shown = [list(image.getdata()) for image in space["images"]]
    torch.save({"images": torch.from_numpy(images), "raw": raw, "shown": torch.tensor(shown)}, case + ".pt")
assert not any(name.startswith(("lightning", "peft")) for name in sys.modules)
"""
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}


def with_scheduler(folder, name, network=None, **options):
    """The pipeline of a folder with another scheduler, and with other settings of its network."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    if network:
        pipeline.register_modules(unet=diffusers.UNet2DModel.from_config({**pipeline.unet.config, **network}))
    pipeline.register_modules(scheduler=getattr(diffusers, name)(**options))
    return pipeline


def latent(folders):
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    pixels = with_scheduler(folders("ddpm"), "DDIMScheduler", {"in_channels": 4, "out_channels": 4})
    return diffusers.LDMPipeline(diffusers.DiffusionPipeline.from_pretrained(folders("dit")).vae, pixels.unet, scheduler)


FLOW = "FlowMatchEulerDiscreteScheduler"
EDM = {"sigma_schedule": "exponential", "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"}
FOUR = {"batch_size": 4}
CASES = {  # teacher, sigma_init, clips, what the pipeline is asked for
    "epsilon": (lambda folders: folders("ddpm"), 2.5, False, FOUR),
    "clipped": (lambda folders: folders("ddpm"), 2.5, True, FOUR),
    "v": (lambda folders: folders("v"), 2.5, False, FOUR),
    "x0": (lambda folders: folders("sample"), 1.0, False, FOUR),
    "zero_snr": (lambda folders: folders("zero_snr"), 1e9, False, FOUR),
    "variance": (
        lambda folders: with_scheduler(
            folders("ddpm"), "DDPMScheduler", {"out_channels": 2, "sample_size": (8, 8)}, clip_sample_range=2.0
        ),
        5.0,
        True,
        FOUR,
    ),
    "labelled": (lambda folders: folders("labelled"), 2.5, False, {**FOUR, "class_labels": [0, 1, 2, 3]}),
    "edm": (lambda folders: folders("edm"), 2.5, False, FOUR),
    "edm_v": (
        lambda folders: with_scheduler(folders("edm"), "EDMEulerScheduler", sigma_data=0.7, **EDM), 10.0, False, FOUR
    ),
    "flow": (lambda folders: with_scheduler(folders("edm"), FLOW), 2.5, False, FOUR),
    "flow_end": (lambda folders: with_scheduler(folders("edm"), FLOW, shift=3.0), 1e9, False, FOUR),
    "latent": (latent, 2.5, False, {**FOUR, "num_inference_steps": 1}),
    "dit": (lambda folders: folders("dit"), 2.5, True, {"class_labels": [0, 1, 2, 3], **ONE_STEP}),
    "sd": (lambda folders: folders("sd"), 2.5, False, {"prompt": ["a photograph of a lighthouse"] * 4, **ONE_STEP}),
}


@pytest.fixture(scope="module")
def drawn(teacher_folder, tmp_path_factory):
    """Each case's folder, what the generator draws, and what a fresh process did."""
    root, calls, expected = tmp_path_factory.mktemp("exported"), {}, {}
    for case, (build, sigma, clips, call) in CASES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            teacher = load_teacher(build(teacher_folder))
        level = float(teacher.denoiser.nearest(torch.tensor([min(sigma, teacher.denoiser.sigma_max)])))
        export(teacher, root / case, sigma_init=level, clips=clips)
        conditioning = {"class_labels": torch.arange(4)} if "class_labels" in call else {}
        conditioning |= teacher.encode_prompts(call["prompt"]) if "prompt" in call else {}
        noise = torch.randn(4, *teacher.sample_shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            x = teacher.denoiser(teacher.denoiser.input_scale(level) * noise, torch.full((4,), level), **conditioning)
        x = x.clamp(*([-2, 2] if case == "variance" else [-1, 1])) if clips else x
        calls[case], expected[case] = call, (x, teacher.decode(x).permute(0, 2, 3, 1))
    (root / "calls.json").write_text(json.dumps(calls))
    ran = subprocess.run([sys.executable, "-c", FRESH], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return root, expected, ran


def export(teacher, folder, *, sigma_init, clips=False, card=CARD):
    parts = teacher if teacher.vae is not None else None
    return export_student(teacher.denoiser, folder, sigma_init=sigma_init, clips=clips, teacher=parts, card=card)


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_draws_the_same(drawn, case):
    root, expected, _ = drawn
    x, images = expected[case]
    got = torch.load(root / f"{case}.pt")
    for raw in got["raw"]:
        assert (raw - x).abs().max() <= 1e-6 * max(1, x.abs().max())
    assert (got["images"] - images).abs().max() <= 1e-6
    assert images.std() > 0.05 and (images[0] - images[1]).abs().max() > 0.1
