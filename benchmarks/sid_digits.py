"""Real digits end to end: a diffusion model of 50 steps is distilled to one step, without data.

    python benchmarks/sid_digits.py --folder DIR [--teacher DIR] [--seeds 0 1 2] [--updates 1500] [--set NAME=VALUE ...]
        [--pictures DIR] [--beside DIR]

The settings are those of ``configs/sid/digits``, changed by ``--set``; they were chosen by the kernel distance with
seed 100. Without ``--teacher`` one is trained by ``configs/sid/digits_teacher`` to ``DIR/teacher``. 1,797 samples, of
the same noise for all seeds and for the teacher's 50 steps, are compared with all 1,797 digits:

- FD: Fréchet distance in the package's 32 ``"digits"`` features, of raw images, which are the generator's, and clamped
  to [0, 1] as a pipeline emits them: the same unless ``--set clip_output=false``; KD: kernel distance in the same;
- what clamping does: FD of images clamped at black alone and at white alone, the share of pixels beyond each, and the
  mean grey level, of which the real digits' is given.

Each seed's state is kept in ``--folder`` every 125 updates: a run that was cut off goes on, and one that is finished is
not made again. Seeds may be trained by processes of their own, each given one; the last call with all prints the table.
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from capsnet_step import cpu_model
from judge import Judge, print_bars, save_runs

from lightning_plugins import KernelDistance
from lightning_plugins.cli import main as command
from lightning_plugins.data.digits import embedded_digits
from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.plots import plot_progress, plot_student
from lightning_plugins.sid.sampling import many_steps
from lightning_plugins.sid.teacher import load_teacher

CONFIG = Path(__file__).parents[1] / "configs" / "sid" / "digits.yaml"
EVERY, TEACHER_STEPS, NOISE_SEED = 125, 50, 7
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
Row = dict[str, float]


class RawJudge(Judge):
    """Also of images beyond [0, 1]."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """``(n, F)``."""
        return torch.cat([self.extractor.network(part).flatten(1) for part in images.split(256)])

    def kernel(self, images: Tensor) -> float:
        """Kernel distance from the real images."""
        metric = KernelDistance(feature=None)
        metric.update(self.real, real=True)
        metric.update(self.features(images), real=False)
        return metric.compute().item()


def real_digits() -> Tensor:
    """``(1797, 1, 8, 8)`` in [0, 1]."""
    return embedded_digits()[0][:, None].float() / 16


def noise() -> Tensor:
    """The unit noise that everybody is judged on."""
    return torch.randn(1797, 1, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))


@torch.no_grad()
def student_images(module: SiD) -> Tensor:
    """Samples in one step, clamped only if the generator itself does that; 0 is black and 1 white."""
    return torch.cat([module(part) for part in noise().split(256)]) / 2 + 0.5


def teacher_images(folder: str) -> Tensor:
    """The teacher's in 50 steps, as its scheduler leaves them, of the same noise."""
    denoiser = load_teacher(folder).denoiser
    parts = [many_steps(denoiser, part, TEACHER_STEPS) for part in noise().split(256)]
    return torch.cat(parts) / 2 + 0.5


def distances(images: Tensor, judge: RawJudge) -> Row:
    """Both distances of raw and of clamped images."""
    clamped = images.clamp(0, 1)
    return {
        "raw": judge.frechet(images),
        "clamped": judge.frechet(clamped),
        "raw_kernel": judge.kernel(images),
        "clamped_kernel": judge.kernel(clamped),
    }


def clamping(images: Tensor, judge: RawJudge) -> Row:
    """What clamping changes, by halves."""
    return {
        "at_black": judge.frechet(images.clamp(min=0)),
        "at_white": judge.frechet(images.clamp(max=1)),
        "below": (images < 0).float().mean().item(),
        "above": (images > 1).float().mean().item(),
        "grey": images.mean().item(),
        "grey_clamped": images.clamp(0, 1).mean().item(),
    }


