import functools
import runpy
import struct
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_plugins.cli import main

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
SAVE_LAST = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
CAPSNET = ["--model=CapsNet", "--model.preset=efficient", "--data=Digits"]
SHORT = [f"--trainer.limit_{name}_batches=2" for name in ("train", "val", "test", "predict")]


def load(path):
    return torch.load(path, weights_only=True)


def saved(project, version=0):
    return yaml.safe_load((project / f"lightning_logs/version_{version}/config.yaml").read_text())


# The user's own classes


def test_own_classes_are_found_in_the_current_folder_and_linked(cli, project):
    cli("fit", *TOY, "--model.lr=0.2", *SAVE_LAST)
    hparams = load(project / "lightning_logs/version_0/checkpoints/last.ckpt")["hyper_parameters"]
    assert hparams["_class_path"] == "my_package.ToyNet"
    assert (hparams["lr"], hparams["num_classes"], tuple(hparams["image_shape"])) == (0.2, 5, (1, 8, 8))


def test_data_without_a_shape_and_a_model_with_its_own_data_work(cli, project):
    cli("fit", "--model=my_package.ToyNet", "--data=my_package.BareData", *SAVE_LAST)
    assert load(project / "lightning_logs/version_0/checkpoints/last.ckpt")["hyper_parameters"]["num_classes"] == 10
    cli("fit", "--model=my_package.Independent")


def test_a_given_value_equal_to_the_linked_one_is_fine(cli, project):
    (project / "equal.yaml").write_text(
        "model: {class_path: my_package.ToyNet, init_args: {num_classes: 5, image_shape: [1, 8, 8]}}\n"
        "data: my_package.ToyData\n"
    )
    cli("fit", "--config=equal.yaml")


def test_the_path_is_left_as_it_was(cli, project):
    before = sys.path.copy()
    cli("fit", *TOY, "--trainer.fast_dev_run=1")
    assert sys.path == before


# Configs


def test_configs_merge_and_the_later_word_wins(cli, project):
    (project / "one.yaml").write_text(
        "model: {class_path: my_package.ToyNet, init_args: {lr: 0.5, kind: scaled}}\ndata: my_package.ToyData\n"
    )
    (project / "two.yaml").write_text("model: {init_args: {lr: 0.25}}\ntrainer: {gradient_clip_val: 7}\n")
    cli("fit", "--config=one.yaml", "--config", "two.yaml", "--trainer.gradient_clip_val", "9")
    config = saved(project)
    assert (config["model"]["init_args"]["lr"], config["model"]["init_args"]["kind"]) == (0.25, "scaled")
    assert config["trainer"]["gradient_clip_val"] == 9


def test_print_config_writes_public_short_names(cli, project, capsys):
    with pytest.raises(SystemExit) as stop:
        cli("fit", *CAPSNET, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert not stop.value.code
    assert config["model"]["class_path"] == "lightning_plugins.CapsNet"
    assert config["data"]["class_path"] == "lightning_plugins.Digits"
    assert config["trainer"]["callbacks"][0]["init_args"]["monitor"] == "x"
    assert "num_classes" not in config["model"]["init_args"]  # the data decides


def test_short_names_in_yaml(cli, project):
    (project / "short.yaml").write_text(
        "model: {class_path: CapsNet, init_args: {preset: efficient}}\ndata: {class_path: Digits}\n"
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}\n"
    )
    cli("fit", "--config=short.yaml", "--trainer.fast_dev_run=1")


