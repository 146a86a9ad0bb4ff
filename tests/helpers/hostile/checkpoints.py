"""Checkpoints that pass ``weights_only=True``: tokenizers, and the names of classes and functions in them."""

from typing import Any

import torch

from hostile.parts import (
    BY_COMMAND_LINE,
    CPU,
    DIGITS,
    EVIL,
    SMALL_BERT,
    SMALL_UNET,
    TOUCH,
    Cases,
    eae,
    pairs,
    save,
    text_file,
    tokenizer_files,
    unilm,
    write,
)

CASES = Cases()

TOKENIZER_FILES = {
    "an absolute name": lambda place: {str(place / "home" / ".bashrc"): text_file("evil")},
    "a name that climbs": lambda place: {"../../home/.bashrc": text_file("evil")},
    "a name that climbs later": lambda place: {"a/../../../home/x.txt": text_file("evil")},
    "a name with backslashes": lambda place: {"..\\x.txt": text_file("evil")},
    "a name with a drive": lambda place: {"C:x.txt": text_file("evil")},
    "an empty name": lambda place: {"": text_file("evil")},
    "a name that is a folder's": lambda place: {".": text_file("evil")},
    "a name that is a number": lambda place: {7: text_file("evil")},
    "a name that writes to the terminal": lambda place: {"\x1b]0;evil\x07\nsecond line.txt": text_file("evil")},
    "a Python file": lambda place: {"tokenization_evil.py": text_file(EVIL)},
    "a pickle": lambda place: {"vocab.pkl": text_file("evil")},
    "floats": lambda place: {"vocab.txt": torch.zeros(3)},
    "two dimensions": lambda place: {"vocab.txt": torch.zeros(3, 3, dtype=torch.uint8)},
    "a text": lambda place: {"vocab.txt": "evil"},
    "a terabyte": lambda place: {"vocab.txt": torch.zeros(1, dtype=torch.uint8).expand(10**12)},
    "many files": lambda place: {f"{index}.txt": text_file("") for index in range(1000)},
    "no JSON": lambda place: {"tokenizer.json": text_file("evil"), "tokenizer_config.json": text_file("evil")},
    "code in a folder beside": lambda place: auto_map("evil_repo--tokenization_evil.EvilTokenizer"),
    "code of its own": lambda place: auto_map("tokenization_evil.EvilTokenizer"),
    "nothing": lambda place: {name: text_file("") for name in tokenizer_files()},
}


def auto_map(name: str) -> dict[str, torch.Tensor]:
    """A tokenizer whose class is in a module that it names."""
    write({"evil_repo/tokenization_evil.py": EVIL, "evil_repo/config.json": {}})
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [name, None]}}
    return {"tokenizer_config.json": text_file(config)}


CASES.every(
    "a tokenizer",
    TOKENIZER_FILES,
    lambda place, files: ["generate", save(unilm(files(place))), "--text=to be"],
)
CASES.every(
    "a tokenizer's records",
    {
        "a list": [1],
        "a number": 7,
        "missing": {"unilm": {}},
        "beside a configuration that is a list": {"unilm": {"config": [], "tokenizer": {}, "results": {}}},
        "beside a configuration of no network": {
            "unilm": {"config": {"model_type": "evil"}, "tokenizer": tokenizer_files(), "results": {}}
        },
        "beside results that are texts": {"unilm": {"config": SMALL_BERT, "tokenizer": {}, "results": {"a": "b"}}},
    },
    lambda place, value: [
        *("generate", "--text=to be"),
        save({**unilm(), **value} if isinstance(value, dict) else unilm(value)),
    ],
)
CASES.every(
    "export of a tokenizer",
    {name: TOKENIZER_FILES[name] for name in ("an absolute name", "code in a folder beside")},
    lambda place, files: ["export", save(unilm(files(place))), "--output=out"],
)
CASES.every(
    "validation by a tokenizer",
    {name: TOKENIZER_FILES[name] for name in ("an absolute name", "code in a folder beside")},
    lambda place, files: ["validate", save(unilm(files(place))), *pairs(), *CPU],
)

# Classes and functions that checkpoints name.

