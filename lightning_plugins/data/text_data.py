"""What all text data modules share: one tokenizer for data and model, limits of length, resumable loaders."""

from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core.pretrained import load_tokenizer, pack_tokenizer, unpack_tokenizer
from lightning_plugins.data.loading import KeyLoader, SplitLoaders, share_of_run
from lightning_plugins.data.text_batches import TextBatches
from lightning_plugins.data.text_pairs import KeyedPairs, KeyedText, Marks, Ragged, Texts, encode, marks_of
from lightning_plugins.data.wordpiece import train_wordpiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextData(SplitLoaders):
    """Base of the text data modules: a subclass gives ``read(split)``. Its batches are those of :class:`KeyedText`.

    Args:
        tokenizer: name of the tokenizer: an id of the Hub, a folder, or package:NAME/FOLDER. Default: the model's, if
            it has one; else a WordPiece tokenizer is learnt from the training texts.
        vocab_size: most tokens of a tokenizer that is learnt.
        lowercase: whether a tokenizer that is learnt folds upper case and strips accents.
        max_source_length: most tokens of a source, with its [CLS] and [SEP]; 3 or more.
        max_target_length: most tokens of a target, with its [SEP]; 2 or more.
        long_sources: what becomes of a longer source: truncate cuts its end and tells how many were cut; raise is an
            error.
        long_targets: what becomes of a longer target, which is never cut, for a model would learn to stop there: raise
            is an error; drop leaves its pair out of training and tells how many were. In validation and test the pair
            stays, with its text but no target tokens: it counts for what is generated, not for the loss.
        batch_size: pairs in a batch of one process; with packing, rows.
        packing: whether training rows of up to max_source_length + max_target_length tokens hold as many pairs as fit.
        length_grouping: whether pairs of a batch are alike in length, so that little is padding; no effect on packed
            rows.
        num_workers: processes that prepare batches. Texts are encoded once, so that the default 0 is the fastest.
        seed: seed of the order and of random splits.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        vocab_size: int = 8000,
        lowercase: bool = False,
        max_source_length: int = 448,
        max_target_length: int = 64,
        long_sources: Literal["truncate", "raise"] = "truncate",
        long_targets: Literal["raise", "drop"] = "raise",
        batch_size: int = 32,
        packing: bool = False,
        length_grouping: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        must.check(
            locals(),
            tokenizer=must.optional(must.path),
            vocab_size=must.count,
            lowercase=must.flag,
            max_source_length=must.whole(3),
            max_target_length=must.whole(2),
            long_sources=must.one_of(["truncate", "raise"]),
            long_targets=must.one_of(["raise", "drop"]),
            batch_size=must.count,
            packing=must.flag,
            length_grouping=must.flag,
            num_workers=must.whole(0),
            seed=must.seed,
        )
        self.tokenizer_name, self.vocab_size, self.lowercase = tokenizer, vocab_size, lowercase
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.long_sources, self.long_targets = long_sources, long_targets
        self.batch_size, self.packing, self.length_grouping = batch_size, packing, length_grouping
        self.num_workers, self.seed = num_workers, seed
        self._texts: dict[str, Texts | None] = {}
        self._datasets: dict[str, tuple[PreTrainedTokenizerBase, KeyedText]] = {}

    # Texts

    def read(self, split: str) -> Texts | None:
        """Read ``"train"``, ``"val"``, ``"test"`` or ``"predict"``; ``None`` if the data have no such split."""
        raise NotImplementedError

    def texts(self, split: str) -> Texts | None:
        """The split as read, kept in memory; prediction without sources of its own takes the test's."""
        if split not in self._texts:
            texts = self.read(split)
            self._texts[split] = self.texts("test") if texts is None and split == "predict" else texts
        return self._texts[split]

    def places(self, split: str) -> list[str]:
        """Where each sample of a split stands, such as a file and its line."""
        return self.require(split).places

    def require(self, split: str) -> Texts:
        """The split, or one sentence if there is none."""
        texts = self.texts(split)
        if texts is None:
            raise ValueError(f"{type(self).__name__} has no {split} texts.")
        return texts

    def setup(self, stage: str) -> None:
        """Before training all processes agree on a tokenizer; without validation texts, there is no validation."""
        if stage == "fit":
            self.require("train")
            if self.texts("val") is None and self.trainer is not None:
                self.trainer.limit_val_batches = 0
            self.tokenizer  # noqa: B018 (where it must be learnt, all processes are here to share it)

    # The tokenizer

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The named one, else the model's, else one learnt from the training texts.

        Where it is learnt, every process of the run must ask for it: the first one learns, for all.

        Raises:
            ValueError: data and model name different ones, or there is none and nothing to learn from.
        """
        theirs = getattr(self.trainer.lightning_module, "tokenizer", None) if self.trainer is not None else None
        if self.tokenizer_name is None:
            return self._learnt if theirs is None else theirs
        if theirs is not None and theirs.get_vocab() != self._named.get_vocab():
            raise ValueError(
                f"tokenizer={self.tokenizer_name!r} of the data has {len(self._named)} tokens and is not the model's, "
                f"which has {len(theirs)}: leave it out, then the data use the model's."
            )
        return self._named

    @cached_property
    def _named(self) -> "PreTrainedTokenizerBase":
        assert self.tokenizer_name is not None  # asked for only where there is one
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def _learnt(self) -> "PreTrainedTokenizerBase":
        texts = self.texts("train")
        if texts is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: the model has none, tokenizer= names none, and there are no "
                "training texts to learn one from."
            )
        trainer = self.trainer
        files: dict[str, Tensor] = {}  # the first process's count
        if trainer is None or trainer.is_global_zero:
            content = [*texts.sources, *(texts.targets or [])]
            tokenizer = train_wordpiece(content, self.vocab_size, self.lowercase)
            if trainer is None or trainer.world_size == 1:
                return tokenizer
            files = pack_tokenizer(tokenizer)
        return unpack_tokenizer(trainer.strategy.broadcast(files))

    # Token ids

    def dataset(self, split: str) -> KeyedText:
        """What the loaders draw from; encoded once."""
        tokenizer = self.tokenizer
        if split not in self._datasets or self._datasets[split][0] is not tokenizer:
            self._datasets[split] = tokenizer, self.encode(split, self.require(split), tokenizer)
        return self._datasets[split][1]

    def encode(self, split: str, texts: Texts, tokenizer: "PreTrainedTokenizerBase") -> KeyedText:
        """Pairs as framed ids; for prediction, sources alone."""
        marks, targets = marks_of(tokenizer), Ragged([] for _ in texts.sources)
        if split != "predict" and texts.targets is not None:
            targets = self._targets(split, texts, tokenizer, marks)
            if split == "train":
                kept = (targets.lengths > 0).nonzero()[:, 0].tolist()
                if not kept:
                    raise ValueError(f"No target fits max_target_length={self.max_target_length}: raise it.")
                texts, targets = texts.select(kept), Ragged(targets[i].tolist() for i in kept)
        sources = self._sources(split, texts, tokenizer, marks)
        return KeyedPairs(texts, sources, targets, marks, self._packs(split), with_texts=split != "train")

    def _packs(self, split: str) -> bool:
        return self.packing and split == "train"

    def _targets(self, split: str, texts: Texts, tokenizer: "PreTrainedTokenizerBase", marks: Marks) -> Ragged:
        """Framed targets; empty for those that are too long."""
        assert texts.targets is not None  # asked for where they are known
        found: list[list[int]] = []
        for place, ids in zip(texts.places, encode(tokenizer, cast(list[str], texts.targets)), strict=True):
            _not_empty("target", ids, place)
            if marks.sep in ids:
                token = tokenizer.sep_token
                raise ValueError(f"{place}: the target holds {token}, which ends it: remove it from the text.")
            fits = len(ids) + 1 <= self.max_target_length
            if not fits and self.long_targets == "raise":
                raise ValueError(
                    f"{place}: the target has {len(ids) + 1} tokens with its {tokenizer.sep_token}, but "
                    f"max_target_length={self.max_target_length}: raise it, or leave such pairs out with "
                    "long_targets='drop'."
                )
            found.append([*ids, marks.sep] if fits else [])
        if long := found.count([]):
            fate = "left out" if split == "train" else "not in the loss"
            rank_zero_info(self._told(split, long, len(found), "target", self.max_target_length, fate))
        return Ragged(found)

    def _sources(self, split: str, texts: Texts, tokenizer: "PreTrainedTokenizerBase", marks: Marks) -> Ragged:
        """Framed sources, cut where they are too long."""
        room = self.max_source_length - len(marks.first) - 1
        found: list[list[int]] = []
        long = 0
        for place, ids in zip(texts.places, encode(tokenizer, texts.sources), strict=True):
            _not_empty("source", ids, place)
            if len(ids) > room:
                long += 1
                if self.long_sources == "raise":
                    length = len(ids) + self.max_source_length - room
                    raise ValueError(
                        f"{place}: the source has {length} tokens with its special ones, but max_source_length="
                        f"{self.max_source_length}: raise it, or cut such sources with long_sources='truncate'."
                    )
            found.append([*marks.first, *ids[:room], marks.sep])
        if long:
            rank_zero_info(self._told(split, long, len(found), "source", self.max_source_length, "cut"))
        return Ragged(found)

    def _told(self, split: str, long: int, count: int, what: str, limit: int, fate: str) -> str:
        return (
            f"{type(self).__name__}: {long:,} of {count:,} {split} {what}s ({long / count:.1%}) are longer than "
            f"max_{what}_length={limit} and {fate}."
        )

    # Loaders

    @property
    def row_length(self) -> int:
        """The most tokens of a row."""
        return self.max_source_length + self.max_target_length

    def _loader(self, split: str) -> KeyLoader:
        dataset = self.dataset(split)
        batches = TextBatches(
            dataset.lengths,
            self.batch_size,
            length_grouping=self.length_grouping and split != "predict",
            row_length=self.row_length if self._packs(split) else None,
            seed=self.seed,
            **share_of_run(self.trainer, split),
        )
        return KeyLoader(dataset, batches, self.num_workers, trainer=self.trainer)


def _not_empty(what: str, ids: list[int], place: str) -> None:
    if not ids:
        raise ValueError(f"{place}: the {what} is empty (it has no tokens). Fill or remove it.")
