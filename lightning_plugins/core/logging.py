"""Pictures and tables for any Lightning logger, and losses of all processes.

Lightning has no common call for a picture. Here one picture is written as a PNG beside the run, and every logger of
the trainer that can show it gets it. A logger of your own joins in with ``@send_image.register(MyLogger)``.

``log_image``, ``log_table`` and ``log_text_table`` may be called by every rank or by rank zero alone: they write on
rank zero and never wait for another. ``log_losses`` tells what all ranks found.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_plugins.core.distributed import means_over_ranks
from lightning_plugins.core.markdown import markdown_table
from lightning_plugins.core.new_file import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_dir(trainer: Trainer) -> Path:
    """Folder of the run: the first logger's, or the trainer's root folder without a logger.

    Unlike ``trainer.log_dir`` it does not wait for the other ranks; it is rank zero's folder, so ask on rank zero.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    folder = logger.log_dir if isinstance(logger, TensorBoardLogger | CSVLogger) else getattr(logger, "save_dir", None)
    return Path(folder or trainer.default_root_dir)


def log_image(trainer: Trainer, tag: str, image: Tensor, step: int) -> None:
    """Write a picture to ``<log_dir>/images/<tag>/<step>.png`` and show it in every logger that can.

    Under ``fast_dev_run``, which leaves no logs, nothing is written.

    Args:
        trainer: the running trainer, with any loggers or none.
        tag: the picture's name, such as ``"val/reconstructions"``.
        image: ``(C, H, W)`` floating values in [0, 1], grey (C = 1) or colour (C = 3), on any device.
        step: the number it is filed under, usually ``trainer.global_step``.

    Raises:
        ValueError: wrong shape, dtype or range, or a tag that leaves the folder.
    """
    if not trainer.is_global_zero:
        return
    pixels = _to_uint8(tag, image)
    if leaves_no_logs(trainer):
        return
    path = _file(trainer, "images", tag, step, "png")
    from PIL import Image

    with new_file(path) as file:
        Image.fromarray(pixels.squeeze(-1).numpy()).save(file, format="PNG")
    for logger in trainer.loggers:
        send_image(logger, tag, path, step)


def log_figures(trainer: Trainer, stage: str, figures: Mapping[str, "Figure"], step: int) -> None:
    """Log figures as images ``<stage>/<name>``, see :func:`log_image`.

    Args:
        trainer: whose loggers are meant.
        stage: ``val`` or ``test``.
        figures: by name.
        step: the training step that they belong to.
    """
    for name, figure in figures.items():
        log_image(trainer, f"{stage}/{name}", figure_to_image(figure), step)


def measured_figures(trainer: Trainer) -> dict[str, float]:
    """Figures of the latest validation or test by name, such as a model card shows; none before the first.

    Args:
        trainer: whose ``callback_metrics`` are read; names begin with ``val/`` or ``test/``.
    """
    figures = trainer.callback_metrics.items()
    return {name: float(value) for name, value in figures if name.startswith(("val/", "test/"))}


def log_table(trainer: Trainer, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Write a table to ``<log_dir>/tables/<tag>/<step>.csv`` and show it in every logger that can.

    Under ``fast_dev_run``, which leaves no logs, nothing is written.

    Args:
        trainer: the running trainer, with any loggers or none.
        tag: the table's name, such as ``"test/confusion"``.
        columns: a heading for each column.
        rows: the cells, as many in each row as there are columns.
        step: the number it is filed under, usually ``trainer.global_step``.

    Raises:
        ValueError: a row with more or fewer cells than columns, or a tag that leaves the folder.
    """
    if not trainer.is_global_zero:
        return
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"Table {tag!r} has {len(columns)} columns, but a row of {len(row)} cells: {list(row)}.")
    if leaves_no_logs(trainer):
        return
    path = _file(trainer, "tables", tag, step, "csv")
    with new_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([columns, *rows])
    for logger in trainer.loggers:
        send_table(logger, tag, columns, rows, path, step)


def log_text_table(
    trainer: Trainer, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Log a table of texts as :func:`log_table` does, and write it to ``<log_dir>/tables/<tag>/<step>.md`` to be read.

    Texts appear as they are: what Markdown would take for a column, a line, emphasis or HTML is escaped.

    Args:
        trainer: the running trainer, with any loggers or none.
        tag: the table's name, such as ``"val/samples"``.
        columns: a heading for each column.
        rows: the cells, as many in each row as there are columns.
        step: the number it is filed under, usually ``trainer.global_step``.

    Raises:
        ValueError: a row with more or fewer cells than columns, or a tag that leaves the folder.
    """
    log_table(trainer, tag, columns, rows, step)
    if trainer.is_global_zero and not leaves_no_logs(trainer):
        with new_file(_file(trainer, "tables", tag, step, "md")) as file:
            file.write((markdown_table(columns, rows) + "\n").encode())


def leaves_no_logs(trainer: Trainer) -> bool:
    """Whether this is a trial (``fast_dev_run``), of which nothing is kept."""
    return bool(cast(Any, trainer).fast_dev_run)  # Lightning sets it without declaring it


@singledispatch
def send_image(logger: Logger, tag: str, path: Path, step: int) -> None:
    """Show the PNG at ``path`` in one logger; a logger that shows no pictures is passed over (the file stays)."""


@send_image.register
def _(logger: TensorBoardLogger, tag: str, path: Path, step: int) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(path))
    logger.experiment.add_image(tag, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")


@send_image.register
def _(logger: WandbLogger, tag: str, path: Path, step: int) -> None:
    logger.log_image(tag, [str(path)], step)


@send_image.register
def _(logger: MLFlowLogger, tag: str, path: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path), f"images/{tag}")


