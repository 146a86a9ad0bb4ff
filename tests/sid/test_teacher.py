"""Teachers from folders and pipelines: what is read, what is frozen, what is refused."""

import json
import shutil

import diffusers
import pytest
import torch

from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.teacher import fingerprint, load_teacher

SHAPES = {
    "ddpm": ((1, 8, 8), None, "vp"),
    "labelled": ((3, 8, 8), 4, "vp"),
    "edm": ((3, 8, 8), None, "edm"),
    "dit": ((4, 8, 8), 10, "vp"),
    "sd": ((4, 8, 8), None, "vp"),
    "flow": ((4, 8, 8), None, "flow"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder(name, teacher_folder):
    teacher = load_teacher(teacher_folder(name))
    assert (teacher.sample_shape, teacher.num_classes, teacher.denoiser.kind) == SHAPES[name]
    assert teacher.source == str(teacher_folder(name)) and teacher.denoiser.network is teacher.network
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters())
    assert (teacher.vae is not None) == (name in ("dit", "sd"))
    assert (teacher.text_encoder is not None) == (teacher.tokenizer is not None) == (name == "sd")
    assert (teacher.null_conditioning() is not None) == (name in ("dit", "sd"))


def test_the_other_ways_in(teacher_folder, tmp_path):
    folder = teacher_folder("ddpm")
    by_folder = load_teacher(str(folder))
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    by_pipeline = load_teacher(pipeline)
    assert by_pipeline.network is pipeline.unet and by_pipeline.source is None
    # unet/ and scheduler/ alone; then the flat layout of the oldest repositories, such as google/ddpm-cifar10-32
    parts, flat = tmp_path / "parts", tmp_path / "flat"
    shutil.copytree(folder, parts)
    (parts / "model_index.json").unlink()
    flat.mkdir()
    for path in [folder / "model_index.json", *folder.glob("*/*")]:
        shutil.copy(path, flat)
    x, sigma = torch.randn(1, 1, 8, 8), by_folder.denoiser.sigmas[440:441]
    for teacher in (by_pipeline, load_teacher(parts), load_teacher(flat)):
        assert teacher.fingerprint == by_folder.fingerprint
        assert torch.equal(teacher.denoiser(x, sigma), by_folder.denoiser(x, sigma))


def test_the_fingerprint_sees_weights_and_settings_alone(teacher_folder):
    teacher, network = load_teacher(teacher_folder("ddpm")), load_teacher(teacher_folder("ddpm")).network
    same = diffusers.UNet2DModel.from_config(network.config)
    same.load_state_dict(network.state_dict())
    assert fingerprint(same, teacher.scheduler) == teacher.fingerprint
    weight = dict(same.named_parameters())["conv_in.weight"]
    for change in (
        lambda: weight[0, 0, 0, 0].mul_(1 + 1e-6),
        lambda: weight.copy_(weight.flip(0)),
        lambda: weight.copy_(weight.flip(-1)),
    ):
        with torch.no_grad():
            kept = weight.clone()
            change()
            assert fingerprint(same, teacher.scheduler) != teacher.fingerprint
            weight.copy_(kept)
    assert fingerprint(same, diffusers.DDPMScheduler(beta_end=0.03)) != teacher.fingerprint
    assert fingerprint(same.bfloat16(), teacher.scheduler) != teacher.fingerprint


def test_decoding(teacher_folder):
    pixels = load_teacher(teacher_folder("ddpm"))
    x = torch.tensor([[-3.0, -1.0], [0.5, 2.0]]).view(1, 1, 2, 2)
    assert pixels.decode(x).flatten().tolist() == [0.0, 0.0, 0.75, 1.0]
    latent = load_teacher(teacher_folder("sd"))
    z = torch.randn(2, 4, 8, 8)
    expected = latent.vae.decode(z / latent.vae.config.scaling_factor).sample
    images = latent.decode(z)
    assert images.shape == (2, 3, 16, 16) and 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    latent.vae.register_to_config(shift_factor=0.1)  # as in Stable Diffusion 3
    torch.testing.assert_close(latent.decode(z - 0.1 * latent.vae.config.scaling_factor), images)
    latent.vae.half()
    assert latent.decode(z).dtype == torch.float32


def test_latents_are_decoded_a_few_at_a_time(teacher_folder):
    """Some of Stable Diffusion's feature maps have 268 MB for each image: eleven are never in its VAE together."""
    latent, seen = load_teacher(teacher_folder("sd")), []
    z = torch.randn(11, 4, 8, 8)
    expected = latent.vae.decode(z / latent.vae.config.scaling_factor).sample
    latent.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(latent.decode(z), (expected / 2 + 0.5).clamp(0, 1))
    assert sum(seen) == 11 and max(seen) <= 4
    module = SiD(str(teacher_folder("sd")), num_pictures=9, teacher_steps=1, clip_output=False)
    with torch.no_grad():
        module.networks.build(module.build_network)
        module.teacher.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        for sample in (module.sample, module.teacher_sample):
            seen.clear()
            assert sample(9, prompts=["a cat"] * 9).shape == (9, 3, 16, 16)
            assert sum(seen) == 9 and max(seen) <= 4


def test_prompts_as_the_pipeline_encodes_them(teacher_folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(teacher_folder("sd"))
    teacher = load_teacher(teacher_folder("sd"))
    prompts = ["a cat", "a sentence that is longer than the few tokens there are"]
    expected, null = pipeline.encode_prompt(prompts, "cpu", 1, True)
    encoded = teacher.encode_prompts(prompts)
    assert list(encoded) == ["encoder_hidden_states"] and encoded["encoder_hidden_states"].shape == (2, 8, 16)
    torch.testing.assert_close(encoded["encoder_hidden_states"], expected)
    torch.testing.assert_close(teacher.null_conditioning()["encoder_hidden_states"], null[:1])
    with pytest.raises(ValueError, match="has no text encoder of Stable Diffusion's kind"):
        load_teacher(teacher_folder("ddpm")).encode_prompts(["a cat"])


def test_what_is_no_teacher(teacher_folder, tmp_path):
    folder = tmp_path / "folder"
    for source, error, words in (
        (tmp_path, FileNotFoundError, "is no diffusers pipeline: no model_index.json there"),
        (tmp_path / "missing", FileNotFoundError, "there is no such folder, and no such id of the Hub"),
        ("nobody/nothing", FileNotFoundError, "teacher='nobody/nothing' cannot be loaded: .+ Give an id of the Hub"),
        (3, ValueError, "teacher=int is no diffusion model"),
    ):
        with pytest.raises(error, match=words):
            load_teacher(source)

    def broken(part, change, name="ddpm"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(teacher_folder(name), folder)
        path = folder / part
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return folder

    cases = [
        (broken, "scheduler/scheduler_config.json", {"prediction_type": "score"}, "prediction_type='score'"),
        (broken, "unet/config.json", {"sample_size": None}, "names no sample_size"),
        (broken, "unet/config.json", {"in_channels": 3}, "cannot be loaded"),
        (broken, "model_index.json", {"_class_name": "OddPipeline"}, "cannot be loaded: .*OddPipeline"),
    ]
    for make, part, change, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_teacher(make(part, change))
    (broken("model_index.json", {}) / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        load_teacher(folder)


def test_networks_that_do_not_fit(teacher_folder):
    pipeline = diffusers.DDPMPipeline.from_pretrained(teacher_folder("ddpm"))
    for channels, words in (((1, 3), "maps 1 channels to 3"), ((2, 2), None)):
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels[0],
            out_channels=channels[1],
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            norm_num_groups=2,
        )
        pipeline.unet = unet
        if words is None:
            assert load_teacher(pipeline).sample_shape == (2, 8, 8)
        else:
            with pytest.raises(ValueError, match=words):
                load_teacher(pipeline)
    latent = diffusers.LDMPipeline(vqvae=diffusers.VQModel(latent_channels=3), unet=unet, scheduler=pipeline.scheduler)
    with pytest.raises(ValueError, match="its VAE has 3 latent channels, but its network 2"):
        load_teacher(latent)
    pipeline.unet = diffusers.UNet1DModel()
    with pytest.raises(ValueError, match="has unet: UNet1DModel, which is not known; known are UNet2DModel"):
        load_teacher(pipeline)

    class Two(diffusers.DiffusionPipeline):
        def __init__(self, unet, prior, scheduler):
            super().__init__()
            self.register_modules(unet=unet, prior=prior, scheduler=scheduler)

    with pytest.raises(ValueError, match="has unet: UNet2DModel, prior: UNet2DModel: a teacher needs exactly one"):
        load_teacher(Two(unet, unet, pipeline.scheduler))
    with pytest.raises(ValueError, match="has no scheduler, which says what its network predicts"):
        load_teacher(Two(unet, None, None))
