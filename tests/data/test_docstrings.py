"""Pairs from the standard library: what they are, and that the parts do not leak into each other."""

import email.message
import inspect
import re
import textwrap

import pytest

from lightning_plugins.data import PythonDocstrings, docstrings
from lightning_plugins.data.docstrings import mine_docstrings

SOURCE = '''"""Module summary.

Module body.
"""

def f():
    """
    Summary of f.

        Indented first line,
    second.
    """
    def inner():
        r"""Inner \\d.

        Inner body."""

def lone():
    """A summary alone."""

def unparted():
    """A first line
    that goes on.

    Body.
    """

class C:
    """Class.\t

    Class body.

    """
    async def g(self):
        \'\'\'Async.

        Module body.
        \'\'\'
'''


def test_what_is_mined(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "mod.py").write_text(SOURCE)
    (tmp_path / "pkg" / "test" / "test_mod.py").write_text(SOURCE.replace("ody", "ODY"))
    (tmp_path / "latin.py").write_bytes(b'# coding: latin-1\n"""S\xe9.\r\n\r\nB\xe9.\r\n"""\r\n')
    (tmp_path / "none.py").write_text("x = 1\n")
    found = mine_docstrings(tmp_path)
    assert [tuple(pair) for pair in found["latin"]] == [("Bé.", "Sé.", "latin.py, line 2")]
    assert [tuple(pair) for pair in found["pkg"]] == [
        ("Module body.", "Module summary.", "pkg/mod.py, line 1"),
        ("Indented first line,\nsecond.", "Summary of f.", "pkg/mod.py, line 7"),
        ("Inner body.", "Inner \\d.", "pkg/mod.py, line 14"),
        ("Class body.", "Class.", "pkg/mod.py, line 29"),
    ]


@pytest.fixture(scope="module")
def splits():
    data = PythonDocstrings()
    return {split: data.require(split) for split in ("train", "val", "test")}


def test_pairs_are_those_that_inspect_finds(splits):
    pairs = {
        " ".join(re.findall(r"\w+", f"{target} {source}")): place
        for texts in splits.values()
        for source, target, place in zip(*texts, strict=True)
    }
    for thing, file in ((textwrap.wrap, "textwrap.py"), (email.message.Message.get_payload, "email/message.py")):
        assert pairs[" ".join(re.findall(r"\w+", inspect.getdoc(thing)))].startswith(f"{file}, line ")


def test_parts_are_disjoint_by_module_and_source(splits):
    sizes = {split: len(texts.sources) for split, texts in splits.items()}
    total = sum(sizes.values())
    assert 2000 < total < 4500
    assert all(0.1 * total <= sizes[split] < 0.25 * total for split in ("val", "test"))
    modules = {
        split: {re.split(r"[/,]", place)[0] for place in texts.places} for split, texts in splits.items()
    }  # "email", "turtle.py"
    for split, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not modules[split] & modules[other]
        assert not set(splits[split].sources) & set(splits[other].sources)
    assert len({source for texts in splits.values() for source in texts.sources}) == total
    assert all(text.strip() == text != "" for texts in splits.values() for text in (*texts.sources, *texts.targets))


def test_near_copies_of_held_out_pairs_are_rare(splits):
    """Random splits leave one held-out pair in ten with a copy of 80 % of its words in training; modules, few."""

    def words(texts):
        pairs = zip(texts.sources, texts.targets, strict=True)
        return [frozenset(re.findall(r"\w+", f"{source} {target}".lower())) for source, target in pairs]

    train = words(splits["train"])
    held_out = words(splits["test"])[::6]
    copied = sum(any(len(x & y) > 0.8 * len(x | y) for y in train) for x in held_out)
    assert copied <= 0.03 * len(held_out)


def test_always_the_same(splits):
    again = docstrings._splits.__wrapped__()["val"]
    assert [pair.body for pair in again] == splits["val"].sources
    assert [pair.place for pair in again] == splits["val"].places


def test_learns_its_tokenizer_and_fills_batches():
    data = PythonDocstrings(vocab_size=2000, max_target_length=16)
    batch = next(iter(data.train_dataloader()))
    assert len(data.tokenizer) == 2000
    assert batch["input_ids"].shape[0] == 32 and batch["input_ids"].shape[1] <= 96 + 16
    assert data.texts("predict") == data.texts("test")


def test_a_python_without_sources_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="this Python came without the source files of its library"):
        docstrings._splits.__wrapped__()
