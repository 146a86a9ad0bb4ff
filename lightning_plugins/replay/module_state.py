"""What a module keeps from call to call besides its parameters: buffers and attributes, saved and put back."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torchmetrics import Metric

from lightning_plugins.core.vectors import norm

_NOT_STATE = {*nn.Module().__dict__, "log", "log_dict", "training_step"}  # torch's own, and what a replay puts there
_CONTAINERS = (list, dict, set, deque)
_MOST_FROZEN = 2**24  # elements of all frozen parameters that are saved for each call, 64 MB in fp32
_LARGEST = 2**20  # elements of a tensor that is a plain attribute; larger ones are data, not state


class ModuleState:
    """The buffers and attributes of a module and its parts at one time: the objects themselves, and their values.

    Of attributes that are lists, dicts, sets or deques the entries are saved, not what is within these; of others the
    reference. torchmetrics are left alone: their states may be shared. Frozen parameters count as state, such as a
    teacher's that follows by running means, unless they are many: then nothing may write to them.

    Args:
        module: the module whose state is kept, with all its parts.
        frozen: whether to keep frozen parameters.
        attributes: whether to keep attributes that are neither parameters, buffers nor parts.
    """

    def __init__(self, module: nn.Module, frozen: bool = True, attributes: bool = True) -> None:
        parts = list(module.modules())
        plain = [part for part in parts if attributes and not isinstance(part, Metric)]
        self._buffers = [(part._buffers, dict(part._buffers)) for part in parts]
        self._attributes = [(part.__dict__, _state(part)) for part in plain]
        held = [value for _, named in self._attributes for value in named.values()]
        tensors = [b for _, named in self._buffers for b in named.values() if b is not None]
        fixed = [param for param in module.parameters() if frozen and not param.requires_grad]
        self._many = fixed if sum(p.numel() for p in fixed) > _MOST_FROZEN else []
        tensors += [] if self._many else fixed
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
        """Put everything back on leaving, and hide from graphs yet to be differentiated that tensors were written.

        Raises:
            RuntimeError: one of many frozen parameters was written to.
        """
        lengths = [norm([param]) for param in self._many]
        with ExitStack() as stack:
            for tensor, _ in self._tensors:
                stack.enter_context(_unsafe_preserve_version_counter(tensor))
            stack.callback(self.restore)
            yield
        if any(norm([param]) != length for param, length in zip(self._many, lengths, strict=True)):
            raise RuntimeError(
                "training_step writes to parameters that are not trained, and running it again has moved them twice: "
                "move them in on_train_batch_end, as a teacher that follows the trained parameters."
            )


def _state(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in part.__dict__.items() if name not in _NOT_STATE}


def _can_be_written(tensor: Tensor) -> bool:
    """Whether a module may write to it in place: not if it is of inference mode, of a graph, or expanded."""
    if tensor.is_inference() or tensor.grad_fn is not None:
        return False
    return tensor.layout != torch.strided or all(
        stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
