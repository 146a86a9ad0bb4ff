"""How a row's token types tell source and target apart. Shapes: B rows, T tokens of a row."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_plugins.core import arguments as must
from lightning_plugins.unilm.masks import MASKS, PADDING, SOURCE, TARGET

Segment = Literal["sep_as_bos", "su", "unilm_v1", "none"]

NUM_V1_TYPES = 6
_V1_TYPES = {"bidirectional": (0, 1), "l2r": (2, 2), "r2l": (3, 3), "seq2seq": (4, 5)}  # of source and target


def token_types(
    segment_ids: Tensor, segment: Segment, kind: str = "seq2seq", sample_ids: Tensor | None = None
) -> Tensor:
    """Token types by a scheme; padding is 0.

    Args:
        segment_ids: ``(B, T)``: 0 padding, 1 source, 2 target.
        segment: ``sep_as_bos``: the source's last [SEP] and the target are 1, all else 0; plain ``generate()``, which
            repeats the last type it is given, does the same. ``su``: source 0, target 1. ``unilm_v1``: source and
            target are 4 and 5 under seq2seq, 2 under l2r, 3 under r2l, else 0 and 1. ``none``: 0.
        kind: kind of the mask; only ``unilm_v1`` looks at it.
        sample_ids: ``(B, T)`` for packed rows, 0 at padding.

    Returns:
        ``(B, T)`` int64.

    Raises:
        ValueError: if ``kind`` is unknown.

    Source:
        su: bert4keras; unilm_v1: microsoft/unilm, ``new_segment_ids`` (arXiv 1905.03197, section 2.2).

    Example:
        >>> token_types(torch.tensor([[1, 1, 1, 2, 2, 0]]), "sep_as_bos").tolist()
        [[0, 0, 1, 1, 1, 0]]
    """
    if kind not in MASKS and kind != "permutation":
        raise ValueError(f"kind={kind!r} is no mask; the kinds are {', '.join(MASKS)}, permutation.")
    is_source, is_target = segment_ids == SOURCE, segment_ids == TARGET
    if segment == "none":
        return torch.zeros_like(segment_ids)
    if segment == "unilm_v1":
        source, target = _V1_TYPES.get(kind, _V1_TYPES["bidirectional"])
        return is_source * source + is_target * target
    if segment == "su":
        return is_target.long()
    goes_on = is_source[:, :-1] & is_source[:, 1:]  # a token of the source, and not its last
    if sample_ids is not None:
        goes_on &= sample_ids[:, :-1] == sample_ids[:, 1:]
    return ((segment_ids != PADDING) & ~pad(goes_on, (0, 1))).long()


def fitting_segment(segment: Segment, model_type: str, num_types: int, can_extend: bool = True) -> Segment:
    """The scheme that a family with ``num_types`` token types can follow: ``sep_as_bos`` becomes ``none`` below two.

    Raises:
        ValueError: if the name is unknown, or there are too few types.
    """
    must.one_of(Segment)("segment", segment)
    if segment == "none" or (num_types >= 2 and segment != "unilm_v1"):
        return segment
    if segment == "sep_as_bos":
        return "none"
    if segment == "unilm_v1" and (num_types >= NUM_V1_TYPES or (num_types and can_extend)):
        return segment
    raise ValueError(
        f"segment={segment!r} needs token types, of which {model_type!r} has {num_types}: use 'sep_as_bos' or 'none'."
    )
