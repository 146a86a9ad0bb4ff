import subprocess
import sys
from pathlib import Path

import pytest

from lightning_plugins import _PUBLIC, __version__
from lightning_plugins.cli import COMMANDS, main, resolve
from lightning_plugins.cli.app import PluginsCLI

ROOT = Path(__file__).parents[2]


def out(capsys, *words):
    main(words)
    return capsys.readouterr().out


def test_list_has_a_line_for_every_part_config_and_recipe(capsys):
    lines = out(capsys, "list").splitlines()
    names = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    configs = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/*/*.yaml")}
    recipes = {path.stem for path in ROOT.glob("recipes/*.py")} - {"__init__"}
    assert configs
    assert set(names) == {*_PUBLIC, *configs, *recipes}
    assert names["CapsNet"].startswith("Capsule network")
    assert all(len(line) > 10 for line in names.values())


def test_help_teaches_with_three_commands(capsys):
    text = out(capsys, "--help")
    assert text == out(capsys)
    assert text.count("  lightning-plugins ") == 3
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) <= 120


def test_version(capsys):
    assert out(capsys, "--version") == f"lightning-plugins {__version__}\n"


def test_help_list_copy_and_version_import_neither_torch_nor_lightning(tmp_path):
    script = (
        "import sys\nfrom lightning_plugins.cli import main\n"
        "for words in '--help', 'fit --help', '--version', 'list', f'copy capsnet/digits {sys.argv[1]}':\n"
        "    main(words.split())\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)


def test_copy_to_a_file_a_folder_and_a_new_folder(tmp_path, capsys):
    text = (ROOT / "configs/capsnet/digits.yaml").read_text()
    targets = {"mine.yaml": "mine.yaml", ".": "digits.yaml", "new/": "new/digits.yaml"}
    for dest, file in targets.items():
        said = out(capsys, "copy", "capsnet/digits", str(tmp_path / dest) + ("/" if dest == "new/" else ""))
        assert (tmp_path / file).read_text() == text
        assert said.endswith(f"Run it: lightning-plugins fit --config {tmp_path / file}\n")
    said = out(capsys, "copy", "capsnet_one_to_two_digits", str(tmp_path))
    assert said.endswith(f"Run it: python {tmp_path}/capsnet_one_to_two_digits.py\n")


def test_copy_never_overwrites(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(SystemExit):
        main(["copy", "capsnet/digits", str(mine)])
    assert mine.read_text() == "mine"


def test_a_bare_clone_finds_its_configs_beside_the_package(monkeypatch):
    installed = resolve.shipped("configs")

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(resolve.importlib.resources, "files", missing)
    assert resolve.shipped("configs") == installed
    assert "capsnet/digits" in installed


def test_class_help_shows_the_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "CapsNet"])
    assert not stop.value.code
    assert "--model.iterations" in capsys.readouterr().out


def test_completion_script_completes(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "lightning_plugins", "--print_completion", "shtab-bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "completion.sh").write_text(run.stdout)
    for words, reply in {
        "li": "list",
        "fit --model.itera": "--model.iterations",
        "fit --model Caps": "CapsNet",
    }.items():
        script = (
            f"source {tmp_path}/completion.sh; COMP_WORDS=(lightning-plugins {words}); "
            f"COMP_CWORD={len(words.split())}; _shtab_lightning_plugins; echo ${{COMPREPLY[@]}}"
        )
        told = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert told.stdout.split() == [reply]


def test_all_commands_are_known_to_the_parser(monkeypatch):
    class StopError(Exception):
        pass

    def look(self, parser, args):
        assert list(parser._subcommands_action.choices) == list(COMMANDS)
        raise StopError

    monkeypatch.setattr(PluginsCLI, "parse_arguments", look)
    with pytest.raises(StopError):
        PluginsCLI(["fit"])
