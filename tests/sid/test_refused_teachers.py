"""Teachers of which no student could be exported are refused before a step; others are drawn from by diffusers."""

import warnings

import diffusers
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins.sid.module import SiD

PROMPTS = ["a b", "c"]
BASE = {"batch_size": 2, "num_pictures": 0, "updates_per_epoch": 1, "lr": 1e-3, "fake_lr": 1e-3}

# numpy 2 about how diffusers 0.42's DPM schedulers make their levels
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def other(network, **settings):
    """A network of the same class with other settings."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return type(network).from_config({**config, **settings})


def pipeline_of(folders, name, scheduler, **settings):
    """One of conftest's teachers with another scheduler, and other settings of its network."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders(name))
    pipeline.register_modules(scheduler=scheduler or diffusers.DDIMScheduler(clip_sample=False))
    if settings:
        pipeline.register_modules(unet=other(pipeline.unet, **settings))
    return pipeline


def pixels(folders, scheduler=None, **settings):
    return pipeline_of(folders, "edm", scheduler, **settings)


def latents(folders, **settings):
    pipeline = pipeline_of(folders, "edm", None, in_channels=4, out_channels=4, **settings)
    return diffusers.LDMPipeline(classes(folders).vae, pipeline.unet, pipeline.scheduler)


def texts(folders, scheduler=None, **settings):
    return pipeline_of(folders, "sd", scheduler, **settings)


def classes(folders, scheduler=None, shift_factor=None):
    pipeline = pipeline_of(folders, "dit", scheduler)
    pipeline.vae.register_to_config(shift_factor=shift_factor)
    return pipeline


def deep_floyd(folders):
    """Texts in pixel space: a network that is told texts, and no VAE."""
    whole = texts(folders, in_channels=3, out_channels=6)
    parts = {"tokenizer": whole.tokenizer, "text_encoder": whole.text_encoder, "unet": whole.unet}
    none = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    return diffusers.IFPipeline(**parts, **none, scheduler=whole.scheduler, requires_safety_checker=False)


def flow(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


KINDS = ("timestep", "identity", "projection", "simple_projection")
REFUSED = {  # teacher, arguments, words of the sentence
    "flow, shift 3": (lambda f: pixels(f, flow(shift=3.0)), {}, "timestep 714.66, .* distil with sigma_init=3"),
    "flow, no whole level": (
        lambda f: pixels(
            f,
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.1),
        ),
        {},
        "no whole number: (distil with|give a teacher with FlowMatchEulerDiscreteScheduler)",
    ),
    "no squares": (
        lambda f: pixels(f, sample_size=(8, 16)),
        {},
        r"Samples of size \(8, 16\) .* Give a teacher of squares",
    ),
    "latents, no squares": (
        lambda f: latents(f, sample_size=(16, 8)),
        {},
        r"\(16, 8\) cannot .* LDMPipeline makes squares",
    ),
    "latents, classes": (lambda f: latents(f, num_class_embeds=4), {}, "LDMPipeline tells its network no class"),
    "shift_factor": (lambda f: classes(f, shift_factor=0.1), {}, "A VAE with a shift_factor cannot be exported"),
    "DiT, EDM": (lambda f: classes(f, diffusers.EDMEulerScheduler()), {}, "A DiT in EDM's scaling cannot be exported"),
    "DeepFloyd": (deep_floyd, {}, r"no pipeline for a UNet2DConditionModel .*\(no VAE, a text encoder\)"),
    "texts, clip_sample": (lambda f: texts(f, diffusers.DDIMScheduler()), {}, "Train with clip_output=False"),
    "DiT, flow, clip_output": (lambda f: classes(f, flow()), {"clip_output": True}, "DiTPipeline clips no latents"),
    "guidance embedding": (lambda f: texts(f, time_cond_proj_dim=16), {}, "time_cond_proj_dim=16, and so an input"),
    "texts, classes": (lambda f: texts(f, num_class_embeds=4), {}, "num_class_embeds=4, and so an input"),
    "texts and sizes": (
        lambda f: texts(
            f, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
        ),
        {},
        "addition_embed_type='text_time', and so",
    ),
    "image embeddings": (
        lambda f: texts(f, encoder_hid_dim_type="image_proj", encoder_hid_dim=16),
        {},
        "encoder_hid_dim_type='image_proj', and so",
    ),
    **{
        f"texts, {kind}": (
            lambda f, kind=kind: texts(f, class_embed_type=kind, projection_class_embeddings_input_dim=8),
            {},
            f"class_embed_type='{kind}', and so",
        )
        for kind in KINDS
    },
    **{
        f"pixels, {kind}": (
            lambda f, kind=kind: pixels(f, class_embed_type=kind),
            {},
            f"class_embed_type='{kind}', and so",
        )
        for kind in KINDS
    },
    "pixels, identity of classes": (
        lambda f: pixels(f, class_embed_type="identity", num_class_embeds=4),
        {},
        "class_embed_type='identity', and so",
    ),
}
TRAINED = {  # teacher, arguments, what the pipeline is asked for
    "pixels": (pixels, {}, {}),
    "pixels, clip_output": (lambda f: pixels(f, diffusers.DDIMScheduler()), {}, {}),
    "flow, shift 3": (lambda f: pixels(f, flow(shift=3.0)), {"sigma_init": 3.0}, {}),
    "flow": (lambda f: pixels(f, flow()), {}, {}),
    "EDM": (lambda f: pixels(f, diffusers.EDMEulerScheduler()), {}, {}),
    "classes": (lambda f: pixels(f, num_class_embeds=4), {}, {"class_labels": [0, 3]}),
    "classes as timesteps": (
        lambda f: pixels(f, class_embed_type="timestep", num_class_embeds=4),
        {},
        {"class_labels": [0, 3]},
    ),
    "latents": (latents, {}, {}),
    "DiT": (classes, {}, {"class_labels": [0, 3]}),
    "DiT, flow": (lambda f: classes(f, flow()), {}, {"class_labels": [0, 3]}),
    "texts": (texts, {}, {"prompt": PROMPTS}),
    "texts, no squares": (lambda f: texts(f, sample_size=(8, 16)), {}, {"prompt": PROMPTS}),
    "texts in the time embedding": (
        lambda f: texts(f, addition_embed_type="text", addition_embed_type_num_heads=4, encoder_hid_dim=16),
        {},
        {"prompt": PROMPTS},
    ),
    "texts, projected": (
        lambda f: texts(f, encoder_hid_dim_type="text_proj", encoder_hid_dim=16),
        {},
        {"prompt": PROMPTS},
    ),
    "texts, flow": (lambda f: texts(f, flow()), {}, {"prompt": PROMPTS}),
    "texts, clip_output": (lambda f: texts(f, diffusers.DDIMScheduler()), {"clip_output": False}, {"prompt": PROMPTS}),
}


