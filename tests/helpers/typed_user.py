# pyright: standard
"""What a user who checks types writes with every public name; ``make types`` demands that it has no error.

Nothing here runs: each function is a page of someone's program. ``tests/gates/test_types.py`` says that no public name
is missing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_plugins import (
    EAE,
    AtomicCheckpointIO,
    BirthdayParadox,
    CapsNet,
    DiffusionTeacher,
    Digits,
    Flooding,
    FrechetDistance,
    GenerationScores,
    GenerativeEvaluation,
    GradientPenalty,
    HFImages,
    IdxImages,
    KernelDistance,
    MultiMNIST,
    NonFiniteGuard,
    NormRMSprop,
    ODEDiagnostics,
    PrecisionRecallDensityCoverage,
    PromptData,
    PythonDocstrings,
    RandomState,
    SaveOnSigterm,
    Seq2SeqData,
    SiD,
    UniLMSeq2Seq,
    entropy_gap,
    flood,
    gradient_penalty_backward,
    is_replaying,
    keep_checkpoints_whole,
    knn_entropy,
    plot_masks,
    plot_ode_diagnostics,
)


class DeeperCapsNet(CapsNet):
    """A part of one's own: a hook, a term of the loss, an argument more."""

    def __init__(self, depth: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth

    def build_features(self) -> nn.Module:
        return nn.Sequential(*(nn.LazyConv2d(256, 5) for _ in range(self.depth)))

    def loss(self, batch: Mapping[str, Tensor], poses: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss(batch, poses)
        return terms | {"short": terms["loss"] * 0.1}


class Classifier(LightningModule):
    """A module of someone else's, for the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = nn.Linear(784, 10)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        def mean_loss() -> Tensor:
            losses = nn.functional.cross_entropy(self.network(batch["image"].flatten(1)), batch["label"])
            return flood(losses, level=0.1, kind="soft")

        loss: Tensor = gradient_penalty_backward(self, mean_loss, 0.01, params=self.network.parameters())
        if not is_replaying():
            self.log("train/loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NormRMSprop(self.parameters(), lr=1e-3, alpha=0.9, weight_decay=1e-4)


def capsules(image: Tensor, labels: Tensor, checkpoint: Path) -> None:
    data = MultiMNIST(source="digits", shift=4, batch_size=64)
    shape: tuple[int, int, int] = data.image_shape
    module = CapsNet(
        "efficient", image_shape=shape, num_classes=data.num_classes, num_labels=2, routing="kmeans", lr=1e-3
    )
    Trainer(max_epochs=1).fit(module, datamodule=data)
    poses: Tensor = module(image)
    predicted: Tensor = module.predict_labels(poses)
    rebuilt: Tensor = module.reconstruct(image, labels=predicted)
    perturbed: Tensor = module.perturb(rebuilt, values=torch.linspace(-0.25, 0.25, 11), labels=labels)
    couplings: Tensor = module.routing_trace(perturbed).couplings
    terms: dict[str, Tensor] = module.loss({"image": image, "label": labels})
    again = DeeperCapsNet.load_from_checkpoint(checkpoint, depth=3)
    print(couplings.shape, sum(terms.values()), again.depth)


def codes(image: Tensor, labels: Tensor, loader: DataLoader[dict[str, Tensor]]) -> None:
    data = Digits(image_size=28, batch_size=256, label_noise=0.1, num_train=500)
    module = EAE(data.image_shape, latent_dim=8, network="rae", objective="eae", k=[1, 2], prior="mixture", lr=1e-3)
    Trainer(max_epochs=1).fit(module, datamodule=data)
    module.fit_prior(loader)
    z: Tensor = module.encode(image)
    between: Tensor = module.interpolate(image[:1], image[1:2], num_steps=5, mode="slerp")
    drawn: Tensor = module.sample(4, labels=labels, prior="mixture", temperature=0.8, generator=torch.Generator())
    entropy: Tensor = knn_entropy(z, k=[1, 2, 3], eps=1e-6)
    gap: Tensor = entropy_gap(z, 2)
    rebuilt: Tensor = module.reconstruct(image, labels)
    weight: float = module.current_weight()
    print(between.shape, drawn.shape, module.decode(z).shape, rebuilt.shape, (entropy + gap).item(), weight)


def distillation(folder: Path, image: Tensor, labels: Tensor) -> None:
    teacher = DiffusionTeacher(
        image_shape=(1, 8, 8), conditional=True, block_out_channels=[16, 32], export_to=str(folder)
    )
    teacher.sample(2, labels=labels, num_steps=10)
    written: Path = teacher.export(folder)
    student = SiD(str(written), alpha=1.0, betas=(0.0, 0.999), loss="sid", noise_levels="grid", num_pictures=4)
    prompts = PromptData(num_classes=10, batch_size=64, batches_per_epoch=100)
    Trainer(max_steps=10, callbacks=[RandomState()]).fit(student, datamodule=prompts)
    drawn: Tensor = student.sample(2, labels=labels, generator=torch.Generator().manual_seed(0))
    slow: Tensor = student.teacher_sample(2, labels=labels, num_steps=5)
    print(drawn.shape, slow.shape, student.export(str(folder / "student"), metrics={"FD": 1.5}))


def text(folder: Path) -> None:
    pairs = [["how are you", "fine thanks"], ["and you", "me too"]]
    small = Seq2SeqData(pairs=pairs, val_size=0.5, vocab_size=200, batch_size=2)
    large = PythonDocstrings(vocab_size=4000, packing=True)
    module = UniLMSeq2Seq(
        config={"model_type": "bert", "hidden_size": 32},
        objective="pseudo",
        mask={"seq2seq": 0.5, "l2r": 0.5},
        generation={"num_beams": 2},
    )
    Trainer(max_epochs=1).fit(module, datamodule=small)
    Trainer(max_epochs=1).validate(module, datamodule=large)
    answers: list[str] = module.generate_text(["how are you"], max_new_tokens=5)
    for piece in module.stream_text(answers[0]):
        print(piece)
    written: Path = module.export(folder)
    plot_masks(("seq2seq", "l2r")).savefig(written / "masks.png")


def metrics(real: Tensor, fake: Tensor, folder: Path) -> None:
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(784, 16))
    frechet = FrechetDistance(extractor, num_features=16)
    kernel = KernelDistance("digits", subset_size=50)
    nearest = PrecisionRecallDensityCoverage("digits", k=3)
    birthday = BirthdayParadox("digits", threshold=0.5)
    for metric in (frechet, kernel, nearest, birthday):
        metric.update(real, real=True)
        metric.update(fake, real=False)
        print(metric.compute())
    frechet.save_reference(folder / "reference.pt")
    frechet.load_reference(folder / "reference.pt")
    first, second = birthday.closest_pairs(5)
    scores = GenerationScores(lowercase=True)
    scores.update(["a cat sat"], ["the cat sat"])
    print(first.shape, second.shape, scores.compute())


def callbacks(run: Path) -> None:
    diagnostics = ODEDiagnostics(every_n_steps=10, sharpness_every_n_steps=100, on_edge="warn")
    trainer = Trainer(
        max_epochs=1,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            Flooding(level_schedule=[[0, 0.2], [10, 0.1]], start="immediately"),
            GradientPenalty(coefficient=0.01, engine="auto", relative_step=0.01),
            GenerativeEvaluation(num_samples=500, metrics=["frechet", "kernel"], reference="val"),
            NonFiniteGuard(policy="skip", patience=4),
            SaveOnSigterm(signals=["SIGTERM", "SIGUSR1"]),
            diagnostics,
        ],
    )
    keep_checkpoints_whole(trainer)
    for data in (HFImages("mnist", val_size=5000, crop=28), IdxImages("mnist", val_size=0.1)):
        trainer.fit(Classifier(), datamodule=data)
    rate: float = diagnostics.suggest_lr()
    picture: Path = plot_ode_diagnostics(run, output=run / "ode.png")
    print(rate, picture)
