"""Pictures of a capsule network: reconstructions, pose dimensions, couplings and the course of routing.

Shapes: B images, L labels per image, J classes, K pose dimensions, V values, R routing iterations.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins.capsnet.losses import align_labels
from lightning_plugins.capsnet.trace import RoutingTrace
from lightning_plugins.core.pictures import new_figure, show_mosaic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def capsnet_figures(model: Any, batch: Mapping[str, Tensor]) -> dict[str, "Figure"]:
    """All pictures of a :class:`~lightning_plugins.CapsNet` for a few images, by name.

    Args:
        model: the network; pictures that it cannot have (no decoder, ``trace`` or ``grid``) are left out.
        batch: a few images as the class documents them.
    """
    images, labels = batch["image"], batch["label"]
    figures: dict[str, Figure] = {}
    if model.decoder is not None:
        poses = model(images)
        predictions = model.predict_labels(poses)
        if model.num_labels == 1:
            figures["reconstructions"] = plot_reconstructions(
                images, model.decoder(poses, predictions), labels, predictions
            )
        elif model.num_labels == 2:
            order = align_labels(predictions, labels)  # so that the colours agree where the reading is right
            figures["reconstructions"] = plot_two_digits(
                images, batch["parts"], model.decoder(poses, order), labels, order
            )
        chosen = predictions[:1] if model.num_labels == 1 else predictions[:1, 0]
        sweep = model.perturb(images[:1], labels=chosen)[0]
        figures["pose_dimensions"] = plot_pose_dimensions(sweep, perturbation_values(), chosen.item())
    if not hasattr(model.capsules, "trace"):
        return figures
    trace = model.routing_trace(images)
    figures["routing"] = plot_routing(trace)
    if grid := getattr(model.features, "grid", None):
        few = RoutingTrace(trace.couplings[:, :3], trace.poses[:, :3], trace.objective[:, :3], trace.entropy[:, :3])
        figures["couplings"] = plot_couplings(images[:3], few, grid, labels[:3])
    return figures


def perturbation_values() -> Tensor:
    """The 11 values of figure 4 in Sabour et al. 2017: -0.25 to 0.25 in steps of 0.05."""
    return torch.arange(-5, 6) * 0.05  # its middle is exactly 0


def overlay(parts: Tensor) -> Tensor:
    """Two images as one in red and green; common pixels turn yellow.

    Args:
        parts: ``(..., 2, C, H, W)`` in [0, 1].

    Returns:
        ``(..., 3, H, W)`` in [0, 1].
    """
    red, green = parts.float().mean(-3).unbind(-3)
    return torch.stack([red, green, torch.zeros_like(red)], dim=-3)


def plot_reconstructions(images: Tensor, reconstructions: Tensor, labels: Tensor, predictions: Tensor) -> "Figure":
    """Images over their reconstructions, each column titled with the true and the read class.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        reconstructions: ``(B, C, H, W)``, decoded from the capsule of the read class.
        labels: ``(B,)`` classes that are shown.
        predictions: ``(B,)`` classes that were read.
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
        labels: ``(B, 2)`` true classes.
        predictions: ``(B, 2)`` read classes, in the order of the reconstructions.
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
        label: the class whose capsule was perturbed.
    """
    K, V = sweep.shape[:2]
    figure = new_figure(0.55 * V + 1.0, 0.55 * K + 0.9)
    axes = figure.add_subplot()
    show_mosaic(axes, sweep, [f"dim {k}" for k in range(K)], [f"{value:+.2f}" for value in values.tolist()])
    axes.set_title(f"Capsule of class {label}: reconstruction as one pose dimension changes", fontsize=10)
    axes.set_xlabel("added to the dimension", fontsize=8)
    return figure


def plot_couplings(images: Tensor, trace: RoutingTrace, grid: Sequence[int], labels: Tensor) -> "Figure":
    """Where in the image each class gets its votes from: last couplings averaged over the capsule types.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        trace: what happened in their routing.
        grid: ``(T, H', W')``, types, rows and columns of the input capsules.
        labels: ``(B,)`` or ``(B, L)`` true classes.
    """
    couplings = trace.couplings[-1].float().unflatten(1, tuple(grid)).mean(1)  # (B, H', W', J)
    lengths = trace.poses[-1].float().norm(dim=-1)  # (B, J)
    B, J = lengths.shape
    figure = new_figure(0.95 * (J + 1) + 0.9, 1.05 * B + 0.9)
    left, right = figure.subplots(1, 2, width_ratios=[1, J])
    show_mosaic(left, images[:, None], [f"label {_join(row)}" for row in labels], ["input"])
    cells = torch.nn.functional.interpolate(couplings.permute(0, 3, 1, 2), images.shape[-2:])  # as large as the input
    maps = show_mosaic(right, cells[:, :, None], [""] * B, [f"class {j}" for j in range(J)], line=float("nan"))
    height, width = (size + 1 for size in images.shape[-2:])
    for b, j in ((b, j) for b in range(B) for j in range(J)):
        place = (j * width + 0.02 * width, b * height + 0.02 * height)
        right.text(*place, f"|v|={lengths[b, j]:.2f}", fontsize=7, color="white", va="top")
    maps.set(cmap="viridis", clim=(couplings.min().item(), couplings.max().item()))
    figure.colorbar(maps, ax=right, fraction=0.012, label="coupling")
    figure.suptitle("Coupling of each place of the image with each class, last iteration, mean over types", fontsize=10)
    return figure


def plot_routing(trace: RoutingTrace) -> "Figure":
    """Coupling entropy and k-means objective at each routing iteration, mean and range over the images.

    Args:
        trace: what happened in the routing of some images.
    """
    figure = new_figure(7.5, 3.0)
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


def _image_table(title: str, rows: dict[str, Tensor], titles: Sequence[str], right: Tensor) -> "Figure":
    """Rows of images ``(B, C, H, W)`` with a title over each column, red where ``right`` is False."""
    figure = new_figure(0.95 * len(titles) + 1.2, 0.95 * len(rows) + 0.8)
    axes = figure.add_subplot()
    colours = max(images.shape[1] for images in rows.values())
    table = torch.stack([images.expand(-1, colours, -1, -1) for images in rows.values()])
    show_mosaic(axes, table, list(rows), titles)
    for text, good in zip(axes.get_xticklabels(), right.tolist(), strict=True):
        text.set_color("black" if good else "red")
    axes.set_title(title, fontsize=10)
    return figure


def _join(labels: Tensor) -> str:
    return "+".join(str(label) for label in labels.reshape(-1).tolist())
