r"""Which token may look at which: the masks that make one encoder a language model of many kinds.

Every mask is boolean, ``True`` = row i may attend to column j, between real tokens of one sample:

=============  =================================  ==========================================
kind           allow(i, j)                        what it makes of the encoder
=============  =================================  ==========================================
bidirectional  always                             BERT
l2r            j <= i                             GPT
r2l            j >= i                             GPT, reversed
seq2seq        j in source, or j <= i in target   UniLM: an encoder and a decoder in one
permutation    rank_j <= rank_i                   a causal mask on the permuted tokens
pseudo         see :func:`pseudo_mask`            UniLMv2: predicts from a second copy of the target
=============  =================================  ==========================================

Every token attends at least to itself, padding to itself alone: no row is empty, so no softmax is undefined. All of
them are reflexive and transitive. That is what makes a mask free of leaks: through any number of layers a token
depends on what its own row allows, and on nothing else.

Shape letters: B rows, T tokens of a row, P pseudo copies, Q queries, K keys.
``segment_ids`` (B, T): 0 padding, 1 source, 2 target. ``sample_ids`` (B, T), for rows packed with several samples:
0 padding, else the sample; a token sees only its own sample. Padding may stand on either side, or between.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PADDING, SOURCE, TARGET = 0, 1, 2


def segments_from_lengths(
    source_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    width: int | None = None,
    padding_side: Literal["right", "left"] = "right",
) -> Tensor:
    """Segment ids of rows that hold a source and then its target.

    Args:
        source_lengths: ``(B,)`` integers ``>= 0``, special tokens included.
        target_lengths: ``(B,)`` integers ``>= 0``.
        width: T; by default that of the longest row.
        padding_side: where the padding stands.

    Returns:
        ``(B, T)`` int64: 0 padding, 1 source, 2 target.

    Raises:
        ValueError: if the lengths do not fit each other or the width.

    Example:
        >>> segments_from_lengths([2, 1], [1, 3], width=5, padding_side="left").tolist()
        [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]]
    """
    source = torch.as_tensor(source_lengths)
    target = torch.as_tensor(target_lengths, device=source.device)
    if source.dim() != 1 or source.shape != target.shape:
        shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
        raise ValueError(f"source_lengths and target_lengths must be one number a row each, not of shapes {shapes}.")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', not {padding_side!r}.")
    total = source + target
    longest = int(total.max()) if len(total) else 0
    if len(total) and int(torch.minimum(source, target).min()) < 0:
        raise ValueError("source_lengths and target_lengths must not be negative.")
    width = longest if width is None else width
    if width < longest:
        raise ValueError(f"width={width} is less than the longest row's {longest} tokens; truncate the source first.")
    place = torch.arange(width, device=source.device) - (width - total[:, None] if padding_side == "left" else 0)
    real = (place >= 0) & (place < total[:, None])
    return torch.where(real, torch.where(place < source[:, None], SOURCE, TARGET), PADDING)


def bidirectional_mask(segment_ids: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Every token sees every token of its sample, as in BERT.

    Args:
        segment_ids: ``(B, T)``, 0 at padding.
        sample_ids: ``(B, T)`` for packed rows, 0 at padding.

    Returns:
        ``(B, T, T)`` bool.
    """
    return _with_self(_same_sample(segment_ids, sample_ids))


