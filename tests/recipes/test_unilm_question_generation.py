"""The recipe from a file of questions to a folder that plain transformers runs, on a tiny model."""

import gzip
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "unilm_question_generation.py"
NAMES = ["Anna", "Ben", "Carl", "Dora", "Emil"]
THINGS = ["apple", "boat", "coat", "drum"]
PLAIN = [
    {"question": f"What does {name} have ?", "answer": thing, "passage": f"There was rain . {name} has a {thing} ."}
    for name in NAMES
    for thing in THINGS
]


@pytest.fixture
def recipe():
    return runpy.run_path(str(RECIPE))


def tiny_bert(folder):
    """A masked language model that knows the words of the questions."""
    words = re.findall(r"\w+|[.?]", " ".join(" ".join(row.values()) for row in PLAIN).lower())
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokens), max_position_embeddings=48, hidden_dropout_prob=0.0, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_recipe_trains_scores_shows_and_exports(recipe, tmp_path, capsys):
    torch.set_num_threads(1)  # two cost more than so small a network
    data, folder = write_lines(tmp_path / "questions.jsonl", PLAIN * 10), tmp_path / "asker"
    files = ["--data", str(data), "--model", tiny_bert(tmp_path / "bert"), "--export", str(folder)]
    limits = ["--max_source_length", "24", "--max_target_length", "10"]
    scores = recipe["main"]([*files, *limits, "--epochs", "6", "--batch_size", "16", "--lr", "1e-2", "--samples", "2"])
    assert scores["val/loss"] < 1.0  # all but the name is the same in every question; uniform: 3.1
    assert scores["val/rougeL"] > 0.5
    printed = capsys.readouterr().out
    assert f"| val/rougeL | {scores['val/rougeL']:.4f} |" in printed
    (first,) = re.findall(
        r"\napple \[SEP\] There was rain \. Anna .*\n  reference: What does Anna have \?\n.*: (.*)", printed
    )
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = tokenizer("apple [SEP] There was rain . Anna has a apple .", return_tensors="pt")
    answer = model.generate(**rows)[0, rows["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == first
    with pytest.raises(SystemExit):
        recipe["main"](files)
    assert "asker exists already" in capsys.readouterr().err


def test_every_format_gives_the_same_questions(recipe, tmp_path):
    expected = [(row["question"], row["answer"], row["passage"]) for row in PLAIN]
    squad = {
        "data": [
            {"paragraphs": [{"context": p, "qas": [{"question": q, "answers": [{"text": a}]}]} for q, a, p in expected]}
        ]
    }
    (tmp_path / "squad.json.gz").write_bytes(gzip.compress(json.dumps(squad).encode()))
    write_lines(tmp_path / "plain.jsonl", PLAIN)
    write_lines(tmp_path / "context.jsonl", [{"question": q, "answer": a, "context": p} for q, a, p in expected])
    fairy = [
        {"story": str(i), "sections": ["1", "2"], "question": q, "answer1": a} for i, (q, a, _) in enumerate(expected)
    ]
    write_lines(tmp_path / "train.questions.jsonl", fairy)
    halves = [passage.partition(" . ") for _, _, passage in expected]
    stories = {
        str(i): {"1": f"{first} .", "2": second, "3": "Not asked."} for i, (first, _, second) in enumerate(halves)
    }
    (tmp_path / "train.sections.json").write_text(json.dumps(stories))
    for name in ("squad.json.gz", "plain.jsonl", "context.jsonl", "train.questions.jsonl"):
        assert list(recipe["read_questions"](tmp_path / name)) == expected, name


def test_the_window_holds_the_answer(recipe):
    passage = " ".join(f"w{i}" for i in range(100))
    for answer, first in (("w0", 0), ("w50", 45), ("W50 w51", 45), ("w99", 90), ("nowhere", 0)):
        assert recipe["window"](passage, answer, 10).split() == [f"w{i}" for i in range(first, first + 10)], answer
    assert recipe["window"]("a short one", "one", 10) == "a short one"


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("plain.jsonl", [PLAIN[0], {"q": "?", "answer": "a", "passage": "p"}],
         "plain.jsonl, line 2 has no column 'question'; it has q, answer, passage."),
        ("plain.jsonl", [{"question": "?", "answer": "a", "text": "p"}],
         "plain.jsonl, line 1 has no column 'context'; it has question, answer, text."),
        ("train.questions.jsonl", [{"story": "s", "sections": [], "question": "?", "answer": "a"}],
         "train.questions.jsonl, line 1 has no column 'answer1'; it has story, sections, question, answer."),
        ("train.questions.jsonl", [{"story": "s", "sections": ["2"], "question": "?", "answer1": "a"}],
         "the story of train.questions.jsonl, line 1 has no column '2'; it has 1."),
        ("squad.json", [{"version": "1.1"}], "squad.json has no column 'data'; it has version."),
        ("squad.json", [{"data": [{"paragraphs": [{"text": "p", "qas": []}]}]}],
         "squad.json: a paragraph has no column 'context'; it has text, qas."),
    ],
)  # fmt: skip
def test_a_missing_column_is_named(recipe, tmp_path, name, rows, told):
    write_lines(Path(name), rows)
    Path("train.sections.json").write_text('{"s": {"1": "Once."}}')
    with pytest.raises(SystemExit) as stop:
        recipe["main"](["--data", name, "--model", tiny_bert(tmp_path / "bert")])
    assert str(stop.value) == f"{told} --help tells the formats."
