"""What is hidden and what is predicted: from a batch of token rows to the network's inputs and labels.

Shapes: B rows, T tokens of a row, P pseudo copies of a row, N predicted tokens of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import rand, randint
from lightning_plugins.unilm.masks import MASKS, permutation_mask, positions, pseudo_index, pseudo_mask

Objective = Literal["lm", "masked", "pseudo"]
MaskKind = Literal["seq2seq", "l2r", "r2l", "bidirectional", "permutation"]

_SHIFT = {"seq2seq": 1, "l2r": 1, "r2l": -1}  # kinds that predict a neighbour, and on which side it stands
_MASKED, _RANDOM = 0.8, 0.9  # BERT's 80 % [MASK], 10 % a random token, 10 % the token itself


class Inputs(NamedTuple):
    """What the network reads and must say.

    ``input_ids``, ``segment_ids``, ``position_ids`` ``(B, T)`` (``T + P`` with pseudo copies), ``token_type_ids`` the
    same or ``None``, ``allow`` ``(B, T, T)`` bool, ``predict`` ``(B, T)`` bool: the places whose logits are computed,
    ``labels`` ``(N,)`` their tokens, row by row.
    """

    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    allow: Tensor
    predict: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The ids that hiding tokens needs; ``mask`` is ``None`` for a tokenizer without [MASK]."""

    size: int
    pad: int
    mask: int | None
    special: tuple[int, ...]


def check_objective(objective: str, mask: str | Mapping[str, float]) -> dict[str, float]:
    """The share of each kind of mask, after refusing what cannot be trained.

    Raises:
        ValueError: an unknown name, shares that are no shares, or a mask that the objective cannot use.
    """
    must.one_of(Objective, why="next token, UniLM v1 or v2")("objective", objective)
    if not isinstance(mask, str | Mapping):
        raise ValueError(f"mask={must.told(mask)} must be a kind of mask, or a dict with a share for each of several.")
    shares = {mask: 1.0} if isinstance(mask, str) else dict(mask)
    known = (*MASKS, "permutation")
    for kind, share in shares.items():
        if kind not in known:
            raise ValueError(f"mask={kind!r} is unknown; the kinds are {', '.join(known)}.")
        must.number(above=0, why="leave the kind out if it is 0")(f"mask[{kind!r}]", share)
    if not shares:
        raise ValueError("mask={} names no kind of mask; give one such as 'seq2seq', or a share for each of several.")
    if objective == "pseudo" and set(shares) != {"seq2seq"}:
        raise ValueError(f"objective='pseudo' has pseudo copies of a target: mask must be 'seq2seq', got {mask!r}.")
    if objective == "lm" and (unfit := set(shares) - set(_SHIFT)):
        raise ValueError(
            f"objective='lm' predicts a neighbour, which mask={sorted(unfit)[0]!r} shows, or whose place it does not "
            "know: use objective='masked', or the masks seq2seq, l2r and r2l."
        )
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}


def draw_kinds(shares: Mapping[str, float], rows: int, generator: torch.Generator | None) -> list[str]:
    """A kind of mask for each row, by its share."""
    kinds = list(shares)
    if len(kinds) == 1:
        return kinds * rows
    place = rand((rows,), generator).cpu()
    last = torch.tensor(list(shares.values()), dtype=place.dtype).cumsum(0)[:-1]  # where each kind but one ends
    return [kinds[i] for i in torch.bucketize(place, last, right=True).tolist()]


