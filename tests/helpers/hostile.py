"""Files and folders that a stranger might send, made where a test wants them: each says by which command it is opened.

Whatever of them is run or imported leaves ``canary`` in the home folder; whatever they write outside is seen there.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

EVIL = 'import os, pathlib\npathlib.Path(os.environ["HOME"], "canary").touch()\n'
MODULE = f"{EVIL}import torch\nmake = torch.optim.SGD\n\n\nclass Thing(torch.nn.Module):\n    pass\n"
TOUCH = "touch $HOME/canary"
SMALL_BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
SMALL_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
EAE_ARGUMENTS = {"image_shape": (1, 8, 8), "latent_dim": 2, "network": "mlp"}
BY_COMMAND_LINE = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
DIGITS = ["--data=Digits", "--data.image_size=8"]
PAIRS = ["--data=Seq2SeqData", "--data.train_file=pairs.tsv", "--data.val_file=pairs.tsv"]
CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
CPU += ["--trainer.max_epochs=1", "--trainer.default_root_dir=out"]

Maker = Callable[[Path], list[str]]
HOSTILE: dict[str, Maker] = {}


class Run:
    """Pickled, it runs a shell command when it is read."""

    def __reduce__(self):
        return os.system, (TOUCH,)


def hostile(name: str) -> Callable[[Maker], Maker]:
    """Keep the maker under a name."""

    def keep(make: Maker) -> Maker:
        assert name not in HOSTILE
        HOSTILE[name] = make
        return make

    return keep


def every(prefix: str, cases: dict[str, Any], make: Callable[[Path, Any], list[str]]) -> None:
    """Keep a maker for each of several values."""
    for name, value in cases.items():
        hostile(f"{prefix}: {name}")(lambda place, value=value: make(place, value))


# Parts of them.


def save(content: Any, name: str = "evil.ckpt") -> str:
    """The option that names a file with this content."""
    torch.save(content, name)
    return f"--ckpt_path={name}"


@cache
def _tokenizer() -> dict[str, torch.Tensor]:
    from lightning_plugins.core.pretrained import pack_tokenizer
    from lightning_plugins.data.wordpiece import train_wordpiece

    return pack_tokenizer(train_wordpiece(["to be or not to be"], vocab_size=40))


def text_file(content: Any) -> torch.Tensor:
    """A file as a checkpoint holds it."""
    text = content if isinstance(content, str) else json.dumps(content)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def unilm(files: Any = None, hparams: dict[str, Any] | None = None) -> dict[str, Any]:
    """A checkpoint of UniLM; its weights are never reached."""
    files = {**_tokenizer(), **files} if isinstance(files, dict) else _tokenizer() if files is None else files
    named = {"_class_path": "lightning_plugins.UniLMSeq2Seq", **BY_COMMAND_LINE, "config": SMALL_BERT}
    return {
        "state_dict": {"net.weight": torch.zeros(1)},
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {**named, **(hparams or {})},
        "unilm": {"config": {**SMALL_BERT, "vocab_size": 40}, "tokenizer": files, "results": {}},
    }


@cache
def _eae_weights() -> dict[str, torch.Tensor]:
    from lightning_plugins import EAE

    return EAE(**EAE_ARGUMENTS).state_dict()


def eae(hparams: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A checkpoint of EAE that is whole, but for the changes."""
    named = {"_class_path": "lightning_plugins.EAE", **BY_COMMAND_LINE, **EAE_ARGUMENTS}
    return {
        "state_dict": _eae_weights(),
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {**named, **(hparams or {})},
        **changes,
    }


def pairs() -> list[str]:
    """Options for text data."""
    Path("pairs.tsv").write_text("source\ttarget\nto be\tbe\nor not\tnot\n")
    return PAIRS


