"""Calls written down in a recipe, such as "Conv2d(1, 6, 5), Tanh()": read, never run as Python."""

import ast
import difflib
from typing import Any

from tinycnn.errors import RecipeError


def evaluate(text, known, where, line=1):
    """The values of the calls in `text`, a list.

    known: what may be called or named, by name    where, line: of the text, for messages
    Arguments are numbers, strings, booleans, None, tuples, lists, and calls and names of what is known.
    """
    try:
        return _values(text, known, where, line)
    except (RecursionError, MemoryError):  # which of them, is up to the version of Python
        raise RecipeError(f"{where}, line {line}: it is nested too deeply") from None


def _values(text, known, where, line):
    try:
        found: Any = ast.parse(f"[{text}\n]", mode="eval").body
    except ValueError as error:  # the text holds a zero byte
        raise RecipeError(f"{where}, line {line}: {error}") from None
    except SyntaxError as error:
        lines = text.splitlines() or [""]
        at = (error.lineno or 1) - 1
        if at < len(lines):
            raise RecipeError(f"{where}, line {line + at}: {error.msg} in {lines[at].strip()[:80]!r}") from None
        raise RecipeError(f"{where}, line {line}: a bracket is not closed") from None

    def wrong(node, problem):
        return RecipeError(f"{where}, line {line + node.lineno - 1}: {problem}")

    def value(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = lookup(node.func)
            if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
                raise wrong(node, f"{node.func.id}(...) may not unpack arguments")
            args, options = [value(a) for a in node.args], {str(k.arg): value(k.value) for k in node.keywords}
            try:
                return function(*args, **options)
            except (RecipeError, RecursionError):
                raise
            except Exception as error:  # the arguments may be anything, and so may what they provoke
                raise wrong(node, f"{_source(node)}: {error or type(error).__name__}") from None
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
        raise wrong(node, f"{_source(node)!r} is neither a call nor a plain value")

    def lookup(node):
        if node.id not in known:
            raise wrong(node, f"unknown name {node.id!r}{suggest(node.id, known)}")
        return known[node.id]

    for node in found.elts:
        if isinstance(node, ast.Name):
            lookup(node)
            raise wrong(node, f"{node.id} is to be called: {node.id}(...)")
    return [value(node) for node in found.elts]


def _source(node):
    """The text of a node, for messages."""
    try:
        text = ast.unparse(node)
    except ValueError:  # an integer that is too long to print
        return type(node).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def suggest(name, names):
    """A hint for a message: the name that was probably meant."""
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
