"""Activations computed again in the backward pass in place of being kept, by the libraries' own checkpoints."""

from torch import nn

# transformers' name, the one it had in 5.20, and diffusers'; each comes with an attribute that says for which classes.
_SWITCHES = (
    ("activation_checkpointing_enable", "supports_gradient_checkpointing"),
    ("gradient_checkpointing_enable", "supports_gradient_checkpointing"),
    ("enable_gradient_checkpointing", "_supports_gradient_checkpointing"),
)


def checkpoint_activations(network: nn.Module, cls: type | None = None) -> None:
    """Let each block of a network keep its input alone in training; the random state of its dropout is replayed.

    Args:
        network: a model of transformers or diffusers. Its weights, their names and what it computes stay as they are.
        cls: the class that a refusal names; the network's own by default.

    Raises:
        ValueError: the network's class cannot do it.
    """
    for switch, supported in _SWITCHES:
        if hasattr(network, switch) and getattr(network, supported, False):
            getattr(network, switch)()  # both libraries' defaults are use_reentrant=False
            return
    name = (cls or type(network)).__name__
    raise ValueError(
        f"activation_checkpointing=True is not possible with {name}, whose class knows no activation checkpointing of "
        "transformers or diffusers: leave it out, and lower the batch size for memory."
    )
