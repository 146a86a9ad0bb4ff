"""What an argument must be: rules that refuse in one form of sentence, with the argument, its value and the cure.

    from lightning_plugins.core import arguments as must

    must.check(locals(), dim=must.count, eps=must.positive, mode=must.one_of(Mode), width=must.optional(must.count))

NaN and infinity are no numbers here, nor is a bool; a number's type is asked before its range. Every refusal is a
ValueError, so that a caller has one exception to catch.
"""

import math
import numbers
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

_LONGEST = 200  # characters of a value that a sentence shows
_LARGEST = 2**63 - 1  # torch's integers


@dataclass(eq=False)  # not frozen: torch 2.8 cannot compile what makes a frozen one
class Rule:
    """What one argument must be.

    Attributes:
        holds: whether a value keeps the rule; it may be given anything.
        noun: what is asked for, to follow "must be" or "each".
        short: the same to follow "must", for a value of the right type.
        right_type: whether ``short`` says enough.
        why: the cure or the reason, to follow a colon.
    """

    holds: Callable[[Any], bool]
    noun: str
    short: str = ""
    right_type: Callable[[Any], bool] = lambda value: False
    why: str = ""

    def __call__(self, name: str, value: Any) -> None:
        """Refuse a value.

        Raises:
            ValueError: the value breaks the rule; the sentence names the argument, the value and what it must be.
        """
        if not self.holds(value):
            must = f"must {self.short}" if self.right_type(value) else f"must be {self.noun}"
            said = f"{name} {must}, got {told(value)}" if isinstance(value, Tensor) else f"{name}={told(value)} {must}"
            raise ValueError(f"{said}{self.why and ': ' + self.why}.")


def check(arguments: Mapping[str, Any], /, **rules: Rule) -> None:
    """Refuse the first argument that breaks its rule.

    Args:
        arguments: by name; those without a rule are not looked at.
        **rules: by the argument's name.

    Raises:
        ValueError: see :class:`Rule`.
    """
    for name, rule in rules.items():
        rule(name, arguments[name])


def told(value: Any) -> str:
    """A value as a sentence shows it: on one line and not too long.

    >>> told(10**5000)
    'a whole number of 16610 bits'
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.device.type != "meta":
            return f"{tuple(value.shape)} {value.dtype} of {value.item()}"
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, nn.Module) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, int) and value.bit_length() > 1000:  # Python writes no more than 4,300 digits
        return f"a whole number of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


# Numbers.


def number(
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    why: str = "",
) -> Rule:
    """A finite number of an interval whose ends are included (``least``, ``most``) or not (``above``, ``below``).

    >>> number(0, below=1)("momentum", 1.5)
    Traceback (most recent call last):
    ValueError: momentum=1.5 must lie in [0, 1).
    """
    return _interval(is_number, "a finite number", least, most, above, below, why)


def whole(least: int | None = None, most: int | None = None, *, why: str = "") -> Rule:
    """A whole number, of an interval whose ends are included.

    >>> whole(1, why="the nearest neighbour is 1")("k", 0)
    Traceback (most recent call last):
    ValueError: k=0 must be 1 or more: the nearest neighbour is 1.
    """
    return _interval(_is_whole, "a whole number", least, most, None, None, why)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, of Python or numpy, that torch can take."""
    if isinstance(value, numbers.Integral):
        return _is_whole(value)
    return isinstance(value, numbers.Real) and abs(float(value)) < math.inf  # torch.compile has no isfinite


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) <= _LARGEST


def _interval(
    fits: Callable[[Any], bool],
    noun: str,
    least: float | None,
    most: float | None,
    above: float | None,
    below: float | None,
    why: str,
) -> Rule:
    low = least if above is None else above
    high = most if below is None else below

    def holds(value: Any) -> bool:
        return (
            fits(value)
            and (low is None or value > low or (value == low and above is None))
            and (high is None or value < high or (value == high and below is None))
        )

    if low is None and high is None:
        return Rule(holds, noun, why=why)
    if high is None:
        words = ("above 0", "be positive") if above == 0 else (f"above {low}", f"be above {low}")
        words = words if least is None else (f"of {low} or more", f"be {low} or more")
    elif low is None:
        words = (f"of {high} or less", f"be {high} or less") if below is None else (f"below {high}", f"be below {high}")
    else:
        span = f"in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
        words = (span, f"lie {span}")
    return Rule(holds, f"{noun} {words[0]}", words[1], fits, why)


finite = number()
positive = number(above=0)
non_negative = number(0)
share = number(0, 1)
proportion = number(above=0, below=1)
count = whole(1)
seed = whole()


# Other values.

