"""Read the parameters of a class or function from its source with `ast`: importing it would import torch, which takes 1 to 5 seconds.

Follows `from x import y`, aliases, star imports, base classes, dataclasses, and lazy packages (PEP 562: a name -> module table in `__init__.py`).
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MAX_DEPTH = 12  # limit on re-exports and base classes, to end import cycles


@dataclass(frozen=True)
class Parameter:
    annotation: ast.expr | None
    required: bool
    default: ast.expr | None = None


@dataclass(frozen=True)
class Signature:
    """`module` defines the target. `open_ended`: it takes **kwargs, or its bases could not be read, so unknown arguments may be valid."""

    module: str
    is_class: bool
    parameters: dict[str, Parameter]
    open_ended: bool


class TargetNotFound(LookupError):
    """There is no such module, or no such name in it; `known` lists the names for a suggestion."""

    def __init__(self, message: str, known: list[str]) -> None:
        super().__init__(message)
        self.known = known


def signature(target: str) -> Signature:
    """Return the signature of `target`, a dotted path. Raises TargetNotFound."""
    module, _, name = target.rpartition(".")
    if not module or module_file(module) is None:
        raise TargetNotFound(f"there is no module {module or target}", [])
    found = _find(module, name)
    if found is None:
        raise TargetNotFound(f"{module} has no {name}", public_names(module))
    where, node = found
    if isinstance(node, ast.ClassDef):
        parameters, open_ended = _class_parameters(where, node)
    else:
        parameters, open_ended = _function_parameters(node, skip_first=False)
    return Signature(where, isinstance(node, ast.ClassDef), parameters, open_ended)


def defaults(target: str) -> dict[str, Any]:
    """Return the defaults of `target`'s arguments that are literals; empty if there is no such class or function."""
    with suppress(TargetNotFound):
        return _plain_values(signature(target))
    return {}


def _plain_values(found: Signature) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, parameter in found.parameters.items():
        with suppress(ValueError):
            values |= {} if parameter.default is None else {name: ast.literal_eval(parameter.default)}
    return values


def method(target: str, name: str) -> Signature | None:
    """Return the signature of the method `name` of the class `target`, own or inherited; None if none is found in readable source."""
    module, _, called = target.rpartition(".")
    found = _find(module, called)
    for _ in range(MAX_DEPTH):
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        where, node = found
        own = next((s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == name), None)
        if own is not None:
            parameters, open_ended = _function_parameters(own, skip_first=True)
            return Signature(where, False, parameters, open_ended)
        found = next((base for base in (_find_dotted(where, ast.unparse(b)) for b in node.bases) if base is not None), None)
    return None


def declares(target: str, name: str) -> bool:
    """Whether the class `target` has `name`: assigned in the class body, assigned to `self` in a method, or defined as a method or property.

    The nearest class with a readable source that mentions it decides; `name = None` counts as not having it.
    """
    for _, node in _lineage(target):
        said = _declared(node, name)
        if said is not None:
            return said
    return False


def attribute(target: str, name: str, default: Any = None) -> Any:
    """Return the literal that the class `target`, or its nearest readable base class, assigns to `name` in its body.

    Returns `default` if none does or the value is not a literal.
    """
    for _, node in _lineage(target):
        for value in reversed(_assigned(node, name)):
            try:
                return ast.literal_eval(value)
            except ValueError:
                return default
    return default


def _lineage(target: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield (module, class) for the class and its bases, each once, depth first from the left."""
    module, _, called = target.rpartition(".")
    seen: set[tuple[str, str]] = set()
    stack = [_find(module, called)]
    while stack:
        where, node = stack.pop() or ("", None)
        if not isinstance(node, ast.ClassDef) or (where, node.name) in seen:
            continue
        seen.add((where, node.name))
        yield where, node
        stack.extend(_find_dotted(where, ast.unparse(b.value if isinstance(b, ast.Subscript) else b)) for b in reversed(node.bases))


def _assigned(node: ast.ClassDef, name: str) -> list[ast.expr]:
    """Return the expressions that the class body assigns to `name`, in order."""
    return [
        statement.value
        for statement in node.body
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None
        for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        if isinstance(target, ast.Name) and target.id == name
    ]


def _declared(node: ast.ClassDef, name: str) -> bool | None:
    """Whether the class body defines `name`; None if the body does not mention it."""
    if any(isinstance(one, ast.FunctionDef) and (one.name == name or _sets(one, name)) for one in node.body):
        return True
    values = _assigned(node, name)
    return not (isinstance(values[-1], ast.Constant) and values[-1].value is None) if values else None


def _sets(method: ast.FunctionDef, name: str) -> bool:
    """Whether the method assigns to `self.name`."""
    return any(
        isinstance(one, ast.Attribute) and one.attr == name and isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == "self"
        for one in ast.walk(method)
    )


def module_file(module: str) -> Path | None:
    """Return the source file of a module. Only the top-level package goes through the import system, where a lookup executes no code."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for part in rest:
        candidates = [path for folder in folders for path in (folder / part / "__init__.py", folder / f"{part}.py")]
        file = next((path for path in candidates if path.is_file()), None)
        if file is None:
            return None
        folders = [file.parent] if file.name == "__init__.py" else []
    return file


def public_names(module: str) -> list[str]:
    """Return the names a user could mean in this module: those it defines, imports by name, or serves lazily."""
    names: set[str] = set()
    for statement in _statements(module):
        if isinstance(statement, Definition):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in statement.names)
    names.update(name for table in _lazy_tables(module) for name in table)
    return sorted(name for name in names if not name.startswith("_") and name not in {"*", "annotations"})


