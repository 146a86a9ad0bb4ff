"""Folders of models and of data, and configurations."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from hostile.parts import (
    CPU,
    DIGITS,
    EVIL,
    SMALL_BERT,
    SMALL_UNET,
    TOUCH,
    Cases,
    Run,
    pairs,
    tokenizer_files,
    write,
)

CASES = Cases()


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
        {"folder/unet/config.json": {**SMALL_UNET, "inner": {"attn_implementation": "evil/kernel"}}},
    ),
    "with a processor whose parts are code": (
        {"unet": ["transformers", "LlavaProcessor"]},
        {"folder/unet/tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil_module.Thing", None]}}},
    ),
    "with a model whose parts are code": (
        {"unet": ["transformers", "LlavaForConditionalGeneration"]},
        {"folder/unet/config.json": {"model_type": "llava", "vision_config": EVIL_MAP}},
    ),
    "with code in a list": (
        {"unet": ["diffusers", "UNet2DModel"]},
        {"folder/unet/more/x.json": [{"y": [EVIL_MAP]}]},
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


CASES.every(
    "a pipeline",
    PIPELINES,
    lambda place, it: [pipeline(*it), "sample", "--ckpt_path=folder", "--num_samples=1", "--output=out.png"][1:],
)
TEACHERS = ("with a module in it", "with a class of its own", "with pickled weights", "that is a list")
CASES.every(
    "a teacher", {name: PIPELINES[name] for name in TEACHERS}, lambda place, it: [pipeline(*it), *teach(place)][1:]
)
CASES.every(
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
            **{f"folder/{name}": bytes(file.numpy()) for name, file in tokenizer_files().items()},
            **{f"folder/{name}": content for name, content in files.items()},
        }
    )
    return [
        *("fit", "--model=UniLMSeq2Seq", "--model.model_name_or_path=folder", *pairs(), *CPU),
        *("--data.max_source_length=8", "--data.max_target_length=6"),
    ]


CASES.every(
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


@CASES.one("a folder of data with a script")
def _(place: Path) -> list[str]:
    write({"evil_set/evil_set.py": EVIL, "evil_set/a.txt": "evil"})
    return ["fit", "--model=CapsNet", "--data=HFImages", "--data.path=evil_set", "--data.image_size=8", *CPU]


@CASES.one("a script in place of data")
def _(place: Path) -> list[str]:
    write({"evil_set.py": EVIL})
    return ["fit", "--model=CapsNet", "--data=HFImages", "--data.path=evil_set.py", "--data.image_size=8", *CPU]


@CASES.one("a folder of texts with a script")
def _(place: Path) -> list[str]:
    write({"evil_set/evil_set.py": EVIL, "evil_set/a.txt": "evil"})
    return [
        *("fit", "--model=UniLMSeq2Seq", f"--model.config={json.dumps(SMALL_BERT)}", *CPU),
        *("--data=Seq2SeqData", "--data.path=evil_set"),
    ]


CASES.every(
    "a configuration",
    {
        "that runs": f"model: CapsNet\nevil: !!python/object/apply:os.system ['{TOUCH}']\n",
        "that makes": "model: CapsNet\nevil: !!python/object:evil_module.Thing {}\n",
        "that imports": "model: CapsNet\nevil: !!python/name:evil_module.Thing\n",
        "that is a module": "model: CapsNet\nevil: !!python/module:evil_module\n",
    },
    lambda place, text: [write({"evil.yaml": text}), "fit", "--config=evil.yaml", *DIGITS, *CPU][1:],
)
