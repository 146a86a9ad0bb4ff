"""Which tests compare floating-point results: seen from what they call."""

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

_COMPARISONS = {"assert_close", "assert_allclose", "allclose", "approx", "isclose", "equal", "gradcheck"}
_READINGS = {"item", "abs", "norm", "mean", "std", "var", "max", "isfinite", "cosine_similarity", "corrcoef"}


def compares_numbers(test: Any) -> bool:
    """Whether a test, or what it calls in its file, names a usual comparison or reads a number off a tensor."""
    test = getattr(getattr(test, "hypothesis", None), "inner_test", test)
    todo, seen = [test.__code__], set()
    while todo:
        code = todo.pop()
        if not (_COMPARISONS | _READINGS).isdisjoint(code.co_names):
            return True
        seen.add(code)
        named = (test.__globals__.get(name) for name in code.co_names)
        inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        inner += [part for value in named for part in _codes(value, test.__module__)]
        todo += [part for part in inner if part not in seen]
    return False


def _codes(value: Any, module: str) -> Iterator[CodeType]:
    """A function's, or those of the methods of a class of this file."""
    functions = vars(value).values() if isinstance(value, type) and value.__module__ == module else [value]
    yield from (function.__code__ for function in functions if isinstance(function, FunctionType))