def _tree(module: str) -> ast.Module | None:
    file = module_file(module)
    return None if file is None else _parsed(file, file.stat().st_mtime_ns)


@cache
def _parsed(file: Path, changed: int) -> ast.Module | None:
    """Parse a file. `changed`, its modification time, is part of the cache key, so that a notebook sees edits."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None


def _statements(module: str) -> Iterator[ast.stmt]:
    tree = _tree(module)
    stack: list[ast.stmt] = list(reversed(tree.body)) if tree else []
    while stack:
        statement = stack.pop()
        yield statement
        if isinstance(statement, ast.If):
            stack.extend(reversed(statement.body + statement.orelse))
        elif isinstance(statement, ast.Try):
            stack.extend(reversed(statement.body + [s for handler in statement.handlers for s in handler.body] + statement.orelse))


def _find(module: str, name: str, depth: int = 0) -> tuple[str, Definition] | None:
    """Return the defining module and the definition of `module.name`."""
    if depth > MAX_DEPTH:
        return None
    found: tuple[str, Definition] | None = None
    for statement in _statements(module):
        if isinstance(statement, Definition) and statement.name == name:
            found = module, statement
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    found = _find(_absolute(module, statement), name if alias.name == "*" else alias.name, depth + 1) or found
        elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name) and statement.value.id != name:
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            found = (_find(module, statement.value.id, depth + 1) if name in names else None) or found
    return found or _find_lazily(module, name, depth)


def _find_lazily(module: str, name: str, depth: int) -> tuple[str, Definition] | None:
    for table in _lazy_tables(module):
        for source in (f"{module}.{table[name].lstrip('.')}", table[name]) if name in table else ():
            if module_file(source) is not None:
                return _find(source, name, depth + 1)
    return None


def _lazy_tables(module: str) -> list[dict[str, str]]:
    """Return the module-level dicts of lazy imports. They map name -> module (`"corpus"`, `".corpus"`, `"package.corpus"`, or a tuple that starts
    with one) or module -> names."""
    tables: list[dict[str, str]] = []
    for statement in _statements(module):
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if not isinstance(value, ast.Dict):
            continue
        table: dict[str, str] = {}
        for key, entry in zip(value.keys, value.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                continue
            texts = [item.value for item in ast.walk(entry) if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            if isinstance(entry, ast.Constant) and texts:
                table[key.value] = texts[0]
            elif module_file(f"{module}.{key.value.lstrip('.')}") is not None:
                table.update(dict.fromkeys(texts, key.value))
            elif texts:
                table[key.value] = texts[0]
        tables.append(table)
    return tables


def _absolute(module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    file = module_file(module)
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(statement.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{statement.module}" if statement.module else package


def _function_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, skip_first: bool) -> tuple[dict[str, Parameter], bool]:
    spec = node.args
    positional = (spec.posonlyargs + spec.args)[1 if skip_first else 0 :]
    given = [None] * (len(positional) - len(spec.defaults)) + spec.defaults[-len(positional) :]
    parameters = {
        argument.arg: Parameter(argument.annotation, required=default is None, default=default)
        for argument, default in zip(positional, given, strict=True)
        if argument not in spec.posonlyargs
    }
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        parameters[argument.arg] = Parameter(argument.annotation, required=default is None, default=default)
    return parameters, spec.kwarg is not None


def _class_parameters(module: str, node: ast.ClassDef, depth: int = 0) -> tuple[dict[str, Parameter], bool]:
    own = next((s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if own is not None:
        parameters, open_ended = _function_parameters(own, skip_first=True)
        if not open_ended:
            return parameters, False
        inherited, _ = _base_parameters(module, node, depth)
        return {**inherited, **parameters}, True  # **kwargs are usually passed to the base class, so its types apply
    inherited, open_ended = _base_parameters(module, node, depth)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = {
            s.target.id: Parameter(s.annotation, required=s.value is None, default=s.value)
            for s in node.body
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and "ClassVar" not in ast.unparse(s.annotation)
        }
        return {**inherited, **fields}, open_ended
    return inherited, open_ended


def _base_parameters(module: str, node: ast.ClassDef, depth: int) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters of the first base class that has any; a base that cannot be read makes the signature open-ended."""
    for base in node.bases:
        dotted = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if dotted.rpartition(".")[2] in {"object", "Generic", "Protocol", "ABC"}:
            continue
        where, definition = (_find_dotted(module, dotted) if depth < MAX_DEPTH else None) or ("", None)
        if not isinstance(definition, ast.ClassDef):
            return {}, True
        parameters, open_ended = _class_parameters(where, definition, depth + 1)
        if parameters or open_ended:
            return parameters, open_ended
    return {}, False


def _find_dotted(module: str, dotted: str) -> tuple[str, Definition] | None:
    """Find a dotted name, such as `nn.Module`, as written inside `module`."""
    first, _, rest = dotted.partition(".")
    if not rest:
        return _find(module, first)
    for statement in _statements(module):
        aliases = statement.names if isinstance(statement, ast.Import | ast.ImportFrom) else []
        for alias in aliases:
            if (alias.asname or alias.name.partition(".")[0]) != first:
                continue
            source = (
                f"{_absolute(module, statement)}.{alias.name}" if isinstance(statement, ast.ImportFrom) else alias.asname and alias.name
            )
            prefix, _, name = f"{source or first}.{rest}".rpartition(".")
            return _find(prefix, name)
    return None