def test_shipped_config_by_name(cli, monkeypatch, project, capsys):
    shipped = project / "elsewhere.yaml"
    shipped.write_text("model: my_package.ToyNet\ndata: my_package.ToyData\n")
    monkeypatch.setattr("lightning_plugins.cli.resolve.shipped", lambda kind: {"toy/noise": shipped})
    cli("fit", "--config", "toy/noise", "--trainer.fast_dev_run=1")
    cli("fit", "-c", "toy/noise.yaml", "--trainer.fast_dev_run=1")
    (project / "toy").mkdir()
    (project / "toy/noise").write_text(
        "model: my_package.ToyNet\ndata: {class_path: my_package.ToyData}\nckpt_path: x\n"
    )
    with pytest.raises(SystemExit):  # a path that exists wins: this one asks for a checkpoint that does not
        cli("fit", "--config", "toy/noise", "--trainer.fast_dev_run=1")
    assert "checkpoint 'x' does not exist" in capsys.readouterr().err


def test_config_is_saved_beside_each_run_and_runs_again(cli, project):
    cli("fit", *TOY)
    cli("fit", "--config=lightning_logs/version_0/config.yaml", "--model.lr=0.3")
    assert saved(project, 1)["model"]["init_args"]["lr"] == 0.3
    assert saved(project)["seed_everything"] == 0


