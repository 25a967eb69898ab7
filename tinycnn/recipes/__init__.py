"""Recipes: named training runs, each with the accuracy that its source claims and the accuracy that we obtain.

A recipe file is TOML with one table per recipe. The built-in files are in this folder; `lenet1998.toml` shows every
key. Layers, optimizers, losses and schedules are written as the Python calls that create them.

    python -m tinycnn recipes                       # list them
    python -m tinycnn reproduce adam-5e4 --seeds 3
    python -m tinycnn reproduce mine.toml
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from tinycnn._check import one_line, short_repr
from tinycnn._files import read_bytes
from tinycnn.errors import RecipeError
from tinycnn.recipes._calls import suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Recipe", "RecipeError", "builtin", "find", "from_config", "of_layers", "read", "with_settings"]

RECIPES_DIR = Path(__file__).parent

NUMBER, LIST, TEXT = (int, float), (list,), (str,)
# Every key of a recipe and the types of its value.
KEYS: dict[str, dict[str, Any]] = {
    "": {
        "title": TEXT,     # a few words
        "source": TEXT,    # where the claim was published
        "claimed": NUMBER, # test accuracy, %
        "trials": LIST,    # for a search: test accuracies of the source's trials, %
        "why": TEXT,       # one line: how and why the obtained accuracy differs from the claimed one
        "like": TEXT,      # an earlier recipe of the file: default for the source and all keys of the tables below
    },
    "net": {
        "input": LIST,     # channels, height, width
        "layers": TEXT,    # arguments of Sequential
        "init": TEXT,      # functions of tinycnn.init; default: the layers' own initialisation, as in torch
    },
    "data": {
        "name": TEXT,      # as for --data; default: mnist
        "train": (int,),   # number of training images, chosen at random; default: all
        "validation": (int,), # number of validation images, taken from the training set
        "mean": NUMBER, "std": NUMBER, # normalisation of pixels in [0, 1]; default: computed from the training images
        "padding": (int,), # pixels added on each side
        "resize": (int,),  # height and width after interpolation
        "fit": TEXT,       # of the user's own images: pad, crop or stretch them to net.input
        "skip_bad": (bool,), # leave out image files that are damaged
        "augment": TEXT,   # RandomAffine, ElasticTransform, ColorJitter
    },
    "training": {
        "loss": TEXT, "optimizer": TEXT,
        "lr": (int, float, str, list), # a number, a schedule without its number of steps, or one number per epoch
        "tune_lr": LIST,   # candidates; the one with the best mean validation accuracy of three runs is used
        "epochs": (int,), "batch": (int,), "steps_per_epoch": (int,),
        "sync_batch_norm": (bool,), # of several ranks: see docs/distributed.md
        "reshuffle": (bool,), # False: the same random order in all epochs
        "gradients": (bool,), # record gradient statistics of each layer (see gradients.py)
        "callbacks": TEXT, # EarlyStopping, ReduceLROnPlateau
        "ema": NUMBER,     # decay of the moving average of the weights; the average is evaluated
    },
}  # fmt: skip
SECTIONS = [section for section in KEYS if section]
INF = math.inf
# Smallest and largest value of the numbers.
RANGES: dict[str, tuple[float, float]] = {
    "claimed": (0, 100), "trials": (0, 100), "train": (1, INF), "validation": (0, INF), "mean": (-INF, INF),
    "std": (1e-6, INF), "padding": (0, INF), "resize": (1, INF), "lr": (0, INF), "tune_lr": (0, INF),
    "epochs": (1, INF), "batch": (1, INF), "steps_per_epoch": (1, INF), "ema": (0, 1),
}  # fmt: skip
COUNTS = ("train", "validation", "padding", "resize", "epochs", "batch", "steps_per_epoch")
MAX_COUNT = 10**9
MAX_BYTES = 1 << 24  # of a file
# A recipe with this table is a search. The table lists the values of each "$name" that the recipe's strings contain.
SPACE = "space"
REQUIRED = {"net": ("input", "layers"), "training": ("optimizer", "epochs", "batch")}


Settings: TypeAlias = dict[str, Any]  # a table of a recipe
Point: TypeAlias = dict[str, Any]  # a value for each name of a search space
Fail: TypeAlias = Callable[[str, str], NoReturn]  # raises an error from a key's path and the problem with its value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe as read from its file; net, data, training and space are its tables.

    study: title of the file    path, lines: position in the file for messages ("net.layers" -> line)
    """

    name: str
    study: str
    title: str = ""
    source: str = ""
    claimed: float | None = None
    trials: list[float] = dataclasses.field(default_factory=list)
    why: str = ""
    net: Settings = dataclasses.field(default_factory=dict)
    data: Settings = dataclasses.field(default_factory=dict)
    training: Settings = dataclasses.field(default_factory=dict)
    space: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    path: Path = RECIPES_DIR
    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    overridden: tuple[str, ...] = ()  # keys set by `with_settings`

    @property
    def fingerprint(self) -> str:
        """Hash of every setting that can change a result; white space does not count."""
        text = json.dumps([self.net, self.data, self.training, *([self.space] if self.space else [])], sort_keys=True)
        return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]

    def substitute(self, point: Point) -> "Recipe":
        """The recipe at a point of its search space: each "$name" is replaced by its value, and the space is empty."""

        def fill(value: Any) -> Any:
            return string.Template(value).substitute(point) if isinstance(value, str) else value

        sections: dict[str, Any] = {
            section: {k: fill(v) for k, v in getattr(self, section).items()} for section in SECTIONS
        }
        return dataclasses.replace(self, **sections, space={})

    def location(self, key: str) -> tuple[str, int]:
        """File and recipe, and the line where the value of `key` begins; for messages."""
        if key in self.overridden:
            return f"--set {key}", 1
        return f"{self.path.name}, recipe {self.name!r}", _line(self.lines, key + " text")


