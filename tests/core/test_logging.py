"""Pictures and tables arrive in files and in the loggers that can show them."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from trainers import quiet_trainer

from lightning_plugins.core.logging import (
    figure_to_image,
    log_dir,
    log_image,
    log_table,
    log_text_table,
    measured_figures,
    send_image,
)


def trainer_with(logger, tmp_path):
    return quiet_trainer(logger=logger, default_root_dir=tmp_path)


def test_fast_dev_run_leaves_nothing(tmp_path):
    trainer = Trainer(fast_dev_run=1, default_root_dir=tmp_path, accelerator="cpu")
    log_image(trainer, "x", torch.rand(1, 4, 4), 0)
    log_table(trainer, "x", ["a"], [[1]], 0)
    log_text_table(trainer, "x", ["a"], [["b"]], 0)
    assert list(tmp_path.rglob("*.*")) == []


def read(path):
    return np.asarray(Image.open(path))


GRADIENT = torch.linspace(0, 1, 256).view(1, 1, 256)


def test_every_byte_level_is_reached_by_rounding(tmp_path):
    trainer = trainer_with(False, tmp_path)
    log_image(trainer, "levels", GRADIENT, 0)
    assert read(tmp_path / "images/levels/000000.png").ravel().tolist() == list(range(256))
    almost = torch.tensor([0.4999, 0.5001, 254.4999, 254.5001]).view(1, 2, 2) / 255
    log_image(trainer, "halves", almost, 0)
    assert read(tmp_path / "images/halves/000000.png").ravel().tolist() == [0, 1, 254, 255]


def test_colour_picture_keeps_channel_order_and_orientation(tmp_path):
    image = torch.zeros(3, 2, 3)
    image[0, 0, 2] = 1.0  # red, top right
    log_image(trainer_with(False, tmp_path), "a/b", image, 12)
    pixels = read(tmp_path / "images/a/b/000012.png")
    assert pixels.shape == (2, 3, 3)
    assert pixels[0, 2].tolist() == [255, 0, 0]
    assert pixels.sum() == 255


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_and_graphs_are_taken(tmp_path, dtype):
    image = torch.full((1, 2, 2), 0.5, dtype=dtype, requires_grad=True)
    log_image(trainer_with(False, tmp_path), "x", image, 0)
    assert read(tmp_path / "images/x/000000.png").tolist() == [[128, 128], [128, 128]]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(4, 4), r"'val/x' must be \(1, H, W\) or \(3, H, W\).*got \(4, 4\)"),
        (torch.zeros(2, 4, 4), r"got \(2, 4, 4\)"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 4, 4), 255.0), r"values in \[0, 1\], got 255 to 255"),
        (torch.full((1, 4, 4), -0.5), "got -0.5"),
        (torch.full((1, 4, 4), float("nan")), "got nan"),
    ],
)
def test_a_wrong_picture_is_named(tmp_path, image, words):
    with pytest.raises(ValueError, match=words):
        log_image(trainer_with(False, tmp_path), "val/x", image, 0)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("tag", ["", "../x", "/etc/x", "a/../../x"])
def test_a_tag_stays_in_its_folder(tmp_path, tag):
    with pytest.raises(ValueError, match="A tag is a name"):
        log_image(trainer_with(False, tmp_path), tag, GRADIENT, 0)


def test_tensorboard_shows_the_picture_and_the_table(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = trainer_with(logger, tmp_path)
    colour = torch.rand(3, 5, 7)
    log_image(trainer, "val/colour", colour, 3)
    log_image(trainer, "val/grey", GRADIENT, 4)
    log_table(trainer, "val/table", ["kind", "error"], [["dynamic", 0.25], ["a|b", 1]], 5)
    logger.finalize("success")

    assert log_dir(trainer) == tmp_path / "run/version_0"
    assert np.array_equal(
        read(log_dir(trainer) / "images/val/colour/000003.png"), (colour * 255).round().byte().permute(1, 2, 0).numpy()
    )
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    shown = events.Images("val/colour")[0]
    assert (shown.step, shown.height, shown.width) == (3, 5, 7)
    assert events.Images("val/grey")[0].step == 4
    text = events.Tensors("val/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["| kind | error |", "| --- | --- |", "| dynamic | 0.25 |", r"| a\|b | 1 |"]


def test_csv_logger_gets_the_files_in_its_run_folder(tmp_path):
    trainer = trainer_with(CSVLogger(tmp_path, name="run"), tmp_path)
    log_image(trainer, "x", GRADIENT, 1)
    log_table(trainer, "t/u", ["a", "b"], [[1, "two, and a comma"]], 2)
    assert (tmp_path / "run/version_0/images/x/000001.png").is_file()
    with (tmp_path / "run/version_0/tables/t/u/000002.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", "two, and a comma"]]


def test_a_text_table_is_read_as_markdown_cell_by_cell(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = trainer_with(logger, tmp_path)
    texts = ["a|b", "two\nlines\r\nmore", "__init__ *x* `y` <s> [SEP] &lt;", "猫\\|", ""]
    log_text_table(trainer, "val/samples", ["source", "n"], [[text, 1] for text in texts], 7)
    logger.finalize("success")

    folder = log_dir(trainer) / "tables/val/samples"
    cells = [r"a\|b", "two<br>lines<br>more", r"\_\_init\_\_ \*x\* \`y\` &lt;s> \[SEP\] &amp;lt;", r"猫\\\|", ""]
    lines = ["| source | n |", "| --- | --- |", *(f"| {cell} | 1 |" for cell in cells)]
    assert (folder / "000007.md").read_text(encoding="utf-8").splitlines() == lines
    with (folder / "000007.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["source", "n"], *([text, "1"] for text in texts)]
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    shown = events.Tensors("val/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert shown.splitlines() == lines


def test_a_ragged_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 2 columns, but a row of 1 cells"):
        log_table(trainer_with(False, tmp_path), "t", ["a", "b"], [[1]], 0)


class _Calls:
    """Stands for a tracking service's client: keeps the calls it gets."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def service_logger(kind):
    """A logger of the service's own class whose client is a list of calls; the service's package is not needed."""

    class Recorded(kind):
        def __init__(self):
            self.client = _Calls()

        experiment = property(lambda self: self.client)
        run_id = "run"
        save_dir = None
        log_image = log_table = None

    if kind is WandbLogger:  # its pictures go through the logger itself
        Recorded.log_image = lambda self, *args, **kwargs: self.client.calls.append(("log_image", args, kwargs))
        Recorded.log_table = lambda self, *args, **kwargs: self.client.calls.append(("log_table", args, kwargs))
    return Recorded()