def test_running_twice_without_a_logger(cli, project):
    for lr in (0.1, 0.2):
        cli("fit", *TOY, "--trainer.logger=false", "--trainer.enable_checkpointing=false", f"--model.lr={lr}")
    assert yaml.safe_load((project / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.2


def test_same_seed_same_weights(cli, project):
    for seed in (0, 0, 1):
        cli("fit", *TOY, *SAVE_LAST, f"--seed_everything={seed}")
    first, second, other = (
        load(project / f"lightning_logs/version_{v}/checkpoints/last.ckpt")["state_dict"]["net.weight"]
        for v in range(3)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# Checkpoints


def test_checkpoint_alone_describes_the_model(cli, project, capsys):
    cli("fit", *TOY, *SAVE_LAST, "--trainer.callbacks.every_n_train_steps=2")
    trained = project / "lightning_logs/version_0/checkpoints/last.ckpt"
    for command in ("validate", "test"):
        cli(command, f"--ckpt_path={trained}", "--data=my_package.ToyData")
    assert "test/accuracy" in capsys.readouterr().out
    assert saved(project, 2)["model"]["class_path"] == "my_package.ToyNet"


def test_checkpoint_made_in_python_needs_only_the_class(cli, trained, project, mistake, capsys):
    content = load(trained)
    del content["hyper_parameters"]["_class_path"], content["hyper_parameters"]["_instantiator"]
    torch.save(content, project / "python.ckpt")
    assert mistake("test", "--ckpt_path=python.ckpt", "--data=my_package.ToyData") == (
        "error: 'python.ckpt' does not say which class it holds (it was made in Python): add --model and the class.\n"
    )
    cli("test", "--ckpt_path=python.ckpt", "--data=my_package.ToyData", "--model=my_package.ToyNet")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # what it says is meant: a new run, a new folder
@pytest.mark.parametrize("how", ["flags", "config"])
def test_the_same_words_resume_a_run(cli, trained, project, how):
    words = [*TOY, *SAVE_LAST] if how == "flags" else ["--config=lightning_logs/version_0/config.yaml"]
    cli("fit", *words, "--ckpt_path=last", "--trainer.max_epochs=3")
    content = load(project / "lightning_logs/version_1/checkpoints/last.ckpt")
    assert content["global_step"] == 9
    assert content["loops"]["fit_loop"]["epoch_progress"]["total"]["started"] == 3  # 1 before, 2 now


def test_last_is_the_newest_run_that_has_one(cli, trained, project, capsys):
    cli("fit", *TOY, *SAVE_LAST, "--model.lr=0.5")
    cli("test", "--ckpt_path=last", "--data=my_package.ToyData")  # makes version_2, without a checkpoint
    cli("validate", "--ckpt_path=last", "--data=my_package.ToyData")
    assert saved(project, 3)["model"]["init_args"]["lr"] == 0.5
    assert saved(project, 3)["ckpt_path"] == "lightning_logs/version_1/checkpoints/last.ckpt"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_last_in_folders_of_the_users_choice(cli, project):
    cli("fit", *TOY, *SAVE_LAST, "--trainer.callbacks.dirpath=mine", "--trainer.logger=false")
    cli("fit", *TOY, *SAVE_LAST, "--trainer.callbacks.dirpath=mine", "--ckpt_path=last", "--trainer.max_epochs=2")
    assert saved(project)["ckpt_path"] == "mine/last.ckpt"
    cli("fit", *TOY, *SAVE_LAST, "--trainer.default_root_dir=root")
    cli("test", "--data=my_package.ToyData", "--ckpt_path=last", "--trainer.default_root_dir=root")


# What a run leaves


def test_predictions_are_written_and_their_path_printed(cli, trained, project, capsys):
    cli("predict", "--ckpt_path=last", "--data=my_package.ToyData")
    table = "lightning_logs/version_1/predictions.csv"
    assert f"Predictions: {table}, lightning_logs/version_1/predictions.pt\n" in capsys.readouterr().out
    predictions = load(project / "lightning_logs/version_1/predictions.pt")
    weight, bias = (load(trained)["state_dict"][f"net.{name}"] for name in ("weight", "bias"))
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(predictions["logits"], images.flatten(1) @ weight.T + bias)
    assert predictions["batch"].tolist() == [0, 1, 2]


def test_capsnet_from_fit_to_predictions(cli, project, capsys):
    cli("fit", *CAPSNET, *SHORT, *SAVE_LAST, "--test_after_fit=true")
    out = capsys.readouterr().out
    table, pictures = out.split("Pictures:\n")
    assert "test/accuracy" in table
    paths = [line.split()[0] for line in pictures.splitlines()]
    assert paths
    assert all((project / path).is_file() and path.startswith("lightning_logs/version_0/images/") for path in paths)
    cli("predict", "--ckpt_path=last", "--data=Digits", *SHORT)
    predictions = load(project / "lightning_logs/version_1/predictions.pt")
    assert predictions["lengths"].shape == (256, 10)


def test_after_fit_the_best_checkpoint_is_tested(cli, project, monkeypatch):
    tested = []
    test = Trainer.test

    @functools.wraps(test)
    def spy(self, *args, ckpt_path=None, **kwargs):
        tested.append(ckpt_path)
        return test(self, *args, ckpt_path=ckpt_path, **kwargs)

    monkeypatch.setattr(Trainer, "test", spy)
    cli("fit", *TOY, *SAVE_LAST, "--test_after_fit=true")
    cli("fit", *TOY, *SAVE_LAST, "--trainer.callbacks.monitor=val/loss", "--test_after_fit=true")
    cli("fit", *TOY, *SAVE_LAST, "--trainer.callbacks.monitor=val/loss")
    assert tested == [None, str(project / "lightning_logs/version_1/checkpoints/epoch=0-step=3.ckpt")]


def refused(cli, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_the_package_finds_wrong_in_a_run_is_a_sentence(cli, project, capsys):
    line = refused(cli, capsys, "fit", *CAPSNET, "--data.batch_size=2000")
    assert line.startswith("error: 1259 images are too few for one training batch: batch_size=2000 needs at least 2000")


def test_missing_test_images_are_told_before_training(cli, project, capsys):
    images, labels = np.zeros((20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (project / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    data = ["--data=IdxImages", "--data.folder=.", "--data.val_size=5"]
    line = refused(cli, capsys, "fit", "--model=CapsNet", *data, "--test_after_fit=true")
    assert "has no file t10k-images-idx3-ubyte or" in line
    assert not list(project.rglob("*.ckpt"))


def test_module_form_is_the_same_program(project, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["__main__.py", "--version"])
    runpy.run_module("lightning_plugins", run_name="__main__")
    first = capsys.readouterr().out
    main(["--version"])
    assert first == capsys.readouterr().out
