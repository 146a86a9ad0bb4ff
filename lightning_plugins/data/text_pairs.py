"""From texts to token ids to batches.

The batch stands in the docstring of :class:`KeyedText`. Shapes: N samples, B rows, T tokens of the longest row.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_plugins.core.random_numbers import random_integers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE, TARGET = 1, 2  # segments; 0 is padding
_CUT = 30  # stream of random numbers: where a piece is cut in two
_CHUNK = 4096  # texts that are encoded at once


class Texts(NamedTuple):
    """One split: N sources, as many targets (``None`` where unknown), and where each stands, for sentences."""

    sources: list[str]
    targets: Sequence[str | None] | None
    places: list[str]

    def select(self, index: Iterable[int]) -> "Texts":
        """Some of the samples."""
        index = list(index)
        targets = None if self.targets is None else [self.targets[i] for i in index]
        return Texts([self.sources[i] for i in index], targets, [self.places[i] for i in index])


class Marks(NamedTuple):
    """The ids that frame a text: ``first`` (one, or none if the tokenizer has no such token), ``sep`` and ``pad``."""

    first: list[int]
    sep: int
    pad: int


def marks_of(tokenizer: "PreTrainedTokenizerBase") -> Marks:
    """The tokenizer's own ``[CLS]``, ``[SEP]`` and ``[PAD]``, whatever they are called there.

    Raises:
        ValueError: it has no ``[SEP]`` or no ``[PAD]``.
    """
    named = cast(Any, tokenizer)  # transformers declares these as whatever a token or a setting may be
    cls, sep, pad = named.cls_token_id, named.sep_token_id, named.pad_token_id
    for name, token in (("sep_token", sep), ("pad_token", pad)):
        if token is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no {name}, which ends or "
                f"fills every row: use the tokenizer of a BERT-like model, or give it one (tokenizer.{name} = ...)."
            )
    return Marks([] if cls is None else [cls], sep, pad)


class Ragged:
    """Sequences of int32 of different lengths, end to end in one tensor.

    Args:
        sequences: N sequences of integers, read once.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        values, ends = array("i"), [0]
        for sequence in sequences:
            values.extend(sequence)
            ends.append(len(values))
        self.values, self.ends = torch.from_numpy(np.array(values)), torch.tensor(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.values[self.ends[index] : self.ends[index + 1]]

    @property
    def lengths(self) -> Tensor:
        """``(N,)`` int64."""
        return self.ends.diff()


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text, whole and without special tokens."""
    for start in range(0, len(texts), _CHUNK):
        yield from tokenizer(
            list(texts[start : start + _CHUNK]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would advise to cut texts at the model's length; we cut, or refuse, ourselves
        )["input_ids"]


class KeyedText(Dataset):
    """Batches by rows of keys, as a dict of ``(B, T)`` int64 tensors, padded on the right.

    - ``input_ids``: ``[CLS] source [SEP] target [SEP]`` of every sample of the row, then the tokenizer's pad id.
    - ``segment_ids``: 0 padding, 1 source with its ``[CLS]`` and ``[SEP]``, 2 target with its ``[SEP]``;
      ``(segment_ids > 0).sum()`` counts real tokens.
    - ``sample_ids``: only if packed: 0 padding, 1, 2, ... the sample of its row that a token belongs to.
    - ``key``: ``(B,)`` int64, which names the row in its epoch: the key of its first sample, by which noise is drawn.
    - ``source`` and ``target``: only if ``with_texts``: lists of str, one for each sample; ``target`` where known.

    A subclass gives ``lengths`` (``(N,)`` int64 tokens of each sample), ``parts(key)`` and ``texts(key)``.

    Args:
        marks: ids that frame a text.
        packed: whether rows hold several samples.
        with_texts: whether batches hold the texts, as for validation, test and prediction.
    """

    lengths: Tensor

    def __init__(self, marks: Marks, packed: bool, with_texts: bool) -> None:
        self.marks, self.packed, self.with_texts = marks, packed, with_texts

    def parts(self, key: int) -> tuple[Tensor, Tensor]:
        """Ids of source and target of a sample, framed; an unknown target is empty."""
        raise NotImplementedError

    def texts(self, key: int) -> dict[str, str | None]:
        """``source`` and ``target`` of a sample; none of the latter if no sample has one."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, rows: list[list[int]]) -> dict[str, Any]:
        """The finished batch of these rows of keys."""
        samples = [[self.parts(key) for key in row] for row in rows]
        width = max(sum(len(ids) for parts in row for ids in parts) for row in samples)
        batch = {"input_ids": torch.full((len(rows), width), self.marks.pad)}
        names = ("segment_ids", "sample_ids") if self.packed else ("segment_ids",)
        batch |= {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in names}
        for n, row in enumerate(samples):
            begin = 0
            for number, parts in enumerate(row, 1):
                for segment, ids in zip((SOURCE, TARGET), parts, strict=True):
                    place = slice(begin, begin + len(ids))
                    begin += len(ids)
                    batch["input_ids"][n, place] = ids.long()
                    batch["segment_ids"][n, place] = segment
                    if self.packed:
                        batch["sample_ids"][n, place] = number
        batch["key"] = torch.tensor([row[0] for row in rows])
        if not self.with_texts:
            return batch
        texts = [self.texts(key) for row in rows for key in row]
        return batch | {name: [text[name] for text in texts] for name in texts[0]}


class KeyedPairs(KeyedText):
    """Sources with their targets; see :class:`KeyedText`.

    Args:
        content: sources and targets as they were read.
        sources: ids of N framed sources.
        targets: ids of N framed targets.
        marks: ids that frame a text.
        packed: whether rows hold several samples.
        with_texts: whether batches hold the texts.
    """

    def __init__(
        self, content: Texts, sources: Ragged, targets: Ragged, marks: Marks, packed: bool, with_texts: bool
    ) -> None:
        super().__init__(marks, packed, with_texts)
        self.sources, self.targets = sources, targets
        self.lengths = sources.lengths + targets.lengths
        self.content = content if with_texts else None

    def parts(self, key: int) -> tuple[Tensor, Tensor]:
        """As they were framed."""
        return self.sources[key % len(self)], self.targets[key % len(self)]

    def texts(self, key: int) -> dict[str, str | None]:
        """As they were read, uncut."""
        assert self.content is not None  # batches ask for texts under with_texts alone
        names = {"source": self.content.sources, "target": self.content.targets}
        return {name: column[key % len(self)] for name, column in names.items() if column is not None}


class KeyedPieces(KeyedText):
    """Pieces of running text, cut into source and target at a place of their own in each epoch; see :class:`KeyedText`.

    Args:
        documents: ids of whole documents.
        row_length: the most tokens of a sample; documents are cut into pieces of this length, special tokens included,
            the last one shorter. A single token that is left over is left out: it cannot be cut in two.
        max_source_length: the most tokens of a source, framed, so that there is room to generate behind it.
        tokenizer: turns pieces back into text.
        seed: seed of the places.
        packed: whether rows hold several samples.
        with_texts: whether batches hold the texts.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        row_length: int,
        max_source_length: int,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        packed: bool,
        with_texts: bool,
    ) -> None:
        super().__init__(marks_of(tokenizer), packed, with_texts)
        self.tokenizer, self.seed = tokenizer, seed
        framing = len(self.marks.first) + 2
        step, self.longest = row_length - framing, max_source_length - framing + 1
        pieces = (ids[start : start + step] for ids in documents for start in range(0, len(ids), step))
        self.pieces = Ragged(piece for piece in pieces if len(piece) > 1)
        self.lengths = self.pieces.lengths + framing

    def halves(self, key: int) -> tuple[Tensor, Tensor]:
        """The two parts of a piece, at least one token each."""
        piece = self.pieces[key % len(self)]
        cut = 1 + int(random_integers(torch.tensor(key), min(len(piece) - 1, self.longest), self.seed, _CUT))
        return piece[:cut], piece[cut:]

    def parts(self, key: int) -> tuple[Tensor, Tensor]:
        """The framed halves."""
        source, target = self.halves(key)
        sep = source.new_tensor([self.marks.sep])
        return torch.cat([source.new_tensor(self.marks.first), source, sep]), torch.cat([target, sep])

    def texts(self, key: int) -> dict[str, str | None]:
        """The halves, decoded."""
        source, target = (cast(str, self.tokenizer.decode(half.tolist())) for half in self.halves(key))  # one text
        return {"source": source, "target": target}
