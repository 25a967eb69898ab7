"""Recipes: named training runs, each with what its source claims and what we obtain.

A recipe file is TOML and holds any number of recipes, a table each; those of the project lie next to this file, and
`lenet1998.toml` shows every part of one.  Layers, optimizers, losses and schedules are written as the Python calls that
would make them.

    python -m tinycnn recipes                       # what there is
    python -m tinycnn reproduce adam-5e4 --seeds 3
    python -m tinycnn reproduce mine.toml
"""

import copy
import dataclasses
import hashlib
import json
import math
import re
import string
import sys
from pathlib import Path
from typing import Any

from tinycnn._check import short_repr
from tinycnn.errors import RecipeError
from tinycnn.recipes._calls import suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Recipe", "RecipeError", "builtin", "find", "read"]

RECIPES_DIR = Path(__file__).parent

NUMBER, LIST, TEXT = (int, float), (list,), (str,)
# Every key of a recipe: the types that its value may have.
KEYS: dict[str, dict[str, Any]] = {
    "": {
        "title": TEXT,     # in a few words
        "source": TEXT,    # who claims it, and where
        "claimed": NUMBER, # test accuracy, %
        "trials": LIST,    # of a search: the test accuracy of each trial that the source tells, %
        "why": TEXT,       # one line: where claimed and obtained differ, and why
        "like": TEXT,      # all that is not said here is as in this recipe, which stands earlier in the file
    },
    "net": {
        "input": LIST,     # channels, height, width
        "layers": TEXT,    # of Sequential
        "init": TEXT,      # functions of tinycnn.init; by default torch's weights
    },
    "data": {
        "name": TEXT,      # as for --data; by default mnist
        "train": (int,),   # so many training images, chosen at random; by default all
        "validation": (int,), # so many of them are kept apart to choose by
        "mean": NUMBER, "std": NUMBER, # of pixels from 0 to 1; by default those of the training images
        "padding": (int,), # pixels round every image
        "resize": (int,),  # height and width to which images are interpolated
        "augment": TEXT,   # RandomAffine, ElasticTransform, ColorJitter
    },
    "training": {
        "loss": TEXT, "optimizer": TEXT,
        "lr": (int, float, str, list), # a number, a schedule without its number of steps, or a rate for each epoch
        "tune_lr": LIST,   # rates to choose from, by the mean validation accuracy of three runs
        "epochs": (int,), "batch": (int,), "steps_per_epoch": (int,),
        "reshuffle": (bool,), # False: one random order for all epochs
        "gradients": (bool,), # record how large gradients are in each layer, for the study of vanishing gradients
        "ema": NUMBER,     # decay of the average of weights that is evaluated
    },
}  # fmt: skip
SECTIONS = [section for section in KEYS if section]
INF = math.inf
# The least and the largest value that numbers may have.
RANGES: dict[str, tuple[float, float]] = {
    "claimed": (0, 100), "trials": (0, 100), "train": (1, INF), "validation": (0, INF), "mean": (-INF, INF),
    "std": (1e-6, INF), "padding": (0, INF), "resize": (1, INF), "lr": (0, INF), "tune_lr": (0, INF),
    "epochs": (1, INF), "batch": (1, INF), "steps_per_epoch": (1, INF), "ema": (0, 1),
}  # fmt: skip
COUNTS = ("train", "validation", "padding", "resize", "epochs", "batch", "steps_per_epoch")
MOST = 10**9
# One more table makes a search of a recipe: names and lists of values, which "$name" in its texts stands for.
SPACE = "space"
REQUIRED = {"net": ("input", "layers"), "training": ("optimizer", "epochs", "batch")}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe says; net, data and training are dicts with the keys above.

    study: what its file is about    path, lines: where it stands, for messages ("net.layers" -> line)
    """

    name: str
    study: str
    title: str = ""
    source: str = ""
    claimed: float | None = None
    trials: list = dataclasses.field(default_factory=list)
    why: str = ""
    net: dict = dataclasses.field(default_factory=dict)
    data: dict = dataclasses.field(default_factory=dict)
    training: dict = dataclasses.field(default_factory=dict)
    space: dict = dataclasses.field(default_factory=dict)
    path: Path = RECIPES_DIR
    lines: dict = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self):
        """Changes with everything that can change a result."""
        told = json.dumps([self.net, self.data, self.training, *([self.space] if self.space else [])], sort_keys=True)
        return hashlib.sha256(" ".join(told.split()).encode()).hexdigest()[:16]

    def substitute(self, point):
        """The recipe at a point of its space: {name: value} for every name."""

        def fill(value):
            return string.Template(value).substitute(point) if isinstance(value, str) else value

        sections: dict[str, Any] = {
            section: {k: fill(v) for k, v in getattr(self, section).items()} for section in SECTIONS
        }
        return dataclasses.replace(self, **sections, space={})

    def location(self, key):
        """For messages: file and recipe, and the line where the text of a key begins."""
        return f"{self.path.name}, recipe {self.name!r}", _line(self.lines, key + " text")


def format_point(point):
    """A point of a space in a line."""
    return ", ".join(f"{name} {value if value != '' else '-'}".rstrip(",") for name, value in point.items())


def builtin():
    """All recipes of the project, by name, in the order of the files and within them."""
    return {name: recipe for path in sorted(RECIPES_DIR.glob("*.toml")) for name, recipe in read(path).items()}


def find(name):
    """The recipes that `name` means, a list: one by its name, "all" but searches, or those of a file (*.toml).

    Raises RecipeError for an unknown name, with the suggest; OSError if the file cannot be read.
    """
    if str(name).endswith(".toml"):
        return list(read(name).values())
    known = builtin()
    if name == "all":
        return [recipe for recipe in known.values() if not recipe.space]
    if name not in known:
        raise RecipeError(f"unknown recipe {name!r}{suggest(name, known)} (python -m tinycnn recipes lists them)")
    return [known[name]]


def read(path):
    """The recipes of a file, by name.  RecipeError says what is wrong, with its line; OSError if it cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # TOMLDecodeError, and what Python says of a number of thousands of digits
        raise RecipeError(f"{path}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: it is nested too deeply") from None
    lines = _lines(text)
    study = tables.pop("study", path.stem)
    if not isinstance(study, str):
        raise RecipeError(f"{path}, line {lines.get('study', 1)}: study must be a string, got {short_repr(study)}")
    found: dict[str, Recipe] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise RecipeError(f"{path}, line {lines.get(name, 1)}: unknown key {name!r}; a recipe is a table, [{name}]")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise RecipeError(f"{path}: a recipe's name must be of letters, digits, - and _, got {name!r}")
        mine = {key.removeprefix(name + "."): line for key, line in lines.items() if key.startswith(name + ".")}
        mine[""] = lines.get(name, 1)
        found[name] = _recipe(name, table, study, path, mine, found)
    if not found:
        raise RecipeError(f"{path}: holds no recipe")
    return found


