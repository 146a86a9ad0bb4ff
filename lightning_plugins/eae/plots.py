"""Pictures of an autoencoder: reconstructions, samples, interpolations, and codes against N(0, I).

Shapes: n images, R rows, S steps, N codes, d latent dimensions. Images are ``(n, C, H, W)`` in [0, 1], of any size,
grey or in colour.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins.core import random_numbers
from lightning_plugins.core.pictures import new_figure, show_grid, show_mosaic
from lightning_plugins.eae.diagnostics import chi_density, chi_moments, correlation_matrix, mean_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_MAX_IMAGES = 64
_NUM_SAMPLES = 49
_MAX_COLUMNS = 16
_MAX_HISTOGRAMS = 8
_MAX_CORRELATIONS = 512  # dimensions beyond which a cell of the heat map is less than a pixel
_CODES, _NORMAL = "#7fa8d1", "#b2182b"


@torch.no_grad()
def eae_figures(model: Any, images: Tensor, labels: Tensor | None, codes: Tensor) -> dict[str, "Figure"]:
    """All pictures of an :class:`~lightning_plugins.EAE`, by name.

    Args:
        model: the autoencoder; its samples come from N(0, I) and, where that is fitted, from its own prior.
        images: ``(n, C, H, W)`` in [0, 1], a few to be reconstructed and, from two on, to be interpolated.
        labels: ``(n,)`` classes of the images if the model is conditional, else None.
        codes: ``(N, d)`` codes of many images, drawn from two on.
    """
    figures = {"reconstructions": plot_reconstructions(images, model.reconstruct(images, labels).float())}
    generator = random_numbers.generator(model.device)  # the same codes each time: pictures compare
    fits = model.prior.is_fitted or model.prior.can_be_fitted  # not before the first batches
    priors = dict.fromkeys(("normal", model.default_prior if fits else "normal"))
    figures["samples"] = plot_samples(
        {name: model.sample(_NUM_SAMPLES, prior=name, generator=generator) for name in priors}
    )
    if (half := len(images) // 2) > 0:
        ends = images[:half], images[half : 2 * half]
        rows = model.interpolate(*ends, mode="slerp", labels=None if labels is None else labels[:half])
        figures["interpolations"] = plot_interpolations(rows, "slerp")
    if len(codes) > 1:
        figures["latents"] = plot_latents(codes)
    return figures


def plot_reconstructions(images: Tensor, reconstructions: Tensor) -> "Figure":
    """Each image over its reconstruction, with the mean squared error, summed over pixels and channels.

    Args:
        images: ``(n, C, H, W)`` in [0, 1]; the first 64 are drawn.
        reconstructions: ``(n, C, H, W)`` in [0, 1], one for each image.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    if images.shape != reconstructions.shape or images.ndim != 4 or not len(images):
        raise ValueError(
            "images and reconstructions must both be (n, C, H, W) with n > 0, got "
            f"{tuple(images.shape)} and {tuple(reconstructions.shape)}."
        )
    images, reconstructions = (x[:_MAX_IMAGES].detach().float().cpu() for x in (images, reconstructions))
    n, C, H, W = images.shape
    blocks = -(-n // _MAX_COLUMNS)
    columns = -(-n // blocks)
    pairs = torch.stack([images, reconstructions])
    blank = pairs.new_full((2, blocks * columns - n, C, H, W), 0.5)  # the colour of the lines
    table = torch.cat([pairs, blank], 1).view(2, blocks, columns, C, H, W).transpose(0, 1).flatten(0, 1)
    cell_height, cell_width = _cell(images)
    figure = new_figure(max(columns * cell_width + 1.1, 4.6), 2 * blocks * cell_height + 0.45, _DPI)
    axes = figure.add_subplot()
    show_mosaic(axes, table, ["input", "reconstruction"] * blocks, [""] * columns)
    for block in range(1, blocks):
        axes.axhline(2 * block * (H + 1) - 1, color="white", linewidth=2)
    error = (images - reconstructions).square().sum((1, 2, 3)).mean()
    axes.set_title(f"Reconstructions: squared error per image {error:.3g}", fontsize=10)
    return figure


def plot_samples(samples: Mapping[str, Tensor]) -> "Figure":
    """Images drawn from several priors of the codes, a square grid for each.

    Args:
        samples: ``(n, C, H, W)`` for each prior's name; the first 64 are drawn.

    Raises:
        ValueError: there is no prior, or one without images.
    """
    if not samples:
        raise ValueError("samples must name at least one prior, got none.")
    samples = {name: images[:_MAX_IMAGES] for name, images in samples.items()}
    cell_height, cell_width = _cell(next(iter(samples.values())))
    n = max(len(images) for images in samples.values())
    columns = math.isqrt(max(n, 1) - 1) + 1
    width = max(columns * cell_width, 1.6) + 0.15
    figure = new_figure(len(samples) * width, -(-n // columns) * cell_height + 0.4, _DPI)
    for axes, (name, images) in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples.items(), strict=True):
        show_grid(axes, images, columns)
        axes.set_title(f"prior: {name}", fontsize=10)
    return figure


def plot_interpolations(rows: Tensor, mode: str) -> "Figure":
    """Images decoded on the way between two codes, one way in each row.

    Args:
        rows: ``(R, S, C, H, W)``, both ends included.
        mode: the way's name: ``linear`` or ``slerp``.

    Raises:
        ValueError: rows of another shape, or fewer than two steps.
    """
    if rows.ndim != 5 or not len(rows) or rows.shape[1] < 2:
        raise ValueError(f"rows must be (R, S, C, H, W) with R > 0 and S > 1, got {tuple(rows.shape)}.")
    rows = rows[:_MAX_IMAGES]
    R, S = rows.shape[:2]
    cell_height, cell_width = _cell(rows[0])
    figure = new_figure(max(S * cell_width + 0.2, 2.6), R * cell_height + 0.7, _DPI)
    axes = figure.add_subplot()
    show_mosaic(axes, rows, [""] * R, [f"{s / (S - 1):.2f}" for s in range(S)])
    axes.set_title(f"Interpolation between codes: {mode}", fontsize=10)
    return figure


def plot_latents(z: Tensor) -> "Figure":
    """Codes against N(0, I): dimensions one by one, the radius, and the correlation of the dimensions.

    Beyond eight dimensions, those are drawn that are farthest from N(0, 1) by the Kolmogorov-Smirnov distance, the
    largest difference of the two distribution functions. Codes outside of a histogram are counted at its edge.

    Args:
        z: ``(N, d)``; codes that are not finite are only counted. The heat map is left out of one dimension and
            beyond 512, and is grey where a dimension is constant.

    Raises:
        ValueError: z has another shape, or fewer than two finite codes.
    """
    z = z.detach().float().cpu()
    finite = z[z.isfinite().all(1)] if z.ndim == 2 else z
    if z.ndim != 2 or len(finite) < 2:
        raise ValueError(f"z must be (N, d) with two finite codes or more, got {tuple(z.shape)}.")
    lost = f" ({len(z) - len(finite):,} more are not finite)" if len(finite) < len(z) else ""
    z, (N, d) = finite, finite.shape
    distance = normal_distance(z)
    chosen = distance.argsort(descending=True, stable=True)[:_MAX_HISTOGRAMS].sort().values
    columns, heat_map = -(-len(chosen) // 2), 2 <= d <= _MAX_CORRELATIONS
    figure = new_figure(1.6 * columns + 4.2, 5.4 if d > 1 else 3.0, _DPI)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.6 * columns + 0.4, 3.8])[0]
    histograms = left.subplots(min(d, 2), columns, sharex=True, sharey=True, squeeze=False).ravel()
    limit = max(4.0, z[:, chosen].abs().quantile(0.995, 0).max().item())
    for axes, dim in zip(histograms, chosen.tolist(), strict=False):
        _draw_dimension(axes, z[:, dim], limit, f"dim {dim}  KS {distance[dim]:.2f}")
    for axes in histograms[len(chosen) :]:
        axes.set_axis_off()
    panels = right.subplots(1 + heat_map, 1, squeeze=False)[:, 0]
    _draw_radius(panels[0], z)
    if heat_map:
        _draw_correlation(panels[1], z)
    which = f": the {_MAX_HISTOGRAMS} of {d} dimensions farthest from it" if d > _MAX_HISTOGRAMS else ""
    figure.suptitle(f"{N:,} codes against N(0, I){which}{lost}", fontsize=10)
    return figure


def normal_distance(z: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance ``(d,)`` in [0, 1] of each dimension of codes ``(N, d)`` from N(0, 1)."""
    expected = torch.special.ndtr(z.sort(0).values)
    below = torch.arange(len(z), device=z.device, dtype=expected.dtype)[:, None] / len(z)  # share before each jump
    return torch.maximum(expected - below, below + 1 / len(z) - expected).amax(0)


def _cell(images: Tensor) -> tuple[float, float]:
    """Inches an image takes, height and width: small ones are enlarged, large ones shrunk."""
    height, width = images.shape[-2:]
    inches = min(max(max(height, width) / 100, 0.45), 1.3)
    return inches * height / max(height, width), inches * width / max(height, width)


def _draw_dimension(axes: "Axes", values: Tensor, limit: float, title: str) -> None:
    axes.hist(values.clamp(-limit, limit).numpy(), bins=40, range=(-limit, limit), density=True, color=_CODES)
    x = torch.linspace(-limit, limit, 201)
    axes.plot(x.numpy(), (-x.square() / 2).exp().numpy() / math.sqrt(2 * math.pi), color=_NORMAL, linewidth=1)
    axes.set_ylim(0, 0.7)  # the normal density reaches 0.4; the spikes of collapsed dimensions are cut
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)


def _draw_radius(axes: "Axes", z: Tensor) -> None:
    d, radius, (mean, std) = z.shape[1], z.norm(dim=1), chi_moments(z.shape[1])
    low, high = max(mean - 4 * std, 1e-3), mean + 4 * std
    shown = min(low, radius.min().item()), max(high, radius.max().item())  # wide, also for codes on one sphere
    axes.hist(radius.numpy(), bins=50, range=shown, density=True, color=_CODES)
    x = torch.linspace(low, high, 201)
    axes.plot(x.numpy(), chi_density(x, d).numpy(), color=_NORMAL, linewidth=1)
    normal = f"$\\chi_{{{d}}}$ {mean:.2f} ± {std:.2f}"
    axes.set_title(f"radius {radius.mean():.2f} ± {radius.std():.2f}, {normal}", fontsize=9)
    axes.tick_params(labelsize=7)


def _draw_correlation(axes: "Axes", z: Tensor) -> None:
    from matplotlib.ticker import MaxNLocator

    matrix = correlation_matrix(z)
    mean = mean_correlation(matrix)
    axes.set_facecolor("0.6")  # shows where a constant dimension has no correlation
    shown = axes.imshow(matrix.fill_diagonal_(torch.nan).numpy(), cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(f"correlation, mean |r| {mean:.3f}", fontsize=9)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.figure.colorbar(shown, ax=axes).ax.tick_params(labelsize=7)
