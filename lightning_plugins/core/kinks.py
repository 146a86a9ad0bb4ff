"""Whether a loss has kinks: places where its gradient jumps, as with ReLU and max-pooling."""

from torch import Tensor, nn

from lightning_plugins.core.graph import operations

# What torch calls the backward of operations that are linear in pieces. clamp_min is left out: it guards divisions.
_BACKWARDS = (
    "Abs",
    "AdaptiveMaxPool",
    "Amax",
    "Amin",
    "ClampBackward",
    "Hard",
    "LeakyRelu",
    "MaxBackward",
    "MaxPool",
    "Maximum",
    "MinBackward",
    "Minimum",
    "Prelu",
    "Relu",
    "Rrelu",
    "Threshold",
    "Topk",
)
_MODULES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold)
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)


def has_kinks(loss: Tensor, module: nn.Module) -> bool:
    """Whether the loss's graph, or a part of the module, is linear in pieces.

    A gradient's finite difference over a tiny step is then mostly noise: a unit that crosses its kink adds a jump
    divided by the step. Graphs that are hidden (compiled or checkpointed) show only through the module's parts.

    Args:
        loss: with its graph.
        module: that computed it.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> has_kinks(x.relu().sum(), nn.Linear(2, 2)), has_kinks(x.tanh().sum(), nn.Linear(2, 2))
        (True, False)
    """
    if any(isinstance(part, _MODULES + _POOLS) for part in module.modules()):
        return True
    return any(name.startswith(_BACKWARDS) for name in operations([loss]))
