"""Train a small diffusion model on handwritten digits, and distil its 50 steps to one, without any data.

Two files are all it takes: the teacher is a plain diffusers pipeline, and so is the student that comes out, in the
folder sid_student: DiffusionPipeline.from_pretrained("sid_student")() draws a digit in one step, with diffusers alone.
Both are compared with the 1,797 real digits by the Fréchet distance; sid_distill.png shows the teacher's 50 steps
beside the student's one, from the same noise. Eight minutes of one core; two with --teacher-steps 1000 --updates 250,
which shows what happens while neither is done. A teacher of your own: --teacher FOLDER, of images of 8 x 8 px.

    lightning-plugins copy sid_distill . && python sid_distill.py
"""

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from lightning_plugins import DiffusionTeacher, Digits, FrechetDistance, SiD

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
SETTINGS = {  # of a network of 0.2 million parameters; the paper's rates are for larger ones and millions of images
    "alpha": 1.0,
    "lr": 5e-4,
    "fake_lr": 5e-4,
    "fake_noise_levels": "grid",
    "decay_from": 1 / 3,
    "ema_halflife_images": 22_000,
    "ema_ramp_up": 0.25,
    "batch_size": 64,
    "num_pictures": 0,
}


class Judge:
    """Fréchet distance from all real digits."""

    def __init__(self) -> None:
        data = Digits(image_size=8)
        self.metric = FrechetDistance("digits")
        for split in ("train", "val", "test"):
            self.metric.update(data.require(split).pixels / 255, real=True)

    def __call__(self, images: Tensor) -> float:
        """Of ``(n, 1, 8, 8)`` in [0, 1]."""
        self.metric.update(images, real=False)
        distance = self.metric.compute().item()
        self.metric.reset()
        return distance


class Course(Callback):
    """Prints the student's distance on the way. The loss would not tell: the divergence is what falls."""

    def __init__(self, judge: Judge, samples: int, every: int) -> None:
        self.judge, self.samples, self.every, self.divergence = judge, samples, every, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: SiD, *args: object) -> None:
        """A row of the table."""
        self.divergence.append(float(trainer.callback_metrics["train/divergence"]))
        if trainer.global_step % self.every == 0:
            latest = self.divergence[-self.every :]
            distance = self.judge(draw(pl_module, self.samples))
            print(f"| {pl_module.images:,} | {distance:.2f} | {sum(latest) / len(latest):.1f} |", flush=True)


def draw(module: SiD, count: int) -> Tensor:
    """The student's images of always the same noise."""
    return module.sample(count, generator=torch.Generator().manual_seed(0))


def train_teacher(folder: Path, steps: int, seed: int) -> None:
    """A diffusion model on the digits, written as a diffusers pipeline."""
    seed_everything(seed, verbose=False)
    data = Digits(image_size=8, batch_size=128, seed=seed)
    module = DiffusionTeacher(
        image_shape=(1, 8, 8), lr=4e-3, seed=seed, pictures_every_n_epochs=0, export_to=str(folder)
    )
    Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, **QUIET).fit(module, datamodule=data)


def save_picture(panels: dict[str, Tensor], path: str) -> None:
    """Images ``(100, 1, 8, 8)`` in pages of 10 x 10, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        framed = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1), value=0.4)  # a line around each
        axes.imshow(framed.view(10, 10, 10, 10).transpose(1, 2).reshape(100, 100).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, distil, print, draw, export; returns the Fréchet distances of ``teacher`` and ``student``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("sid_teacher"), help="trained here if it is not there")
    parser.add_argument("--teacher-steps", type=int, default=2500, help="of the teacher's training")
    parser.add_argument("--updates", type=int, default=1500, help="of the student")
    parser.add_argument("--every", type=int, default=125, help="updates between two measurements")
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student", type=Path, default=Path("sid_student"), help="folder to export to")
    parser.add_argument("--picture", default="sid_distill.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the networks are too small to share
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if not args.teacher.exists():
        train_teacher(args.teacher, args.teacher_steps, args.seed)

    judge = Judge()
    module = SiD(str(args.teacher), seed=args.seed, updates_per_epoch=args.updates, **SETTINGS)
    print("| images seen | FD, 1 step | divergence |\n|---|---|---|")
    course = Course(judge, args.samples, args.every)
    trainer = Trainer(max_steps=args.updates, accelerator="cpu", limit_val_batches=0, callbacks=[course], **QUIET)
    trainer.fit(module)

    student = draw(module, max(args.samples, 100))
    teacher = module.teacher_sample(len(student), generator=torch.Generator().manual_seed(0))  # of the same noise
    distances = {"teacher": judge(teacher[: args.samples]), "student": judge(student[: args.samples])}
    ratio = distances["student"] / distances["teacher"]
    print(
        f"FD: teacher, 50 steps {distances['teacher']:.2f}; student, 1 step {distances['student']:.2f}: {ratio:.2f} x"
    )
    panels = {f"teacher, 50 steps, FD {distances['teacher']:.2f}": teacher[:100]}
    save_picture(panels | {f"student, 1 step, FD {distances['student']:.2f}": student[:100]}, args.picture)
    print(f"student: {module.export(args.student, metrics={'FD': distances['student']})}")
    return distances


if __name__ == "__main__":
    main()