def row_masks(
    kinds: Sequence[str], segment_ids: Tensor, sample_ids: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """``(B, T, T)`` bool, each row's mask by its kind."""
    if len(set(kinds)) == 1 and kinds[0] != "permutation":
        return MASKS[kinds[0]](segment_ids, sample_ids)
    score = rand(segment_ids.shape, generator, segment_ids.device)
    order = score.argsort(dim=1, stable=True).argsort(1)  # ranks: of two tokens alike, however long the padding is
    allow = permutation_mask(segment_ids, order, sample_ids)
    for kind in {*kinds} - {"permutation"}:
        rows = torch.tensor([k == kind for k in kinds], device=segment_ids.device)
        allow = torch.where(rows[:, None, None], MASKS[kind](segment_ids, sample_ids), allow)
    return allow


def next_tokens(
    input_ids: Tensor, segment_ids: Tensor, sample_ids: Tensor | None, kinds: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Which places predict their neighbour, and the neighbour's token.

    Under seq2seq the targets are predicted, each by the token before it: the first by the source's last [SEP]. Under
    l2r and r2l every token is, but a sample's first (last).

    Returns:
        ``predict`` ``(B, T)`` bool and ``labels`` ``(N,)``.
    """
    samples = (segment_ids > 0).long() if sample_ids is None else sample_ids
    shift = torch.tensor([_SHIFT[kind] for kind in kinds], device=input_ids.device)[:, None]
    place = torch.arange(input_ids.shape[1], device=input_ids.device) + shift  # (B, T) of the neighbour
    inside = (place >= 0) & (place < input_ids.shape[1])
    place = place.clamp(0, input_ids.shape[1] - 1)
    wanted = torch.tensor([2 if kind == "seq2seq" else 1 for kind in kinds], device=input_ids.device)[:, None]
    neighbour = segment_ids.gather(1, place)
    predict = inside & (neighbour >= wanted) & (samples.gather(1, place) == samples) & (samples > 0)
    return predict, input_ids.gather(1, place)[predict]


def hide(input_ids: Tensor, chosen: Tensor, vocabulary: Vocabulary, generator: torch.Generator | None = None) -> Tensor:
    """BERT's corruption of the chosen tokens: 80 % [MASK], 10 % a random token, 10 % as it was."""
    assert vocabulary.mask is not None
    fate = rand(input_ids.shape, generator, input_ids.device)
    other = randint(vocabulary.size, input_ids.shape, generator, input_ids.device)
    hidden = torch.where(fate < _MASKED, torch.full_like(input_ids, vocabulary.mask), input_ids)
    hidden = torch.where((fate >= _MASKED) & (fate < _RANDOM), other, hidden)
    return torch.where(chosen, hidden, input_ids)


def choose(candidates: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """``rate`` of each row's candidates at random, rounded, and at least one of them: ``(B, T)`` bool.

    Source: UniLM v1, biunilm/seq2seq_loader.py: n = max(1, round(candidates · mask_prob)).
    """
    score = rand(candidates.shape, generator, candidates.device).masked_fill(~candidates, 2.0)
    count = (candidates.sum(1, keepdim=True) * rate).round().clamp(min=1)
    return (score.argsort(dim=1, stable=True).argsort(1) < count) & candidates


def mask_candidates(
    input_ids: Tensor, segment_ids: Tensor, kinds: Sequence[str], vocabulary: Vocabulary, alone: bool
) -> Tensor:
    """Tokens that the masked objective may hide: ``(B, T)`` bool.

    Fine-tuning (seq2seq ``alone``) hides targets only, their last [SEP] included, since decoding must predict it.
    Otherwise all tokens but the special ones, and for seq2seq the last [SEP] too.
    """
    target = segment_ids == 2
    if alone:
        return target
    special = torch.isin(input_ids, torch.tensor(vocabulary.special, device=input_ids.device))
    s2s = torch.tensor([kind == "seq2seq" for kind in kinds], device=input_ids.device)[:, None]
    return (segment_ids > 0) & (~special | (s2s & target))


def append_pseudo(
    input_ids: Tensor, segment_ids: Tensor, sample_ids: Tensor | None, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pseudo copies behind each row: a [MASK] for each target token, at its position.

    Returns:
        ``input_ids`` and ``segment_ids`` ``(B, T + P)``, ``index`` ``(B, P)`` the copied place or -1, and ``allow``.
    """
    assert vocabulary.mask is not None
    index = pseudo_index(segment_ids)
    real = index >= 0
    copies = torch.where(real, vocabulary.mask, vocabulary.pad)
    allow = pseudo_mask(segment_ids, index, sample_ids)
    return torch.cat([input_ids, copies], 1), torch.cat([segment_ids, 2 * real.long()], 1), index, allow


def with_copies(values: Tensor, index: Tensor) -> Tensor:
    """``(B, T)`` values of places, and behind them those of the copied places: ``(B, T + P)``."""
    return torch.cat([values, values.gather(1, index.clamp(min=0))], 1)


@dataclass
class InputBuilder:
    """From batches to :class:`Inputs`, by objective and masks.

    Args:
        objective: ``lm``, ``masked`` or ``pseudo``.
        shares: share of the rows that each kind of mask gets, as :func:`check_objective` returns them.
        mask_probability: share of the candidates that ``masked`` hides.
        target_noise: share of the target's tokens that ``lm`` and ``pseudo`` hide where ``noisy`` is asked for.
        vocabulary: the tokenizer's size and special ids.
        token_types: from segment ids ``(B, T)``, kind of mask and sample ids to token types, or to ``None``.
    """

    objective: Objective
    shares: Mapping[str, float]
    mask_probability: float
    target_noise: float
    vocabulary: Vocabulary
    token_types: Callable[[Tensor, str, Tensor | None], Tensor | None]

    def __call__(self, batch: Mapping[str, Any], noisy: bool, generator: torch.Generator | None = None) -> Inputs:
        """Inputs and labels of a batch; ``noisy``: with target noise."""
        ids, segments, samples = batch["input_ids"], batch["segment_ids"], batch.get("sample_ids")
        kinds = draw_kinds(self.shares, len(ids), generator)
        types, place = self._types(segments, samples, kinds), positions(segments, samples)
        if self.objective == "pseudo":
            return self._pseudo(self._noised(ids, segments, noisy, generator), ids, segments, samples, types, place)
        if self.objective == "lm":
            predict, labels = next_tokens(ids, segments, samples, kinds)
            hidden = self._noised(ids, segments, noisy, generator)
        else:
            candidates = mask_candidates(ids, segments, kinds, self.vocabulary, alone=set(self.shares) == {"seq2seq"})
            predict = choose(candidates, self.mask_probability, generator)
            hidden, labels = hide(ids, predict, self.vocabulary, generator), ids[predict]
        # Last, because it draws for some batches only: a row's other draws must not depend on the rows beside it.
        allow = row_masks(kinds, segments, samples, generator)
        return Inputs(hidden, segments, place, types, allow, predict, labels)

    def _pseudo(
        self,
        noised: Tensor,
        ids: Tensor,
        segments: Tensor,
        samples: Tensor | None,
        types: Tensor | None,
        place: Tensor,
    ) -> Inputs:
        longer, longer_segments, index, allow = append_pseudo(noised, segments, samples, self.vocabulary)
        types = None if types is None else with_copies(types, index)
        predict = pad(index >= 0, (ids.shape[1], 0))
        labels = ids.gather(1, index.clamp(min=0))[index >= 0]
        return Inputs(longer, longer_segments, with_copies(place, index), types, allow, predict, labels)

    def _noised(self, ids: Tensor, segments: Tensor, noisy: bool, generator: torch.Generator | None) -> Tensor:
        if not (noisy and self.target_noise):
            return ids
        drawn = rand(ids.shape, generator, ids.device) < self.target_noise
        return hide(ids, drawn & (segments == 2), self.vocabulary, generator)

    def _types(self, segments: Tensor, samples: Tensor | None, kinds: Sequence[str]) -> Tensor | None:
        types = self.token_types(segments, kinds[0], samples)
        for kind in {*kinds} - {kinds[0]} if types is not None else ():
            rows = torch.tensor([k == kind for k in kinds], device=segments.device)
            types = torch.where(rows[:, None], self.token_types(segments, kind, samples), types)
        return types