class Counting(SiD):
    """Counts the steps of its optimizers."""

    steps = 0

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.steps += 1


@pytest.fixture
def built(teacher_folder):
    """Pipelines with the same weights in each test."""

    def build(case):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return case(teacher_folder)

    return build


def distil(pipeline, arguments, *callbacks, prompts=False, **options):
    """The module, and its fit as a function."""
    module = Counting(teacher=pipeline, **(BASE | arguments))
    data = DataLoader([{"prompt": PROMPTS}], batch_size=None) if prompts else None
    trainer = quiet_trainer(*callbacks, **({"max_steps": 1} | options))
    return module, lambda: trainer.fit(module, data)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_step(built, case, tmp_path):
    build, arguments, words = REFUSED[case]
    saves = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    prompts = "text" in case or "embedding" in case or case == "DeepFloyd"
    module, fit = distil(built(build), arguments, saves, prompts=prompts, logger=CSVLogger(tmp_path))
    with pytest.raises(ValueError, match=words):
        fit()
    assert module.steps == 0 and module.images == 0
    with pytest.raises(ValueError, match=words):
        module.export(tmp_path / "student")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("case", TRAINED)
def test_trained_and_drawn_by_plain_diffusers(built, case, tmp_path):
    build, arguments, call = TRAINED[case]
    module, fit = distil(built(build), arguments, prompts="prompt" in call)
    fit()
    assert module.steps == 2
    pipeline = diffusers.DiffusionPipeline.from_pretrained(module.export(tmp_path / "student"))
    pipeline.set_progress_bar_config(disable=True)
    conditions = {"class_labels": torch.tensor(call["class_labels"])} if "class_labels" in call else {}
    conditions |= module.teacher.encode_prompts(PROMPTS) if "prompt" in call else {}
    rows = {} if "prompt" in call or case.startswith("DiT") else {"batch_size": 2}
    guided = {} if rows else {"guidance_scale": 1.0}
    noise = torch.randn(2, *module.teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.networks.decode(module(noise, **conditions)).permute(0, 2, 3, 1)
    drawn = pipeline(**call, **rows, **guided, num_inference_steps=1, generator=torch.manual_seed(0), output_type="np")
    assert (torch.from_numpy(drawn.images) - expected).abs().max() <= 2e-6  # float32 in [0, 1], sums in another order
    assert expected.std() > 0.02


def test_a_fit_leaves_no_filter_of_warnings_behind(built, tmp_path):
    """Neither one that ends nor one that fails; within it a checkpoint by steps warns of nothing."""
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    _, fit = distil(built(pixels), {}, saves)
    before = list(warnings.filters)
    fit()
    assert warnings.filters == before

    class Failing(ModelCheckpoint):
        def on_train_batch_end(self, *_):
            raise RuntimeError("a disk is full")

    _, fit = distil(built(pixels), {}, Failing(tmp_path / "other"))
    with pytest.raises(RuntimeError, match="disk"):
        fit()
    assert warnings.filters == before
