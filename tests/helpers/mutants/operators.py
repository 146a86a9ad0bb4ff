"""Random mutants of a source: cosmic-ray's operators, and what they lack: something left out."""

import ast
import random
from typing import NamedTuple

SILLY = ("Mod", "RShift", "LShift", "BitXor", "FloorDiv")  # what nobody types in place of + - * /


class Mutant(NamedTuple):
    """A wrong product: ``source`` in the place of the file's, which differs from ``line`` on; ``label`` says how.

    ``also``: test files that run in processes of their own, for what only several of them notice.
    """

    file: str
    line: int
    label: str
    source: str
    also: tuple[str, ...] = ()


def sample(file: str, source: str, num: int, seed: int = 0) -> list[Mutant]:
    """Up to ``num`` mutants at different places, each place as likely, whatever the number of changes it allows."""
    places: dict[tuple, list] = {}
    for position, operator, occurrence in _changes(source):
        places.setdefault(position, []).append((operator, occurrence))
    rng = random.Random(f"{seed} {file}")
    found: list[Mutant] = []
    for position in rng.sample(sorted(places), len(places)):
        if len(found) == num:
            break
        mutated = _mutate(source, *rng.choice(places[position]))
        if mutated is not None:
            found.append(Mutant(file, first_change(source, mutated), label(source, mutated), mutated))
    return sorted(found, key=lambda mutant: mutant.line)


def first_change(source: str, mutated: str) -> int:
    """The number of the first line that differs."""
    pairs = zip(source.splitlines(), mutated.splitlines(), strict=False)
    return next((number for number, (old, new) in enumerate(pairs, 1) if old != new), len(source.splitlines()))


def label(source: str, mutated: str) -> str:
    """``old line -> new line``, stripped, of the first line that differs."""
    index = first_change(source, mutated) - 1
    lines = [text.splitlines()[index].strip() for text in (source, mutated)]
    return " -> ".join(" ".join(line.split()) for line in lines)


def _mutate(source, operator, occurrence):
    from cosmic_ray.mutating import mutate_code

    mutated = mutate_code(source, operator, occurrence)
    try:
        same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    return None if same else mutated


def _changes(source):
    """Position, operator and occurrence of every change of code that runs."""
    from cosmic_ray.ast import ast_nodes, get_ast

    tree = get_ast(source)
    for operator in _operators():
        places = ((node, place) for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, (node, position) in enumerate(places):
            if not _never_runs(node):
                yield position, operator, occurrence


def _never_runs(node):
    """Whether it is an annotation, a star of a signature, part of an f-string or under ``if TYPE_CHECKING``."""
    while (parent := node.parent) is not None:
        annotation = parent.type in ("tfpdef", "annassign") and node is parent.children[1 + (parent.type == "tfpdef")]
        result = parent.type == "funcdef" and node is parent.annotation
        checking = parent.type == "if_stmt" and parent.children[1].get_code().strip() == "TYPE_CHECKING"
        star = parent.type == "parameters" and node.type == "operator"
        if annotation or result or checking or star or parent.type == "fstring_expr":
            return True
        node = parent
    return False


def _operators():
    from cosmic_ray.plugins import get_operator, operator_names

    for name in sorted(operator_names()):
        operator = get_operator(name)
        old, new = name.split("_")[-2:] if "Operator_" in name else ("", "")
        silly = new in SILLY or new.startswith("Bit") != old.startswith("Bit") or (old, new) == ("USub", "Not")
        if not operator.arguments() and not silly:
            yield operator()
    yield from map(_left_out, (_method, _call, _keyword, _statement, _value))


def _left_out(rewrites):
    """An operator that puts one of ``rewrites(node)`` in the place of a node."""
    import parso
    from cosmic_ray.operators.operator import Operator

    class LeftOut(Operator):
        def mutation_positions(self, node):
            return [(node.start_pos, (*node.end_pos, text)) for text in rewrites(node)]

        def mutate(self, node, index):
            return parso.parse(node.get_first_leaf().prefix + rewrites(node)[index])

        @classmethod
        def examples(cls):
            return ()

    return LeftOut()


def _trailers(node, opening):
    """Indices of what follows a name or an expression: ``.name``, ``(...)`` or ``[...]``."""
    if node.type not in ("atom_expr", "power"):
        return []
    return [i for i, child in enumerate(node.children) if child.type == "trailer" and child.children[0] == opening]


def _code(nodes):
    return "".join(node.get_code() for node in nodes).strip()


def _method(node):
    """``x.f(...)`` becomes ``x``, where x is no module."""
    found = []
    for i in _trailers(node, "("):
        before = node.children[: i - 1]
        if i < 2 or node.children[i - 1].children[0] != "." or _code(before) in ("self", "cls", "super()"):
            continue
        modules = {str(name.value) for item in node.get_root_node().iter_imports() for name in item.get_defined_names()}
        if _code(before).split(".")[0] not in modules:
            found.append(_code([*before, *node.children[i + 1 :]]))
    return found


def _arguments(trailer):
    inside = trailer.children[1:-1]
    return [n for n in (inside[0].children if inside and inside[0].type == "arglist" else inside) if n != ","]


def _call(node):
    """``f(x, ...)`` becomes ``x``."""
    found = []
    for i in _trailers(node, "("):
        arguments = _arguments(node.children[i])
        if arguments and arguments[0].type not in ("argument", "string"):
            found.append("(" + _code(arguments[:1]) + ")" + _code(node.children[i + 1 :]))
    return found


def _keyword(node):
    """``f(x, a=1)`` becomes ``f(x)``."""
    found = []
    for i in _trailers(node, "("):
        arguments = _arguments(node.children[i])
        for left_out in arguments:
            if left_out.type == "argument" and left_out.children[1] == "=":
                kept = ", ".join(_code([argument]) for argument in arguments if argument is not left_out)
                found.append(_code(node.children[:i]) + f"({kept})" + _code(node.children[i + 1 :]))
    return found


def _statement(node):
    """A call alone on its line, or ``x += ...``, is left out."""
    if node.type != "simple_stmt" or len(node.children) != 2:
        return []
    (only, _) = node.children
    augmented = only.type == "expr_stmt" and only.children[1].type == "augassign"
    return ["pass\n"] if augmented or _trailers(only, "(") else []


def _value(node):
    """``return x`` becomes ``return None``."""
    return ["return None"] if node.type == "return_stmt" and _code(node.children[1:]) != "None" else []
