"""Run ``make test-mutants``: see the package's docstring."""

import argparse
import signal
import sys
import time
from pathlib import Path

from mutants import kept
from mutants.judge import Judge
from mutants.operators import Mutant, sample
from mutants.rates import load, record, write_page


def main(argv: list[str] | None = None) -> int:
    """Judge mutants, print what becomes of each, and write rates down if asked."""
    parser = argparse.ArgumentParser(prog="make test-mutants", description=__doc__)
    parser.add_argument("files", nargs="*", help="to mutate; all that the kept list names by default")
    parser.add_argument("--kind", choices=["random", "plausible", "both"], help="random of files, else the kept list")
    parser.add_argument("--num", type=int, default=25, help="random mutants of a file")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for a mutant, the quicker ones")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of a test that is worth running")
    parser.add_argument("--near", action="store_true", help="only test files that name the file mutated, if any do")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    parser.add_argument("--match", default="", help="only mutants whose text holds this")
    parser.add_argument("--write", action="store_true", help="write rates.json and docs/mutants.md")
    parser.add_argument("--page", action="store_true", help="only make docs/mutants.md anew, of rates.json")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[3])
    options = parser.parse_args(argv)
    if options.page:
        write_page(options.root)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no fork is left
    options.kind = options.kind or ("random" if options.files else "plausible")
    found = _mutants(options)
    totals = {key: len(mutants) for key, mutants in found.items()}
    found = {key: [m for m in mutants if _wanted(m, *key, options)] for key, mutants in found.items()}
    found = {key: mutants for key, mutants in found.items() if mutants}
    start = time.monotonic()
    files = list(dict.fromkeys(file for file, _ in found))
    judge = Judge(options.root, files, options.budget, options.near, options.limit)
    print(f"{len(judge.covering.seconds)} tests, unchanged, in {time.monotonic() - start:.0f} s", flush=True)
    for test in judge.covering.failed:
        print(f"left out, as it does not pass unchanged, or in time: {test}")
    alive = 0
    for (file, kind), mutants in found.items():
        survivors = [mutant.label for mutant in mutants if _survives(judge, mutant)]
        print(f"{file}: {len(mutants) - len(survivors)} of {len(mutants)} {kind} mutants killed", flush=True)
        if options.write and not options.match:
            record(options.root, file, kind, totals[file, kind], survivors)
        alive += len(survivors)
    return int(alive > 0)


def _mutants(options: argparse.Namespace) -> dict[tuple[str, str], list[Mutant]]:
    """By file and kind."""
    found: dict[tuple[str, str], list[Mutant]] = {}
    if options.kind != "plausible":
        equivalent = kept.equivalent(options.root)
        for file in options.files:
            source = (options.root / file).read_text(encoding="utf-8")
            mutants = sample(file, source, options.num, options.seed)
            found[file, "random"] = [mutant for mutant in mutants if (file, mutant.label) not in equivalent]
    if options.kind != "random":
        for mutant in kept.plausible(options.root):
            if not options.files or mutant.file in options.files:
                found.setdefault((mutant.file, "plausible"), []).append(mutant)
    return found


def _wanted(mutant: Mutant, file: str, kind: str, options: argparse.Namespace) -> bool:
    known = load(options.root).get(file, {}).get(kind, {}).get("survivors", ())
    return options.match in mutant.label and (not options.survivors or mutant.label in known)


def _survives(judge: Judge, mutant: Mutant) -> bool:
    start = time.monotonic()
    verdict = judge.judge(mutant)
    seconds = time.monotonic() - start
    print(f"{mutant.file}:{mutant.line}: {mutant.label}: {verdict} ({seconds:.1f} s)", flush=True)
    return verdict in ("survived", "not covered")


if __name__ == "__main__":
    sys.exit(main())
