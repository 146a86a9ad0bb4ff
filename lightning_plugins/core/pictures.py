"""Pictures of images: plain grids as tensors, and matplotlib figures that need no display."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def pictures_are_due(module: LightningModule, every: int) -> bool:
    """Whether a validation that is over draws pictures: one that was asked for by itself always does.

    Args:
        module: whose validation it is.
        every: validation epochs from picture to picture; 0 for none.
    """
    trainer = module.trainer
    if not every or trainer.sanity_checking:
        return False
    return trainer.state.fn != TrainerFn.FITTING or (module.current_epoch + 1) % every == 0


def image_grid(
    images: Tensor, columns: int | None = None, *, zoom: int = 1, line: float = 0.5, line_width: int = 1
) -> Tensor:
    """Put images into one, row by row, with lines between them; cells of the last row that are left over are line.

    Args:
        images: ``(n, C, H, W)``, n > 0; their values stay as they are.
        columns: images in a row; by default as many as the side of the smallest square that holds n.
        zoom: each pixel becomes a square of ``zoom`` by ``zoom``; 1 leaves it, 4 makes a digit of 8 x 8 easy to see.
        line: value of the lines.
        line_width: pixels between two images; there are none around the grid.

    Returns:
        ``(C, H', W')`` with ``H' = rows * (zoom * H + line_width) - line_width``, W' alike; type and device of images.

    Raises:
        ValueError: images of another shape, or none, or fewer than one column or zoom.

    Example:
        >>> import torch
        >>> image_grid(torch.zeros(10, 3, 32, 32)).shape
        torch.Size([3, 98, 131])
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be (n, C, H, W) with n > 0, got {tuple(images.shape)}.")
    columns = math.isqrt(len(images) - 1) + 1 if columns is None else columns
    if columns < 1 or zoom < 1 or line_width < 0:
        raise ValueError(
            f"columns and zoom must be at least 1 and line_width at least 0, got {columns}, {zoom} and {line_width}."
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    framed = pad(images, (0, line_width, 0, line_width), value=line)  # a line below and to the right of each
    filled = pad(framed, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(images)), value=line)
    C, H, W = filled.shape[1:]
    canvas = filled.view(rows, columns, C, H, W).permute(2, 0, 3, 1, 4).reshape(C, rows * H, columns * W)
    return canvas[:, : rows * H - line_width, : columns * W - line_width]


def new_figure(width: float, height: float, dpi: int = 100) -> "Figure":
    """An empty matplotlib figure of ``width`` by ``height`` inches that belongs to no window and no global state."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def show_grid(axes: "Axes", images: Tensor, columns: int | None = None, line: float = 0.5) -> "AxesImage":
    """Draw images ``(n, C, H, W)`` as :func:`image_grid` places them, without ticks and frame.

    Args:
        axes: matplotlib's.
        images: in [0, 1], values beyond are clipped; grey (C = 1), colour (C = 3, further channels are left out), or
            two channels, which are averaged since they have no colours.
        columns: images in a row; the grid is about a square by default.
        line: value of the lines of one pixel between images; NaN leaves them out.

    Returns:
        What matplotlib's ``imshow`` does.
    """
    images = images.detach().float().cpu()
    images = images.mean(1, keepdim=True) if images.shape[1] == 2 else images[:, :3]
    canvas = image_grid(images, columns, line=line).permute(1, 2, 0).clamp(0, 1)
    shown = axes.imshow(canvas.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return shown


def show_mosaic(
    axes: "Axes", images: Tensor, row_names: Sequence[str], column_names: Sequence[str], line: float = 0.5
) -> "AxesImage":
    """Draw rows of images ``(rows, columns, C, H, W)`` by :func:`show_grid`, named at the left and on top."""
    rows, columns, _, H, W = images.shape
    shown = show_grid(axes, images.flatten(0, 1), columns, line)
    axes.set_xticks([(c + 0.5) * (W + 1) - 1 for c in range(columns)], column_names, fontsize=8)
    axes.set_yticks([(r + 0.5) * (H + 1) - 1 for r in range(rows)], row_names, fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    return shown