def _recipe(name, table, study, path, lines, earlier):
    def fail(key, problem):
        raise RecipeError(f"{path.name}, recipe {name!r}, line {_line(lines, key)}: {problem}")

    said: dict[str, Any] = {}
    for key, value in table.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                fail(key, f"{key} must be a table, [{name}.{key}]")
            for inner, given in value.items():
                check_key(fail, KEYS[key], f"{key}.{inner}", inner, given)
            said[key] = dict(value)
        elif key == SPACE:
            said[key] = _space(fail, value)
        else:
            check_key(fail, KEYS[""] | dict.fromkeys([*SECTIONS, SPACE]), key, key, value)
            said[key] = value
    if "like" in said:
        model = said.pop("like")
        if model not in earlier:
            wanted = "like must name a recipe that stands earlier in the file"
            fail("like", f"{wanted}, got {model!r}{suggest(model, earlier)}")
        base = earlier[model]
        lines = base.lines | lines
        for section in SECTIONS:
            said[section] = copy.deepcopy(getattr(base, section)) | said.get(section, {})
        if {"lr", "tune_lr"} <= said["training"].keys():  # of which one is the other recipe's
            del said["training"]["tune_lr" if "lr" in table.get("training", {}) else "lr"]
        said = {"source": base.source} | said
    for section, keys in REQUIRED.items():
        for key in keys:
            if key not in said.get(section, {}):
                fail(section, f"{section}.{key} is missing")
    if "trials" in said and SPACE not in said:
        fail("trials", f"trials are those of a search, and there is no table '{SPACE}'")
    if ("lr" in said["training"]) == ("tune_lr" in said["training"]):
        fail("training", "training must have either lr or tune_lr")
    return _filled(fail, Recipe(name, study, path=path, lines=lines, **said))


