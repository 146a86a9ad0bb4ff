"""What stands in an autograd graph."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def operations(tensors: Iterable[Tensor | None]) -> Iterator[str]:
    """The names of the backward operations that lead to the tensors, each of them once, such as ``MulBackward0``.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> sorted(operations([2 * x.tanh(), None]))
        ['MulBackward0', 'TanhBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            yield node.name()
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
