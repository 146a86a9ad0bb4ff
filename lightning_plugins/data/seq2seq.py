"""Text pairs from files, from Hugging Face ``datasets``, or from memory; and running text for continued pretraining."""

import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from os import PathLike
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from lightning_plugins.core import arguments as must
from lightning_plugins.data.hf import find_validation, load_splits
from lightning_plugins.data.loading import VAL_SIZE, random_split
from lightning_plugins.data.text_data import TextData
from lightning_plugins.data.text_files import Row, read_rows
from lightning_plugins.data.text_pairs import KeyedPieces, KeyedText, Texts, encode

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


_FILES = must.optional(must.several(must.path))
_PAIR = must.each(must.text, 2, of="[source, target]")


class Seq2SeqData(TextData):
    """Pairs of texts, source and target, from files, from the Hub or from memory; or running text, cut in two.

    Give ``train_file``, or ``path``, or ``pairs``. The format of a file is told by its ending: ``.jsonl``, ``.tsv``,
    ``.csv``, ``.txt``, each also with ``.gz`` (see :func:`read_rows`). Every validation and test pair comes once over
    all processes, sorted by length; prediction keeps the order of its file. Batches are those of :class:`KeyedText`.

    With ``text_column`` the rows are running text: each document is cut into pieces of
    ``max_source_length + max_target_length`` tokens and each piece into source and target, at a random place that is
    another one in every epoch; sources stay within ``max_source_length``, targets may be longer than theirs.

    Args:
        train_file: file or list of files with the training pairs: .jsonl, .tsv, .csv or .txt, each also with .gz.
        val_file: file or list of files with the validation pairs. Default: the validation split of path, else val_size
            of the training pairs.
        test_file: file or list of files with the test pairs. Default: the test split of path.
        predict_file: file or list of files with sources to predict for; targets are told beside the predictions where
            there are some, and are not needed. Default: those of test_file, or the test split of path.
        path: an id of the Hub, or a folder or parquet file that the library datasets reads, in place of train_file.
        name: configuration of the data set at path, for ids that have several.
        train_split: name of the training split of path.
        val_split: name of the validation split of path. Default: validation, valid, val or dev, if there is one.
        test_split: name of the test split of path.
        pairs: training pairs themselves, [[source, target], ...], in place of train_file or path.
        val_size: training pairs held out at random, by the seed, where nothing else is for validation: a count, or a
            fraction if a float; 0 for none. Rows with a common source may then stand on both sides: give val_file if
            that matters.
        source_format: template of the source over the columns of a row, such as "{answers[text][0]} [SEP] {context}".
            [SEP] is read as the tokenizer spells it: write </s> for one of RoBERTa's kind.
        target_format: template of the target over the columns of a row, such as "{question}".
        text_column: name of the column with the documents of running text, each of which is cut into source and target;
            in a .txt file its name is text. Default: rows are pairs.
        columns: names for the columns of .tsv and .csv files whose first line does not name them.
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
        seed: seed of the order, the validation pairs, and the cuts of running text.

    Raises:
        FileNotFoundError: a file is missing, or nothing readable is at ``path``.
        ValueError: no origin or several, a template without columns; and, when the data are first asked for, whatever
            is wrong in a row, with file and line.

    Example:
        >>> data = Seq2SeqData(pairs=[["one two", "two one"], ["red green blue", "blue green red"]], val_size=0)
        >>> batch = next(iter(data.train_dataloader()))
        >>> print(data.tokenizer.decode(batch["input_ids"][1]))
        [CLS] one two [SEP] two one [SEP] [PAD] [PAD]
        >>> batch["segment_ids"][1]
        tensor([1, 1, 1, 1, 2, 2, 2, 0, 0])
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        predict_file: str | list[str] | None = None,
        path: str | None = None,
        name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str = "test",
        pairs: list[list[str]] | None = None,
        val_size: int | float = 0.1,
        source_format: str = "{source}",
        target_format: str = "{target}",
        text_column: str | None = None,
        columns: list[str] | None = None,
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
        super().__init__(
            tokenizer,
            vocab_size,
            lowercase,
            max_source_length,
            max_target_length,
            long_sources,
            long_targets,
            batch_size,
            packing,
            length_grouping,
            num_workers,
            seed,
        )
        files = dict.fromkeys(("train_file", "val_file", "test_file", "predict_file"), _FILES)
        words = dict.fromkeys(("path", "name", "val_split", "text_column"), must.optional(must.word))
        texts = dict.fromkeys(("source_format", "target_format"), must.text)
        must.check(
            locals(),
            **files,
            **words,
            **texts,
            train_split=must.word,
            test_split=must.word,
            val_size=VAL_SIZE,
            pairs=must.optional(must.instance(Sequence, "a list of pairs [source, target]")),
            columns=must.optional(must.each(must.word, of="a list of names")),
        )
        origins = {"train_file": train_file, "path": path, "pairs": pairs}
        given = [key for key, value in origins.items() if value is not None]
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        if len(given) > 1 or not (given or test_file or predict_file):
            got = " and ".join(given) or "none"
            raise ValueError(f"Seq2SeqData takes its training pairs from one of {', '.join(origins)}; got {got}.")
        if text_column is not None and (source_format, target_format) != ("{source}", "{target}"):
            raise ValueError(
                f"text_column={text_column!r} is cut into source and target, which source_format and target_format "
                "would put together: leave out one or the other."
            )
        self.files = {split: [file] if isinstance(file, str | PathLike) else file for split, file in files.items()}
        self.path, self.name, self.pairs, self.val_size, self.columns = path, name, pairs, val_size, columns
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.text_column = text_column
        self.source_format = Template("source_format", source_format)
        self.target_format = Template("target_format", target_format)
        if text_column is not None:
            self.source_format = Template("text_column", f"{{{text_column}}}")

    def prepare_data(self) -> None:
        """Download once, in one process; the others find the cache."""
        if self.path is not None:
            self._hub  # noqa: B018

    def require(self, split: str) -> Texts:
        """The split, or one sentence if there is none."""
        texts = self.texts(split)
        if texts is None:
            cure = "val_size above 0 or val_file" if split == "val" else f"{split}_file"
            raise ValueError(f"Seq2SeqData has no {split} texts; set {cure}.")
        return texts

    def read(self, split: str) -> Texts | None:
        """A split's own file, else its part of the origin."""
        if split in ("train", "val") and self._carves:
            return self._carved[split == "val"]
        if split == "predict":  # whose targets may be unknown, also in the test's rows
            return self._read("test" if self.files["predict"] is None else "predict", for_prediction=True)
        return self._read(split)

    @property
    def _carves(self) -> bool:
        """Whether validation pairs are taken from the training pairs."""
        return self.files["val"] is None and self._split_name("val") is None

    @cached_property
    def _carved(self) -> tuple[Texts | None, Texts | None]:
        texts = self._read("train")
        if texts is None:
            return None, None
        train, val = (index.tolist() for index in random_split(len(texts.places), self.val_size, self.seed))
        return texts.select(train), texts.select(val) if val else None

    def _read(self, split: str, for_prediction: bool = False) -> Texts | None:
        files = self.files[split]
        if files is not None:
            rows: Iterable[Row] = (row for file in files for row in read_rows(file, self.columns))
            origin = ", ".join(map(str, files))
        elif split == "train" and self.pairs is not None:
            return _in_memory(self.pairs)
        elif (hub := self._split_name(split)) is not None:
            rows = (Row(dict(values), f"{self.path}, {hub} row {n}") for n, values in enumerate(self._hub[hub]))
            origin = f"{self.path}, split {hub},"
        else:
            return None
        return self._filled(rows, origin, for_prediction)

    def _filled(self, rows: Iterable[Row], origin: str, for_prediction: bool) -> Texts:
        """The templates, filled from every row."""
        sources: list[str] = []
        targets: list[str | None] = []
        places: list[str] = []
        for row in rows:
            sources.append(self.source_format.fill(row))
            places.append(row.place)
            if self.text_column is None:
                known = not for_prediction or self.target_format.has_columns(row)
                targets.append(self.target_format.fill(row) if known else None)
        if not places:
            raise ValueError(f"{origin} holds no rows.")
        return Texts(sources, targets if any(target is not None for target in targets) else None, places)

    @cached_property
    def _hub(self) -> "datasets.DatasetDict":
        assert self.path is not None  # nothing asks for splits without one
        return load_splits("Seq2SeqData", self.path, self.name, self.split_names["train"], "a folder of text files")

    def _split_name(self, split: str) -> str | None:
        """The split's name in ``path``; a name that the user gave for validation must exist."""
        if self.path is None or split == "predict":
            return None
        name = self.split_names[split]
        if split == "val" and name is None:
            return find_validation(self._hub)
        if name in self._hub:
            return name
        if split == "test":
            return None
        raise ValueError(f"{self.path!r} has no split {name!r}; its splits are {', '.join(map(str, self._hub))}.")

    def encode(self, split: str, texts: Texts, tokenizer: "PreTrainedTokenizerBase") -> KeyedText:
        """Running text as pieces, pairs as they are."""
        if self.text_column is None or split == "predict":
            return super().encode(split, texts, tokenizer)
        documents = encode(tokenizer, texts.sources)
        packed, with_texts = self._packs(split), split != "train"
        pieces = KeyedPieces(
            documents, self.row_length, self.max_source_length, tokenizer, self.seed, packed, with_texts
        )
        if not len(pieces):
            raise ValueError(f"No {split} document has two tokens or more.")
        return pieces


