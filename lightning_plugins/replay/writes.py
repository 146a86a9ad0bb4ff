"""Whether a run of a module writes to tensors that nobody puts back: trained ones, and such as are too many to save."""

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_plugins.core.vectors import local

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FEW = 4  # places along each dimension, about, at which a tensor is looked at every time
_looks: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
_suspected: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class Marks:
    """What tensors are like before a run of the module, to be compared with what they are after it.

    Of ``fixed`` tensors each run looks at the versions that torch counts, at addresses, and at some numbers of each,
    since torch does not count what is written by way of ``.data``. The sum of all bits, also of ``trained`` tensors, is
    taken in the first look at a module, the second, fourth, eighth and so on, and in that after a trained tensor's
    version has changed (which embeddings with a ``max_norm`` do without changing a number).

    Args:
        module: the module that will run.
        fixed: tensors that may not be written to.
        trained: those of which their optimizer alone may change the numbers.
    """

    def __init__(self, module: nn.Module, fixed: Sequence[Tensor], trained: Sequence[Tensor] = ()) -> None:
        self._module, self._fixed, self._trained = module, list(fixed), [p for p in trained if not is_lazy(p)]
        if not self._fixed and not self._trained:
            return
        looks = _looks[module] = _looks.get(module, 0) + 1
        self._sums_up = looks & (looks - 1) == 0 or _suspected.pop(module, False)
        self._versions = _versions(self._trained)
        self._before = self._look()

    def _look(self) -> tuple[list[Any], list[Any]]:
        plain = [_memory(t) for t in self._fixed if _is_plain(t)]
        fixed = [*_versions(self._fixed), *(t.data_ptr() for t in plain), *map(_sample, plain)]
        if not self._sums_up:
            return fixed, []
        return fixed + [_sum(t) for t in plain], [_sum(_memory(t)) for t in self._trained if _is_plain(t)]

    def written(self) -> Literal["fixed", "trained"] | None:
        """Which of the tensors were written to since."""
        if not self._fixed and not self._trained:
            return None
        if _versions(self._trained) != self._versions:
            _suspected[self._module] = True
        fixed, trained = (_same(a, b) for a, b in zip(self._before, self._look(), strict=True))
        return None if fixed and trained else ("trained" if fixed else "fixed")


def _same(before: list[Any], after: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _memory(tensor: Tensor) -> Tensor:
    return local([tensor.detach()])[0]


def is_opaque(tensor: Tensor) -> bool:
    """Whether it is made of other tensors, as quantised weights are; a shard of a sharded one is plain."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie in memory as they are."""
    return tensor.layout == torch.strided and not (is_opaque(tensor) or tensor.is_nested or tensor.is_quantized)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's memory as integers: zeros of two signs differ, and NaN equals itself."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.view(_BITS[tensor.element_size()])


def _sample(tensor: Tensor) -> Tensor:
    return bits(tensor[tuple(slice(None, None, max(1, size // _FEW)) for size in tensor.shape)]).clone()


def _sum(tensor: Tensor) -> Tensor:
    """Of all bits: one number that changes changes it."""
    return bits(tensor).sum()
