"""What became of mutants: ``rates.json``, and the page made of it."""

import json
from pathlib import Path

from mutants.kept import FOLDER, equivalent

_PAGE = """# What the suite notices

How many wrong products of each file the default suite catches, by `make test-mutants` (a maintainer's command, not part
of `make test`). *Random*: a seeded sample of changes at places chosen evenly, by cosmic-ray's operators and by leaving
out calls, methods, keywords, statements and results. *Plausible*: the kept list of
[`plausible.yaml`](../tests/helpers/mutants/plausible.yaml), mistakes that someone could make, each with its reason.
{equivalent} random mutants that change nothing are left out, each with its reason, by
[`equivalent.yaml`](../tests/helpers/mutants/equivalent.yaml). How covering tests are found:
[`tests/helpers/mutants`](../tests/helpers/mutants/__init__.py).

    make test-mutants                                            # the kept list
    make test-mutants FILE=lightning_plugins/sid/losses.py       # 25 random mutants of one file
    make test-mutants FILE="..." MUTANTS_ARGS="--num 100 --seed 1 --write"   # and bring this page up to date

{table}

This page is written by that command with `--write`; a survivor is named here until a test kills it.
{survivors}"""


def load(root: Path) -> dict[str, dict[str, dict]]:
    """``{file: {kind: {"total": n, "survivors": labels}}}``."""
    path = root / FOLDER / "rates.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(root: Path, file: str, kind: str, total: int, survivors: list[str]) -> None:
    """Note a file's outcome, in place of an earlier one, and make the page anew."""
    rates = load(root)
    rates.setdefault(file, {})[kind] = {"total": total, "survivors": survivors}
    text = json.dumps(dict(sorted(rates.items())), indent=1, ensure_ascii=False) + "\n"
    (root / FOLDER / "rates.json").write_text(text, encoding="utf-8")
    write_page(root)


def write_page(root: Path) -> None:
    """Make ``docs/mutants.md`` anew."""
    (root / "docs/mutants.md").write_text(page(root), encoding="utf-8")


def page(root: Path) -> str:
    """The text of ``docs/mutants.md``."""
    rates, same = load(root), equivalent(root)
    for file, kinds in rates.items():
        for outcome in kinds.values():  # what was found to be the same since does not count
            survivors = [label for label in outcome["survivors"] if (file, label) not in same]
            outcome["total"] -= len(outcome["survivors"]) - len(survivors)
            outcome["survivors"] = survivors
    rows = [f"| `{file.removeprefix('lightning_plugins/')}` |" + _cells([kinds]) for file, kinds in rates.items()]
    head = "| file | random killed | % | plausible killed | % |\n|:--|--:|--:|--:|--:|"
    table = "\n".join([head, *rows, "| **all** |" + _cells(list(rates.values()))])
    survivors = [
        f"\n- `{file.removeprefix('lightning_plugins/')}`, {kind}: `{label}`"
        for file, kinds in rates.items()
        for kind, outcome in kinds.items()
        for label in outcome["survivors"]
    ]
    return _PAGE.format(table=table, survivors="".join(survivors) + "\n", equivalent=len(same))


def _cells(files: list[dict[str, dict]]) -> str:
    cells = ""
    for kind in ("random", "plausible"):
        outcomes = [kinds[kind] for kinds in files if kind in kinds]
        total = sum(outcome["total"] for outcome in outcomes)
        killed = total - sum(len(outcome["survivors"]) for outcome in outcomes)
        cells += f" {killed} of {total} | {100 * killed / total:.1f} |" if total else " | |"
    return cells
