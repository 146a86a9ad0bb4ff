"""Pictures of the masks: which token (row) may look at which (column)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core.pictures import new_figure
from lightning_plugins.unilm.masks import MASKS, SOURCE, TARGET, permutation_mask, pseudo_index, pseudo_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "bidirectional": "bidirectional\nBERT",
    "l2r": "left to right\nGPT",
    "r2l": "right to left\nGPT, reversed",
    "seq2seq": "sequence to sequence\nUniLM: the target continues the source",
    "permutation": "permutation\nXLNet: looks at lower ranks (in brackets)",
    "pseudo": "pseudo-masked\nUniLMv2: copies behind the row predict the target",
    "packed": "packed sequence to sequence\ntwo samples in one row",
}
SOURCE_TOKENS = ("[CLS]", "how", "are", "you", "[SEP]")
TARGET_TOKENS = ("fine", "thanks", "[SEP]")
# What a cell means, by the segment of its column: hidden, a source token, a target token, a pseudo copy.
COLOURS = ("#f4f4f1", "#7fa8d1", "#f2a65a", "#8c6bb1")
INK = "#3a3a3a"


def plot_masks(
    kinds: Sequence[str] = tuple(TITLES),
    tokens: tuple[Sequence[str], Sequence[str]] = (SOURCE_TOKENS, TARGET_TOKENS),
) -> "Figure":
    """Draw masks with their tokens on both axes: a coloured cell is a column that the row may look at.

    Args:
        kinds: masks to draw, a panel each: ``"bidirectional"``, ``"l2r"``, ``"r2l"``, ``"seq2seq"``,
            ``"permutation"``, ``"pseudo"``, ``"packed"``; all by default.
        tokens: tokens of a source and of a target, special ones included; ``"packed"`` shows them twice.

    Returns:
        A figure without a display; ``figure.savefig("masks.png")`` writes it.

    Raises:
        ValueError: if a kind is unknown or there is nothing to draw.

    Example:
        >>> figure = plot_masks(["seq2seq"], (["[CLS]", "2", "1", "[SEP]"], ["1", "2", "[SEP]"]))
        >>> [axes.get_title() for axes in figure.axes]
        ['sequence to sequence']
    """
    must.each(must.one_of(TITLES), of="a list of kinds")("kinds", kinds)
    texts = must.each(must.text, of="a list of tokens", empty=True)
    must.each(texts, 2, of="a source and a target")("tokens", tokens)
    if not tokens[0] and not tokens[1]:
        raise ValueError("tokens must hold a source and a target, of which one may be empty, not both.")
    panels = [_panel(kind, *tokens) for kind in kinds]
    columns = min(len(panels), 4 if len(panels) in (4, 7, 8) else 3)
    rows = -(-len(panels) // columns)
    sizes = [len(names) for names, *_ in panels]
    side = max(0.34 * min(sizes), 0.17 * max(sizes)) + 1.1  # inches: the longest row's labels keep clear of each other
    figure = new_figure(columns * side, rows * (side + 0.35) + 0.6)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, kind, panel in zip(grid, kinds, panels, strict=False):
        _draw(axes, TITLES[kind], *panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, words=4 if "pseudo" in kinds else 3, columns=1 if columns == 1 else 2 if columns == 2 else 4)
    return figure


def _panel(kind: str, source: Sequence[str], target: Sequence[str]) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Labels of the tokens, the mask ``(N, N)``, the segment of each token, and where a line sets parts apart."""
    names = [*source, *target]
    segments = torch.tensor([SOURCE] * len(source) + [TARGET] * len(target))
    ids, T = segments[None], len(names)
    borders = torch.tensor([len(source)])
    if kind == "permutation":
        order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
        names = [f"{name} ({rank})" for name, rank in zip(names, order.tolist(), strict=True)]
        return names, permutation_mask(ids, order[None])[0], segments, torch.tensor([])
    if kind == "pseudo":
        allow = pseudo_mask(ids, pseudo_index(ids))[0]
        copies = [f"[MASK] {name}" for name in target]
        segments = torch.cat([segments, torch.full((len(target),), TARGET + 1)])
        return [*names, *copies], allow, segments, torch.tensor([len(source), T])
    if kind == "packed":
        samples = torch.tensor([[1] * T + [2] * T])
        return names * 2, MASKS["seq2seq"](ids.repeat(1, 2), samples)[0], segments.repeat(2), torch.tensor([T])
    return names, MASKS[kind](ids)[0], segments, borders if kind == "seq2seq" else torch.tensor([])


def _draw(axes: Any, title: str, names: list[str], allow: Tensor, segments: Tensor, borders: Tensor) -> None:
    """One mask: columns are coloured by the segment that is looked at."""
    from matplotlib.colors import ListedColormap

    N = len(names)
    axes.imshow((allow * segments).numpy(), cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1)
    axes.set_xticks(range(N), names, fontsize=8, rotation=90, color=INK)
    axes.set_yticks(range(N), names, fontsize=8, color=INK)
    axes.set_xticks([n + 0.5 for n in range(N - 1)], minor=True)
    axes.set_yticks([n + 0.5 for n in range(N - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    for border in borders.tolist():
        axes.axhline(border - 0.5, color=INK, linewidth=1.2)
        axes.axvline(border - 0.5, color=INK, linewidth=1.2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    name, meaning = title.split("\n")
    axes.set_xlabel(meaning, fontsize=8, color=INK, labelpad=6)
    axes.set_title(name, fontsize=11, fontweight="bold", color=INK, pad=8)


def _legend(figure: "Figure", words: int, columns: int) -> None:
    """What the colours mean, under the panels."""
    from matplotlib.patches import Patch

    meanings = ["hidden", "a source token", "a target token", "itself: a [MASK] in the target's place"]
    patches = [
        Patch(facecolor=colour, edgecolor="#cccccc", linewidth=0.6, label=meaning)
        for colour, meaning in zip(COLOURS, meanings, strict=True)
    ]
    style = dict(fontsize=9, title_fontsize=9, frameon=False, labelcolor=INK)
    title = "what the row's token sees in each column"
    figure.legend(handles=patches[:words], title=title, loc="outside lower center", ncols=columns, **style)
