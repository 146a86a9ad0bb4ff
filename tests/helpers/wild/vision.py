"""Networks for images and sound."""

import torch
from torch import nn
from torch.nn import functional as F

from wild.language import EAGER, VOCABULARY, Language, tokens
from wild.zoo import Networked, Wild

IMAGES, CLASSES = (3, 1, 8, 8), 3


class Images(Networked):
    """Cross-entropy of ``net`` on labelled images."""

    @classmethod
    def batch(cls):
        return torch.randn(IMAGES), torch.randint(CLASSES, IMAGES[:1])

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss


class Block(nn.Module):
    """Two convolutions with batch norm, beside the identity."""

    def __init__(self, channels, activation):
        super().__init__()
        self.activation = activation
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.activation(self.norm_1(self.first(x)))
        return self.activation(x + self.norm_2(self.second(y)))


def residual(activation):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Block(4, activation), nn.AvgPool2d(2), *head)


class Residual(Images, family="vision", title="residual CNN"):
    """Batch norm's running statistics must move once a batch."""

    def network(self):
        return residual(nn.SiLU())


class ResidualReLU(Images, family="vision", title="residual CNN, ReLU"):
    """Batch norm before units with kinks: the default of every image network."""

    seen = "kinks"

    def network(self):
        return residual(nn.ReLU(inplace=True))


class MaxPool(Images, family="vision", title="CNN with max-pooling"):
    """Kinks without ReLU; the last layer is not trained."""

    seen = "kinks"

    def network(self):
        layers = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES)
        layers[-1].requires_grad_(False)
        return nn.Sequential(*layers)


class ViT(Language, family="vision", title="ViT"):
    """A transformer over patches."""

    lr, islands = 0.02, False

    def network(self):
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 2}
        sizes |= {"intermediate_size": 16, "num_attention_heads": 2, "num_labels": CLASSES}
        return ViTForImageClassification(ViTConfig(**sizes, hidden_dropout_prob=0.1, **EAGER))

    @classmethod
    def batch(cls):
        return {"pixel_values": torch.randn(IMAGES), "labels": torch.randint(CLASSES, IMAGES[:1])}


class ConvNeXt(ViT, family="vision", title="ConvNeXt"):
    """Layers left out at random, scales that begin at a millionth."""

    def network(self):
        from transformers import ConvNextConfig, ConvNextForImageClassification

        sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 1]}
        return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=CLASSES, drop_path_rate=0.2))


class Clip(Language, family="vision", title="CLIP"):
    """Two towers and a temperature: the loss couples all samples of a batch."""

    lr, step, faint = 0.02, 1e-4, True  # of small networks the cosines are all but equal

    def network(self):
        from transformers import CLIPConfig, CLIPModel

        tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "eos_token_id": 2}
        vision = tower | {"image_size": 8, "patch_size": 4, "num_channels": 1}
        return CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=4, logit_scale_init_value=0.0, **EAGER)
        )

    @classmethod
    def batch(cls):
        return {"input_ids": tokens(3, 5), "pixel_values": torch.randn(IMAGES), "return_loss": True}


class Whisper(Language, family="vision", title="Whisper"):
    """Spectra in, text out; one matrix is both embedding and last layer."""

    islands = False

    def network(self):
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        sizes = {"vocab_size": VOCABULARY, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8}
        sizes |= {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        sizes |= {"d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 1}
        names = {"eos_token_id": 2, "decoder_start_token_id": 1}
        return WhisperForConditionalGeneration(WhisperConfig(**sizes, **names, dropout=0.1, **EAGER))

    @classmethod
    def batch(cls):
        return {"input_features": torch.randn(2, 4, 12), "labels": tokens(2, 4)}


class Autoencoder(Wild, family="vision", title="VAE"):
    """Draws the codes' noise in the step."""

    lr = 0.02

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(3, 12)

    @classmethod
    def batch(cls):
        return torch.randn(4, 12)

    def training_step(self, batch, batch_idx):
        mean, log_variance = self.encoder(batch).chunk(2, -1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (log_variance.exp() + mean**2 - 1 - log_variance).sum(-1) / 2
        return ((self.decoder(code) - batch) ** 2).sum(-1).mean() + divergence.mean()


class Diffusion(Wild, family="vision", title="diffusion, group norm"):
    """Draws noise and its levels in the step."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)
        self.level = nn.Linear(1, 4)

    @classmethod
    def batch(cls):
        return torch.randn(IMAGES)

    def training_step(self, batch, batch_idx):
        level = torch.rand(len(batch), 1, device=batch.device).to(batch)
        noise = torch.randn_like(batch)
        noisy = batch + level[:, :, None, None] * noise
        hidden = self.norm(self.inner(noisy)) + self.level(level)[:, :, None, None]
        return F.mse_loss(self.outer(F.silu(hidden)), noise)


class PartlyFrozenCapsules(Wild, family="vision", title="CapsNet, partly frozen"):
    """Routing by agreement, which sums in fp32, on features that are not trained."""

    islands, seen = True, "kinks"  # the margin loss's

    def __init__(self):
        super().__init__()
        from lightning_plugins import CapsNet

        sizes = {"image_shape": (1, 10, 10), "channels": 4, "kernel_size": 3, "num_types": 2, "decoder_hidden": (8,)}
        self.net = CapsNet(**sizes, num_classes=CLASSES)
        self.net.features.requires_grad_(False)

    @classmethod
    def batch(cls):
        return {"image": torch.rand(2, 1, 10, 10), "label": torch.randint(CLASSES, (2,))}

    def training_step(self, batch, batch_idx):
        return sum(self.net.loss(batch).values())
