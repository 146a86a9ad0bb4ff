"""Pictures of a capsule network: reconstructions, pose dimensions, couplings and the course of routing.

Shapes: B images, L labels per image, J classes, K pose dimensions, V values, R routing iterations.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins.capsnet.routing import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def perturbation_values() -> Tensor:
    """The 11 values of figure 4 in Sabour et al. 2017: -0.25 to 0.25 in steps of 0.05."""
    return torch.arange(-5, 6) * 0.05  # its middle is exactly 0


def overlay(parts: Tensor) -> Tensor:
    """Two images ``(..., 2, C, H, W)`` as one in red and green ``(..., 3, H, W)``; common pixels turn yellow."""
    red, green = parts.float().mean(-3).unbind(-3)
    return torch.stack([red, green, torch.zeros_like(red)], dim=-3)


def plot_reconstructions(images: Tensor, reconstructions: Tensor, labels: Tensor, predictions: Tensor) -> "Figure":
    """Images over their reconstructions, each column titled with the true and the read class.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        reconstructions: ``(B, C, H, W)``, decoded from the capsule of the read class.
        labels: ``(B,)``.
        predictions: ``(B,)``.
    """
    titles = [f"{true} read {read}" for true, read in zip(labels.tolist(), predictions.tolist(), strict=True)]
    rows = {"input": images, "reconstruction": reconstructions}
    return _image_table(
        "Reconstruction from the capsule of the class that was read", rows, titles, labels == predictions
    )


def plot_two_digits(
    images: Tensor, parts: Tensor, reconstructions: Tensor, labels: Tensor, predictions: Tensor
) -> "Figure":
    """Overlapping digits: the input, its true parts and the two reconstructions in two colours.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        parts: ``(B, 2, C, H, W)`` the clean images, in the order of the labels.
        reconstructions: ``(B, 2, C, H, W)``, one from each read capsule.
        labels: ``(B, 2)``.
        predictions: ``(B, 2)``.
    """
    pairs = zip(labels.tolist(), predictions.tolist(), strict=True)
    titles = [f"{a}+{b} read {c}+{d}" for (a, b), (c, d) in pairs]
    rows = {"input": images, "true parts": overlay(parts), "reconstructions": overlay(reconstructions)}
    right = (labels.sort(-1).values == predictions.sort(-1).values).all(-1)
    return _image_table("Two digits taken apart: one colour for each read capsule", rows, titles, right)


def plot_pose_dimensions(sweep: Tensor, values: Tensor, label: int) -> "Figure":
    """What each dimension of a pose means: one row per dimension, one column per added value.

    Args:
        sweep: ``(K, V, C, H, W)`` from :meth:`CapsNet.perturb`, of one image.
        values: ``(V,)`` what was added.
        label: class whose capsule was perturbed.
    """
    K, V = sweep.shape[:2]
    figure = _figure(0.55 * V + 1.0, 0.55 * K + 0.9)
    axes = figure.add_subplot()
    _show_mosaic(axes, sweep)
    height, width = (size + 1 for size in sweep.shape[-2:])
    axes.set_xticks([(i + 0.5) * width for i in range(V)], [f"{value:+.2f}" for value in values.tolist()], fontsize=7)
    axes.set_yticks([(i + 0.5) * height for i in range(K)], [f"dim {i}" for i in range(K)], fontsize=7)
    axes.set_title(f"Capsule of class {label}: reconstruction as one pose dimension changes", fontsize=10)
    axes.set_xlabel("added to the dimension", fontsize=8)
    return figure


def plot_couplings(images: Tensor, trace: RoutingTrace, grid: Sequence[int], labels: Tensor) -> "Figure":
    """Where in the image each class gets its votes from: last couplings averaged over the capsule types.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        trace: of the same images.
        grid: ``(T, H', W')`` of the input capsules.
        labels: ``(B,)`` or ``(B, L)``.
    """
    couplings = trace.couplings[-1].float().unflatten(1, tuple(grid)).mean(1)  # (B, H', W', J)
    lengths = trace.poses[-1].float().norm(dim=-1)  # (B, J)
    B, J = lengths.shape
    figure = _figure(0.95 * (J + 1) + 0.9, 1.2 * B + 0.7)
    cells = figure.subplots(B, J + 1, squeeze=False)
    low, high = couplings.min().item(), couplings.max().item()
    for b, row in enumerate(cells):
        _show_mosaic(row[0], images[b : b + 1, None])
        row[0].set_title(f"label {_join(labels[b])}", fontsize=8)
        for j, axes in enumerate(row[1:]):
            map_ = axes.imshow(couplings[b, ..., j].cpu().numpy(), vmin=low, vmax=high, cmap="viridis")
            axes.set_title(f"{j}: |v|={lengths[b, j]:.2f}", fontsize=7)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.colorbar(map_, ax=cells, fraction=0.012, label="coupling")
    figure.suptitle("Coupling of each place of the image with each class, last iteration, mean over types", fontsize=10)
    return figure


def plot_routing(trace: RoutingTrace) -> "Figure":
    """Coupling entropy and k-means objective at each routing iteration, mean and range over the images."""
    figure = _figure(7.5, 3.0)
    panels = {
        "coupling entropy / log J  (1 = uniform)": trace.entropy,
        "k-means objective (lower = tighter clusters)": trace.objective,
    }
    steps = list(range(1, len(trace.entropy) + 1))
    for axes, (title, values_RB) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        values_RB = values_RB.float().cpu()
        low, mean, high = (reduced.numpy() for reduced in (values_RB.amin(1), values_RB.mean(1), values_RB.amax(1)))
        axes.fill_between(steps, low, high, alpha=0.25, label="range over images")
        axes.plot(steps, mean, "o-", label="mean")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("routing iteration", fontsize=8)
        axes.set_xticks(steps)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    return figure


def capsnet_figures(model: Any, batch: dict[str, Tensor]) -> dict[str, "Figure"]:
    """All pictures of a :class:`~lightning_plugins.CapsNet` for a few images, by name.

    Args:
        model: the network; pictures that it cannot have (no decoder, no ``grid``) are left out.
        batch: a few images as the class documents them.
    """
    images, labels = batch["image"], batch["label"]
    figures: dict[str, Figure] = {}
    if model.decoder is not None:
        predictions = model.predict_labels(model(images))
        reconstructions = model.reconstruct(images, predictions)
        if model.num_labels == 1:
            figures["reconstructions"] = plot_reconstructions(images, reconstructions, labels, predictions)
        elif model.num_labels == 2:
            # each read capsule beside the part it should show, so that the colours agree where it is right
            swap = (predictions[:, 0] == labels[:, 1]) | (predictions[:, 1] == labels[:, 0])
            order = torch.where(swap[:, None], predictions.flip(1), predictions)
            figures["reconstructions"] = plot_two_digits(
                images, batch["parts"], model.reconstruct(images, order), labels, order
            )
        chosen = predictions[:1] if model.num_labels == 1 else predictions[:1, 0]
        sweep = model.perturb(images[:1], labels=chosen)[0]
        figures["pose_dimensions"] = plot_pose_dimensions(sweep, perturbation_values(), chosen.item())
    trace = model.routing_trace(images)
    figures["routing"] = plot_routing(trace)
    if grid := getattr(model.features, "grid", None):
        few = RoutingTrace(trace.couplings[:, :3], trace.poses[:, :3], trace.objective[:, :3], trace.entropy[:, :3])
        figures["couplings"] = plot_couplings(images[:3], few, grid, labels[:3])
    return figures


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _image_table(title: str, rows: dict[str, Tensor], titles: Sequence[str], right: Tensor) -> "Figure":
    """Rows of images ``(B, C, H, W)`` with a title over each column, red where ``right`` is False."""
    figure = _figure(0.95 * len(titles) + 1.2, 0.95 * len(rows) + 0.8)
    cells = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, images) in zip(cells, rows.items(), strict=True):
        for column, axes in enumerate(line):
            _show_mosaic(axes, images[column : column + 1, None])
        line[0].set_ylabel(name, fontsize=8)
    for axes, text, good in zip(cells[0], titles, right.tolist(), strict=True):
        axes.set_title(text, fontsize=8, color="black" if good else "red")
    figure.suptitle(title, fontsize=10)
    return figure


def _show_mosaic(axes: Any, images: Tensor) -> None:
    """Draw images ``(rows, columns, C, H, W)`` edge to edge with a line of one pixel between them."""
    images = images.detach().float().cpu().clamp(0, 1)
    if images.shape[2] == 2:
        images = images.mean(2, keepdim=True)  # two channels have no colours
    rows, columns, C, H, W = images.shape
    canvas = torch.full((rows * (H + 1) - 1, columns * (W + 1) - 1, C), 0.5)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (H + 1), c * (W + 1)
            canvas[top : top + H, left : left + W] = images[r, c].permute(1, 2, 0)
    axes.imshow(
        (canvas[..., 0] if C == 1 else canvas[..., :3]).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _join(labels: Tensor) -> str:
    return "+".join(str(label) for label in labels.reshape(-1).tolist())