def with_settings(recipe: Recipe, assignments: Sequence[str], settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other settings.

    assignments  "section.key=value" each, with a value in TOML, or a text without quotes
    settings     "section.key" -> value, of options that stand for an assignment

    Raises RecipeError for an unknown key, with the nearest known one, or a value of a wrong type or range.
    """

    def fail(path: str, problem: str) -> NoReturn:
        raise RecipeError(f"--set {path}: {problem}")

    known = [f"{section}.{key}" for section in SECTIONS for key in KEYS[section]]
    changes: dict[str, Any] = dict(settings)
    for assignment in assignments:
        path, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise RecipeError(f"--set must be KEY=VALUE, got {assignment!r}")
        if path not in known:
            raise RecipeError(f"--set: unknown key {path!r}{suggest(path, known)}")
        try:
            changes[path] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            changes[path] = text
    sections: dict[str, Any] = {section: dict(getattr(recipe, section)) for section in SECTIONS}
    for path, value in changes.items():
        section, _, key = path.partition(".")
        check_key(fail, KEYS[section], path, key, value)
        if key in ("lr", "tune_lr"):
            sections[section].pop("tune_lr" if key == "lr" else "lr", None)
        sections[section][key] = value
    return dataclasses.replace(recipe, **sections, overridden=tuple(changes))


def from_config(config: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe in a run's config.json.   path: of that file.  ValueError if it does not describe one."""

    def fail(key: str, problem: str) -> NoReturn:
        raise ValueError(problem)

    try:
        sections: dict[str, Any] = {}
        for section in SECTIONS:
            saved = config.get(section, {})
            sections[section] = {key: saved[key] for key in KEYS[section] if key in saved}
            for key, value in sections[section].items():
                check_key(fail, KEYS[section], key, key, value)
        for key in REQUIRED["net"]:
            sections["net"][key]  # KeyError
        if config.get("dataset"):
            sections["data"].setdefault("name", "mnist")
        else:  # written by version 0.1.0
            sections["data"]["name"] = config["data"]["name"]
        if not isinstance(sections["data"]["name"], str):
            raise TypeError("the data set's name must be a string")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a network ({type(error).__name__}: {one_line(error)})") from None
    return Recipe(str(config.get("recipe", "run")), "", title=str(config.get("title", "")), path=path, **sections)


def of_layers(layers: Sequence[Any], *, like: str, name: str) -> Recipe:
    """The built-in recipe `like` under another name and with other layers, for scripts whose network is in Python."""
    base = builtin()[like]
    net = base.net | {"layers": ", ".join(map(repr, layers))}
    return dataclasses.replace(base, name=name, title=name, source="", claimed=None, net=net)


def format_point(point: Point) -> str:
    """A point of a search space on one line."""
    return ", ".join(f"{name} {value if value != '' else '-'}".rstrip(",") for name, value in point.items())


def builtin() -> dict[str, Recipe]:
    """All recipes of the project by name, in the order of the files and within them."""
    return {name: recipe for path in sorted(RECIPES_DIR.glob("*.toml")) for name, recipe in read(path).items()}


def find(name: str) -> list[Recipe]:
    """The recipes with this name: a built-in recipe, "all" (built-in, without searches), or a file (*.toml).

    Raises RecipeError for an unknown name and suggests a similar one; OSError if the file cannot be read.
    """
    if name.endswith(".toml"):
        return list(read(name).values())
    known = builtin()
    if name == "all":
        return [recipe for recipe in known.values() if not recipe.space]
    if name not in known:
        raise RecipeError(f"unknown recipe {name!r}{suggest(name, known)} (python -m tinycnn recipes lists them)")
    return [known[name]]


def read(path: str | os.PathLike[str]) -> dict[str, Recipe]:
    """Read a recipe file; returns its recipes by name.

    Raises RecipeError, with the line, if the file is invalid; OSError if it cannot be read.
    """
    path = Path(path)
    try:
        data = read_bytes(path, MAX_BYTES)
    except ValueError as error:  # a pipe or a folder
        raise RecipeError(str(error)) from None
    try:
        text = data.decode("utf-8-sig")
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # TOMLDecodeError, or Python's limit on the digits of an integer
        raise RecipeError(f"{path}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: it is nested too deeply") from None
    lines = _lines(text)
    study = tables.pop("study", path.stem)
    if not isinstance(study, str):
        raise RecipeError(f"{path}, line {lines.get('study', 1)}: study must be a string, got {short_repr(study)}")
    parsed: dict[str, Recipe] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise RecipeError(f"{path}, line {lines.get(name, 1)}: unknown key {short_repr(name)}; a recipe is a table")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            problem = "a recipe's name must consist of at most 100 letters, digits, - and _"
            raise RecipeError(f"{path}: {problem}, got {short_repr(name)}")
        local = {key.removeprefix(name + "."): line for key, line in lines.items() if key.startswith(name + ".")}
        local[""] = lines.get(name, 1)
        parsed[name] = _recipe(name, table, study, path, local, parsed)
    if not parsed:
        raise RecipeError(f"{path}: contains no recipe")
    return parsed


def _recipe(
    name: str, table: dict[str, Any], study: str, path: Path, lines: dict[str, int], earlier: dict[str, Recipe]
) -> Recipe:
    def fail(key: str, problem: str) -> NoReturn:
        raise RecipeError(f"{path.name}, recipe {name!r}, line {_line(lines, key)}: {problem[:1000]}")

    fields: dict[str, Any] = {}
    for key, value in table.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                fail(key, f"{key} must be a table, [{name}.{key}]")
            for inner, setting in value.items():
                check_key(fail, KEYS[key], f"{key}.{inner}", inner, setting)
            fields[key] = dict(value)
        elif key == SPACE:
            fields[key] = _space(fail, value)
        else:
            check_key(fail, KEYS[""] | dict.fromkeys([*SECTIONS, SPACE]), key, key, value)
            fields[key] = value
    if "like" in fields:
        parent = fields.pop("like")
        if parent not in earlier:
            problem = "like must name an earlier recipe of the file"
            fail("like", f"{problem}, got {parent!r}{suggest(parent, earlier)}")
        base = earlier[parent]
        lines = base.lines | lines
        for section in SECTIONS:
            fields[section] = copy.deepcopy(getattr(base, section)) | fields.get(section, {})
        if {"lr", "tune_lr"} <= fields["training"].keys():  # one of them is inherited
            del fields["training"]["tune_lr" if "lr" in table.get("training", {}) else "lr"]
        fields = {"source": base.source} | fields
    for section, keys in REQUIRED.items():
        for key in keys:
            if key not in fields.get(section, {}):
                fail(section, f"{section}.{key} is missing")
    if "trials" in fields and SPACE not in fields:
        fail("trials", f"trials need a table '{SPACE}': only a search has them")
    if ("lr" in fields["training"]) == ("tune_lr" in fields["training"]):
        fail("training", "training must have either lr or tune_lr")
    recipe = Recipe(name, study, path=path, lines=lines, **fields)
    _check_placeholders(fail, recipe)
    return recipe


def _space(fail: Fail, table: Any) -> dict[str, list[Any]]:
    if not isinstance(table, dict) or not table:
        fail(SPACE, f"{SPACE} must be a table of names and lists of values")
    for name, values in table.items():
        if not re.fullmatch(string.Template.idpattern, name, re.ASCII | re.IGNORECASE):
            fail(f"{SPACE}.{name}", f"names in {SPACE} must consist of letters, digits and _, got {short_repr(name)}")
        if not isinstance(values, list) or not values or not all(isinstance(v, (str, int, float)) for v in values):
            fail(f"{SPACE}.{name}", f"{SPACE}.{name} must be a list of strings or numbers, got {short_repr(values)}")
        if len(set(values)) < len(values):
            fail(f"{SPACE}.{name}", f"{SPACE}.{name} must not repeat a value, got {short_repr(values)}")
    return dict(table)


def _check_placeholders(fail: Fail, recipe: Recipe) -> None:
    """Check that every "$name" in the recipe's strings is in its space, and that every name of the space is used."""
    used = set()
    for section in SECTIONS:
        for key, value in getattr(recipe, section).items():
            for match in string.Template.pattern.finditer(value) if isinstance(value, str) else ():
                name = match["named"] or match["braced"]
                if not name:
                    fail(f"{section}.{key}", "$ must be followed by a name of the space")
                if name not in recipe.space:
                    fail(f"{section}.{key}", f"${name} is not in the space{suggest(name, recipe.space)}")
                used.add(name)
    for name in sorted(recipe.space.keys() - used):
        fail(f"{SPACE}.{name}", f"${name} is not used")


def check_key(fail: Fail, keys: dict[str, Any], path: str, key: str, value: Any) -> None:
    """Call `fail(path, problem)` if `key` is not in `keys` or its value has the wrong type or range."""
    if key not in keys:
        fail(path, f"unknown key {key!r}{suggest(key, keys)}")
    types = keys[key]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        words = {int: "an integer", float: "a number", str: "a string", list: "a list", bool: "true or false"}
        expected = " or ".join(words[kind] for kind in types if not (kind is int and float in types))
        fail(path, f"{key} must be {expected}, got {short_repr(value)}")
    if key in RANGES and not isinstance(value, str):
        _check_range(fail, path, key, value)


def _check_range(fail: Fail, path: str, key: str, value: Any) -> None:
    """Check that a number, or each number of a list, is finite and in its range."""
    low, high = RANGES[key]
    numbers = value if isinstance(value, list) else [value]
    if not numbers:
        fail(path, f"{key} must not be empty")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, NUMBER):
            fail(path, f"{key} must hold numbers, got {short_repr(number)}")
        try:
            finite = math.isfinite(number)
        except OverflowError:  # an integer beyond the largest float
            finite = False
        if not (finite and low <= number <= high):
            bounds = f"from {low:g} to {high:g}" if high < INF else f"at least {low:g}"
            fail(path, f"{key} must be {bounds if finite else 'finite'}, got {short_repr(number)}")
        if key in COUNTS and number > MAX_COUNT:
            fail(path, f"{key} must be at most {MAX_COUNT}, got {short_repr(number)}")


def _line(lines: dict[str, int], key: str) -> int:
    """The line of a key, or of the table that would contain it."""
    while key not in lines and key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _lines(text: str) -> dict[str, int]:
    """The line of every key: {"recipe.section.key": number}, for the subset of TOML that recipes use."""
    lines, table, delimiter = {}, "", ""
    for number, line in enumerate(text.splitlines(), 1):
        quotes = re.findall(r'"""|\'\'\'', line)
        if delimiter:  # inside a multi-line string
            delimiter = "" if delimiter in quotes else delimiter
            continue
        delimiter = quotes[0] if len(quotes) % 2 else ""
        if header := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line):
            table = header[1].strip().replace('"', "") + "."
            lines[table[:-1]] = number
        elif key := re.match(r"\s*([A-Za-z0-9_-]+)\s*=", line):
            lines.setdefault(table + key[1], number)
            lines.setdefault(table + key[1] + " text", number + line.rstrip().endswith(('"""', "'''")))
    return lines
