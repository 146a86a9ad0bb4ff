"""``lightning-plugins sample``: pictures from any module that draws some, and nothing half-written after a mistake."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from spoken import errors

from lightning_plugins.cli import main

PAINTER = '''
from lightning.pytorch import LightningModule
import torch

ASKED = []


class Painter(LightningModule):
    """Draws noise, whose darkest column tells the label; `trick` makes it misbehave."""

    def __init__(self, conditional: bool = False, num_classes: int = 10, channels: int = 1, size: int = 8,
                 trick: str = ""):
        super().__init__()
        self.save_hyperparameters()
        self.conditional, self.num_classes = conditional, num_classes
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def sample(self, num_samples, *, labels=None, generator=None, temperature=1.0):
        h = self.hparams
        assert not self.training and not torch.is_grad_enabled()
        ASKED.append((num_samples, None if labels is None else labels.tolist(), temperature))
        images = self.scale * (1 + torch.rand(num_samples, h.channels, h.size, h.size, generator=generator))
        for image, label in zip(images, [] if labels is None else labels):
            image[..., label] = 0
        if h.trick == "second batch" and len(ASKED) == 2:
            raise KeyboardInterrupt
        if h.trick == "bug":
            raise ValueError("of the user's own code")
        return {"range": 4 * images - 3, "nan": images * float("nan"), "shape": images[0]}.get(h.trick, images)


class Global(Painter):
    """Draws with the global random numbers."""

    def sample(self, num_samples, temperature=1.0):
        return super().sample(num_samples, temperature=temperature)


class Chooser(Painter):
    """Also takes a prior, in whatever form."""

    def sample(self, num_samples, **options):
        ASKED.append(options.pop("prior", "none"))
        return super().sample(num_samples, **options)
'''


@pytest.fixture
def save(own_module, write_checkpoint):
    """Write a checkpoint made by the class with these arguments, trained enough."""
    painter = own_module("painter", PAINTER)

    def write(path="runs/version_0/checkpoints/last.ckpt", cls="Painter", **arguments):
        painter.ASKED.clear()
        write_checkpoint(getattr(painter, cls)(**arguments), path)
        return painter.ASKED

    return write


def sample(*words, model="painter.Painter"):
    main(["sample", "--ckpt_path=last", f"--model={model}", *words])


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_page_of_all_images_stands_beside_the_run(save, project, capsys):
    asked = save()
    sample("--num_samples=6", "--batch_size=4")
    assert capsys.readouterr().out == "Picture: runs/version_0/samples.png\n"
    assert asked == [(4, None, 1.0), (2, None, 1.0)]
    page = pixels("runs/version_0/samples.png")
    assert page.dtype == np.uint8 and page.shape == (3 * 33 - 1, 2 * 33 - 1)  # each image four times as large
    generator = torch.Generator().manual_seed(0)
    expected = torch.cat([0.5 * (1 + torch.rand(n, 1, 8, 8, generator=generator)) for n in (4, 2)])
    for index, image in enumerate(expected):
        top, left = 33 * (index // 2), 33 * (index % 2)
        shown = page[top : top + 32, left : left + 32]
        assert np.array_equal(shown, np.kron((255 * image[0]).round(), np.ones((4, 4))))
    sample("--num_samples=6", "--batch_size=4", "--seed=1", "--output=new/mine.PNG")
    assert pixels("new/mine.PNG").shape == page.shape and not np.array_equal(pixels("new/mine.PNG"), page)
    sample("--num_samples=6", "--batch_size=4", "--output=new/mine.PNG")  # a page is replaced
    assert np.array_equal(pixels("new/mine.PNG"), page)
    assert [path.name for path in (project / "new").iterdir()] == ["mine.PNG"]


def test_a_folder_holds_every_image_and_is_never_written_over(save, project, capsys):
    asked = save(channels=3, size=40)
    sample("--num_samples=3", "--batch_size=2", "--temperature=0.5", "--output=drawn/colour")
    assert capsys.readouterr().out == "3 images: drawn/colour\n"
    assert asked == [(2, None, 0.5), (1, None, 0.5)]
    files = sorted((project / "drawn/colour").iterdir())
    assert [file.name for file in files] == ["sample_00000.png", "sample_00001.png", "sample_00002.png"]
    generator = torch.Generator().manual_seed(0)
    expected = 0.5 * (1 + torch.rand(2, 3, 40, 40, generator=generator))
    assert np.array_equal(pixels(files[1]), (255 * expected[1]).round().permute(1, 2, 0))
    files[0].unlink()
    before = files[1].read_bytes()
    with pytest.raises(SystemExit):
        sample("--num_samples=9", "--seed=1", "--output=drawn/colour")
    told = "--output 'drawn/colour' holds sample_00001.png already, and nothing is replaced; choose another folder.\n"
    assert errors(capsys) == f"error: {told}"
    assert sorted((project / "drawn/colour").iterdir()) == files[1:] and files[1].read_bytes() == before


def test_labels_come_in_turn_and_a_column_of_the_page_holds_one(save):
    asked = save(conditional=True)
    sample("--labels", "3", "5", "--num_samples=7", "--batch_size=5", "--output=page.png")
    assert asked == [(5, [3, 5, 3, 5, 3], 1.0), (2, [5, 3], 1.0)]
    page = pixels("page.png")
    assert page.shape == (4 * 33 - 1, 2 * 33 - 1)
    assert (page[:32, 12:16] == 0).all() and (page[33:65, 33 + 20 : 33 + 24] == 0).all()
    sample("--num_samples=7", "--output=any.png")  # at random, by the module
    assert asked[-1] == (7, None, 1.0)


def test_a_prior_is_passed_on_only_where_it_is_given(save):
    asked = save(cls="Chooser")
    sample("--output=page.png", model="painter.Chooser")
    sample("--output=page.png", "--prior=mixture", "--temperature=0.7", model="painter.Chooser")
    assert asked == ["none", (64, None, 1.0), "mixture", (64, None, 0.7)]


def test_a_model_without_a_generator_draws_by_the_seed(save):
    asked = save(cls="Global")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        sample(f"--output={name}.png", f"--seed={seed}", "--num_samples=6", "--batch_size=4", model="painter.Global")
    assert asked == [(4, None, 1.0), (2, None, 1.0)] * 3
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and not np.array_equal(pixels("a.png"), pixels("c.png"))


@pytest.mark.parametrize(
    ("arguments", "words", "told"),
    [
        ({}, ["--prior=mixture"], "--prior does not fit this Painter: its sample takes no prior. Leave it out."),
        ({}, ["--prior=uniform"], "argument --prior: invalid choice: 'uniform'"),
        ({}, ["--labels", "3"], "--labels: this Painter is not conditional, it cannot be told what to draw."),
        ({"conditional": True}, ["--labels", "3", "10"], "--labels 10: the classes of this Painter are 0 to 9."),
        ({}, ["--labels", "-1"], '"labels" element 1: Not of type NonNegativeInt'),
        ({}, ["--output=page.jpg"], "--output 'page.jpg' must end in .png, or be a folder for a PNG of each image."),
        ({}, ["--output=my_package.png"], "--output 'my_package.png' is a folder; give the picture another name."),
        ({}, ["--output=painter.py/drawn"], "nothing can be written to 'painter.py'; choose another place."),
        ({}, ["--output=painter.py"], "nothing can be written to 'painter.py'; choose another place."),
        ({}, ["--output=painter.py/page.png"], "nothing can be written to 'painter.py'; choose another place."),
        ({"trick": "range"}, [], "Painter.sample gave values from -"),
        ({"trick": "nan"}, [], "Painter.sample gave values from nan to nan; those of a picture lie in [0, 1]."),
        ({"trick": "shape"}, ["--num_samples=4"], "gave (1, 8, 8) where (4, 1 or 3, H, W) was asked for"),
        ({"channels": 4}, ["--num_samples=4"], "gave (4, 4, 8, 8) where (4, 1 or 3, H, W) was asked for"),
        ({}, ["--ckpt_path=none.ckpt"], "checkpoint 'none.ckpt' does not exist."),
        ({}, ["--ckpt_path=my_package"], "--ckpt_path 'my_package' is a folder; give a checkpoint file."),
    ],
)
def test_mistakes_leave_nothing_behind(save, project, capsys, arguments, words, told):
    save(**arguments)
    (project / "my_package.png").mkdir()
    before = sorted(project.rglob("*"))
    for output in [], ["--output=new/drawn"]:
        with pytest.raises(SystemExit) as stop:
            sample(*output, *words)
        error = errors(capsys)
        assert stop.value.code == 2
        assert error.startswith("error: ") and told in error and len(error.splitlines()) <= 5
    after = [path for path in sorted(project.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]


def test_a_model_of_another_kind_is_refused(trained, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["sample", f"--ckpt_path={trained}"])
    assert errors(capsys) == (
        f"error: '{trained}' holds a ToyNet, which draws no samples (it has no sample).\n"
        f"Its predictions: lightning-plugins predict --ckpt_path {trained} --data CLASS\n"
    )


def test_a_run_that_is_cut_off_or_finds_no_room_takes_its_files_away(save, project, capsys, monkeypatch):
    save(trick="second batch")
    (project / "kept").mkdir()
    (project / "kept/mine.txt").write_text("mine")
    for folder in "kept", "new":
        sys.modules["painter"].ASKED.clear()
        with pytest.raises(SystemExit) as stop:
            sample("--num_samples=4", "--batch_size=2", f"--output={folder}")
        assert stop.value.code == 130
    assert [path.name for path in (project / "kept").iterdir()] == ["mine.txt"] and not (project / "new").exists()
    save()
    (project / "page.png").write_text("mine")
    monkeypatch.setattr("os.replace", no_room)
    with pytest.raises(SystemExit) as stop:
        sample("--output=page.png")
    assert stop.value.code == 2
    assert errors(capsys) == "error: --output 'page.png': No space left on device.\n"
    assert (project / "page.png").read_text() == "mine" and not list(project.rglob(".saving-*"))


def no_room(path, target):
    """A disk that is full."""
    raise OSError(28, "No space left on device")


def test_an_error_of_the_users_own_code_keeps_its_traceback(save):
    save(trick="bug")
    with pytest.raises(ValueError, match="of the user's own code"):
        sample("--output=page.png")


def test_an_autoencoder_draws_digits_from_each_prior(cli, project, capsys):
    model = ["--model=EAE", "--model.network=mlp", "--model.latent_dim=2", "--model.conditional=true"]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    cli("fit", *model, "--model.pictures_every_n_epochs=0", "--data=Digits", "--data.image_size=8", *save)
    words = ["sample", "--ckpt_path=last", "--labels", "3", "5"]
    pages = []
    for prior in "normal", "gaussian", "mixture":
        main([*words, f"--prior={prior}", f"--output={prior}.png"])
        pages.append(pixels(f"{prior}.png"))
        assert pages[-1].shape == (8 * 33 - 1, 8 * 33 - 1)
    main(words)
    assert capsys.readouterr().out.endswith("\nPicture: lightning_logs/version_0/samples.png\n")
    assert np.array_equal(pixels("lightning_logs/version_0/samples.png"), pages[0])
    assert not np.array_equal(pages[0], pages[1]) and not np.array_equal(pages[1], pages[2])
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["prior.num_seen"].zero_()
    torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--prior=gaussian"])
    error = errors(capsys)
    assert stop.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
