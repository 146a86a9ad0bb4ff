"""Random numbers that depend on integers alone: a hash of keys, the same in any process, order or batch."""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's step


_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 that has the same 64 bits as the unsigned ``x``."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> copies the sign bit in; splitmix64 wants zeros


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
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


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
    state = 0
    for number in numbers:
        state = _mix_integer((state + _GOLDEN * (number + 1)) & _MASK)
    return torch.Generator(device).manual_seed(state >> 1)


def _mix_integer(x: int) -> int:
    """As :func:`_mix`, for one unsigned number: some forty operations on tensors would cost more than its draws."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
