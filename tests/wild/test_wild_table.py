"""The page of the table names every module, and what it says of each is what the cells assert."""

import re

import pytest
from wild.cells import CALLBACKS, SETTINGS, asserted, tolerance
from wild.table import PAGE, lead
from wild.zoo import ZOO

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = {match[1]: match[2] for match in re.finditer(r"^\| \*\*(.+?)\*\*: (.*) \|$", TEXT, re.MULTILINE)}
SENTENCES = dict(re.findall(r"^(\d+)\. (.+)$", TEXT, re.MULTILINE))


def test_there_are_many():
    assert sorted(ROWS) == sorted(ZOO)
    assert len(ZOO) >= 40
    assert f"{len(ZOO)} modules, each under {len(CALLBACKS)} choices" in TEXT
    assert f"{len(ZOO) * len(CALLBACKS) * len(SETTINGS)} cells" in TEXT.replace("\n", " ")


@pytest.mark.parametrize("title", ZOO)
def test_row(title):
    cls, (wild, *cells) = ZOO[title], ROWS[title].split(" | ")
    assert wild == lead(cls)
    for callback, cell in zip(CALLBACKS, cells, strict=True):
        told = {setting: asserted(cls, callback, setting) for setting in SETTINGS}
        for number in re.findall(r"no (\d+)", cell):
            assert any(sentence and re.search(sentence, SENTENCES[number]) for sentence in told.values())
        assert ("no" in cell) == any(told.values())
        assert bool(re.search(r"=|1e", cell)) == (not all(told.values()))
        for half, error in re.findall(r"(bf16 )?(1e-?\d+)", cell):
            assert float(error) < 10 * tolerance(cls, "bf16-mixed" if half else "plain", "difference")
