import os

import pytest
import torch

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
DATA = "--data=my_package.ToyData"


@pytest.fixture
def changed(trained, project):
    """A copy of the checkpoint with one thing changed, as ``changed.ckpt``."""

    def save(change):
        content = torch.load(trained, weights_only=True)
        change(content)
        torch.save(content, project / "changed.ckpt")

    return save


def test_a_cut_off_file_is_told_and_left_untouched(trained, project, mistake):
    whole = trained.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "almost": whole[:-1]}.items():
        file = project / f"{name}.ckpt"
        file.write_bytes(content)
        for command in ("fit", "test"):
            words = TOY if command == "fit" else [DATA]
            told = f"checkpoint '{name}.ckpt' is truncated: the run that wrote it was cut off. Use an earlier one."
            assert mistake(command, *words, f"--ckpt_path={name}.ckpt") == f"error: {told}\n"
        assert file.read_bytes() == content


def test_a_file_of_another_program(project, mistake):
    torch.save({"weights": torch.zeros(3), "step": 1}, project / "plain.ckpt")
    assert mistake("test", DATA, "--ckpt_path=plain.ckpt") == (
        "error: 'plain.ckpt' is not a Lightning checkpoint (it holds weights, step).\n"
    )
    torch.save(torch.zeros(3), project / "tensor.ckpt")
    assert mistake("test", DATA, "--ckpt_path=tensor.ckpt") == "error: 'tensor.ckpt' is not a Lightning checkpoint.\n"


def test_an_object_in_the_file_is_never_run(project, changed, mistake):
    changed(lambda content: content["hyper_parameters"].update(hook=os.system))
    assert mistake("test", DATA, "--ckpt_path=changed.ckpt") == (
        "error: checkpoint 'changed.ckpt' holds an object of posix.system; only plain values can be loaded safely.\n"
    )


def test_another_class(trained, mistake):
    assert mistake("test", "--model=CapsNet", DATA, f"--ckpt_path={trained}") == (
        f"error: --model CapsNet was given, but '{trained}' holds a ToyNet.\n"
    )


def test_a_class_that_is_gone(changed, mistake):
    changed(lambda content: content["hyper_parameters"].update(_class_path="gone.Net"))
    assert mistake("test", DATA, "--ckpt_path=changed.ckpt") == (
        "error: 'changed.ckpt' is of the class 'gone.Net', which is not imported, and a checkpoint imports nothing.\n"
        "If you trust it, import it yourself: --model and the class by its path, or a --config that names it.\n"
    )


def test_an_argument_that_is_gone_or_of_another_type(changed, mistake):
    changed(lambda content: content["hyper_parameters"].update(width=3))
    assert mistake("test", DATA, "--ckpt_path=changed.ckpt") == (
        "error: 'changed.ckpt' was made by another version of ToyNet: it has no argument 'width' now.\n"
    )
    changed(lambda content: content["hyper_parameters"].update(lr="high"))
    assert (
        mistake("test", DATA, "--ckpt_path=changed.ckpt") == "error: changed.ckpt: model.lr takes float, not 'high'.\n"
    )


def test_no_hyperparameters_at_all(changed, mistake, cli):
    changed(lambda content: content.pop("hyper_parameters"))
    assert mistake("test", DATA, "--ckpt_path=changed.ckpt") == (
        "error: 'changed.ckpt' holds no hyperparameters: add --model with the arguments it was made with.\n"
    )
    cli("test", *TOY, "--ckpt_path=changed.ckpt")


def test_weights_that_do_not_fit(changed, mistake):
    def rename(content):
        content["state_dict"]["other.weight"] = content["state_dict"].pop("net.weight")

    changed(rename)
    assert mistake("test", DATA, "--ckpt_path=changed.ckpt") == (
        "error: the weights in 'changed.ckpt' do not fit this ToyNet.\n"
        "It lacks: net.weight\n"
        "It has beside them: other.weight\n"
    )
    changed(lambda content: content["state_dict"].update({"net.weight": torch.zeros(5, 3)}))
    assert mistake("test", DATA, "--ckpt_path=changed.ckpt") == (
        "error: the weights in 'changed.ckpt' do not fit this ToyNet.\n"
        "Other sizes: net.weight, [5, 3] there, [5, 64] here\n"
    )


@pytest.mark.parametrize("command", ["fit", "test"])
def test_what_the_checkpoint_would_override_is_refused(trained, mistake, command):
    given = [*TOY, f"--ckpt_path={trained}", "--model.lr=0.7"]
    assert mistake(command, *given) == (
        f"error: model.lr is 0.1 in '{trained}', but 0.7 was given, and the checkpoint's would win.\n"
        "Leave it out to go on with the checkpoint, or leave out --ckpt_path to start anew.\n"
    )


def test_an_override_in_a_config_is_refused_too(trained, project, mistake):
    (project / "mine.yaml").write_text("model: {class_path: my_package.ToyNet, init_args: {kind: scaled, lr: 0.1}}\n")
    assert mistake("fit", "--config=mine.yaml", DATA, f"--ckpt_path={trained}").startswith(
        f"error: model.kind is 'plain' in '{trained}', but 'scaled' was given"
    )


def test_equal_values_are_no_override(trained, project, cli):
    (project / "mine.yaml").write_text(
        "model: {class_path: my_package.ToyNet, init_args: {kind: plain, lr: 0.1, image_shape: [1, 8, 8]}}\n"
    )
    cli("test", "--config=mine.yaml", DATA, f"--ckpt_path={trained}")


def test_data_that_contradicts_the_checkpoint(trained, mistake):
    assert mistake("test", DATA, "--data.size=4", f"--ckpt_path={trained}") == (
        "error: model.image_shape (1, 8, 8) is the checkpoint's, but ToyData's is (1, 4, 4).\n"
        "Give the data it was trained on.\n"
    )


def test_a_bug_keeps_its_traceback(cli):
    with pytest.raises(KeyError, match="not an argument error"):
        cli("fit", *TOY, "--model.lr=666")


OWN_IO = """
from lightning.pytorch.plugins.io import TorchCheckpointIO

class Own(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        print("own", flush=True)
        super().save_checkpoint(checkpoint, path, storage_options)
"""


@pytest.mark.parametrize(
    ("words", "own", "ours"),
    [
        ([], 0, 2),
        (["--trainer.plugins+=AtomicCheckpointIO"], 0, 2),
        (["--trainer.plugins+=lightning.pytorch.plugins.io.AsyncCheckpointIO"], 0, 2),
        (["--trainer.plugins+=lightning.pytorch.plugins.precision.DoublePrecision"], 0, 2),
        (["--trainer.plugins+=own_io.Own"], 2, 0),
    ],
    ids=["default", "named", "in the background", "another plugin", "own"],
)
def test_how_checkpoints_are_written(cli, own_module, monkeypatch, capsys, words, own, ours):
    """By AtomicCheckpointIO, unless the user names a way of his own."""
    own_module("own_io", OWN_IO)
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (written.append(str(target)), replace(source, target)))
    cli("fit", *TOY, *words, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true")
    assert capsys.readouterr().out.count("own\n") == own
    assert len([path for path in written if path.endswith(".ckpt")]) == ours