class Watch(Callback):
    """Measures the student every so many updates, and remembers that in the checkpoint."""

    def __init__(self, judge: RawJudge) -> None:
        self.judge, self.rows, self.divergence, self.seconds = judge, [], None, 0.0
        self._mark = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: SiD, *args: Any) -> None:
        """Keep a running mean of the divergence; measure on the cadence."""
        now = float(trainer.callback_metrics["train/divergence"])
        self.divergence = now if self.divergence is None else 0.98 * self.divergence + 0.02 * now
        if (step := trainer.global_step) % EVERY == 0 or step == trainer.max_steps:
            self._count()
            row = {"updates": step, "images": pl_module.images, "divergence": self.divergence}
            row |= {**distances(student_images(pl_module), self.judge), "seconds": self.seconds}
            self.rows.append(row)
            print(json.dumps({"seed": pl_module.seed, **{k: round(v, 3) for k, v in row.items()}}), flush=True)
            self._mark = time.process_time()  # measuring does not count

    def _count(self) -> None:
        self.seconds += time.process_time() - self._mark
        self._mark = time.process_time()

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {"rows": self.rows, "divergence": self.divergence, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rows, self.divergence, self.seconds = state["rows"], state["divergence"], state["seconds"]


def settings(teacher: Path, changes: list[str]) -> dict[str, Any]:
    """The config's arguments of SiD, with ``name=value`` changes."""
    arguments = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]["init_args"]
    arguments |= {"teacher": str(teacher), "num_pictures": 0}
    return arguments | {name: yaml.safe_load(value) for name, value in (change.split("=", 1) for change in changes)}


def distil(seed: int, updates: int, arguments: dict[str, Any], folder: Path, judge: RawJudge) -> list[Row]:
    """Train, or go on, or take what there is; the rows of its course."""
    done, state = folder / f"seed_{seed}.json", folder / f"seed_{seed}.ckpt"
    if done.exists():
        return json.loads(done.read_text())
    watch = Watch(judge)
    saving = ModelCheckpoint(folder, state.stem, every_n_train_steps=EVERY, enable_version_counter=False)
    trainer = Trainer(accelerator="cpu", max_steps=updates, limit_val_batches=0, callbacks=[watch, saving], **QUIET)
    module = SiD(**arguments, seed=seed, updates_per_epoch=updates)
    trainer.fit(module, ckpt_path=str(state) if state.exists() else None, weights_only=True)
    torch.save(student_images(module), folder / f"seed_{seed}.pt")
    save_runs(watch.rows, done)
    return watch.rows


def train_teacher(folder: Path) -> Path:
    """The config's, unless it is there."""
    teacher = folder / "teacher"
    if not teacher.exists():
        options = ["--model.export_to", str(teacher), "--trainer.default_root_dir", str(folder)]
        command(["fit", "--config", "sid/digits_teacher", *options, "--trainer.enable_progress_bar", "false"])
    return teacher


def print_course(courses: dict[int, list[Row]]) -> None:
    """FD of every seed on the way."""
    print("\n| updates | images | FD raw, per seed | FD clamped, per seed | divergence |\n|---|---|---|---|---|")
    for rows in zip(*courses.values(), strict=True):
        raw, clamped = (" ".join(f"{row[name]:.2f}" for row in rows) for name in ("raw", "clamped"))
        divergence = " ".join(f"{row['divergence']:.1f}" for row in rows)
        print(f"| {rows[0]['updates']} | {rows[0]['images']:,} | {raw} | {clamped} | {divergence} |")


COLUMNS = {
    "FD raw": ("raw", 2),
    "FD clamped": ("clamped", 2),
    "KD raw": ("raw_kernel", 2),
    "KD clamped": ("clamped_kernel", 2),
    "FD, clamped at black": ("at_black", 2),
    "at white": ("at_white", 2),
    "pixels below black": ("below", 3),
    "above white": ("above", 3),
    "mean grey": ("grey", 4),
    "clamped": ("grey_clamped", 4),
    "CPU s": ("seconds", 0),
}


