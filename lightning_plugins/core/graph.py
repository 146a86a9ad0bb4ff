"""What stands in an autograd graph."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


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
