import itertools

import pytest
import torch

from lightning_plugins.unilm.masks import MASKS
from lightning_plugins.unilm.plots import TITLES, plot_masks

TOKENS = (["[CLS]", "a", "b", "[SEP]"], ["c", "[SEP]"])
IDS = torch.tensor([[1, 1, 1, 1, 2, 2]])


def cells(axes):
    """0 where nothing is seen, else the segment that is looked at."""
    return torch.tensor(axes.images[0].get_array())


def labels(ticks):
    return [text.get_text() for text in ticks]


def test_every_kind_is_one_panel_of_its_own_mask_with_tokens_on_both_axes():
    figure = plot_masks(tokens=TOKENS)
    panels = dict(zip(TITLES, figure.axes, strict=False))
    assert [axes.get_title() for axes in panels.values()] == [title.split("\n")[0] for title in TITLES.values()]
    for kind, axes in panels.items():
        assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels())
        if kind in MASKS:
            assert torch.equal(cells(axes), MASKS[kind](IDS)[0] * IDS)
            assert labels(axes.get_xticklabels()) == [*TOKENS[0], *TOKENS[1]]
    packed, alone = cells(panels["packed"]), cells(panels["seq2seq"])
    assert torch.equal(packed, torch.block_diag(alone, alone))
    pseudo = cells(panels["pseudo"])
    assert torch.equal(pseudo[:6], torch.nn.functional.pad(alone, (0, 2)))
    assert pseudo[6:].tolist() == [[1, 1, 1, 1, 0, 0, 3, 0], [1, 1, 1, 1, 2, 0, 0, 3]]
    ranks = [int(name.split("(")[1][:-1]) for name in labels(panels["permutation"].get_xticklabels())]
    expected = [[IDS[0, j].item() * (ranks[j] <= ranks[i]) for j in range(6)] for i in range(6)]
    assert sorted(ranks) == list(range(6)) and cells(panels["permutation"]).tolist() == expected
    assert sum(axes.axison for axes in figure.axes) == len(TITLES)


def test_labels_stay_inside_the_picture_and_apart(tmp_path):
    figure = plot_masks()
    figure.savefig(tmp_path / "masks.png")
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
        assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
        assert all(left.x1 < right.x0 + 1 for left, right in itertools.pairwise(boxes))
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0
    assert (tmp_path / "masks.png").stat().st_size > 20_000


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"kinds=.*'prefix'\] must be a list of kinds, each one of bidirectional, l2r"):
        plot_masks(["seq2seq", "prefix"])
    with pytest.raises(ValueError, match=r"kinds=\[\] must be a list of kinds"):
        plot_masks([])
    with pytest.raises(ValueError, match="of which one may be empty, not both"):
        plot_masks(tokens=([], []))
    assert [axes.get_title() for axes in plot_masks(["seq2seq"], (["a"], [])).axes] == ["sequence to sequence"]
