"""Pictures of a one-step student beside its teacher. Images are ``(n, C, H, W)`` in [0, 1]."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins.core import random_numbers
from lightning_plugins.core.pictures import new_figure, show_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sid_figures(model: Any, teacher: Tensor) -> dict[str, "Figure"]:
    """All pictures of a :class:`~lightning_plugins.SiD` by name: its student's samples beside the teacher's.

    Args:
        model: the module, whose student is drawn from.
        teacher: ``(n, C, H, W)`` the teacher's samples of :func:`picture_options`, which do not change in training.
    """
    student = model.sample(**picture_options(model))
    return {"samples": plot_student(student, teacher, model.teacher_steps, model.images)}


def picture_options(model: Any) -> dict[str, Any]:
    """Arguments of ``sample`` and ``teacher_sample`` for a picture: always of the same noise and conditions.

    Args:
        model: the module; it has ``num_pictures`` samples, of its classes in turn, or of the data's first prompts.
    """
    n = model.num_pictures
    options: dict[str, Any] = {"num_samples": n, "generator": random_numbers.generator(model.device, model.seed)}
    if model.networks.description["takes_text"]:
        prompts = list(getattr(getattr(model.trainer, "datamodule", None), "prompts", None) or [])[:n]
        options["prompts"] = prompts + [""] * (n - len(prompts))
    elif (classes := model.num_classes) is not None:
        options["labels"] = torch.arange(n, device=model.device) % classes
    return options


def plot_student(student: Tensor, teacher: Tensor, num_steps: int, images: int) -> "Figure":
    """The student's samples at the left, the teacher's of the same noise at the right.

    Args:
        student: ``(n, C, H, W)`` samples, made in one step.
        teacher: ``(n, C, H, W)`` samples of the teacher.
        num_steps: the teacher's number of steps, for the title.
        images: number of images that the student has been trained with, for the title.
    """
    height, width = student.shape[-2:]
    figure = new_figure(9.0, 9.0 / 2 * height / width + 0.6)
    panels = {f"student, 1 step, {images:,} images": student, f"teacher, {num_steps} steps": teacher}
    for axes, (title, samples) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        show_grid(axes, samples)
        axes.set_title(title, fontsize=10)
    return figure


def plot_progress(images: Sequence[float], curves: dict[str, Sequence[float]], teacher: dict[str, float]) -> "Figure":
    """Fréchet distances against images seen on logarithmic axes, as figure 4 of the paper.

    Args:
        images: number of images seen at each measurement; a logarithmic axis leaves 0 out.
        curves: distances at each measurement, by name.
        teacher: the teacher's distance for each curve, drawn as a dashed line.
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    for name, values in curves.items():
        (line,) = axes.loglog(images, values, "o-", label=name, markersize=3)
        if name in teacher:
            axes.axhline(teacher[name], color=line.get_color(), linestyle="--", label=f"teacher, {name}")
    axes.set(xlabel="generated images seen", ylabel="Fréchet distance")
    axes.legend(fontsize=8)
    return figure