def write(files: dict[str, Any]) -> None:
    """Texts, JSON or bytes by name, with their folders."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            Path(name).write_text(content if isinstance(content, str) else json.dumps(content))


# Tokenizers in checkpoints.

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
    "nothing": lambda place: {name: text_file("") for name in _tokenizer()},
}


def auto_map(name: str) -> dict[str, torch.Tensor]:
    """A tokenizer whose class is in a module that it names."""
    write({"evil_repo/tokenization_evil.py": EVIL, "evil_repo/config.json": {}})
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [name, None]}}
    return {"tokenizer_config.json": text_file(config)}


every(
    "a tokenizer",
    TOKENIZER_FILES,
    lambda place, files: ["generate", save(unilm(files(place))), "--text=to be"],
)
every(
    "a tokenizer's records",
    {
        "a list": [1],
        "a number": 7,
        "missing": {"unilm": {}},
        "beside a configuration that is a list": {"unilm": {"config": [], "tokenizer": {}, "results": {}}},
        "beside a configuration of no network": {
            "unilm": {"config": {"model_type": "evil"}, "tokenizer": _tokenizer(), "results": {}}
        },
        "beside results that are texts": {"unilm": {"config": SMALL_BERT, "tokenizer": {}, "results": {"a": "b"}}},
    },
    lambda place, value: [
        *("generate", "--text=to be"),
        save({**unilm(), **value} if isinstance(value, dict) else unilm(value)),
    ],
)
every(
    "export of a tokenizer",
    {name: TOKENIZER_FILES[name] for name in ("an absolute name", "code in a folder beside")},
    lambda place, files: ["export", save(unilm(files(place))), "--output=out"],
)
every(
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
every("a class", CLASSES, lambda place, name: ["sample", save(eae({"_class_path": name})), "--output=out.png"])
every(
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
    "an instantiator": {"_instantiator": "evil_module.make"},
    "an instantiator of the system": {"_instantiator": "os.system"},
    "an argument that is a class": {"latent_dim": POPEN},
    "a key that is a class": {"class_path": "evil_module.Thing", "init_args": {}},
}
every("arguments", ARGUMENTS, lambda place, more: ["sample", save(eae(more)), "--output=out.png"])
every("arguments in a test", ARGUMENTS, lambda place, more: ["test", save(eae(more)), *DIGITS, *CPU])
every(
    "arguments in training",
    {name: ARGUMENTS[name] for name in ("an optimizer beside", "an optimizer that runs", "an instantiator")},
    lambda place, more: ["fit", save(eae(more)), *DIGITS, *CPU],
)
every(
    "arguments under an old name",
    {"hparams": "hparams", "module_arguments": "module_arguments"},
    lambda place, key: ["sample", save(eae(**{key: {"optimizer": "evil_module.make"}})), "--output=out.png"],
)
every(
    "a network's configuration",
    {"that runs": POPEN, "that runs within": {**SMALL_BERT, "id2label": [POPEN]}},
    lambda place, config: ["generate", save(unilm(hparams={"config": config})), "--text=to be"],
)
every(
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


every(
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

# Files that are no checkpoints, or not whole.

every(
    "a checkpoint",
    {
        "without weights": {"state_dict": None},
        "with a list of weights": {"state_dict": [1]},
        "with texts for weights": {"state_dict": {"a": "b"}},
        "with numbered weights": {"state_dict": {1: torch.zeros(1)}},
        "with other weights": {"state_dict": {"a": torch.zeros(1).expand(10**12)}},
        "with a list of arguments": {"hyper_parameters": [1]},
        "with numbered arguments": {"hyper_parameters": {1: 2}},
        "of a version of no number": {"pytorch-lightning_version": "evil"},
        "of a version that is a number": {"pytorch-lightning_version": 7},
    },
    lambda place, changes: ["sample", save(eae(**changes)), "--output=out.png"],
)
every(
    "a checkpoint whose callbacks",
    {
        "delete what climbs": {"best_k_models": {"/runs/checkpoints/../../home/.bashrc": torch.tensor(0.0)}},
        "delete by another protocol": {"kth_best_model_path": "local:///home/.bashrc"},
    },
    lambda place, state: ["fit", save(eae(callbacks={"ModelCheckpoint{}": state})), *DIGITS, *CPU],
)
every(
    "a checkpoint in a test",
    {"without weights": {"state_dict": None}, "with a list of arguments": {"hyper_parameters": [1]}},
    lambda place, changes: ["test", save(eae(**changes)), *DIGITS, *CPU],
)
every(
    "a file in place of a checkpoint",
    {
        "a pickle": pickle.dumps(Run()),
        "an empty one": b"",
        "a text": b"evil",
        "half a zip": b"PK\3\4",
        "a list": pickle.dumps([1]),
    },
    lambda place, content: [write({"evil.ckpt": content}), "sample", "--ckpt_path=evil.ckpt", "--output=out.png"][1:],
)


@hostile("a checkpoint with a pickle in it")
def _(place: Path) -> list[str]:
    return ["sample", save(eae({"hook": Run()})), "--output=out.png"]


@hostile("a checkpoint of the old form with a pickle in it")
def _(place: Path) -> list[str]:
    torch.save(eae({"hook": Run()}), "evil.ckpt", _use_new_zipfile_serialization=False)
    return ["test", "--ckpt_path=evil.ckpt", *DIGITS, *CPU]


@hostile("a zip of other files")
def _(place: Path) -> list[str]:
    with zipfile.ZipFile("evil.ckpt", "w") as archive:
        archive.writestr("evil/data.pkl", b"evil")
        archive.writestr("evil/version", "3\n")
        archive.writestr("../../home/x", "evil")
    return ["sample", "--ckpt_path=evil.ckpt", "--output=out.png"]


PLACES = {"nothing": "", "a folder": "folder", "a pipe": "pipe", "a device": "/dev/zero", "no file": "\x1b[31m.ckpt"}


def place_of(place: Path, name: str) -> str:
    """The option with such a path."""
    Path("folder").mkdir()
    os.mkfifo("pipe")
    return f"--ckpt_path={name}"


every("a path", PLACES, lambda place, name: ["sample", place_of(place, name), "--output=out.png"])
every("a path in a test", PLACES, lambda place, name: ["test", place_of(place, name), *DIGITS, "--model=CapsNet", *CPU])
every(
    "a path in training", PLACES, lambda place, name: ["fit", place_of(place, name), *DIGITS, "--model=CapsNet", *CPU]
)


@hostile("a sharded checkpoint")
def _(place: Path) -> list[str]:
    write({"shards/.metadata": pickle.dumps(Run()), "shards/__0_0.distcp": b"evil"})
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "shards/meta.pt")
    return ["test", "--ckpt_path=shards", *DIGITS, "--model=CapsNet", *CPU]


# Folders of models and of data.


def pipeline(index: Any, files: dict[str, Any] | None = None) -> None:
    """A folder that looks like a diffusers pipeline."""
    whole = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.36.0", "scheduler": ["diffusers", "DDPMScheduler"]}
    write(
        {
            "folder/model_index.json": {**whole, **index} if isinstance(index, dict) else index,
            "folder/unet/config.json": {"_class_name": "UNet2DModel", **SMALL_UNET},
            "folder/scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler"},
            "folder/evil_pipeline.py": EVIL,
            "folder/pipeline.py": EVIL,
            "folder/unet/evil_module.py": EVIL,
            **(files or {}),
        }
    )


def pickled(*keys: str) -> bytes:
    """Weights that are no weights."""
    file = io.BytesIO()
    torch.save({key: Run() for key in ("conv_in.weight", *keys)}, file)
    return file.getvalue()


EVIL_MAP = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForMaskedLM"), "evil_module.Thing")}
PIPELINES = {
    "with a module beside": ({"unet": ["evil_module", "Thing"]}, {"folder/unet/evil_module.py": ""}),
    "with a module in it": ({"unet": ["evil_module", "Thing"]}, {}),
    "with a module of the system": ({"unet": ["os", "system"]}, {}),
    "with a class of its own": ({"_class_name": ["evil_pipeline", "Thing"], "unet": ["diffusers", "UNet2DModel"]}, {}),
    "with a class of no name": ({"_class_name": "evil_module.Thing", "unet": ["diffusers", "UNet2DModel"]}, {}),
    "with a class that is none": ({"_class_name": "logging", "unet": ["diffusers", "UNet2DModel"]}, {}),
    "with any model of transformers": (
        {"unet": ["transformers", "AutoModel"]},
        {"folder/unet/config.json": EVIL_MAP},
    ),
    "with any model of diffusers": (
        {"unet": ["diffusers", "AutoModel"]},
        {"folder/unet/config.json": {"auto_map": {"AutoModel": "evil_module.Thing"}}},
    ),
    "with a function": ({"unet": ["diffusers", "logging"]}, {}),
    "with pickled weights": (
        {"unet": ["diffusers", "UNet2DModel"]},
        {"folder/unet/diffusion_pytorch_model.bin": pickled()},
    ),
    "with the code of a pipeline of no name": ({"unet": ["diffusers", "UNet2DModel"]}, {"folder/None.py": EVIL}),
    "with code in place of the library": (
        {"unet": ["diffusers", "UNet2DModel"]},
        {"folder/unet/diffusers.py": EVIL},
    ),
    "with adapters": (
        {"unet": ["diffusers", "UNet2DModel"]},
        {"folder/unet/adapter_config.json": {"base_model_name_or_path": "evil", "peft_type": "LORA"}},
    ),
    "with a kernel of the Hub": (
        {"unet": ["diffusers", "UNet2DModel"]},
        {"folder/unet/config.json": {**SMALL_UNET, "attn_implementation": "evil/kernel"}},
    ),
    "that is a list": ("[1]", {}),
    "that is no JSON": ("evil", {}),
    "with a part that is a number": ({"unet": 7}, {}),
    "with a name that climbs": ({"../../home": ["diffusers", "UNet2DModel"]}, {}),
    "that writes to the terminal": ({"unet": ["\x1b[31mevil\nsecond", "\x07"]}, {}),
}


def teach(place: Path, folder: str = "folder") -> list[str]:
    """The words of a training by a teacher."""
    return ["fit", "--model=SiD", f"--model.teacher={folder}", *CPU]


every(
    "a pipeline",
    PIPELINES,
    lambda place, it: [pipeline(*it), "sample", "--ckpt_path=folder", "--num_samples=1", "--output=out.png"][1:],
)
TEACHERS = ("with a module in it", "with a class of its own", "with pickled weights", "that is a list")
every("a teacher", {name: PIPELINES[name] for name in TEACHERS}, lambda place, it: [pipeline(*it), *teach(place)][1:])
every(
    "a teacher's part",
    {"of a pipeline": "DiffusionPipeline", "of a function": "logging.get_logger", "of no name": 7},
    lambda place, name: [
        write(
            {
                "folder/unet/config.json": {"_class_name": name},
                "folder/scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler"},
            }
        ),
        *teach(place),
    ][1:],
)


def masked(files: dict[str, Any]) -> list[str]:
    """The words of a training that starts from a folder of transformers."""
    write(
        {
            "folder/config.json": {**SMALL_BERT, "vocab_size": 40},
            "folder/evil_module.py": EVIL,
            "folder/custom_generate/generate.py": EVIL,
            **{f"folder/{name}": bytes(file.numpy()) for name, file in _tokenizer().items()},
            **{f"folder/{name}": content for name, content in files.items()},
        }
    )
    return [
        *("fit", "--model=UniLMSeq2Seq", "--model.model_name_or_path=folder", *pairs(), *CPU),
        *("--data.max_source_length=8", "--data.max_target_length=6"),
    ]


every(
    "a model's folder",
    {
        "with a configuration of its own": {"config.json": {**EVIL_MAP, "model_type": "evil"}},
        "with a tokenizer of its own": {
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil_module.Thing", None]}}
        },
        "with pickled weights": {"pytorch_model.bin": pickled()},
        "with adapters": {
            "adapter_config.json": {"base_model_name_or_path": "evil", "peft_type": "LORA", "megatron_core": "evil"},
            "pytorch_model.bin": pickled(),
        },
        "without weights": {},
    },
    lambda place, files: masked(files),
)


@hostile("a folder of data with a script")
def _(place: Path) -> list[str]:
    write({"evil_set/evil_set.py": EVIL, "evil_set/a.txt": "evil"})
    return ["fit", "--model=CapsNet", "--data=HFImages", "--data.path=evil_set", "--data.image_size=8", *CPU]


@hostile("a script in place of data")
def _(place: Path) -> list[str]:
    write({"evil_set.py": EVIL})
    return ["fit", "--model=CapsNet", "--data=HFImages", "--data.path=evil_set.py", "--data.image_size=8", *CPU]


@hostile("a folder of texts with a script")
def _(place: Path) -> list[str]:
    write({"evil_set/evil_set.py": EVIL, "evil_set/a.txt": "evil"})
    return [
        *("fit", "--model=UniLMSeq2Seq", f"--model.config={json.dumps(SMALL_BERT)}", *CPU),
        *("--data=Seq2SeqData", "--data.path=evil_set"),
    ]


every(
    "a configuration",
    {
        "that runs": f"model: CapsNet\nevil: !!python/object/apply:os.system ['{TOUCH}']\n",
        "that makes": "model: CapsNet\nevil: !!python/object:evil_module.Thing {}\n",
        "that imports": "model: CapsNet\nevil: !!python/name:evil_module.Thing\n",
        "that is a module": "model: CapsNet\nevil: !!python/module:evil_module\n",
    },
    lambda place, text: [write({"evil.yaml": text}), "fit", "--config=evil.yaml", *DIGITS, *CPU][1:],
)
