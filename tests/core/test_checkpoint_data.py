"""``load_from_checkpoint`` in Python: what the file names is not imported, what the caller gives is taken."""

import inspect
import io
import sys

import pytest
import torch
from hostile import BY_COMMAND_LINE, MODULE, eae
from lightning.pytorch import LightningModule

from lightning_plugins import EAE
from lightning_plugins.core.checkpoint_data import arguments_in


class Own(EAE):
    """A class of the user's own."""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """``evil_module`` in the current folder."""
    (tmp_path / "evil_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def write(content, form, place):
    """The content as a file of one of the forms that Lightning reads."""
    if form == "open":
        file = io.BytesIO(b"before")
        file.seek(0, io.SEEK_END)
        torch.save(content, file)
        file.seek(6)
        return file
    torch.save(content, place / "file.ckpt", _use_new_zipfile_serialization=form != "old")
    return str(place / "file.ckpt") if form == "text" else place / "file.ckpt"


@pytest.mark.parametrize("form", ["path", "text", "old", "open"])
def test_nothing_is_imported(beside, tmp_path, form):
    hparams = {"_class_path": f"{__name__}.Own", "optimizer": "evil_module.make"}
    with pytest.raises(ValueError, match=r"its optimizer names 'evil_module\.make', which is not imported"):
        EAE.load_from_checkpoint(write(eae(hparams), form, tmp_path))
    assert "evil_module" not in sys.modules and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", ["path", "text", "old", "open"])
@pytest.mark.parametrize("cls", [EAE, Own])
def test_a_good_file_is_read(tmp_path, form, cls):
    content = eae({"_class_path": f"{__name__}.Own" if cls is Own else "lightning_plugins.EAE"})
    model = cls.load_from_checkpoint(write(content, form, tmp_path))
    assert type(model) is cls
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in model.state_dict().items())


def test_what_the_caller_gives_is_taken(tmp_path):
    path = write(eae({"optimizer": "evil_module.make"}), "path", tmp_path)
    model = EAE.load_from_checkpoint(path, optimizer="torch.optim.SGD")
    assert isinstance(model.configure_optimizers(), torch.optim.SGD)


def test_without_a_maker_names_are_texts(beside, tmp_path):
    content = eae({"optimizer": "evil_module.make"})
    for key in ("_class_path", *BY_COMMAND_LINE):
        del content["hyper_parameters"][key]
    with pytest.raises(ValueError, match=r"optimizer='evil_module.make' must be a function or a class"):
        EAE.load_from_checkpoint(write(content, "path", tmp_path))
    assert "evil_module" not in sys.modules


def test_a_pickle_is_not_run_unless_the_caller_says_so(tmp_path):
    content = eae(more=torch.nn.Linear(1, 1))
    with pytest.raises(Exception, match="Weights only load failed"):
        EAE.load_from_checkpoint(write(content, "path", tmp_path))
    assert EAE.load_from_checkpoint(write(content, "path", tmp_path), weights_only=False)


def test_it_is_a_method_of_the_class_alone(tmp_path):
    model = EAE.load_from_checkpoint(path := write(eae(), "path", tmp_path))
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        model.load_from_checkpoint(path)


def test_positions_are_those_of_lightning(tmp_path):
    names = [[*inspect.signature(cls.load_from_checkpoint).parameters] for cls in (EAE, LightningModule)]
    assert names[0] == names[1]
    path = write(eae(), "path", tmp_path)
    assert EAE.load_from_checkpoint(path, "cpu", None, True, True)
    with pytest.raises(Exception, match="Weights only load failed"):
        EAE.load_from_checkpoint(write(eae(more=torch.nn.Linear(1, 1)), "path", tmp_path), None, None, True, True)


def test_the_cure_in_the_sentence_works(beside, tmp_path):
    with pytest.raises(ValueError, match=r"no part of a model\. .* give the argument yourself"):
        EAE.load_from_checkpoint(path := write(eae({"optimizer": "os.system"}), "path", tmp_path))
    assert EAE.load_from_checkpoint(path, optimizer=torch.optim.SGD)


def test_old_names_of_arguments():
    """Lightning takes pairs, too; what is neither is a module's own."""
    assert arguments_in({"hparams": [("optimizer", "evil_module.make")]}) == {"optimizer": "evil_module.make"}
    assert arguments_in({"hparams": ["a"], "module_arguments": 7, "hyper_parameters": {"x": 1}}) == {"x": 1}
    for content in ({"hparams": {1: 2}}, {"hyper_parameters": ["a"]}):
        with pytest.raises(ValueError, match="no arguments by name"):
            arguments_in(content)
