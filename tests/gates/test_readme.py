"""What the README and the pages under docs show, works: commands and Python, block after block, a folder a page."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hostile import eae, shards
from lightning.pytorch import Trainer
from pages import blocks, commands

from lightning_plugins.cli import main

pytestmark = pytest.mark.random_order(disabled=True)  # its blocks build on each other, as a reader runs them
ROOT = Path(__file__).parents[2]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
LAUNCHED = "several_gpus.md"  # its lines start processes: tests/distributed/test_launch_lines.py
SHORT = {
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "log_every_n_steps": 1,
}
# Shown, and not run here: they reach for the network or for another environment. Their form is tested.
FORMS = {
    "git clone": r"git clone \S+( \S+)?",
    "cd": r"cd \S+",
    "make": r"make (demo|test|help|clean)",
    "venv": r"(python3? -m venv \.venv|\. \.venv/bin/activate|source \.venv/bin/activate)",
    "pip": r"(python -m )?pip install (-c \S*constraints\.txt )?(--\S+ \S+ )*(-e )?\S+",
    "recipe": r"python \w+\.py",
    # run by tests/distributed/test_launch_lines.py
    "torchrun": r"torchrun --\S+ .*-m lightning_plugins fit .*",
    "srun": r"srun lightning-plugins fit .*",
    "uv": r"uvx? .*(lightning-plugins|pytest|pip install|sync).*",
    "tensorboard": r"tensorboard --logdir \S+",
}


OURS = re.compile(r"(lightning-plugins|python3? -m lightning_plugins) ")
BLOCKS = [(page, *block) for page, text in PAGES.items() for block in blocks(text)]
SHELL = [
    (page, line, command)
    for page, language, line, content in BLOCKS
    if language in ("bash", "sh")
    for command in commands(content)
]
STEPS = [
    (page, line, language, text)
    for page in PAGES
    if page != LAUNCHED
    for line, language, text in sorted(
        [(line, "bash", command) for of, line, command in SHELL if of == page and OURS.match(command + " ")]
        + [(line, "python", content) for of, language, line, content in BLOCKS if of == page and language == "python"],
        key=lambda step: step[0],
    )
]


def test_blocks_are_read():
    text = "a\n```bash\n$ git clone x && make \\\n  demo # now\n```\n\n```python\nx = 1\n```\n"
    (shell, line, content), (python, number, code) = blocks(text)
    assert (shell, line, python, number, code) == ("bash", 3, "python", 8, "x = 1\n")
    assert commands(content) == ["git clone x", "make demo"]


def test_the_readme_has_its_parts():
    assert {language for page, language, _, _ in BLOCKS if page == "README.md"} >= {"bash", "python"}
    shown = [command for page, _, command in SHELL if page == "README.md"]
    assert [command for command in shown if command.startswith("make ")][:2] == ["make demo", "make test"]
    assert re.search(r"!\[[^\]]*\]\([^)]+\.png\)", README), "a picture made by the project"


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", prose)
    assert links or page != "README.md"
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_readme_leads_to_every_page():
    assert {page for page in PAGES if page != "README.md" and f"docs/{page}" not in README} <= {"mutants.md", "wild.md"}


@pytest.mark.parametrize(
    ("page", "line", "command"), SHELL, ids=[f"{page} {line}: {command}"[:60] for page, line, command in SHELL]
)
def test_every_command_is_known(page, line, command):
    known = OURS.match(command + " ") or any(re.fullmatch(form, command) for form in FORMS.values())
    assert known, f"{page}, after line {line}: {command!r}"
    if command.startswith("make "):
        subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each page, so that a later block finds what an earlier one made."""
    return {page: tmp_path_factory.mktemp(page.removesuffix(".md")) for page in PAGES}


@pytest.mark.parametrize(
    ("page", "line", "language", "text"), STEPS, ids=[f"{page} {line} {kind}" for page, line, kind, _ in STEPS]
)
def test_block_runs(page, line, language, text, folders, monkeypatch):
    folder = folders[page]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    if language == "bash":
        run_command(shlex.split(text))
    else:
        run_python(f"{page}, line {line}", text, folder, monkeypatch)


def run_command(words):
    arguments = words[1:] if words[0] == "lightning-plugins" else words[3:]
    if arguments[0] == "fit":
        arguments += ["--trainer.max_epochs=1", "--data.batch_size=12"]
    if arguments[0] == "consolidate":  # of a run on several processes
        shards(eae(), arguments[1])
    if arguments[0] in ("fit", "validate", "test", "predict"):
        arguments += [f"--trainer.{name}={value}" for name, value in SHORT.items()]
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, f"{arguments} ended with {end.code}"


def run_python(place, code, folder, monkeypatch):
    """Run a block as a script; a first line ``# name.py`` also puts it there for the commands that follow."""
    if name := re.match(r"# (\S+\.py)\n", code):
        (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
        (folder / name[1]).write_text(code)
    plain = Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, **arguments: plain(self, **(arguments | SHORT | {"max_epochs": 1}))
    )
    exec(compile(code, place, "exec"), {"__name__": "__main__"})