def left_to_right_mask(segment_ids: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Token i sees ``j <= i``, whatever the segments; arguments and result as in :func:`bidirectional_mask`."""
    return _with_self(_same_sample(segment_ids, sample_ids).tril())


def right_to_left_mask(segment_ids: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Token i sees ``j >= i``, whatever the segments; arguments and result as in :func:`bidirectional_mask`."""
    return _with_self(_same_sample(segment_ids, sample_ids).triu())


def seq2seq_mask(segment_ids: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """The source sees itself whole; the target sees the source and the target up to itself.

    Without a source it is the left-to-right mask, without a target the bidirectional one.

    Args:
        segment_ids: ``(B, T)``: 0 padding, 1 source, 2 target.
        sample_ids: ``(B, T)`` for packed rows, 0 at padding.

    Returns:
        ``(B, T, T)`` bool.

    Source:
        Dong et al. 2019, Unified Language Model Pre-training (arXiv 1905.03197), figure 1.

    Example:
        >>> seq2seq_mask(torch.tensor([[1, 1, 2, 2]])).int()[0].tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    same = _same_sample(segment_ids, sample_ids)
    is_source, is_target = segment_ids == SOURCE, segment_ids == TARGET
    return _with_self(same & (is_source[:, None, :] | (is_target[:, :, None] & is_target[:, None, :]).tril()))


def permutation_mask(segment_ids: Tensor, order: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Token i sees j where ``order_j <= order_i``: a causal mask in the order given, as in one stream of XLNet.

    Shifted by one, such a model is not told which place it predicts: training as XLNet takes a second stream.

    Args:
        segment_ids: ``(B, T)``, 0 at padding.
        order: ``(B, T)`` rank of each token, compared within its sample; ``arange(T)`` is left to right. Tokens of
            equal rank see each other.
        sample_ids: ``(B, T)`` for packed rows, 0 at padding.

    Returns:
        ``(B, T, T)`` bool.

    Raises:
        ValueError: if ``order`` has another shape.

    Source:
        Yang et al. 2019, XLNet (arXiv 1906.08237), section 2.2.
    """
    if order.shape != segment_ids.shape:
        raise ValueError(f"order has shape {tuple(order.shape)}; it must be segment_ids' {tuple(segment_ids.shape)}.")
    return _with_self(_same_sample(segment_ids, sample_ids) & (order[:, None, :] <= order[:, :, None]))


def pseudo_index(segment_ids: Tensor) -> Tensor:
    """Place of each target token in its row: what the pseudo copies are copies of.

    Args:
        segment_ids: ``(B, T)``: 0 padding, 1 source, 2 target.

    Returns:
        ``(B, P)`` int64, ascending; P is the most target tokens of a row; -1 as padding.

    Example:
        >>> pseudo_index(torch.tensor([[1, 2, 2, 2], [1, 1, 2, 0]])).tolist()
        [[1, 2, 3], [2, -1, -1]]
    """
    is_target = segment_ids == TARGET
    counts = is_target.sum(-1, keepdim=True)
    P = int(counts.max()) if len(counts) else 0
    index = is_target.int().argsort(dim=-1, descending=True, stable=True)[:, :P]
    return index.masked_fill(torch.arange(P, device=index.device) >= counts, -1)


def pseudo_mask(segment_ids: Tensor, index: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Mask of a row followed by pseudo copies of its target: all of the target is predicted in one run.

    The row itself is under the seq2seq mask and sees no copy. The copy of place p, a [MASK] with p's position, sees
    its sample's source, its target at places ``< p``, and itself: what is known when p is to be predicted.

    Args:
        segment_ids: ``(B, T)`` of the row without copies: 0 padding, 1 source, 2 target.
        index: ``(B, P)`` places of the target, -1 as padding: :func:`pseudo_index` or a part of it.
        sample_ids: ``(B, T)`` for packed rows, 0 at padding.

    Returns:
        ``(B, T + P, T + P)`` bool.

    Raises:
        ValueError: if ``index`` names a place that holds no target, whose copy would see its own answer.

    Source:
        Bao et al. 2020, UniLMv2 (arXiv 2002.12804), section 2.3; Bao et al. 2021, s2s-ft (arXiv 2110.13640).
    """
    owner, (T, P), place = _owner(segment_ids, sample_ids), (segment_ids.shape[1], index.shape[1]), index.clamp(min=0)
    is_copy = index >= 0
    if bool((is_copy & (segment_ids.gather(1, place) != TARGET)).any()):
        raise ValueError("index names a place that holds no target token; take it from pseudo_index(segment_ids).")
    copied = owner.gather(1, place).masked_fill(~is_copy, PADDING)  # (B, P) sample of each copy
    earlier = torch.arange(T, device=index.device) < index[:, :, None]
    known = (segment_ids == SOURCE)[:, None, :] | ((segment_ids == TARGET)[:, None, :] & earlier)
    known &= (copied[:, :, None] == owner[:, None, :]) & (copied != PADDING)[:, :, None]
    row = pad(seq2seq_mask(segment_ids, sample_ids), (0, P))  # blind to the copies
    return torch.cat([row, _with_self(pad(known, (0, P)), offset=T)], dim=1)


def positions(segment_ids: Tensor, sample_ids: Tensor | None = None) -> Tensor:
    """Position of each token: 0, 1, 2, ... over the real tokens of its sample.

    Args:
        segment_ids: ``(B, T)``, 0 at padding.
        sample_ids: ``(B, T)`` for packed rows, 0 at padding.

    Returns:
        ``(B, T)`` int64, 0 at padding.

    Example:
        >>> positions(torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 1, 2, 2]])).tolist()
        [[0, 0, 1, 0, 1]]
    """
    return left_to_right_mask(segment_ids, sample_ids).sum(-1) - 1  # how many of the sample came before


MASKS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "bidirectional": bidirectional_mask,
    "l2r": left_to_right_mask,
    "r2l": right_to_left_mask,
    "seq2seq": seq2seq_mask,
}


def attention_mask(allow: Tensor, implementation: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """A boolean mask in the form that an attention implementation of transformers really obeys.

    Eager attention adds its mask to the scores: a boolean there would be added as 0 and 1 and hide nothing, silently.

    Args:
        allow: ``(B, Q, K)`` bool, True = may attend, no row empty.
        implementation: ``"sdpa"``, ``"eager"`` or ``"flex_attention"``, as ``model.config._attn_implementation`` says.
        dtype: type of the model's weights, of which eager's mask is made.

    Returns:
        sdpa: ``(B, 1, Q, K)`` bool. eager: ``(B, 1, Q, K)`` of ``dtype``, 0 where allowed, else its lowest finite
        number. flex_attention: a BlockMask.

    Raises:
        ValueError: if the implementation cannot take such a mask, or ``allow`` or ``dtype`` is of another kind.
    """
    if allow.dtype != torch.bool or allow.dim() != 3:
        kind = f"{allow.dtype} of shape {tuple(allow.shape)}"
        raise ValueError(f"allow must be a bool mask (B, Q, K), True = may attend, not {kind}.")
    if implementation == "sdpa":
        return allow[:, None]
    if implementation == "eager":
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} has no lowest number to hide a score with; give the model's own dtype.")
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allow.device)
        return torch.where(allow[:, None], torch.zeros_like(hidden), hidden)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        B, Q, K = allow.shape
        return create_block_mask(lambda b, h, q, k: allow[b, q, k], B, None, Q, K, device=allow.device)
    raise ValueError(
        f"attn_implementation={implementation!r} cannot take a mask of one's own; use 'sdpa', 'eager' or, "
        "on a GPU, 'flex_attention'."
    )


def _owner(segment_ids: Tensor, sample_ids: Tensor | None) -> Tensor:
    """``(B, T)``: the sample of each token, 0 at padding."""
    if segment_ids.dim() != 2:
        raise ValueError(f"segment_ids must have shape (B, T), not {tuple(segment_ids.shape)}.")
    if sample_ids is None:
        return segment_ids.ne(PADDING).long()
    if sample_ids.shape != segment_ids.shape:
        shapes = f"{tuple(sample_ids.shape)}; it must be segment_ids' {tuple(segment_ids.shape)}"
        raise ValueError(f"sample_ids has shape {shapes}.")
    return sample_ids.masked_fill(segment_ids == PADDING, PADDING)


def _same_sample(segment_ids: Tensor, sample_ids: Tensor | None) -> Tensor:
    """``(B, T, T)``: both are real tokens of one sample."""
    owner = _owner(segment_ids, sample_ids)
    return (owner[:, :, None] == owner[:, None, :]) & (owner != PADDING)[:, None, :]


def _with_self(allow: Tensor, offset: int = 0) -> Tensor:
    """Let row i ``(B, Q, K)`` see column ``i + offset``: its own, also at padding."""
    own = torch.ones(allow.shape[-2:], dtype=torch.bool, device=allow.device).tril(offset).triu(offset)
    return allow | own
