"""Parser for the calls in recipes, such as "Conv2d(1, 6, 5), Tanh()". Nothing is run as Python code."""

import ast
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from tinycnn.errors import RecipeError


def evaluate_calls(text: str, names: Mapping[str, Any], location: str, line: int = 1) -> list[Any]:
    """A list with the value of each call in `text`.

    names: the functions and values that the text may use    location, line: position of the text for messages
    Arguments are numbers, strings, booleans, None, tuples, lists, calls and names.
    Raises RecipeError, with the line, for anything else and for a call that fails.
    """
    try:
        return _values(text, names, location, line)
    except (RecursionError, MemoryError):  # depends on the version of Python
        raise RecipeError(f"{location}, line {line}: it is nested too deeply") from None


def _values(text: str, names: Mapping[str, Any], location: str, line: int) -> list[Any]:
    try:
        tree: Any = ast.parse(f"[{text}\n]", mode="eval").body
    except ValueError as error:  # a null byte in the text
        raise RecipeError(f"{location}, line {line}: {error}") from None
    except SyntaxError as error:
        lines = text.splitlines() or [""]
        offset = (error.lineno or 1) - 1
        if offset < len(lines):
            raise RecipeError(
                f"{location}, line {line + offset}: {error.msg} in {lines[offset].strip()[:80]!r}"
            ) from None
        raise RecipeError(f"{location}, line {line}: a bracket is not closed") from None

    def error_at(node: ast.expr, problem: str) -> RecipeError:
        return RecipeError(f"{location}, line {line + node.lineno - 1}: {problem}")

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = lookup(node.func)
            if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
                raise error_at(node, f"{node.func.id}(...) may not unpack arguments")
            args, options = [value(a) for a in node.args], {str(k.arg): value(k.value) for k in node.keywords}
            try:
                return function(*args, **options)
            except (RecipeError, RecursionError):
                raise
            except Exception as error:  # arbitrary arguments can raise anything
                raise error_at(node, f"{_source(node)}: {error or type(error).__name__}") from None
        if isinstance(node, ast.Name):
            return lookup(node)
        if isinstance(node, (ast.Tuple, ast.List)):
            return tuple(value(item) for item in node.elts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = value(node.operand)
            if isinstance(number, (int, float)):
                return -number
        if isinstance(node, ast.Constant):
            return node.value
        raise error_at(node, f"{_source(node)!r} is neither a call nor a plain value")

    def lookup(node: ast.Name) -> Any:
        if node.id not in names:
            raise error_at(node, f"unknown name {node.id!r}{suggest(node.id, names)}")
        return names[node.id]

    for node in tree.elts:
        if isinstance(node, ast.Name):
            lookup(node)
            raise error_at(node, f"{node.id} must be called: {node.id}(...)")
    return [value(node) for node in tree.elts]


def _source(node: ast.expr) -> str:
    """Source text of a node, for messages."""
    try:
        text = ast.unparse(node)
    except ValueError:  # an integer that is too long to print
        return type(node).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def suggest(name: str, names: Iterable[str]) -> str:
    """A hint for a message: the known name that is most similar to `name`."""
    similar = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"; did you mean {similar[0]!r}?" if similar else ""