def print_finals(finals: dict[str, Row]) -> None:
    """One line a model."""
    print(f"\n| model | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for model, row in finals.items():
        cells = (f"{row[name]:.{digits}f}" if name in row else "" for name, digits in COLUMNS.values())
        print(f"| {model} | {' | '.join(cells)} |")


def bars_of(teacher: Row, students: list[Row]) -> dict[str, tuple[float, str, float]]:
    """Means over the seeds by the teacher's."""
    ratios = {name: [row[name] / teacher[name] for row in students] for name in ("raw", "clamped")}
    bars = {}
    for name, bar in (("raw", 1.3), ("clamped", 1.5)):
        bars[f"FD {name}: student / teacher, mean of seeds"] = (statistics.mean(ratios[name]), "<=", bar)
        bars[f"FD {name}: student / teacher, worst seed"] = (max(ratios[name]), "<=", bar)
    return bars


def course(courses: dict[Any, list[Row]], name: str) -> list[float]:
    """Means over the seeds at each measurement."""
    return [statistics.mean(row[name] for row in rows) for rows in zip(*courses.values(), strict=True)]


def draw(
    courses: dict[int, list[Row]], beside: Path | None, teacher: Row, student: Tensor, taught: Tensor, folder: Path
) -> None:
    """The course, as means over the seeds, and samples of the first seed beside the teacher's."""
    images, curves = course(courses, "images"), {"raw": course(courses, "raw")}
    if (clamped := course(courses, "clamped")) != curves["raw"]:
        curves["clamped"] = clamped
    if beside:
        others = json.loads((beside / "sid_digits.json").read_text())["courses"]
        curves |= {f"{name}, {beside.name}": course(others, name) for name in ("raw", "clamped")}
    figure = plot_progress(images, curves, {"raw": teacher["raw"]})
    twin = figure.axes[0].twinx()
    twin.loglog(images, course(courses, "divergence"), "k:", label="ω|δ|²")
    twin.set_ylabel("ω|δ|², running mean (dotted)")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "sid_progress.png")
    plot_student(student[:100].clamp(0, 1), taught[:100].clamp(0, 1), TEACHER_STEPS, images[-1]).savefig(
        folder / "sid_digits.png"
    )


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, print the tables, draw on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs' states and figures")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other arguments of SiD")
    parser.add_argument("--pictures", type=Path, help="folder to draw to")
    parser.add_argument("--beside", type=Path, help="folder of other, finished runs whose course is drawn, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    args.folder.mkdir(parents=True, exist_ok=True)
    arguments = settings(args.teacher or train_teacher(args.folder), args.set)
    judge = RawJudge("digits", real_digits())
    courses = {seed: distil(seed, args.updates, arguments, args.folder, judge) for seed in args.seeds}

    students = {seed: torch.load(args.folder / f"seed_{seed}.pt", weights_only=True) for seed in args.seeds}
    taught = teacher_images(arguments["teacher"])
    teacher = {**distances(taught, judge), **clamping(taught, judge)}
    finals = {f"teacher, {TEACHER_STEPS} steps": teacher}
    for seed, images in students.items():
        finals[f"student, 1 step, seed {seed}"] = {**courses[seed][-1], **clamping(images, judge)}
    print(f"\n{cpu_model()}, one thread, torch {torch.__version__}; real digits' mean grey {real_digits().mean():.4f}")
    print_course(courses)
    print_finals(finals)
    print_bars(bars_of(teacher, [courses[seed][-1] for seed in args.seeds]))
    save_runs({"settings": arguments, "courses": courses, "finals": finals}, args.folder / "sid_digits.json")
    if args.pictures:
        draw(courses, args.beside, teacher, students[args.seeds[0]], taught, args.pictures)


if __name__ == "__main__":
    main()
