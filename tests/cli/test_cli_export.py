"""``lightning-plugins export``: a folder from any module that writes one, and what ``sample`` draws from it."""

import diffusers
import numpy as np
import pytest
from PIL import Image

from lightning_plugins.cli import main

KEEPER = '''
from lightning.pytorch import LightningModule
import torch

MISSING = False


class Keeper(LightningModule):
    """Exports its only weight; `trick` makes it fail."""

    def __init__(self, trick: str = ""):
        super().__init__()
        self.save_hyperparameters()
        if trick == "extra" and MISSING:
            raise ModuleNotFoundError("needs peft: pip install lightning_plugins[lora]")
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def export(self, folder):
        if self.hparams.trick == "full":
            raise OSError(28, "No space left on device")
        if self.hparams.trick == "bug":
            raise ValueError("of the user's own code")
        folder.mkdir(parents=True)
        (folder / "weight.txt").write_text(f"{self.weight.item()} {self.training}")
'''


@pytest.fixture
def save(own_module, write_checkpoint):
    """Write a checkpoint of a Keeper."""
    keeper = own_module("keeper", KEEPER)
    return lambda **arguments: write_checkpoint(keeper.Keeper(**arguments), "checkpoints/last.ckpt")


def export(*words):
    main(["export", "--ckpt_path=last", "--model=keeper.Keeper", *words])


def test_any_module_that_exports(save, project, capsys):
    save()
    export("--output=new/kept")
    assert capsys.readouterr().out == "Exported: new/kept (its README.md shows how to run it)\n"
    assert (project / "new/kept/weight.txt").read_text() == "0.5 False"
    (project / "empty").mkdir()
    save(trick="bug")
    with pytest.raises(ValueError, match="of the user's own code"):
        export("--output=empty")


def test_mistakes(save, trained, capsys, monkeypatch):
    save(trick="extra")
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("keeper.MISSING", True)
        export("--output=kept")
    assert capsys.readouterr().err.splitlines()[1:] == ["error: needs peft: pip install lightning_plugins[lora]"]
    save(trick="full")
    for words, told in (
        (["--output=checkpoints"], "--output 'checkpoints' exists and is not empty; choose a new folder."),
        (["--output=keeper.py"], "--output 'keeper.py' exists and is not empty; choose a new folder."),
        (["--output=kept"], "--output 'kept': No space left on device."),
        (["--output=kept", "--ckpt_path=my_package"], "--ckpt_path 'my_package' is a folder; give a checkpoint file."),
        (
            ["--output=kept", f"--ckpt_path={trained}", "--model=my_package.ToyNet"],
            "which cannot be exported (it has no",
        ),
        ([], "export needs a place: --output FOLDER, or --push_to_hub OWNER/NAME."),
    ):
        with pytest.raises(SystemExit) as stop:
            export(*words)
        error = capsys.readouterr().err
        error = error[error.index("error: ") :]
        assert stop.value.code == 2 and told in error and len(error.splitlines()) <= 2


@pytest.fixture
def teacher(project):
    """A tiny teacher of four classes, in a folder."""
    options = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **options, **blocks)
    diffusers.ConsistencyModelPipeline(unet, diffusers.DDIMScheduler()).save_pretrained("teacher")
    return project / "teacher"


@pytest.mark.parametrize("lora", [[], ["--model.lora_rank=2"]])
def test_a_student_is_exported_and_draws_what_it_drew(teacher, cli, project, capsys, lora):
    model = ["--model=SiD", "--model.teacher=teacher", "--model.batch_size=2", "--model.num_pictures=0", *lora]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    cli("fit", *model, "--model.lr=0.01", "--model.updates_per_epoch=2", *save)
    main(["export", "--ckpt_path=last", "--output=student"])
    assert capsys.readouterr().out.endswith("Exported: student (its README.md shows how to run it)\n")
    card = (project / "student/README.md").read_text()
    assert "| teacher | teacher |" in card and "| generated images seen | 4 |" in card
    words = ["--labels", "3", "1", "--num_samples=6"]
    main(["sample", "--ckpt_path=last", "--output=before.png", *words])
    main(["sample", "--ckpt_path=student", *words])
    assert capsys.readouterr().out.endswith("Picture: samples.png\n")
    before, after = (np.asarray(Image.open(path)).astype(int) for path in ("before.png", "samples.png"))
    assert before.shape == (3 * 33 - 1, 2 * 33 - 1, 3) and abs(before - after).max() <= 1
    main(["sample", "--ckpt_path=teacher", "--output=teacher.png", *words])
    assert abs(np.asarray(Image.open("teacher.png")).astype(int) - after).max() > 10
    model = ["--ckpt_path=last", "--prompt=a"]
    with pytest.raises(SystemExit):
        main(["sample", *model])
    assert "error: prompts were given, but the teacher reads no text" in capsys.readouterr().err
    (project / "student/model_index.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["sample", "--ckpt_path=student"])
    assert "error: 'student' cannot be loaded as a diffusers pipeline: " in capsys.readouterr().err
