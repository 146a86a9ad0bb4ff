"""Grids: every pixel of every image in its place."""

import pytest
import torch

from lightning_plugins.core.pictures import image_grid, new_figure, show_mosaic


@pytest.mark.parametrize(
    ("n", "columns", "zoom", "width", "shape"),
    [
        (7, 3, 1, 1, (3, 3)),
        (4, None, 1, 0, (2, 2)),
        (5, None, 2, 1, (2, 3)),
        (2, 8, 3, 2, (1, 2)),
        (1, None, 1, 1, (1, 1)),
    ],
)
def test_each_image_lies_in_its_cell(n, columns, zoom, width, shape):
    images = torch.rand(n, 3, 4, 5)
    grid = image_grid(images, columns, zoom=zoom, line=0.25, line_width=width)
    H, W = 4 * zoom + width, 5 * zoom + width
    rows, columns = shape
    assert grid.shape == (3, rows * H - width, columns * W - width)
    rest = torch.ones_like(grid, dtype=torch.bool)
    for i, image in enumerate(images):
        y, x = i // columns * H, i % columns * W
        for dy in range(zoom):
            for dx in range(zoom):
                assert torch.equal(grid[:, y + dy : y + 4 * zoom : zoom, x + dx : x + 5 * zoom : zoom], image)
        rest[:, y : y + 4 * zoom, x : x + 5 * zoom] = False
    assert (grid[rest] == 0.25).all()


def test_type_is_kept():
    assert image_grid(torch.zeros(3, 1, 2, 2, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 8, 8),), r"images must be \(n, C, H, W\) with n > 0, got \(1, 8, 8\)\."),
        ((torch.zeros(0, 1, 8, 8),), r"got \(0, 1, 8, 8\)\."),
        ((torch.zeros(2, 1, 8, 8), 0), r"at least 1 and line_width at least 0, got 0, 1 and 1\."),
    ],
)
def test_what_is_no_grid_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        image_grid(*arguments)


def test_mosaic_shows_two_channels_as_grey_and_clips():
    images = torch.tensor([0.2, 0.6]).view(1, 1, 2, 1, 1).expand(2, 3, 2, 4, 4).clone()
    images[1, 2] = 7.0
    axes = new_figure(2, 2).add_subplot()
    canvas = show_mosaic(axes, images, ["a", "b"], ["x", "y", "z"], line=float("nan")).get_array()
    assert canvas.shape == (9, 14)
    assert canvas[0, 0] == pytest.approx(0.4) and canvas[-1, -1] == 1 and canvas.mask[4].all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]


def test_mosaic_puts_every_image_in_its_cell():
    images = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 5) / 6
    canvas = show_mosaic(new_figure(2, 2).add_subplot(), images, ["a", "b"], ["x", "y", "z"]).get_array()
    assert canvas.shape == (9, 17)
    assert [[canvas[5 * r, 6 * c].item() for c in range(3)] for r in range(2)] == images[:, :, 0, 0, 0].tolist()
    assert (canvas[4] == 0.5).all() and (canvas[:, 5] == 0.5).all()


def test_figures_are_unknown_to_pyplot():
    from matplotlib import pyplot

    known = pyplot.get_fignums()
    assert new_figure(3, 2, dpi=50).get_size_inches().tolist() == [3, 2]
    assert pyplot.get_fignums() == known