class Template(Formatter):
    """A text with columns of a row in braces, as :meth:`str.format` has it, but strict.

    Args:
        argument: name of the argument that it came by, for sentences.
        text: the template, such as ``"{question} [SEP] {context}"``; ``{answers[text][0]}`` goes into nested values.

    Raises:
        ValueError: ``text`` is malformed, or names no column.

    Example:
        >>> Template("source_format", "{a[0]} and {b}").fill(Row({"a": ["x"], "b": 1}, "rows.jsonl, line 1"))
        'x and 1'
    """

    def __init__(self, argument: str, text: str) -> None:
        self.argument, self.text = argument, text
        try:
            fields = [field for _, field, _, _ in self.parse(text) if field is not None]
        except ValueError as error:
            raise ValueError(f"{argument}={text!r} is malformed: {error}. Double a brace that is text.") from error
        self.columns = {re.split(r"[.\[]", field)[0] for field in fields}
        if not fields or not all(field and not field[0].isdigit() for field in fields):
            raise ValueError(f"{argument}={text!r} must name a column in braces, such as '{{source}}'.")

    def fill(self, row: Row) -> str:
        """The text of one row.

        Raises:
            ValueError: a column is missing, or what is asked for is no text or number.
        """
        try:
            text = self.vformat(self.text, (), row.values)
            text.encode("utf-8")  # fails for half of a surrogate pair, which JSON can spell and no tokenizer reads
            return text
        except _MissingColumnError as error:
            known = ", ".join(row.values)
            raise ValueError(f"{row.place}: {self.argument} asks for the column {error}, it has {known}.") from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
            raise ValueError(f"{row.place}: {self.argument}={self.text!r} cannot be filled ({reason}).") from error

    def has_columns(self, row: Row) -> bool:
        """Whether a row has all columns that the template asks for, with something in them."""
        return all(row.values.get(column) is not None for column in self.columns)

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The column ``key``."""
        if key not in kwargs:
            raise _MissingColumnError(key)
        return kwargs[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        """Text and numbers alone: Python's way to print a list or None would be learnt as text."""
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError(f"a field is {'null' if value is None else f'a {type(value).__name__}'}, not text")
        if isinstance(value, float) and not math.isfinite(value):
            raise TypeError(f"a field is {value}, not text")
        return super().format_field(value, format_spec)


class _MissingColumnError(Exception):
    def __str__(self) -> str:
        return repr(self.args[0])


def _in_memory(pairs: Sequence[Sequence[str]]) -> Texts:
    for n, pair in enumerate(pairs):
        _PAIR(f"pairs[{n}]", pair)
    if not pairs:
        raise ValueError("pairs=[] holds no pairs.")
    return Texts([pair[0] for pair in pairs], [pair[1] for pair in pairs], [f"pairs[{n}]" for n in range(len(pairs))])
