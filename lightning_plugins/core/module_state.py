"""What a module keeps from call to call besides its parameters: buffers and attributes, saved and put back."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

_NOT_STATE = {*nn.Module().__dict__, "log", "log_dict", "training_step"}  # torch's own, and what a replay puts there
_CONTAINERS = (list, dict, set, deque)
_LARGEST = 2**20  # elements of a tensor that is a plain attribute; larger ones are data, not state


class ModuleState:
    """The buffers and attributes of a module and its parts at one time: the objects themselves, and their values.

    Of attributes that are lists, dicts, sets or deques the entries are saved, not what is within these; of others the
    reference. torchmetrics are left alone: their states may be shared.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        plain = [part for part in parts if not isinstance(part, Metric)]
        self._buffers = [(part._buffers, dict(part._buffers)) for part in parts]
        self._attributes = [(part.__dict__, _state(part)) for part in plain]
        held = [value for _, named in self._attributes for value in named.values()]
        tensors = [b for _, named in self._buffers for b in named.values() if b is not None]
        tensors += [value for value in held if type(value) is Tensor and value.numel() <= _LARGEST]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors if _can_be_written(tensor)]
        self._entries = [(value, value.copy()) for value in held if type(value) in _CONTAINERS]

    def restore(self) -> None:
        """Put everything back, also what torch wrote without counting, as batch norm does."""
        for owner, named in self._buffers:
            owner.clear()
            owner.update(named)
        for owner, named in self._attributes:
            for name in owner.keys() - named.keys() - _NOT_STATE:
                del owner[name]
            owner.update((name, value) for name, value in named.items() if owner.get(name) is not value)
        for container, entries in self._entries:
            container.clear()
            container.extend(entries) if isinstance(container, list | deque) else container.update(entries)
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back on leaving, and hide from graphs yet to be differentiated that tensors were written."""
        with ExitStack() as stack:
            for tensor, _ in self._tensors:
                stack.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
            stack.callback(self.restore)
            yield


def _state(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in part.__dict__.items() if name not in _NOT_STATE}


def _can_be_written(tensor: Tensor) -> bool:
    """Whether a module may write to it in place: not if it is of inference mode, of a graph, or expanded."""
    if tensor.is_inference() or tensor.grad_fn is not None:
        return False
    return tensor.layout != torch.strided or all(
        stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
