"""Check plain values against type annotations. An annotation is an `ast` node, so nothing has to be imported.

Supported: int float bool str None Any, X | Y, Optional, Union, Literal, list/Sequence/Iterable/tuple/dict/Mapping, paths, and the ranged names
of RANGES. Any other name accepts every value, so that no valid configuration is refused.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

LARGEST = 2**63  # random seeds and tensor sizes must fit int64
# name -> (whether fractions are allowed, range check, description)
RANGES: dict[str, tuple[bool, Callable[[float], bool], str]] = {
    "int": (False, lambda x: abs(x) < LARGEST, "a whole number"),
    "float": (True, lambda x: True, "a number"),
    "PositiveInt": (False, lambda x: 1 <= x < LARGEST, "a whole number of at least 1"),
    "Count": (False, lambda x: 0 <= x < LARGEST, "a whole number of at least 0"),
    "PositiveFloat": (True, lambda x: x > 0, "a number above 0"),
    "NonNegativeFloat": (True, lambda x: x >= 0, "a number of at least 0"),
    "Share": (True, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
}
LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "set", "Set", "frozenset"}
DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}
TEXTS = {"str", "Path", "PathLike", "StrPath"}


def parse(annotation: str | None) -> ast.expr | None:
    return None if annotation is None else ast.parse(annotation, mode="eval").body


def fits(value: Any, annotation: ast.expr | None) -> bool:
    """Whether the plain value (None, bool, number, text, list, dict) fits the annotation."""
    if annotation is None:
        return True
    options = _options(annotation)
    if options is not None:
        return any(fits(value, option) for option in options)
    name, arguments = _split(annotation)
    if name == "None":
        return value is None
    if name == "Literal":
        return any(type(value) is type(choice) and value == choice for choice in literals(annotation))
    if name == "bool":
        return isinstance(value, bool)
    if name in RANGES:
        fractional, inside, _ = RANGES[name]
        return isinstance(value, (int, float) if fractional else int) and not isinstance(value, bool) and inside(value)
    if name in TEXTS:
        return isinstance(value, str)
    if name in LISTS:
        return isinstance(value, list) and (not arguments or all(fits(item, arguments[0]) for item in value))
    if name in {"tuple", "Tuple"}:
        return isinstance(value, list) and _fits_tuple(value, arguments)
    if name in DICTS:
        return isinstance(value, dict) and (len(arguments) < 2 or all(fits(item, arguments[1]) for item in value.values()))
    return True


def describe(annotation: ast.expr | None) -> str:
    """Describe the annotation for a message: `a whole number of at least 1 or null`."""
    if annotation is None:
        return "anything"
    options = _options(annotation)
    if options is not None:
        return " or ".join(dict.fromkeys(describe(option) for option in options))
    name, arguments = _split(annotation)
    if name == "Literal":
        choices = [str(choice) for choice in literals(annotation)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if name in RANGES:
        return RANGES[name][2]
    if name in LISTS | {"tuple", "Tuple"}:
        inner = describe(arguments[0]) if arguments else ""
        return f"a list of {inner.removeprefix('a ')}" if inner else "a list"
    if name in DICTS:
        return "a group of settings"
    return {"None": "null", "bool": "true or false", "str": "text"}.get(name, "text" if name in TEXTS else name or "anything")


def literals(annotation: ast.expr | None) -> list[Any]:
    """Return every value listed by a `Literal` anywhere in the annotation."""
    if annotation is None:
        return []
    found: list[Any] = []
    for option in _options(annotation) or [annotation]:
        name, arguments = _split(option)
        if name == "Literal":
            found += [_constant(argument) for argument in arguments]
        elif option is not annotation:
            found += literals(option)
    return found


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)  # handles -1 too, which is not an ast.Constant
    except ValueError:  # a name, such as an enum member, which no plain value equals
        return ast.unparse(node)


def _fits_tuple(value: list[Any], arguments: list[ast.expr]) -> bool:
    if not arguments:
        return True
    if len(arguments) == 2 and isinstance(arguments[1], ast.Constant) and arguments[1].value is Ellipsis:
        return all(fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(fits(item, argument) for item, argument in zip(value, arguments, strict=True))


def _options(annotation: ast.expr) -> list[ast.expr] | None:
    """Return the members of a union or the content of a quoted annotation; None for a single type."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [annotation.left, annotation.right]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return [ast.parse(annotation.value, mode="eval").body]
        except SyntaxError:
            return None
    name, arguments = _split(annotation)
    if name == "Optional" and arguments:
        return [arguments[0], ast.Constant(None)]
    if name == "Union" and arguments:
        return arguments
    if name == "Annotated" and arguments:
        return arguments[:1]
    return None


def _split(annotation: ast.expr) -> tuple[str, list[ast.expr]]:
    """`typing.List[int]` -> ("List", [int])."""
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        return _split(annotation.value)[0], list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
    if isinstance(annotation, ast.Attribute):
        return annotation.attr, []
    if isinstance(annotation, ast.Name):
        return annotation.id, []
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return "None", []
    return "", []
