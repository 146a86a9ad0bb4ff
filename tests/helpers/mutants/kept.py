"""The kept lists: plausible wrong products, and random mutants that change nothing."""

from pathlib import Path

import yaml

from mutants.operators import Mutant, first_change

FOLDER = Path("tests/helpers/mutants")


def entries(root: Path, name: str) -> list[dict[str, str]]:
    """The entries of ``plausible.yaml`` or ``equivalent.yaml``."""
    path = root / FOLDER / name
    return yaml.safe_load(path.read_text(encoding="utf-8")) or [] if path.exists() else []


def plausible(root: Path) -> list[Mutant]:
    """The list's mutants.

    Raises:
        ValueError: an entry's old text does not stand in its file just once.
    """
    return [_mutant(root, entry) for entry in entries(root, "plausible.yaml")]


def _mutant(root, entry):
    file, old, new = f"lightning_plugins/{entry['file']}", entry["old"], entry["new"]
    source = (root / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"plausible.yaml: {old!r} stands {source.count(old)} times in {file}: bring it up to date.")
    mutated = source.replace(old, new)
    label = " ".join(f"{old} -> {new}".split())
    return Mutant(file, first_change(source, mutated), label, mutated, tuple(entry.get("tests", ())))


def equivalent(root: Path) -> set[tuple[str, str]]:
    """File and label of random mutants that nothing could tell from the original."""
    return {(f"lightning_plugins/{entry['file']}", entry["change"]) for entry in entries(root, "equivalent.yaml")}