@send_image.register
def _(logger: CometLogger, tag: str, path: Path, step: int) -> None:
    logger.experiment.log_image(str(path), name=tag, step=step)


@singledispatch
def send_table(
    logger: Logger, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path, step: int
) -> None:
    """Show a table in one logger, from its cells or from the CSV at ``path``; others are passed over."""


@send_table.register
def _(
    logger: TensorBoardLogger, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path, step: int
) -> None:
    logger.experiment.add_text(tag, markdown_table(columns, rows), step)  # TensorBoard renders Markdown


@send_table.register
def _(
    logger: WandbLogger, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path, step: int
) -> None:
    logger.log_table(tag, list(columns), [list(row) for row in rows], step=step)


@send_table.register
def _(
    logger: MLFlowLogger, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path, step: int
) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path), f"tables/{tag}")


@send_table.register
def _(
    logger: CometLogger, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path, step: int
) -> None:
    logger.experiment.log_table(str(path))


def figure_to_image(figure: "Figure") -> Tensor:
    """Draw a matplotlib figure; returns ``(3, H, W)`` float values in [0, 1], without any window or backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height(physical=True)
    return rgba.view(height, width, 4)[..., :3].permute(2, 0, 1).float() / 255


def _to_uint8(tag: str, image: Tensor) -> Tensor:
    """``(C, H, W)`` in [0, 1] to ``(H, W, C)`` bytes, rounded to the nearest level."""
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
        found = f"{tuple(image.shape)} {image.dtype}"
        raise ValueError(f"Picture {tag!r} must be (1, H, W) or (3, H, W) floating values in [0, 1], got {found}.")
    image = image.detach().float().cpu()  # half precision has fewer than 256 levels near one
    low, high = image.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN; the margin is for resampling in half precision
        raise ValueError(f"Picture {tag!r} must have values in [0, 1], got {low.item():.4g} to {high.item():.4g}.")
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _file(trainer: Trainer, kind: str, tag: str, step: int, suffix: str) -> Path:
    place = PureWindowsPath(tag)  # splits at slashes of both kinds, and knows drives
    if not place.parts or ".." in place.parts or place.anchor or not tag.isprintable():
        raise ValueError(f"A tag is a name such as 'val/samples', got {tag!r}.")
    path = log_dir(trainer) / kind / tag / f"{step:06d}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def log_losses(
    module: LightningModule,
    stage: str,
    loss: Tensor,
    terms: Mapping[str, Tensor],
    rows: int,
    weight: float | None = None,
) -> None:
    """Log the loss of a batch, and means over the epoch of its terms, of all processes; all must call it.

    Args:
        module: whose batch it is.
        stage: ``train``, ``val`` or ``test``.
        loss: in training that of the step, else its mean over the epoch.
        terms: what else is told, by name.
        rows: of this process's batch.
        weight: of this process's means beside the others' in training; its rows by default.
    """
    trains, size = stage == "train", rows * module.trainer.world_size  # Lightning averages these and rounds down
    means = {f"{stage}/loss": loss, **{f"{stage}/{name}": term for name, term in terms.items()}}
    if trains:
        means, _ = means_over_ranks(means, rows if weight is None else weight)
    module.log(f"{stage}/loss", means.pop(f"{stage}/loss"), prog_bar=True, batch_size=size, sync_dist=not trains)
    module.log_dict(means, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
