"""Exported students: a process with diffusers alone draws, in one step, what the generator draws of the same noise."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
import yaml
from clients import asked_for, run_client
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file

from lightning_plugins.cli import main
from lightning_plugins.sid.card import TESTED
from lightning_plugins.sid.export import export_student
from lightning_plugins.sid.teacher import load_teacher

# numpy 2 about how diffusers 0.42's Euler and DPM schedulers make their levels
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CARD = {"teacher": "someone/model", "alpha": 1.2, "images": 1000, "metrics": {}}
FRESH = """
import json, re, sys

import numpy, torch
from diffusers import DiffusionPipeline

for case, call in json.load(open("calls.json")).items():
    pipeline = DiffusionPipeline.from_pretrained(case)
    pipeline.set_progress_bar_config(disable=True)
    raw = []
    if type(pipeline).__name__ == "ConsistencyModelPipeline":
        assert len(pipeline().images) == 1
        call["callback"] = lambda i, t, sample: raw.append(sample)
    images = pipeline(**call, generator=torch.manual_seed(0), output_type="np").images
    card = re.search(r"```python\\n(.*?)```", open(case + "/README.md").read(), re.S).group(1)
    space = {}
    exec(card.replace('"."', repr(case)).replace('"sample.png"', repr(case + ".png")), space)
    shown = numpy.stack([numpy.asarray(image) for image in space["images"]])
    torch.save({"images": torch.from_numpy(images), "raw": raw, "shown": torch.from_numpy(shown)}, case + ".pt")
assert not any(name.startswith("lightning") for name in sys.modules)
"""
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1.0}


def with_scheduler(folder, name, network=None, **options):
    """The pipeline of a folder with another scheduler, and with other settings of its network."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    if network:
        pipeline.register_modules(unet=diffusers.UNet2DModel.from_config({**pipeline.unet.config, **network}))
    pipeline.register_modules(scheduler=getattr(diffusers, name)(**options))
    return pipeline


