"""Tiny teachers as diffusers saves them, one folder each, made when first asked for."""

import pytest
import torch
from tiny import sd_unet


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks only wait for a second one; also while a module's fixtures are made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet(channels=1, **options):
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **options,
    )


def vae():
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def ddpm(**scheduler):
    import diffusers

    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(**scheduler))


def labelled():
    import diffusers

    return diffusers.ConsistencyModelPipeline(unet(channels=3, num_class_embeds=4), diffusers.DDIMScheduler())


def edm():
    import diffusers

    return diffusers.ConsistencyModelPipeline(unet(channels=3), diffusers.EDMEulerScheduler())


def dit():
    import diffusers

    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler())


def stable_diffusion():
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = sd_unet()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=8)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        vae(), encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


class Parts:
    """A folder with transformer/ and scheduler/, without a pipeline's model_index.json."""

    def save_pretrained(self, folder):
        import diffusers

        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        )
        transformer.save_pretrained(folder / "transformer")
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


TEACHERS = {
    "ddpm": ddpm,  # epsilon, linear; (1, 8, 8) pixels
    "v": lambda: ddpm(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "sample": lambda: ddpm(prediction_type="sample"),
    "zero_snr": lambda: ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "labelled": labelled,  # 4 classes; (3, 8, 8) pixels
    "edm": edm,  # (3, 8, 8) pixels
    "dit": dit,  # 10 classes and none, learned variance; (4, 8, 8) latents of (3, 16, 16) images
    "sd": stable_diffusion,  # prompts of 8 tokens; (4, 8, 8) latents of (3, 16, 16) images
    "flow": Parts,  # encoder_hidden_states (B, n, 16), pooled_projections (B, 16); (4, 8, 8) latents, no VAE
}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """``teacher_folder(name)``: the folder of one of TEACHERS, to be read only."""
    made = {}

    def folder(name):
        if name not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made[name] = tmp_path_factory.mktemp("teachers") / name
                TEACHERS[name]().save_pretrained(made[name])
        return made[name]

    return folder
