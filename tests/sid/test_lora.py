"""LoRA: a copy that shares its weights and starts equal, adapters on every layer, and their merging."""

from importlib import util

import pytest
import torch

from lightning_plugins.sid.lora import lora_copy, merged
from lightning_plugins.sid.teacher import load_teacher

RANK = 3


def adapters(network):
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def call(name, network):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, network.config.in_channels, 8, 8, generator=generator)
    options = {
        "dit": {"class_labels": torch.tensor([1, 7])},
        "sd": {"encoder_hidden_states": torch.randn(2, 8, 16, generator=generator)},
    }
    with torch.no_grad():
        return network(x, timestep=torch.tensor([5, 400]), **options.get(name, {})).sample


@pytest.mark.parametrize("name", ["ddpm", "dit", "sd"])
def test_the_copy_starts_equal_learns_beside_and_merges(name, teacher_folder):
    network = load_teacher(teacher_folder(name)).network
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    copied = lora_copy(network, RANK)
    assert copied.training and torch.equal(call(name, copied.eval()), call(name, network))
    shared = {id(parameter) for parameter in network.parameters()}
    own = [parameter for parameter in copied.parameters() if id(parameter) not in shared]
    learnt = adapters(copied)
    assert len(own) == len(learnt) and len(own) + len(shared) == len(list(copied.parameters()))
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    sizes = {f"{n}.lora_{ab}.default.weight": 0 for n in layers for ab in "AB"}
    assert learnt.keys() == sizes.keys()
    for key, parameter in learnt.items():
        assert RANK in parameter.shape[:2] and bool(parameter.any()) == (".lora_A." in key)
        with torch.no_grad():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
    changed = call(name, copied)
    assert (changed - call(name, network)).abs().max() > 0.01
    plain = merged(copied)
    assert type(plain) is type(network) and plain.state_dict().keys() == before.keys() and not plain.training
    assert not adapters(plain) and not hasattr(plain, "peft_config")
    assert (call(name, plain) - changed).abs().max() < 1e-5 * changed.abs().max()
    layer = next(iter(layers))
    a, b = (learnt[f"{layer}.lora_{ab}.default.weight"] for ab in "AB")
    moved = plain.get_submodule(layer).weight - before[f"{layer}.weight"]
    assert (moved - torch.einsum("or...,ri...->oi...", b, a)).abs().max() < 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(call(name, copied), changed)
    assert not {id(parameter) for parameter in plain.parameters()} & shared


def test_gradients_reach_the_adapters_alone_and_these_are_float32(teacher_folder):
    network = load_teacher(teacher_folder("ddpm")).network.bfloat16()
    copied = lora_copy(network, 1)
    assert {parameter.dtype for parameter in adapters(copied).values()} == {torch.float32}
    output = copied(torch.randn(1, 1, 8, 8).bfloat16(), timestep=3).sample
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert adapters(copied)["conv_out.lora_B.default.weight"].grad.any()
    assert {parameter.dtype for parameter in merged(copied).parameters()} == {torch.bfloat16}
    size = sum(parameter.numel() for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in adapters(copied).values()) < size / 5


def test_without_peft_the_extra_is_named(teacher_folder, monkeypatch):
    network = load_teacher(teacher_folder("ddpm")).network
    found = util.find_spec
    monkeypatch.setattr("lightning_plugins.sid.lora.find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ModuleNotFoundError, match=r"lora_rank=4 needs peft: pip install lightning_plugins\[lora\]"):
        lora_copy(network, 4)
