"""Every public constructor and function with small valid arguments, and one step with what it makes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from toys import Squares, mlp
from trainers import fit, quiet_trainer

import lightning_plugins
from lightning_plugins import callbacks, capsnet, data, eae, metrics, optim, sid, unilm
from lightning_plugins.replay.recorder import is_replaying

# Plain records, and bases that a subclass completes: they compute nothing with what they are given.
RECORDS = {"PRESETS", "Preset", "RoutingTrace", "LabelledImages", "Texts", "Teacher", "KeyedText"}


@dataclass(frozen=True)
class Subject:
    """What is called.

    Attributes:
        call: a class or a function.
        base: makes valid arguments, small ones; the others keep their defaults.
        step: uses what the call gave, and returns what must hold no NaN.
        examples: how many nasty values each argument gets.
        told_as: what a sentence may call an argument, which is passed on.
    """

    call: Callable[..., Any]
    base: Callable[[], dict[str, Any]]
    step: Callable[[Any], Any] = lambda made: made
    examples: int = 10
    told_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Names of all arguments."""
        return [name for name, p in inspect.signature(self.call).parameters.items() if p.kind != p.VAR_KEYWORD]


def draw(*shape: int) -> Tensor:
    """Numbers in [0, 1), the same each time."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def images(shape: tuple[int, ...], classes: int = 3, count: int = 8) -> dict[str, Tensor]:
    """A batch."""
    return {"image": draw(count, *shape), "label": torch.arange(count) % classes}


# Steps


def trained(module: LightningModule, loss: Callable[[], Tensor]) -> list[Tensor]:
    """A step of the module's own optimiser, and the loss after it."""
    first = loss()
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    optimizer.zero_grad()
    first.backward()
    optimizer.step()
    return [first, loss(), *module.parameters()]


def train_capsnet(module: capsnet.CapsNet) -> list[Tensor]:
    """Of a CapsNet."""
    batch = images(module.image_shape, module.num_classes)
    if module.num_labels > 1:
        batch["label"] = torch.stack([(batch["label"] + n) % module.num_classes for n in range(module.num_labels)], 1)
        batch["parts"] = batch["image"][:, None].expand(-1, module.num_labels, -1, -1, -1)
    return trained(module, lambda: torch.stack([*module.loss(batch).values()]).sum())


def train_eae(module: eae.EAE) -> list[Tensor]:
    """Of an EAE."""
    batch = images(module.image_shape, min(2, module.num_classes))
    return [*trained(module, lambda: torch.stack([*module.loss(batch).values()]).sum()), module.sample(2)]


def train_teacher(module: sid.DiffusionTeacher) -> list[Tensor]:
    """Of a DiffusionTeacher."""
    batch = images(module.image_shape, module.num_classes, count=2)
    return trained(module, lambda: module.loss(batch, torch.Generator().manual_seed(0))["denoising"])


def train_sid(module: sid.SiD) -> list[Tensor]:
    """Of a SiD: one update of both networks, as a trainer asks for it."""
    quiet_trainer(max_steps=1).fit(module)
    return [*module.networks.state_dict().values()]


def train_unilm(module: unilm.UniLMSeq2Seq) -> list[Tensor]:
    """Of a UniLM, on rows of the data's tokenizer."""
    pairs = data.Seq2SeqData(pairs=PAIRS, batch_size=4, val_size=0)
    module._tokenizer = module._tokenizer or pairs.tokenizer
    quiet_trainer(max_steps=1, num_sanity_val_steps=0).fit(module, datamodule=pairs)
    return [*module.network.parameters()]


def watch(callback: Callback) -> list[Tensor]:
    """Two steps of a trainer with the callback."""
    module = Squares(mlp(2, 1, 1, seed=0))
    fit(module, list(draw(8, 2).split(4)), callback)
    return [*module.parameters()]


def penalised() -> dict[str, Any]:
    """Arguments of gradient_penalty_backward for a module in a trainer."""
    module = Squares(mlp(2, 1, 1, seed=0))
    module.automatic_optimization = False
    module.trainer = quiet_trainer(max_steps=1)
    module.trainer.strategy.connect(module)
    return {"module": module, "loss_fn": lambda: module.training_step(draw(4, 2), 0), "coefficient": 0.1}


