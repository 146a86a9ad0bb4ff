"""What hostile files are made of. Whatever of them is run or imported leaves ``canary`` in the home folder."""

import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as sharded

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


class Run:
    """Pickled, it runs a shell command when it is read."""

    def __reduce__(self):
        return os.system, (TOUCH,)


class Cases(dict[str, Maker]):
    """Makers by name: each writes what is hostile, and returns the words of the command that opens it."""

    def one(self, name: str) -> Callable[[Maker], Maker]:
        """Keep the decorated maker."""

        def keep(make: Maker) -> Maker:
            assert name not in self
            self[name] = make
            return make

        return keep

    def every(self, prefix: str, cases: dict[str, Any], make: Callable[[Path, Any], list[str]]) -> None:
        """Keep a maker for each of several values."""
        for name, value in cases.items():
            self.one(f"{prefix}: {name}")(lambda place, value=value: make(place, value))


def save(content: Any, name: str = "evil.ckpt") -> str:
    """The option that names a file with this content."""
    torch.save(content, name)
    return f"--ckpt_path={name}"


def shards(content: dict[str, Any], folder: str | Path = "shards") -> str:
    """The option that names a folder as FSDP2 writes it, with the content of a checkpoint file, of one process."""
    rest = dict(content)
    parts = {"state_dict": rest.pop("state_dict")}
    parts |= {f"optimizer_{number}": state for number, state in enumerate(rest.pop("optimizer_states", []))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process alone
        sharded.save(parts, checkpoint_id=folder)
    torch.save(rest, Path(folder) / "meta.pt")
    return f"--ckpt_path={folder}"


@cache
def tokenizer_files() -> dict[str, torch.Tensor]:
    from lightning_plugins.core.pretrained import pack_tokenizer
    from lightning_plugins.data.wordpiece import train_wordpiece

    return pack_tokenizer(train_wordpiece(["to be or not to be"], vocab_size=40))


def text_file(content: Any) -> torch.Tensor:
    """A file as a checkpoint holds it."""
    text = content if isinstance(content, str) else json.dumps(content)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def unilm(files: Any = None, hparams: dict[str, Any] | None = None) -> dict[str, Any]:
    """A checkpoint of UniLM; its weights are never reached."""
    files = {**tokenizer_files(), **files} if isinstance(files, dict) else tokenizer_files() if files is None else files
    named = {"_class_path": "lightning_plugins.UniLMSeq2Seq", **BY_COMMAND_LINE, "config": SMALL_BERT}
    return {
        "state_dict": {"net.weight": torch.zeros(1)},
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {**named, **(hparams or {})},
        "unilm": {"config": {**SMALL_BERT, "vocab_size": 40}, "tokenizer": files, "results": {}},
    }


@cache
def eae_weights() -> dict[str, torch.Tensor]:
    from lightning_plugins import EAE

    return EAE(**EAE_ARGUMENTS).state_dict()


def eae(hparams: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A checkpoint of EAE that is whole, but for the changes."""
    named = {"_class_path": "lightning_plugins.EAE", **BY_COMMAND_LINE, **EAE_ARGUMENTS}
    return {
        "state_dict": eae_weights(),
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