CLASSES = {
    "a module beside": "evil_module.Thing",
    "no dots": "nodots",
    "empty": "",
    "dots alone": "..",
    "a number": 3,
    "a builtin": "builtins.dict",
    "a function of the system": "os.system",
    "a class of the system": "subprocess.Popen",
    "the command line": "lightning_plugins.cli.main",
    "its entry": "lightning_plugins.__main__.main",
    "no module of Lightning's": "torch.nn.Linear",
    "what writes to the terminal": "evil_module.\x1b[31mThing\nsecond line",
}
CASES.every("a class", CLASSES, lambda place, name: ["sample", save(eae({"_class_path": name})), "--output=out.png"])
CASES.every(
    "a class in a test",
    {name: CLASSES[name] for name in ("a module beside", "no dots", "a builtin", "a function of the system")},
    lambda place, name: ["test", save(eae({"_class_path": name})), *DIGITS, *CPU],
)
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": TOUCH, "shell": True}}
ARGUMENTS = {
    "an optimizer beside": {"optimizer": "evil_module.make"},
    "a class path beside": {"optimizer": {"class_path": "evil_module.Thing", "init_args": {}}},
    "an optimizer of the system": {"optimizer": "os.system"},
    "an optimizer that runs": {"optimizer": POPEN},
    "a scheduler that runs": {"scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": POPEN}},
    "one within another": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": POPEN}}},
    "an optimizer in a text": {"optimizer": '{"class_path": "evil_module.Thing"}'},
    "an optimizer in letters by number": {"optimizer": r'"\u0065vil_module\u002emake"'},
    "an optimizer at an address": {"optimizer": "file:///evil.yaml"},
    "an instantiator": {"_instantiator": "evil_module.make"},
    "an instantiator of the system": {"_instantiator": "os.system"},
    "an argument that is a class": {"latent_dim": POPEN},
    "a key that is a class": {"class_path": "evil_module.Thing", "init_args": {}},
}
CASES.every("arguments", ARGUMENTS, lambda place, more: ["sample", save(eae(more)), "--output=out.png"])
CASES.every("arguments in a test", ARGUMENTS, lambda place, more: ["test", save(eae(more)), *DIGITS, *CPU])
CASES.every(
    "arguments in training",
    {name: ARGUMENTS[name] for name in ("an optimizer beside", "an optimizer that runs", "an instantiator")},
    lambda place, more: ["fit", save(eae(more)), *DIGITS, *CPU],
)
CASES.every(
    "arguments under an old name",
    {"hparams": "hparams", "module_arguments": "module_arguments"},
    lambda place, key: ["sample", save(eae(**{key: {"optimizer": "evil_module.make"}})), "--output=out.png"],
)
CASES.every(
    "a network's configuration",
    {
        "in a text": {**SMALL_BERT, "x": r'{"class_path": "\u0065vil_module.Thing"}'},
        "that runs": POPEN,
        "that runs within": {**SMALL_BERT, "id2label": [POPEN]},
    },
    lambda place, config: ["generate", save(unilm(hparams={"config": config})), "--text=to be"],
)
CASES.every(
    "a search",
    {"of its own": {"custom_generate": "evil_repo"}, "trusted": {"trust_remote_code": True}},
    lambda place, search: ["generate", save(unilm(hparams={"generation": search})), "--text=to be"],
)


def sid(**record: Any) -> dict[str, Any]:
    """A checkpoint of SiD with another description of its networks."""
    described = {
        "fingerprint": "",
        "network": "UNet2DModel",
        "config": SMALL_UNET,
        "scheduler": {"_class_name": "DDPMScheduler"},
        "sample_shape": [1, 8, 8],
        "num_classes": None,
        "in_pixels": True,
        "takes_text": False,
    }
    progress = {"start_level": 2.5, "images": 0, "updates": 0, "results": {}}
    return {
        "state_dict": {"networks.x": torch.zeros(1)},
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"_class_path": "lightning_plugins.SiD", **BY_COMMAND_LINE, "teacher": "teacher"},
        "sid": {**described, **progress, **record},
    }


CASES.every(
    "a student",
    {
        "of a pipeline": {"network": "DiffusionPipeline"},
        "of no class": {"network": "os"},
        "of a number": {"network": 7},
        "with a scheduler of no class": {"scheduler": {"_class_name": "DiffusionPipeline"}},
        "with no scheduler": {"scheduler": None},
        "with no shape": {"sample_shape": None},
        "with no results": {"results": None},
    },
    lambda place, record: ["sample", save(sid(**record)), "--output=out.png"],
)