def _space(fail, table):
    if not isinstance(table, dict) or not table:
        fail(SPACE, f"{SPACE} must be a table of names and lists of values")
    for name, values in table.items():
        if not re.fullmatch(string.Template.idpattern, name, re.ASCII | re.IGNORECASE):
            fail(f"{SPACE}.{name}", f"the names of {SPACE} must be of letters, digits and _, got {short_repr(name)}")
        if not isinstance(values, list) or not values or not all(isinstance(v, (str, int, float)) for v in values):
            fail(f"{SPACE}.{name}", f"{SPACE}.{name} must be a list of strings or numbers, got {short_repr(values)}")
        if len(set(values)) < len(values):
            fail(f"{SPACE}.{name}", f"{SPACE}.{name} must hold every value once, got {short_repr(values)}")
    return dict(table)


def _filled(fail, recipe):
    """The recipe, if each "$name" in its texts is in its space, and the other way round."""
    used = set()
    for section in SECTIONS:
        for key, value in getattr(recipe, section).items():
            for found in string.Template.pattern.finditer(value) if isinstance(value, str) else ():
                name = found["named"] or found["braced"]
                if not name:
                    fail(f"{section}.{key}", "$ must stand before a name of the space")
                if name not in recipe.space:
                    fail(f"{section}.{key}", f"${name} is not in the space{suggest(name, recipe.space)}")
                used.add(name)
    for name in sorted(recipe.space.keys() - used):
        fail(f"{SPACE}.{name}", f"no text uses ${name}")
    return recipe


def check_key(fail, keys, path, key, value):
    """Call `fail(path, problem)` if `key` is none of `keys`, or cannot have this value."""
    if key not in keys:
        fail(path, f"unknown key {key!r}{suggest(key, keys)}")
    kinds = keys[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = {int: "a whole number", float: "a number", str: "a string", list: "a list", bool: "true or false"}
        wanted = " or ".join(words[kind] for kind in kinds if not (kind is int and float in kinds))
        fail(path, f"{key} must be {wanted}, got {short_repr(value)}")
    if key in RANGES and not isinstance(value, str):
        _check_range(fail, path, key, value)


def _check_range(fail, path, key, value):
    """A number, or a list of numbers, must be finite and in its range."""
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
        if key in COUNTS and number > MOST:
            fail(path, f"{key} must be at most {MOST}, got {short_repr(number)}")


def _line(lines, key):
    """The line of a key, or of the table that it would stand in."""
    while key not in lines and key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _lines(text):
    """The line of every key: {"recipe.section.key": number}, for TOML as the recipes write it."""
    found, table, inside = {}, "", ""
    for number, line in enumerate(text.splitlines(), 1):
        quotes = re.findall(r'"""|\'\'\'', line)
        if inside:  # a text of several lines
            inside = "" if inside in quotes else inside
            continue
        inside = quotes[0] if len(quotes) % 2 else ""
        if header := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line):
            table = header[1].strip().replace('"', "") + "."
            found[table[:-1]] = number
        elif key := re.match(r"\s*([A-Za-z0-9_-]+)\s*=", line):
            found.setdefault(table + key[1], number)
            found.setdefault(table + key[1] + " text", number + line.rstrip().endswith(('"""', "'''")))
    return found
