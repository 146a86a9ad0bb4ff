"""A stranger's folder of pictures in the place of each shipped config's images, by the words of the documentation."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_plugins.cli import main
from lightning_plugins.cli.resolve import shipped

CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
OWN = ["--data=HFImages", "--data.path=pics", "--data.batch_size=8", "--data.num_workers=0"]


@pytest.fixture
def pictures(project, monkeypatch, tmp_path_factory):
    """Photographs of three classes, no two of one size, in no split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    draw = np.random.default_rng(0)
    for name in ("cat", "dog", "tree frog"):
        for n in range(20):
            path = project / "pics" / name / f"IMG_{n}.{'jpg' if n % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (*draw.integers(30, 60, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return project / "pics"


def config(name):
    return yaml.safe_load(shipped("configs")[name].read_text(encoding="utf-8"))


IMAGES = [
    name
    for name in shipped("configs")
    if config(name)["model"]["class_path"] != "SiD"
    and config(name)["data"]["class_path"] in ("Digits", "HFImages", "IdxImages", "MultiMNIST")
]


def test_there_are_such_configs():
    assert {"capsnet/digits", "eae/celeba64", "sid/digits_teacher", "callbacks/label_noise"} <= {*IMAGES}


@pytest.mark.parametrize("name", IMAGES)
def test_every_shipped_config_takes_them(pictures, capsys, name):
    """As it is, or with the option that the sentence names."""
    small = ["--model.width=4"] if config(name)["model"].get("init_args", {}).get("network") == "rae" else []
    words = ["fit", "--config", name, *OWN, *small, "--trainer.fast_dev_run=1", *CPU]
    cures = {
        "give image_size.": "--data.image_size=28",
        "less than crop=": "--data.crop=null",
        "must leave training samples of 60: give less, such as 0.1.": "--data.val_size=0.1",
        "such as by the data's image_size=32": "--data.image_size=32",
    }
    for _ in cures:
        capsys.readouterr()
        try:
            main(words)
            break
        except SystemExit as stop:
            told = capsys.readouterr().err
            assert stop.code == 2
            (cure,) = [option for sentence, option in cures.items() if sentence in told]
            assert cure not in words
            words.append(cure)
    else:
        main(words)


def test_it_is_trained_tested_and_kept_apart(pictures, project, capsys):
    few = [f"--trainer.limit_{part}_batches=2" for part in ("train", "val")]
    main(["fit", "--config=capsnet/digits", *OWN, "--trainer.max_epochs=1", "--model.channels=8", *few, *CPU,
          "--trainer.log_every_n_steps=1"])  # fmt: skip
    record = json.loads(Path("lightning_logs/version_0/metrics.json").read_text())
    assert "test/accuracy" in record["metrics"]["test"]
