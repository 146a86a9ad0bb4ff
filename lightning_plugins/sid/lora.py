"""Low-rank adapters (LoRA) in place of whole trainable copies of a network; by peft, the extra ``lora``."""

import copy
import re
from importlib.util import find_spec

import torch
from torch import nn


def lora_copy(network: nn.Module, rank: int) -> nn.Module:
    r"""A copy of a network that holds no second set of its weights, only trainable adapters beside them.

    .. math:: W x + B A x, \quad A \in R^{r \times n}, \; B \in R^{m \times r}, \; B = 0 \text{ at the start}

    Every linear and convolutional layer gets one, not attention alone: convolutions hold most of a U-Net's weights, and
    a one-step generator is a larger change than a style. Normalisations and embeddings stay the network's.

    Args:
        network: a diffusers network; its parameters are frozen where they are, and shared with the copy.
        rank: rank of the adapters, r, 1 or more; their weight (``lora_alpha / r``) is 1.

    Returns:
        The copy in train mode, which computes what the network does, whose only trainable parameters (``lora_`` in
        their names) are float32 in every precision.

    Raises:
        ModuleNotFoundError: peft is not installed.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    if find_spec("peft") is None:
        raise ModuleNotFoundError(f"lora_rank={rank} needs peft: pip install lightning_plugins[lora]")
    from peft import LoraConfig, inject_adapter_in_model

    copied = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    layers = [name for name, layer in copied.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    exactly = "|".join(map(re.escape, layers))  # a list of names would match other layers by their endings
    copied = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly), copied)
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # updates of a small rate are lost in a low precision
    return copied.train()


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A plain network of the same class as before :func:`lora_copy`, with the adapters added to its weights.

    Args:
        network: a network from :func:`lora_copy`; not changed.

    Returns:
        A network with weights of its own, without gradients, in eval mode.
    """
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(network).requires_grad_(False).eval()
    adapted = {name: layer for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        (adapter,) = layer.active_adapters
        base.weight += layer.get_delta_weight(adapter)
        plain.set_submodule(name, base)
    del plain.peft_config
    return plain
