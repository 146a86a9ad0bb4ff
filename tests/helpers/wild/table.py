"""Write ``docs/wild.md`` from what the cells found: ``python -m wild.table RESULTS``, as ``make test-wild`` does."""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

from wild.cells import CALLBACKS, FAMILIES, SETTINGS
from wild.zoo import ZOO

PAGE = Path(__file__).parents[3] / "docs/wild.md"
NAMES = {
    "language": "Language models",
    "vision": "Images and sound",
    "teachers": "Teachers, queues, running means",
    "data": "Batches and loaders",
    "autograd": "Graphs that hide something",
    "training": "Loops, optimizers, hooks",
}
HEADS = ("plain", "ODEDiagnostics", "differences", "exact", "auto", "Flooding", "all three")
TEXT = """# The callbacks on modules that were not written for them

{modules} modules, each under {callbacks} choices of callbacks (none; `ODEDiagnostics`; `GradientPenalty` by
finite differences, exact, and `engine="auto"`; `Flooding`; all three) in {settings} settings: {names}. That is {cells}
cells, and each asserts a number:

- `=`: all weights, buffers and whatever else the module keeps are bit for bit those of a training loop that is written
  out without the package (`tests/helpers/wild/reference.py`), and in the setting "resume" those of a run that was never
  stopped. The rows of `ODEDiagnostics` are compared with the same loop.
- a number: the largest distance to that loop's weights, whose penalty is written out by autograd or as a central
  difference of gradients of copies, divided by what the penalty changes in the run; in float64, and after `bf16` under
  bf16-mixed. Where a network is smooth, differences are compared with autograd's second derivative too.
- `no` and a number: refused, and no weight has changed; the sentence stands below.

Made by `make test-wild`; `make test` runs part of it.
"""
WIDTH = 120


def read(path):
    """Outcomes by module, callback and setting."""
    found = defaultdict(dict)
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["module"], row["callback"]][row["setting"]] = row
    return found


def page(found):
    """The whole page."""
    sentences = []
    text = TEXT.format(
        modules=len(ZOO),
        callbacks=len(CALLBACKS),
        settings=len(SETTINGS),
        names=", ".join(SETTINGS[:-1]) + f" and {SETTINGS[-1]}",
        cells=sum(map(len, found.values())),
    )
    for family in FAMILIES:
        text += f"\n## {NAMES[family]}\n\n| module | {' | '.join(HEADS)} |\n|{'---|' * (len(HEADS) + 1)}\n"
        for cls in (cls for cls in ZOO.values() if cls.family == family):
            cells = [cell(found[cls.title, callback], sentences) for callback in CALLBACKS]
            text += f"| **{cls.title}**: {lead(cls)} | {' | '.join(cells)} |\n"
    text += "\n## What is refused\n\n"
    return text + "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(sentences, 1))


def lead(cls):
    """The first line of its docstring, which says what is wild."""
    return cls.__doc__.split("\n")[0].rstrip(".")


def cell(rows, sentences):
    """All settings of a module under a callback."""
    parts = []
    errors = {setting: row["equal"] for setting, row in rows.items() if "equal" in row}
    if errors:
        parts.append(rounded(max((error for setting, error in errors.items() if setting != "bf16-mixed"), default=0)))
        if errors.get("bf16-mixed"):
            parts.append(f"bf16 {rounded(errors['bf16-mixed'])}")
    refused = {setting: plain(row["refused"]) for setting, row in rows.items() if "refused" in row}
    for sentence in dict.fromkeys(refused.values()):
        if sentence not in sentences:
            sentences.append(sentence)
        where = [setting for setting, told in refused.items() if told == sentence]
        limited = f" ({', '.join(where)})" if len(where) < len(SETTINGS) else ""
        parts.append(f"no {sentences.index(sentence) + 1}{limited}")
    return ", ".join(parts) or "open"


def plain(sentence):
    """A sentence without what differs from module to module and from run to run."""
    sentence = re.sub(r"\d\.\de[-+]\d\d", "...", " ".join(sentence.split()))
    for cls in ZOO.values():
        sentence = re.sub(rf"\b{cls.__name__}\b", "the module", sentence)
    return sentence


def rounded(error):
    """The next power of ten, which other processors have too; ``=`` for none."""
    return f"1e{math.ceil(math.log10(error))}" if error else "="


if __name__ == "__main__":
    PAGE.write_text(page(read(sys.argv[1])), encoding="utf-8")