def measure(metric: Metric) -> Any:
    """Of two sets of features."""
    width = 1 if getattr(metric, "extractor", None) is None else 2
    width = len(metric.real_features_sum) if isinstance(metric, metrics.FrechetDistance) else width
    metric.update(draw(200, width), real=True)
    metric.update(draw(200, width) + 0.1, real=False)
    return {name: value for name, value in listed(metric.compute()).items() if value.isfinite()}


def listed(values: Any) -> dict[str, Tensor]:
    """One value or several, by name."""
    return values if isinstance(values, dict) else {"value": values}


def codes_kept(metric: Metric) -> Any:
    """Of random codes."""
    width = int(metric.dim) or 2
    metric.update(draw(24, width))
    return metric.compute()


def scored(scores: MetricCollection) -> dict[str, Tensor]:
    """Of two texts."""
    scores.update(["a b", "c"], ["a b", "d"])
    return scores.compute()


def remembered(prior: eae.LatentPrior) -> Tensor:
    """Fitted and drawn from."""
    prior.fit(draw(40, prior.latent_dim))
    return prior.sample(3, "mixture")


def moved(optimizer: optim.NormRMSprop) -> list[Tensor]:
    """A step."""
    params = optimizer.param_groups[0]["params"]
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    return params


def loaded(module: LightningDataModule) -> Any:
    """The first training batch."""
    return next(iter(module.train_dataloader()))


def convolved(layer: capsnet.PrimaryCapsules) -> Tensor:
    """Of a map that is large enough."""
    return layer(draw(1, layer.conv.in_channels, *(size + 1 for size in layer.conv.kernel_size)))


def routed(layer: capsnet.RoutingCapsules) -> Tensor:
    """Of as many capsules as the layer takes."""
    *inputs, dim, _, _ = layer.weight.shape
    return layer(draw(2, inputs[0] if inputs else 4, dim))


def decoded(decoder: capsnet.CapsuleDecoder) -> Tensor:
    """Of the first class."""
    width = decoder.layers[0].in_features // decoder.num_capsules
    return decoder(draw(2, decoder.num_capsules, width), torch.zeros(2, dtype=torch.int64))


def drawn(figure: Any) -> int:
    """How many panels."""
    return len(figure.axes)


# Arguments

PAIRS = [["one two", "two one"], ["red green", "green red"], ["up down", "down up"], ["in out", "out in"]]
BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}


def denoiser() -> sid.Denoiser:
    """Of a network that returns its input."""
    import diffusers

    return sid.Denoiser(Same(), diffusers.DDPMScheduler(num_train_timesteps=50))


class Same(nn.Module):
    """Predicts that all is noise."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Its input."""
        return x


def pipeline() -> Any:
    """A tiny teacher."""
    import diffusers

    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())


def denoised() -> dict[str, Tensor]:
    """Images of a distillation."""
    return {name: draw(2, 3) + n for n, name in enumerate(("x_g", "d_teacher", "d_fake"))}


def log_of_a_run(folder: Path) -> str:
    """A table as Lightning's CSVLogger writes it."""
    (folder / "metrics.csv").write_text("step,ode/time,ode/igr_term\n1,0.1,0.5\n2,0.2,0.4\n")
    return str(folder)


