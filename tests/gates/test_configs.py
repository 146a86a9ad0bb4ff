"""Every shipped config says what it is, and trains a step."""

import gzip
import importlib.util
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_plugins.cli import main

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
)


def test_there_are_configs():
    assert NAMES


def header(path):
    """The comment block at the top of a config, as ``{field: text}``; a field's text may go on in the next lines."""
    fields, last = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        start = re.match(r"(Paper|Data|Hardware|Minutes|Expected|Command)\b\W*(.*)", text, re.IGNORECASE)
        if start:
            last = start[1].lower()
            fields[last] = start[2]
        elif last:
            fields[last] += " " + text
    return fields


@pytest.mark.parametrize("name", NAMES)
def test_header(name):
    fields = header(ROOT / "configs" / f"{name}.yaml")
    missing = {"paper", "data", "hardware", "minutes", "expected", "command"} - fields.keys()
    assert not missing, f"the comment on top of {name} lacks {missing}"
    assert all(fields.values()), fields
    assert re.search(r"\d", fields["minutes"]), "minutes is a number"
    assert re.search(r"\d", fields["expected"]), "the expected result is a number"
    assert f"lightning-plugins fit --config {name}" in fields["command"]
    if "GPU" in fields["hardware"] + fields["minutes"]:
        several = r"--trainer\.devices \d+ --trainer\.strategy ddp|--trainer\.strategy ddp\S* --trainer\.devices \d+"
        assert re.search(several, fields["hardware"]), "a line for several GPUs"


def idx_folder(folder, size=28, count=40):
    """A small set in the four idx files: noise, and labels that hold every class."""
    folder.mkdir()
    for part in ("train", "t10k"):
        pixels = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, *pixels.shape) + pixels.tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, count) + labels.tobytes())
    return folder


def image_folder(folder, size=28, count=3):
    """A small set of PNG files in a folder for each split and class."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (size, size), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.png")
    return folder


def text_folder(folder):
    """Rows with the columns of SQuAD and of CNN/DailyMail, as ``datasets`` reads them from a folder."""
    folder.mkdir()
    row = {"answers": {"text": ["a cat"]}, "context": "There sat a cat.", "question": "What sat there?"}
    row |= {"article": "A cat sat there.", "highlights": "Cat sits."}
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    return folder


def tiny_bert(folder):
    """A BERT of one layer with a tokenizer, in place of one from the hub."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "there", "what", "sits", ".", "?"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def tiny_teacher(folder, name):
    """A diffusers pipeline of one of the kinds in the tests of SiD, in place of one from the hub."""
    spec = importlib.util.spec_from_file_location("tiny_teachers", ROOT / "tests" / "sid" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TEACHERS[name]().save_pretrained(folder)
    return folder


def local_model(model, folder):
    """Options that give a config a model of this machine in place of the hub's."""
    if model["class_path"] == "SiD":
        kind = "sd" if "stable-diffusion" in model["init_args"]["teacher"] else "ddpm"
        options = ["--model.teacher", str(tiny_teacher(folder / "teacher", kind)), "--model.teacher_steps", "2"]
        return [*options, "--model.num_pictures", "2", "--model.batch_size", "4"]
    if model["class_path"] == "EAE" and model["init_args"]["network"] == "rae":
        return ["--model.width", "4"]
    name = model.get("init_args", {}).get("model_name_or_path", "package:")
    if name.startswith("package:"):
        return []
    return ["--model.model_name_or_path", str(tiny_bert(folder / "bert")), "--model.generation.max_new_tokens", "4"]


def local_data(data, folder):
    """Options that give a config data of this machine in place of what it would read from elsewhere."""
    name, arguments = data["class_path"].split(".")[-1], data.get("init_args", {})
    if name == "Seq2SeqData" and "path" in arguments:
        return ["--data.path", str(text_folder(folder / "text")), "--data.name", "null"]
    if name == "Seq2SeqData":
        rows = folder / "rows.tsv"
        rows.write_text("\t".join(["a cat"] * len(arguments["columns"])) + "\n")
        return ["--data.train_file", str(rows), "--data.val_file", str(rows)]
    if name == "IdxImages":
        return ["--data.folder", str(idx_folder(folder / "idx")), "--data.val_size", "10"]
    if name == "HFImages":
        size = arguments.get("crop", 28)
        return [
            "--data.path",
            str(image_folder(folder / "png", size)),
            "--data.val_size",
            "10",
            "--data.num_workers",
            "0",
        ]
    if name == "PromptData" and "prompt_file" in arguments:
        (folder / "prompts.txt").write_text("a cat\na dog\na fish\na bird\n")
        return ["--data.prompt_file", str(folder / "prompts.txt")]
    if name == "MultiMNIST" and arguments.get("source", "digits") != "digits":
        return ["--data.source", str(image_folder(folder / "png"))]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_trains_one_step(name, tmp_path):
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    options = local_model(config["model"], tmp_path)
    if "data" in config:
        options += [*local_data(config["data"], tmp_path), "--data.batch_size", "4"]
    main(["fit", "--config", name, *options, "--trainer.fast_dev_run", "1"])