flag = Rule(lambda value: isinstance(value, bool), "True or False")
text = Rule(lambda value: isinstance(value, str), "a text")
word = Rule(lambda value: isinstance(value, str) and bool(value.strip()), "a text that is not empty")
path = Rule(lambda value: isinstance(value, str | os.PathLike) and bool(os.fspath(value)), "a path that is not empty")
function = Rule(callable, "a function or a class")


def instance(kind: type, noun: str) -> Rule:
    """An object of a class."""
    return Rule(lambda value: isinstance(value, kind), noun)


def one_of(choices: Any, *, why: str = "") -> Rule:
    """One of the values of a Literal or of a collection.

    >>> one_of(["linear", "slerp"])("mode", "cubic")
    Traceback (most recent call last):
    ValueError: mode='cubic' must be one of linear, slerp.
    """
    known = tuple(choices) if isinstance(choices, Collection) else get_args(choices)
    listed = ", ".join(map(str, known))

    def holds(value: Any) -> bool:
        return any((type(value) is type(one) or _are_texts(value, one)) and value == one for one in known)

    return Rule(holds, f"one of {listed}", why=why)


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)  # of numpy and of an Enum, too


def optional(rule: Rule) -> Rule:
    """None, or what the rule asks."""
    return replace(rule, holds=lambda value: value is None or rule.holds(value))


def several(rule: Rule, *, why: str = "") -> Rule:
    """One value that keeps the rule, or a list of such.

    >>> several(count)("k", 0)
    Traceback (most recent call last):
    ValueError: k=0 must be 1 or more, or several such numbers.
    """
    many, more = each(rule), ", or several such numbers"
    return replace(
        rule, holds=lambda value: rule.holds(value) or many.holds(value), noun=rule.noun + more,
        short=rule.short + more, why=why,
    )  # fmt: skip


def each(rule: Rule, length: int | None = None, *, of: str = "a list", empty: bool = False, why: str = "") -> Rule:
    """A list or tuple whose every item keeps the rule.

    >>> each(count, 3, of="(C, H, W)")("image_shape", [1, 28, 0])
    Traceback (most recent call last):
    ValueError: image_shape=[1, 28, 0] must be (C, H, W), each a whole number of 1 or more.
    """

    def holds(value: Any) -> bool:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return False
        fits = len(value) == length if length is not None else empty or len(value) > 0
        return fits and all(map(rule.holds, value))

    return Rule(holds, f"{of}, each {rule.noun}", why=why)


module = instance(nn.Module, "a torch module")
mapping = instance(Mapping, "a dict")
generator = instance(torch.Generator, "a torch.Generator")
image_shape = each(count, 3, of="(C, H, W)")


# Tensors.


def tensor(shape: str | None = None, *, dtype: str = "floating", noun: str = "", why: str = "") -> Rule:
    """A tensor with as many dimensions as the shape has letters (``"(B, ..., D)"``: or more), of a kind of numbers.

    Args:
        shape: such as ``"(N, d)"``; None for any.
        dtype: ``floating``, ``integer`` (or bool) or ``any``.
        noun: what it holds; "a tensor" by default.
        why: see :class:`Rule`.
    """
    kinds: dict[str, Callable[[Tensor], bool]] = {
        "floating": Tensor.is_floating_point,
        "integer": lambda value: not (value.is_floating_point() or value.is_complex()),
        "any": lambda value: True,
    }
    letters = [] if shape is None else [letter for letter in shape.strip("()").split(",") if letter.strip()]
    open_end = any("..." in letter for letter in letters)
    dims = len(letters) - open_end

    def holds(value: Any) -> bool:
        if not isinstance(value, Tensor) or not kinds[dtype](value):
            return False
        return shape is None or value.ndim == dims or (open_end and value.ndim > dims)

    kind = {"floating": "a floating-point tensor", "integer": "an integer tensor", "any": "a tensor"}[dtype]
    return Rule(holds, f"{noun or kind}{'' if shape is None else f' {shape}'}", why=why)


codes = tensor("(N, d)", noun="floating-point codes", why="flatten and widen")


def class_labels(labels: Tensor, number: int, num_classes: int) -> None:
    """Refuse what is not the class of each of ``number`` images.

    Raises:
        ValueError: another shape or dtype, or a class that there is not; reading it waits for the device.
    """
    whole_numbers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole_numbers or labels.shape != (number,):
        raise ValueError(f"labels must be ({number},) int64, a class for each image, got {told(labels)}.")
    if number and not 0 <= (low := int(labels.min())) <= (high := int(labels.max())) < num_classes:
        raise ValueError(f"labels run from {low} to {high}: they must be 0 to {num_classes - 1}.")