def subjects(folder: Path) -> dict[str, Subject]:
    """All of them, by name.

    Args:
        folder: an empty one.
    """
    votes, u, w = draw(2, 4, 3, 2), draw(2, 4, 2), draw(4, 2, 3, 2)
    z, labels = draw(12, 2), torch.arange(12) % 2
    plot = Subject(unilm.plot_masks, lambda: {"kinds": ["seq2seq"], "tokens": (["a"], ["b"])}, drawn, 4)
    found = [
        Subject(
            capsnet.CapsNet,
            lambda: {
                "image_shape": (1, 12, 12),
                "num_classes": 3,
                "channels": 2,
                "kernel_size": 3,
                "num_types": 2,
                "primary_dim": 2,
                "capsule_dim": 2,
                "decoder_hidden": (2,),
            },
            train_capsnet,
        ),
        Subject(capsnet.PrimaryCapsules, lambda: {"in_channels": 2, "num_types": 2, "kernel_size": 3}, convolved),
        Subject(capsnet.RoutingCapsules, lambda: {"in_dim": 2, "num_capsules": 3, "dim": 2, "num_inputs": 4}, routed),
        Subject(capsnet.SelfAttentionRouting, lambda: {"in_dim": 2, "num_capsules": 3, "num_inputs": 4}, routed),
        Subject(capsnet.CapsuleDecoder, lambda: {"num_capsules": 3, "dim": 2, "image_shape": (1, 2, 2)}, decoded),
        Subject(capsnet.exponential_squash, lambda: {"s": u}),
        Subject(capsnet.margin_loss, lambda: {"lengths": draw(2, 3), "targets": torch.tensor([0, 2])}),
        Subject(capsnet.multi_hot, lambda: {"labels": torch.tensor([0, 2]), "num_classes": 3}),
        Subject(capsnet.compute_votes, lambda: {"u": u, "W": w}),
        Subject(capsnet.kmeans_objective, lambda: {"votes": votes, "centres": draw(2, 3, 2)}),
        Subject(capsnet.route, lambda: {"u": u, "W": w}),
        Subject(capsnet.route_votes, lambda: {"votes": votes}),
        Subject(capsnet.routing_trace, lambda: {"u": u, "W": w}, vars),
        Subject(capsnet.squash, lambda: {"s": u}),
        Subject(
            eae.EAE,
            lambda: {"image_shape": (1, 4, 4), "num_classes": 2, "latent_dim": 2, "network": "mlp", "width": 4},
            train_eae,
        ),
        Subject(eae.KNNEntropy, lambda: {"max_codes": 20}, codes_kept),
        Subject(eae.KNNEntropyLoss, dict, lambda loss: loss(z)),
        Subject(eae.LatentBatchNorm, lambda: {"dim": 2}, lambda norm: norm(draw(4, norm.dim))),
        Subject(eae.LatentDiagnostics, lambda: {"latent_dim": 2, "max_codes": 20}, codes_kept, 6),
        Subject(eae.LatentPrior, lambda: {"latent_dim": 2, "num_components": 2, "capacity": 50}, remembered),
        Subject(eae.conditional_knn_entropy, lambda: {"z": z, "labels": labels}),
        Subject(eae.count_duplicates, lambda: {"z": z}),
        Subject(eae.entropy_gap, lambda: {"z": z}),
        Subject(eae.gaussian_reference_entropy, lambda: {"num_samples": 12, "dim": 2, "num_draws": 1}),
        Subject(eae.interpolate_codes, lambda: {"a": z, "b": z + 1, "num_steps": 3}),
        Subject(eae.knn_entropy, lambda: {"z": z}),
        Subject(eae.koleo_loss, lambda: {"z": z}),
        Subject(eae.latent_diagnostics, lambda: {"z": z}),
        Subject(eae.mmd, lambda: {"z": z}),
        Subject(eae.sigreg, lambda: {"z": z, "num_slices": 2}),
        Subject(
            unilm.UniLMSeq2Seq, lambda: {"config": dict(BERT), "generate_every_n_epochs": 0}, train_unilm, examples=4
        ),
        plot,
        Subject(
            sid.DiffusionTeacher,
            lambda: {
                "image_shape": (1, 4, 4),
                "block_out_channels": (8,),
                "layers_per_block": 1,
                "attention_levels": 0,
                "num_train_timesteps": 50,
            },
            train_teacher,
            examples=6,
        ),
        Subject(
            sid.SiD,
            lambda: {"teacher": pipeline(), "batch_size": 2, "num_pictures": 0},
            train_sid,
            examples=4,
            told_as={"fake_guidance": "guidance"},
        ),
        Subject(sid.Denoiser, lambda: {"network": Same(), "scheduler": denoiser().scheduler_config}, examples=5),
        Subject(
            sid.load_teacher,
            lambda: {"source": pipeline()},
            lambda teacher: teacher.sample_shape,
            5,
            {"source": "teacher"},
        ),
        Subject(
            sid.guided,
            lambda: {
                "denoiser": denoiser(),
                "x": draw(2, 1, 2, 2),
                "sigma": torch.ones(2),
                "conditioning": {},
                "null_conditioning": {},
                "scale": 2.0,
            },
        ),
        Subject(sid.many_steps, lambda: {"denoiser": denoiser(), "noise": draw(2, 1, 2, 2), "num_steps": 2}),
        Subject(sid.generator_loss, denoised),
        Subject(sid.fisher_divergence, lambda: {"d_teacher": draw(2, 3), "d_fake": draw(2, 3) + 1}),
        Subject(sid.fake_score_loss, lambda: {"d_fake": draw(2, 3), "x_g": draw(2, 3), "sigma": torch.ones(2)}),
        Subject(sid.karras_sigmas, lambda: {"r": draw(3)}),
        Subject(callbacks.Flooding, lambda: {"level": 0.1}, watch),
        Subject(callbacks.GradientPenalty, lambda: {"coefficient": 0.1}, watch),
        Subject(callbacks.ODEDiagnostics, lambda: {"every_n_steps": 1, "picture": False}, watch, examples=8),
        Subject(callbacks.GenerativeEvaluation, lambda: {"feature": "digits"}),
        Subject(callbacks.RandomState, dict, watch),
        Subject(callbacks.NonFiniteGuard, dict, watch),
        Subject(callbacks.ExactResume, dict, watch),
        Subject(lightning_plugins.AtomicCheckpointIO, dict),
        Subject(lightning_plugins.keep_checkpoints_whole, lambda: {"trainer": quiet_trainer(max_steps=1)}),
        Subject(callbacks.SaveOnSigterm, dict, watch),
        Subject(callbacks.flood, lambda: {"losses": draw(3), "level": 0.1}),
        Subject(callbacks.gradient_penalty_backward, penalised),
        Subject(callbacks.plot_ode_diagnostics, lambda: {"run": log_of_a_run(folder)}, str, 4),
        Subject(is_replaying, dict),
        Subject(metrics.BirthdayParadox, lambda: {"feature": None, "collision_probability": 0.1}, measure),
        Subject(metrics.FrechetDistance, lambda: {"feature": None, "num_features": 2}, measure),
        Subject(metrics.GenerationScores, dict, scored),
        Subject(metrics.KernelDistance, lambda: {"feature": None, "num_subsets": 2}, measure),
        Subject(metrics.PrecisionRecallDensityCoverage, lambda: {"feature": None}, measure),
        Subject(metrics.feature_extractor, lambda: {"feature": "digits"}, lambda made: made(draw(2, 1, 8, 8))),
        Subject(optim.NormRMSprop, lambda: {"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}, moved),
        Subject(data.Digits, lambda: {"image_size": 8, "batch_size": 1}, loaded),
        Subject(data.MultiMNIST, lambda: {"batch_size": 2}, loaded, 6, {"source": "path"}),
        Subject(data.HFImages, lambda: {"path": "nowhere"}),
        Subject(data.IdxImages, lambda: {"folder": "nowhere"}),
        Subject(data.ImageData, dict),
        Subject(data.TextData, dict),
        Subject(data.PromptData, lambda: {"num_classes": 3, "batch_size": 2}, loaded),
        Subject(data.PythonDocstrings, dict),
        Subject(data.Seq2SeqData, lambda: {"pairs": PAIRS, "batch_size": 1, "val_size": 1}, loaded, 5),
        Subject(data.box_overlap, lambda: {"parts": draw(1, 2, 1, 4, 4)}),
        Subject(data.train_wordpiece, lambda: {"texts": ["a b c"], "vocab_size": 20}, len),
    ]
    return {subject.call.__name__: subject for subject in found}


def public_names() -> set[str]:
    """Names of the package and of its parts."""
    parts = (lightning_plugins, callbacks, capsnet, data, eae, metrics, optim, sid, unilm)
    return {name for part in parts for name in part.__all__}
