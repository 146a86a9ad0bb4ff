"""``--help`` is a page that teaches; ``--help all`` and ``--trainer.help`` hold the rest."""

import inspect
import re
import shlex

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import lightning_plugins
from lightning_plugins.cli import main
from lightning_plugins.cli.short_help import public_names

COMMANDS = ["fit", "validate", "test", "predict"]
TRAINER = [f"--trainer.{name}" for name in inspect.signature(Trainer).parameters]


@pytest.fixture
def told(capsys):
    """What the command line says, and that it leaves without a complaint."""

    def run(*words):
        try:
            main(words)
        except SystemExit as stop:
            assert not stop.code
        return capsys.readouterr().out

    return run


def options_in(text):
    """Every option that a help begins a line with."""
    return re.findall(r"--[\w.]+", "\n".join(re.findall(r"^  (-.*?)(?: {2,}|$)", text, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_holds_every_option_of_this_package(told, whole_parser, command):
    text = told(command, "--help")
    actions = whole_parser._subcommands_action.choices[command]._actions
    options = {option for action in actions for option in action.option_strings if option.startswith("--")}
    own = {option for option in options if not option.startswith("--trainer")}
    assert {"--config", "--print_config", "--model", "--data.help", "--ckpt_path", "--test_after_fit"} <= own
    assert own <= {*options_in(text)}
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 120
    assert text.startswith(f"usage: lightning-plugins {command}")
    assert text.index("model and data:") < text.index("\noptions:") < text.index("trainer:\n  --trainer.")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_page_offers_is_there(told, whole_parser, command):
    actions = whole_parser._subcommands_action.choices[command]._actions
    options = {option for action in actions for option in action.option_strings}
    offered = {option for option in options_in(told(command, "--help")) if not option.endswith(".NAME")}
    assert offered - {"--trainer.callbacks"} <= options
    assert "--trainer.callbacks" in options


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_are_right(told, whole_parser, command):
    examples = re.findall(r"^  lightning-plugins (.*?)(?: {2,}.*| --print_config.*)?$", told(command, "--help"), re.M)
    assert len(examples) >= 2
    for example in examples:
        assert whole_parser.parse_args(shlex.split(example)).subcommand == command


@pytest.mark.parametrize(
    ("kind", "base"), [("model", LightningModule), ("data", LightningDataModule), ("callback", Callback)]
)
def test_names_are_those_of_the_classes(told, kind, base):
    parts = {name: getattr(lightning_plugins, name) for name in lightning_plugins._PUBLIC}
    known = {name for name, part in parts.items() if isinstance(part, type) and issubclass(part, base)}
    assert known == {*public_names(kind)}
    assert all(re.search(rf"\b{name}\b", told("fit", "--help")) for name in known)


@pytest.mark.parametrize("words", ["--help", "-h", "-h --model CapsNet", "--config nowhere.yaml --help"])
def test_the_page_comes_wherever_help_stands(told, words):
    assert told("fit", *words.split()) == told("fit", "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_ends_with_the_whole_trainer(told, command):
    text = told(command, "--help", "all")
    found = options_in(text)
    assert {*TRAINER, "--config", "--model.help", "--trainer.callbacks.help", "--ckpt_path"} <= {*found}
    assert max(map(found.index, ("--config", "--model", "--data", "--ckpt_path"))) < found.index(TRAINER[0])
    assert text == told(command, "--help=all")


def test_trainer_help_is_the_trainer_alone(told):
    found = options_in(told("fit", "--trainer.help"))
    assert {*TRAINER} <= {*found}
    assert [option for option in found if not option.startswith("--trainer")] == []


@pytest.mark.parametrize("command", ["generate", "sample", "export", "list", "copy", "plot"])
def test_other_commands_are_a_page_too(told, command):
    text = told(command, "--help")
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 120


def test_known_classes_are_listed_unless_they_are_all_of_torch(told):
    assert "known subclasses" in " ".join(told("fit", "--data.help=MultiMNIST").split())
    assert "known subclasses" not in " ".join(told("fit", "--trainer.callbacks.help=GenerativeEvaluation").split())
