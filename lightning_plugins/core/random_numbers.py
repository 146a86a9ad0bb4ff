"""Random numbers that depend on integers alone: a hash of keys, the same in any process, order or batch."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's step


_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 that has the same 64 bits as the unsigned ``x``."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # torch's >> copies the sign bit in; splitmix64 wants zeros


def hash_keys(keys: Tensor, seed: int, stream: int = 0) -> Tensor:
    r"""Hash integers to 63 uniform bits: output number ``key`` of the splitmix64 generator of (seed, stream).

    A counter-based generator: any output is reached without those before it, and int64 arithmetic wraps modulo
    :math:`2^{64}` as the algorithm wants.

    Args:
        keys: ``(...)`` int64.
        seed: any integer.
        stream: one number for each independent use (shift, partner, ...).

    Returns:
        ``(...)`` int64 in :math:`[0, 2^{63})`.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    start = _mix(_mix(torch.tensor(_signed(int(seed) * _GOLDEN), device="cpu")) + _signed((stream + 1) * _GOLDEN))
    return _shift_right(_mix(start + keys * _signed(_GOLDEN)), 1)


def _mix(x: Tensor) -> Tensor:
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_signed(0xBF58476D1CE4E5B9))  # in place: memory is what it costs
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_signed(0x94D049BB133111EB))
    return _shift_right(x, 31).bitwise_xor_(x)


def random_integers(keys: Tensor, high: int | Tensor, seed: int, stream: int = 0) -> Tensor:
    """Uniform integers in ``[0, high)``, one for each key.

    Args:
        keys: ``(...)`` int64.
        high: exclusive bound, positive and below 2^31; a number, or one for each key.
        seed: any integer.
        stream: one number for each independent use.

    Returns:
        ``(...)`` int64.
    """
    return (_shift_right(hash_keys(keys, seed, stream), 31) * high) >> 32  # 32 bits times 31 bits fit in an int64


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """Random numbers that depend on integers alone: a seed, a step, a rank and the like.

    Args:
        device: of the draws.
        numbers: any integers; others, or the same ones in another order, give other draws.

    Example:
        >>> one, same = generator("cpu", 7, 1), generator("cpu", 7, 1)
        >>> torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=same))
        True
    """
    # Hashed, because torch's generator on a CPU reads the lower half of its seed alone.
    return torch.Generator(device).manual_seed(_hash_numbers(*numbers) >> 1)


def _hash_numbers(*numbers: int) -> int:
    state = 0
    for number in numbers:
        state = _mix_integer((state + _GOLDEN * (number + 1)) & _MASK)
    return state


def _mix_integer(x: int) -> int:
    """As :func:`_mix`, for one unsigned number: some forty operations on tensors would cost more than its draws."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


class RowGenerator(torch.Generator):
    """Random numbers of a batch's rows, those of a row by its key: the same in any batch and on any process.

    :func:`rand`, :func:`randn` and :func:`randint` of this file draw by it, each time anew: element j of a row is a
    hash of (numbers, key, how many draws came before, j), whatever the other rows and the row's length. For torch's
    own functions it is a :func:`generator` of the numbers, which knows no rows.

    Args:
        keys: ``(B,)`` int64, a key for each row, on the device of the draws.
        numbers: any integers, such as a seed and a step; others give other draws.

    Example:
        >>> whole = rand((3, 2), RowGenerator(torch.tensor([4, 5, 6]), 7))
        >>> torch.equal(rand((1, 2), RowGenerator(torch.tensor([5]), 7)), whole[1:2])
        True
    """

    def __new__(cls, keys: Tensor, *numbers: int) -> "RowGenerator":
        """On the keys' device."""
        return cast(Any, super()).__new__(cls, keys.device)  # torch's stub has no such argument

    def __init__(self, keys: Tensor, *numbers: int) -> None:
        state = _hash_numbers(*numbers)
        self.manual_seed(state >> 1)
        self._rows = _mix(keys * _signed(_GOLDEN) + _signed(state))
        self._draws = 0

    def bits(self, shape: Sequence[int]) -> Tensor:
        """The next draw: 64 random bits for each element of ``shape``, whose first number is B, as int64."""
        self._draws += 1
        row = _mix(self._rows + _signed(self._draws * _GOLDEN))
        place = torch.arange(1, 1 + math.prod(shape[1:]), device=row.device)
        return _mix(row[:, None] + place * _signed(_GOLDEN)).view(*shape)


def rand(shape: Sequence[int], source: torch.Generator | None, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        shape: of the result; by a :class:`RowGenerator` its first number is that of the rows.
        source: where the numbers come from, drawn on its device; torch's global generator by default.
        device: where they are wanted; by default where they are drawn.
    """
    if not isinstance(source, RowGenerator):
        return torch.rand(*shape, generator=source, device=_device(source, device)).to(device)
    if torch.get_default_dtype() == torch.float64:
        return (_shift_right(source.bits(shape), 11).double() * 2**-53).to(device)
    return (_shift_right(source.bits(shape), 40).float() * 2**-24).to(device)


def randn(
    shape: Sequence[int],
    source: torch.Generator | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers of N(0, 1), of torch's default type or another; for the other arguments see :func:`rand`.

    Source: of rows by Box and Muller 1958: the radius of 32 bits, no number beyond 6.8, and the angle of 32.
    """
    dtype = dtype or torch.get_default_dtype()
    if not isinstance(source, RowGenerator):
        return torch.randn(*shape, generator=source, device=_device(source, device), dtype=dtype).to(device)
    bits, wide = source.bits(shape), torch.promote_types(dtype, torch.float32)
    radius = _shift_right(bits, 32).to(wide).add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFFFF).to(wide).mul_(math.tau * 2**-32)
    return angle.cos_().mul_(radius).to(device, dtype)


def randint(
    high: int, shape: Sequence[int], source: torch.Generator | None, device: torch.device | str | None = None
) -> Tensor:
    """Uniform int64 in ``[0, high)``, with ``high`` below 2^31; for the other arguments see :func:`rand`."""
    if not isinstance(source, RowGenerator):
        return torch.randint(high, tuple(shape), generator=source, device=_device(source, device)).to(device)
    return ((_shift_right(source.bits(shape), 32) * high) >> 32).to(device)


def _device(source: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    return device if source is None else source.device
