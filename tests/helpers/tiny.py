"""Networks of transformers and diffusers that are small enough for a test, without weights from elsewhere."""

import torch

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,  # each process would draw its own
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def sd_unet():
    """Stable Diffusion's kind of network, which reads texts."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def save_teacher(folder):
    """A diffusion model of 8 x 8 grey pictures with random weights, as diffusers keeps it."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(folder)


def letter_pairs(count):
    """Text pairs: letters with spaces between, two to six of them, and the same backwards."""
    generator = torch.Generator().manual_seed(0)
    letters = [[chr(97 + int(i)) for i in torch.randint(9, (2 + n % 5,), generator=generator)] for n in range(count)]
    return [[" ".join(row), " ".join(row[::-1])] for row in letters]