def test_services_get_each_picture_and_table_in_their_own_call(tmp_path):
    wandb, mlflow, comet = (service_logger(kind) for kind in (WandbLogger, MLFlowLogger, CometLogger))
    trainer = trainer_with(False, tmp_path)
    trainer.loggers = [wandb, mlflow, comet]
    log_image(trainer, "val/x", GRADIENT, 7)
    log_table(trainer, "t", ("a",), ((1,),), 8)
    png, table = str(tmp_path / "images/val/x/000007.png"), str(tmp_path / "tables/t/000008.csv")
    assert wandb.client.calls == [
        ("log_image", ("val/x", [png], 7), {}),
        ("log_table", ("t", ["a"], [[1]]), {"step": 8}),
    ]
    assert mlflow.client.calls == [
        ("log_artifact", ("run", png, "images/val/x"), {}),
        ("log_artifact", ("run", table, "tables/t"), {}),
    ]
    assert comet.client.calls == [("log_image", (png,), {"name": "val/x", "step": 7}), ("log_table", (table,), {})]


def test_a_users_own_logger_joins_by_registration(tmp_path):
    class Scrapbook(Logger):
        name = version = "scrapbook"
        pictures = []  # noqa: RUF012

        def log_metrics(self, metrics, step=None): ...
        def log_hyperparams(self, params): ...

    @send_image.register
    def _(logger: Scrapbook, tag: str, path, step: int) -> None:
        logger.pictures.append((tag, path.name, step))

    trainer = trainer_with([CSVLogger(tmp_path), Scrapbook()], tmp_path)
    log_image(trainer, "x", GRADIENT, 2)
    assert Scrapbook.pictures == [("x", "000002.png", 2)]


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    trainer = trainer_with(False, tmp_path)
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    log_image(trainer, "x", GRADIENT, 0)
    log_table(trainer, "t", ["a"], [[1]], 0)
    log_text_table(trainer, "t", ["a"], [["b"]], 0)
    assert not list(tmp_path.iterdir())


def test_figure_becomes_a_picture_of_its_size_and_colours():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50, facecolor=(1.0, 0.0, 0.0))
    image = figure_to_image(figure)
    assert image.shape == (3, 50, 100)
    assert image.dtype == torch.float32
    assert image[0].min() == 1
    assert image[1:].max() == 0


class Measured(LightningModule):
    """Logs a figure in each stage, and keeps what is measured where a checkpoint would be written."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.saved = []

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 3.0)
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.log("val/score", 0.25 * self.weight.detach())

    def test_step(self, batch, batch_idx):
        self.log("test/score", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def on_train_epoch_start(self):
        self.saved.append(measured_figures(self.trainer))

    def on_save_checkpoint(self, checkpoint):
        self.saved.append(measured_figures(self.trainer))


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_the_figures_measured_are_those_of_the_latest_evaluation(tmp_path):
    module, batches = Measured(), torch.utils.data.DataLoader([0.0])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **quiet)
    assert measured_figures(trainer) == {}
    trainer.fit(module, batches, batches)
    assert module.saved == [{}, {"val/score": 0.25}]  # not of the sanity check; as a checkpoint would hold it
    assert "train/loss" in trainer.callback_metrics and measured_figures(trainer) == {"val/score": 0.25}
    assert type(measured_figures(trainer)["val/score"]) is float
    trainer.test(module, batches, verbose=False)
    assert measured_figures(trainer) == {"test/score": 0.5}