def latent(folders):
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    pixels = with_scheduler(folders("ddpm"), "DDIMScheduler", {"in_channels": 4, "out_channels": 4})
    return diffusers.LDMPipeline(
        diffusers.DiffusionPipeline.from_pretrained(folders("dit")).vae, pixels.unet, scheduler
    )


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
        2.5,
        True,
        FOUR,
    ),
    "labelled": (lambda folders: folders("labelled"), 2.5, False, {**FOUR, "class_labels": [0, 1, 2, 3]}),
    "edm": (lambda folders: folders("edm"), 2.5, False, FOUR),
    "edm_v": (
        lambda folders: with_scheduler(folders("edm"), "EDMEulerScheduler", sigma_data=0.7, **EDM),
        10.0,
        False,
        FOUR,
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
        noise = torch.randn(4, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x = teacher.denoiser(teacher.denoiser.input_scale(level) * noise, torch.full((4,), level), **conditioning)
        largest = float(x.abs().max())
        x = x.clamp(*([-2, 2] if case == "variance" else [-1, 1])) if clips else x
        calls[case], expected[case] = call, (x, teacher.decode(x).permute(0, 2, 3, 1), largest)
    (root / "calls.json").write_text(json.dumps(calls))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", FRESH], cwd=root, capture_output=True, text=True, env=one_thread)
    assert ran.returncode == 0, ran.stderr
    return root, expected, ran


def export(teacher, folder, *, sigma_init, clips=False, card=CARD):
    parts = teacher if teacher.vae is not None else None
    return export_student(teacher.denoiser, folder, sigma_init=sigma_init, clips=clips, teacher=parts, card=card)


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_draws_the_same(drawn, case):
    root, expected, _ = drawn
    x, images, largest = expected[case]
    got = torch.load(root / f"{case}.pt")
    for raw in got["raw"]:
        assert (raw - x).abs().max() <= 1e-6 * max(1, largest)
    assert bool(got["raw"]) == (case not in ("latent", "dit", "sd"))
    assert (got["images"] - images).abs().max() <= 5e-7 * max(2, largest)
    assert images.std() > 0.02 and (images[0] - images[1]).abs().max() > 0.1


def test_the_card_of_each_is_true(drawn):
    """Its example, run there, draws the same images."""
    root, expected, _ = drawn
    for case, (_, images, _) in expected.items():
        shown = torch.load(root / f"{case}.pt")["shown"]
        assert shown.view(images.shape).sub(255 * images).abs().max() <= 0.51 and (root / f"{case}.png").is_file(), case
    for case, words in {
        "labelled": [
            "pipeline(batch_size=4, class_labels=[0, 1, 2, 3], gen",
            "DDIMPipeline",
            "| teacher | someone/model |",
        ],
        "dit": ["pipeline(num_inference_steps=1, guidance_scale=1.0, class_labels=[0, 1, 2, 3], gen"],
        "sd": ["guidance_scale=1.0, gen", "the defaults, 50 and 7.5, run", "pipeline_tag: text-to-image"],
    }.items():
        card = (root / case / "README.md").read_text()
        assert all(word in card for word in words) and "## Results" not in card


def test_the_command_draws_from_each(drawn, tmp_path, capsys):
    root, expected, _ = drawn
    for case, (*_, call) in CASES.items():
        words = ["--labels", *map(str, call["class_labels"])] if "class_labels" in call else []
        words += [f"--prompt={prompt}" for prompt in call.get("prompt", [])[:1]]
        main(["sample", f"--ckpt_path={root / case}", "--num_samples=4", f"--output={tmp_path / case}", *words])
        assert "4 images: " in capsys.readouterr().out
        for path, image in zip(sorted((tmp_path / case).iterdir()), expected[case][1], strict=True):
            shown = torch.from_numpy(numpy.asarray(Image.open(path)).copy()).view(image.shape)
            assert (shown - 255 * image).abs().max() <= 0.51, case
    main(["sample", f"--ckpt_path={root / 'dit'}", "--num_samples=2", "--output=any.png"])  # classes at random
    assert Path("any.png").is_file()
    for case, words, told in (
        ("sd", [], "This StableDiffusionPipeline draws what a text says: give one by --prompt."),
        ("edm", ["--prompt=a"], "--prompt: this ConsistencyModelPipeline cannot be told what to draw. Leave it out."),
        ("dit", ["--labels=10"], "--labels 10: the classes of this Pipeline are 0 to 9."),
        ("edm", ["--labels=1"], "--labels: this Pipeline is not conditional, it cannot be told what to draw."),
        ("edm", ["--prior=normal"], "--prior does not fit this Pipeline: its sample takes no prior."),
    ):
        with pytest.raises(SystemExit):
            main(["sample", f"--ckpt_path={root / case}", *words])
        assert f"error: {told}" in capsys.readouterr().err


def test_the_files(drawn):
    root, _, _ = drawn
    names = {path.relative_to(root / "sd").as_posix() for path in (root / "sd").rglob("*") if path.is_file()}
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"} < names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]
    for case in CASES:
        for path in (root / case).rglob("*.json"):
            assert "/tmp" not in path.read_text() and "_name_or_path" not in path.read_text(), path
    scheduler = json.loads((root / "clipped/scheduler/scheduler_config.json").read_text())
    assert (
        scheduler["clip_sample"] is True and scheduler["num_train_timesteps"] == len(scheduler["trained_betas"]) == 441
    )
    assert json.loads((root / "epsilon/scheduler/scheduler_config.json").read_text())["clip_sample"] is False


def test_the_cards_figures_and_names(teacher_folder, tmp_path):
    teacher, private = load_teacher(teacher_folder("edm")), tmp_path / "private"
    private.mkdir()
    card = {"teacher": str(private), "alpha": 1.0, "images": 2**20, "metrics": {"FID": 1.92345}}
    text = (export(teacher, tmp_path / "local", sigma_init=2.5, card=card) / "README.md").read_text()
    assert "| teacher | private |" in text and str(tmp_path) not in text and "base_model" not in text
    assert "| FID | 1.923 |" in text and "| generated images seen | 1048576 |" in text
    header = (export(teacher, tmp_path / "hub", sigma_init=2.5) / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(header) == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "base_model": "someone/model",
        "tags": ["score-identity-distillation", "one-step"],
    }


def test_nothing_is_left_where_nothing_could_be_written(teacher_folder, tmp_path, monkeypatch):
    teacher, folder = load_teacher(teacher_folder("sd")), tmp_path / "some" / "student"
    sigma = float(teacher.denoiser.nearest(torch.tensor([2.5])))
    for largest in (100, 3_000, 30_000):  # bytes: a scheduler, a tokenizer and the weights do not fit
        with (
            full_disk(largest),
            pytest.raises(OSError, match=r"student cannot be written, and nothing of it was: .*File too"),
        ):
            export(teacher, folder, sigma_init=sigma)
        assert list(folder.parent.iterdir()) == []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupt)
        export(teacher, folder, sigma_init=sigma)
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()
    export(teacher, folder, sigma_init=sigma)  # an empty folder is filled
    assert [path.name for path in folder.parent.iterdir()] == ["student"]
    with pytest.raises(FileExistsError, match="student exists and is not empty: export to a new folder"):
        export(teacher, folder, sigma_init=sigma)
    with pytest.raises(OSError, match="inner cannot be written, and nothing of it was: Not a directory"):
        export(teacher, folder / "README.md" / "inner", sigma_init=sigma)


@contextmanager
def full_disk(largest):
    """No file can grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_no_pipeline_draws_is_said(teacher_folder, tmp_path):
    ddpm, sd, dit = (load_teacher(teacher_folder(name)) for name in ("ddpm", "sd", "dit"))
    sigma = float(ddpm.denoiser.nearest(torch.tensor([2.5])))
    latent_sigma = float(sd.denoiser.nearest(torch.tensor([2.5])))
    shifted = load_teacher(with_scheduler(teacher_folder("edm"), FLOW, shift=3.0))
    level = float(shifted.denoiser.nearest(torch.tensor([2.5])))
    wide = load_teacher(with_scheduler(teacher_folder("ddpm"), "DDPMScheduler", {"sample_size": (8, 16)}))
    edm_dit = diffusers.DiffusionPipeline.from_pretrained(teacher_folder("dit"))
    edm_dit.register_modules(scheduler=diffusers.EDMEulerScheduler())
    flow = load_teacher(teacher_folder("flow"))
    said = [
        (ddpm, {"sigma_init": 2.5}, "sigma_init=2.5 is none of the network's noise levels; the nearest is 2.5023"),
        (shifted, {"sigma_init": level}, r"the network's timestep 714.\d\d, .* distil with sigma_init="),
        (
            sd,
            {"sigma_init": latent_sigma, "clips": True},
            "clip_output=True cannot be exported: StableDiffusionPipeline",
        ),
        (load_teacher(edm_dit), {"sigma_init": 2.5}, "A DiT in EDM's scaling cannot be exported"),
        (
            wide,
            {"sigma_init": sigma},
            r"Samples of size \(8, 16\) cannot be exported: ConsistencyModelPipeline makes sq",
        ),
        (flow, {"sigma_init": flow.denoiser.sigma_max}, r"no pipeline for a SD3Transformer2DModel .*\(no VAE, no text"),
    ]
    for teacher, options, words in said:
        with pytest.raises(ValueError, match=words):
            export(teacher, tmp_path / "student", **options)
    dit.vae.register_to_config(shift_factor=0.1)
    with pytest.raises(ValueError, match="A VAE with a shift_factor cannot be exported"):
        export(dit, tmp_path / "student", sigma_init=float(dit.denoiser.nearest(torch.tensor([2.5]))))
    assert list(tmp_path.iterdir()) == []
    best = min((level for level in whole_levels(shifted.denoiser)), key=lambda level: abs(level - 2.5))
    with pytest.raises(ValueError, match=f"distil with sigma_init={best:.6g}"):
        export(shifted, tmp_path / "student", sigma_init=level)
    export(shifted, tmp_path / "student", sigma_init=best)


def whole_levels(denoiser):
    return [float(s) for s in denoiser.sigmas if abs(1000 * s / (1 + s) - round(float(1000 * s / (1 + s)))) < 1e-3]


def test_every_version_of_transformers_reads_the_text_parts(drawn):
    """As released models have them: files of the vocabulary, and a prefix without which weights stayed random."""
    root, _, _ = drawn
    names = {path.name for path in (root / "sd" / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= names
    weights = load_file(root / "sd" / "text_encoder" / "model.safetensors")
    assert weights and all(name.startswith("text_model.") for name in weights)


def test_the_cards_name_the_versions_that_were_run(drawn):
    """Newer than the newest named: run make test-clients with it, then name it in TESTED."""
    root, _, _ = drawn
    tried = {package: " and ".join(versions) for package, versions in TESTED.items()}
    assert f"all it needs: tested with {tried['diffusers']}." in (root / "edm" / "README.md").read_text()
    text = f"all it needs: tested with diffusers {tried['diffusers']}, transformers {tried['transformers']}."
    assert text in (root / "sd" / "README.md").read_text()
    for package, (oldest, newest) in TESTED.items():
        assert Version(oldest) < Version(sys.modules[package].__version__) <= Version(newest), package


@asked_for
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["oldest", "newest"])
def test_the_versions_named_draw_the_same(drawn, which, tmp_path):
    root, expected, _ = drawn
    packages = [f"{package}=={versions[which]}" for package, versions in TESTED.items()]
    run_client(tmp_path / "packages", packages, f"import os; os.chdir({str(root)!r})\n" + FRESH)
    for case, (_, images, largest) in expected.items():
        assert (torch.load(root / f"{case}.pt")["images"] - images).abs().max() <= 5e-7 * max(2, largest), case
