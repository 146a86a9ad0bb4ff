"""``lightning-plugins new``: what it writes runs as it is, outside the checkout, and nothing is ever written over."""

import subprocess
import sys

import pytest
import torch

from lightning_plugins.cli import main
from lightning_plugins.cli.new import _module_of
from lightning_plugins.cli.starters import CLASSES, CONFIGS, TESTS

SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
SMALL = {"unilm": ["--model.num_generate=2", "--model.generation={max_new_tokens: 2}"]}
DATA = {"unilm": ["--data=PythonDocstrings"], "eae": ["--data=Digits", "--data.image_size=8"]}
TEACHER = ["fit", "--config=sid/digits_teacher", "--model.export_to=digits_teacher", "--trainer.callbacks=null", *SHORT]


@pytest.mark.parametrize("part", CLASSES)
def test_what_is_written_runs(part, cli, project, capsys, monkeypatch):
    name, module = f"My{part.capitalize()}", f"my_{part}"
    main(["new", part, name])
    assert capsys.readouterr().out == (
        f"Written: {module}.py, {module}.yaml, test_{module}.py\n"
        f"Train it: lightning-plugins fit --config {module}.yaml\nTest it:  pytest test_{module}.py\n"
    )
    assert all("NAME" not in (project / file).read_text() for file in (f"{module}.py", f"test_{module}.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", f"test_{module}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr

    if part == "sid":
        cli(*TEACHER, "--trainer.max_epochs=1", "--trainer.logger=false")
    cli("fit", f"--config={module}.yaml", *SMALL.get(part, []), *SHORT)
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    model = [] if part == "callback" else [f"--model={module}.{name}"]
    assert hparams["_class_path"] == (f"{module}.{name}" if model else "lightning_plugins.CapsNet")
    cli("test", *model, "--ckpt_path=last", *DATA.get(part, ["--data=Digits"]), *SHORT)
    if part in ("eae", "sid"):
        main(["sample", "--ckpt_path=last", "--num_samples=2", "--output=page.png"])
        assert (project / "page.png").exists()


def test_every_part_has_its_three_files():
    assert CLASSES.keys() == CONFIGS.keys() == TESTS.keys()
    for source in [*CLASSES.values(), *TESTS.values()]:
        compile(source, "starter", "exec")
        assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "module"),
    [("MyCapsNet", "my_caps_net"), ("EAE2", "eae2"), ("MyEAE", "my_eae"), ("X", "x"), ("HTTPNet", "http_net")],
)
def test_files_are_named_after_the_class(name, module):
    assert _module_of(name) == module


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["eae", "my-thing"],
            "'my-thing' is no name for a class: letters and digits, a capital first, such as MyCapsNet.",
        ),
        (["eae", "../Mine"], "'../Mine' is no name for a class"),
        (["eae", "mine"], "Such as: Mine"),
        (["eae", "3"], "'3' is no name for a class"),
        (["eae", "True"], "'True' is no name for a class"),
        (["eae", ""], "'' is no name for a class"),
        (["eae", "Größe"], "'Größe' is no name for a class"),
        (["eae", "Random"], "random.py would hide the module 'random'; choose another name than Random."),
        (["eae", "Torch"], "torch.py would hide the module 'torch'"),
        (["eae", "MyPackage"], "my_package.py would hide the module 'my_package'"),
        (["eae", "CapsNet"], "CapsNet is a class of this package; choose another name, such as MyCapsNet."),
        (["gan", "Mine"], "argument part: invalid choice: 'gan'"),
        (["eae"], "the following arguments are required: name"),
    ],
)
def test_names_are_checked_and_nothing_is_written(words, told, project, capsys):
    before = sorted(project.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["new", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and told in error and len(error.splitlines()) <= 5
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize("file", ["mine.py", "mine.yaml", "test_mine.py"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_is_written_over(file, kind, project, capsys):
    if kind == "file":
        (project / file).write_text("mine")
    else:
        (project / file).symlink_to("nowhere")
    before = sorted(project.iterdir())
    with pytest.raises(SystemExit):
        main(["new", "eae", "Mine"])
    assert f"'{file}' exists and is not replaced; choose another name than Mine." in capsys.readouterr().err
    assert sorted(project.iterdir()) == before


def test_a_disk_without_room_is_left_as_it_was(project, capsys, monkeypatch):
    before = sorted(project.iterdir())
    whole = TESTS["eae"]

    class Full(str):
        def replace(self, *words):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(TESTS, "eae", Full(whole))
    with pytest.raises(SystemExit) as stop:
        main(["new", "eae", "Mine"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: 'test_mine.py' cannot be written: No space left on device.\n"
    assert sorted(project.iterdir()) == before


def test_its_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["new", "--help"])
    text = capsys.readouterr().out
    assert not stop.value.code
    assert text.count("  lightning-plugins ") >= 3 and all(part in text for part in CLASSES)
    assert max(map(len, text.splitlines())) <= 120
