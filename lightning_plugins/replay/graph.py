"""What stands in an autograd graph: its operations, half precision, kinks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """The nodes that lead to the tensors, each of them once."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            yield node
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]


def operations(tensors: Iterable[Tensor | None]) -> Iterator[str]:
    """The names of the backward operations that lead to the tensors, such as ``MulBackward0``.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> sorted(operations([2 * x.tanh(), None]))
        ['MulBackward0', 'TanhBackward0', 'torch::autograd::AccumulateGrad']
    """
    return (node.name() for node in nodes(tensors))


def half_precision(loss: Tensor) -> torch.dtype | None:
    """The coarsest half precision in which a part of the loss was computed, also under an autocast of the module's own.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> half_precision(x.bfloat16().sum().float()), half_precision(x.sum())
        (torch.bfloat16, None)
    """
    found = {entry.dtype for node in nodes([loss]) for entry in node._input_metadata}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found), None)


# Modules whose custom functions are known: reentrant checkpoints raise, the others are linear.
_KNOWN_FUNCTIONS = ("torch.utils.checkpoint", "torch.nn.parallel", "torch.distributed", "torch._functorch")
_OWN_OPERATORS = "GeneratedBackwardFor_lightning_plugins_"  # which the tests differentiate twice


def custom_functions(loss: Tensor) -> set[str]:
    """The names of ``torch.autograd.Function`` classes in a loss's graph whose second derivative nobody vouches for.

    A backward that computes from detached values gives the right first derivative, and a second one that lacks a term.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        >>> custom_functions(Double.apply(x).sum())
        {'Double'}
    """
    found = [type(node) for node in nodes([loss]) if isinstance(node, torch.autograd.function.BackwardCFunction)]
    classes = {getattr(kind, "_forward_cls", kind) for kind in found}
    return {
        cls.__name__
        for cls in classes
        if not cls.__module__.startswith(_KNOWN_FUNCTIONS) and not cls.__name__.startswith(_OWN_OPERATORS)
    }


def coarsest_precision(losses: Iterable[Tensor]) -> torch.dtype:
    """The coarsest floating type in which a part of the losses was computed: their gradients round as it does.

    Example:
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> coarsest_precision([x.float().sum()]), coarsest_precision([x.sum()])
        (torch.float32, torch.float64)
    """
    found = {entry.dtype for node in nodes(losses) for entry in node._input_metadata}
    real = {dtype.to_real() for dtype in found if dtype.is_floating_point or dtype.is_complex}
    return max(real, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


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
        loss: a loss with its graph.
        module: the module that computed it.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> has_kinks(x.relu().sum(), nn.Linear(2, 2)), has_kinks(x.tanh().sum(), nn.Linear(2, 2))
        (True, False)
    """
    if any(isinstance(part, _MODULES + _POOLS) for part in module.modules()):
        return True
    return any(node.name().startswith(_BACKWARDS) and not _is_complex_abs(node) for node in nodes([loss]))


def _is_complex_abs(node: Any) -> bool:
    """Whether a node is the backward of ``|z|`` of complex numbers, which bends at zero alone."""
    if not node.name().startswith("Abs"):
        return False
    if len(node.next_functions) != 1:  # a custom function whose name begins so
        return False
    ((before, output),) = node.next_functions
    return before is not None and before._input_metadata[output].dtype.is_complex
