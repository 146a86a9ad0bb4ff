"""What the command line prints of each argument of each public class can be read alone, in plain words."""

import re

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins import CheckpointIO

import lightning_plugins
from lightning_plugins.cli import main
from lightning_plugins.cli.explain import argument_names

CLASSES = [name for name in lightning_plugins._PUBLIC if isinstance(getattr(lightning_plugins, name), type)]
OPTIONS = {
    LightningModule: "--model.help",
    LightningDataModule: "--data.help",
    Callback: "--trainer.callbacks.help",
    CheckpointIO: "--trainer.plugins.help",
}
LEANING = ("of ", "and ", "as ", "see ", "the same", "likewise", "of both")
# Roles, LaTeX and literals of reST, which a terminal shows as they are.
MARKUP = re.compile(r":(class|func|meth|mod|attr|math|obj|data|ref|doc):|\\[A-Za-z]+|``")


def print_help(whole_parser, name):
    """Print a class's help; optimisers and metrics, which have no option of their own, as the parser would."""
    cls = getattr(lightning_plugins, name)
    option = next((option for base, option in OPTIONS.items() if issubclass(cls, base)), None)
    parser, words = whole_parser, ["fit", f"{option}={name}"]
    if option is None:
        parser, words = ArgumentParser(), ["--help"]
        parser.add_class_arguments(cls, "part", fail_untyped=False)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert not stop.value.code


def entries(text):
    """Each option's last word with what is printed of it, without the parser's own ``(type: ..., default: ...)``."""
    for found in re.finditer(r"^  --(\S+)(.*(?:\n {3,}.*)*)", text, re.MULTILINE):
        name, _, said = found[1].rpartition(".")[2], *re.split(r"\n| {2,}", found[2], maxsplit=1)
        said = re.sub(r"\s*\((required|required, type: .*|type: .*|default: .*)\)$", "", " ".join(said.split()))
        if name not in ("help", "part") and name.islower():
            yield name, said


def faults(said):
    """What is wrong with an entry, in words."""
    checks = {
        "does not begin with a word": not re.match(r"[A-Za-z]", said),
        "leans on another entry": said.lower().startswith(LEANING),
        "holds markup": bool(MARKUP.search(said)),
        "has fewer than four words": len(said.split()) < 4,
        "does not end in a full stop": not said.endswith("."),
    }
    return [fault for fault, is_so in checks.items() if is_so]


@pytest.mark.parametrize("name", CLASSES)
def test_each_entry_can_be_read_alone(whole_parser, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100000")  # an entry, a line
    print_help(whole_parser, name)
    text = capsys.readouterr().out
    found = {argument: (said, faults(said)) for argument, said in entries(text)}
    names = argument_names(f"lightning_plugins.{name}")
    assert [*found] == [argument for argument in names if not argument.endswith(".help")]
    assert {argument: told for argument, told in found.items() if told[1]} == {}
    assert not MARKUP.search(text)  # nor does the class's first line


def test_the_list_of_parts_is_plain_text(capsys):
    main(["list"])
    assert [line for line in capsys.readouterr().out.splitlines() if MARKUP.search(line)] == []
