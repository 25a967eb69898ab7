"""Results of recipes: one small JSON file per finished seed, one per search, and their summary.

results/<recipe>/seed-0.json
results/<recipe>/trials.json
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tinycnn._check import short_repr
from tinycnn._files import atomic_write, read_json, require_writable
from tinycnn.recipes import RECIPES_DIR, Recipe

Result: TypeAlias = dict[str, Any]  # of one seed
Trial: TypeAlias = dict[str, Any]  # of a search

# Two-sided 95 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom, then that of the normal distribution.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

# Keys that the reports need, and their types.
RESULT_KEYS = {
    "fingerprint": str, "seed": int, "data": str, "accuracy": float, "errors": int, "precision": float, "recall": float,
    "f1": float, "cpu_seconds": float, "held_out": str, "history": dict, "confusion": list, "environment": dict,
}  # fmt: skip
SEARCH_KEYS = {"fingerprint": str, "trials": list}
TRIAL_KEYS = {
    "number": int, "point": dict, "state": str, "validation": (float, type(None)), "environment": dict, "finished": str,
}  # fmt: skip
TRIAL_METRICS = {"validation": float, "accuracy": float, "f1": float, "cpu_seconds": float}  # of complete trials
CLASSES = 10  # in every data set
FRACTIONS = ("accuracy", "precision", "recall", "f1", "validation")
CURVES = ("train_accuracy", "val_accuracy")  # in "history"
MACHINE = ("device", "numpy", "numba")  # in "environment", unless that is empty


def result_path(root: str | Path, recipe: Recipe, seed: int) -> Path:
    """The file of a seed's result."""
    return Path(root) / recipe.name / f"seed-{seed}.json"


def prepare_folder(root: str | Path, recipe: Recipe) -> None:
    """Create a recipe's folder under `root` and check that it is writable: OSError before any training."""
    require_writable(result_path(root, recipe, 0).parent)


def save(root: str | Path, recipe: Recipe, result: Result) -> Path:
    """Write a seed's result, replacing an earlier one; returns its path."""
    path = result_path(root, recipe, result["seed"])
    with atomic_write(path) as file:
        file.write((json.dumps(result) + "\n").encode())
    return path


def read(root: str | Path, recipe: Recipe) -> list[Result]:
    """The results of the current version of `recipe` in the order of their seeds.

    Raises ValueError with the file's name if a file is damaged.
    """
    found = []
    for path in sorted((Path(root) / recipe.name).glob("seed-*.json"), key=lambda p: (len(p.name), p.name)):
        result = _load(path, recipe, _check_result)
        if result["fingerprint"] == recipe.fingerprint:
            found.append(result)
    return found


def save_trials(root: str | Path, recipe: Recipe, trials: list[Trial]) -> Path | None:
    """Write the trials of a search unless the file holds more; returns the path, or None if nothing was written."""
    if len(read_trials(root, recipe)) > len(trials):
        return None
    path = Path(root) / recipe.name / "trials.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    search = {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "trials": trials}
    with atomic_write(path) as file:
        file.write((json.dumps(search) + "\n").encode())
    return path


def read_trials(root: str | Path, recipe: Recipe) -> list[Trial]:
    """The trials of the current version of the search `recipe`, best validation accuracy first.

    Raises ValueError with the file's name if the file is damaged.
    """
    path = Path(root) / recipe.name / "trials.json"
    if not path.exists():
        return []
    search = _load(path, recipe, _check_search)
    trials = search["trials"] if search["fingerprint"] == recipe.fingerprint else []
    return sorted(trials, key=lambda t: (not is_complete(t), -(t["validation"] or 0), t["number"]))


def read_classifiers(root: str | Path) -> dict[str, dict[str, Any]]:
    """{name: title, claimed accuracy, reason of the difference, and seeds} of the classifiers that are no recipes.

    `python -m benchmarks classifiers` writes the file, classifiers1998.json.  Raises ValueError if it is damaged.
    """
    path = Path(root) / "classifiers1998.json"
    try:
        found: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from None
    for name, record in found.items():
        if not isinstance(record, dict) or not {"title", "claimed", "why", "seeds"} <= record.keys():
            raise ValueError(f"{path} is damaged at {name!r}: remove it")
    return found


def is_complete(trial: Trial) -> bool:
    """Whether a trial was trained to the end: neither pruned nor failed."""
    return bool(trial["state"] == "COMPLETE")


def source_file(recipe: Recipe) -> str | None:
    """The file of a recipe, as stored in results; None for a built-in recipe."""
    return None if recipe.path.parent == RECIPES_DIR else str(recipe.path.resolve())


def check_owner(root: str | Path, recipe: Recipe) -> None:
    """ValueError if the recipe's folder holds results of a recipe with the same name from another file."""
    for path in sorted((Path(root) / recipe.name).glob("seed-*.json")):
        result = _load(path, recipe, _check_result)
        owner = result.get("file")
        if owner not in (None, source_file(recipe)) and result["fingerprint"] != recipe.fingerprint:
            raise ValueError(
                f"{path} is a result of another recipe {recipe.name!r}, from {owner}: choose another name, or another "
                "folder with --results"
            )


def _load(path: Path, recipe: Recipe, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Content of a result file of the recipe; ValueError with the file's name if `check` raises one."""
    try:
        content = read_json(path)
        if content.get("recipe") != recipe.name:
            raise ValueError("it is not of this recipe")
        check(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a result of recipe {recipe.name!r} ({error}): remove it") from None
    return content


def check(recipe: Recipe, result: Result, origin: str) -> None:
    """ValueError, with `origin`, unless this is a whole result of the recipe."""
    try:
        if (result.get("recipe"), result.get("fingerprint")) != (recipe.name, recipe.fingerprint):
            raise ValueError("it is not of this recipe")
        _check_result(result)
    except ValueError as error:
        raise ValueError(f"{origin} is not a result of recipe {recipe.name!r} ({error})") from None


def _check_keys(record: Any, keys: Mapping[str, Any]) -> None:
    for key, kind in keys.items():
        if not isinstance(record, dict) or key not in record or not isinstance(record[key], kind):
            raise ValueError(f"{key} is missing or damaged")
        value = record[key]
        if isinstance(value, bool) or (kind is int and value < 0):
            raise ValueError(f"{key} must not be {short_repr(value)}")
        high, bounds = (1, "from 0 to 1") if key in FRACTIONS else (math.inf, "at least 0")
        if isinstance(value, float) and not (math.isfinite(value) and 0 <= value <= high):
            raise ValueError(f"{key} must be {bounds}, got {value}")


def _check_search(search: dict[str, Any]) -> None:
    _check_keys(search, SEARCH_KEYS)
    for trial in search["trials"]:
        _check_keys(trial, TRIAL_KEYS)
        if is_complete(trial):
            _check_keys(trial, TRIAL_METRICS)
        _check_environment(trial)


def _check_result(result: Result) -> None:
    """ValueError unless the result has all that reports and pictures need."""
    _check_keys(result, RESULT_KEYS)
    _check_environment(result)
    if result["held_out"] not in ("test", "validation"):
        raise ValueError(f"held_out must be 'test' or 'validation', got {short_repr(result['held_out'])}")
    rows = result["confusion"]
    if len(rows) != CLASSES or not all(isinstance(row, list) and len(row) == CLASSES for row in rows):
        raise ValueError(f"confusion must have {CLASSES} rows of {CLASSES} counts")
    if not all(type(count) is int and 0 <= count < 2**53 for row in rows for count in row):
        raise ValueError("confusion must hold counts")
    for key in ("diverged", "file"):
        if key in result and not isinstance(result[key], str):
            raise ValueError(f"{key} must be a string, got {short_repr(result[key])}")
    for key in CURVES if "diverged" not in result else ():
        curve = result["history"].get(key)
        if not isinstance(curve, list) or not curve or not all(_is_number(value, 1) for value in curve):
            raise ValueError(f"history must have {key}, a number from 0 to 1 per epoch")
    if "rate" in result and not _is_number(result["rate"]):
        raise ValueError(f"rate must be a number, got {short_repr(result['rate'])}")
    tuning = result.get("tuning", {})
    if not isinstance(tuning, dict) or not all(_is_number(value, 1) for value in tuning.values()):
        raise ValueError("tuning must hold a number from 0 to 1 for each rate")
    for rate in tuning:
        float(rate)  # ValueError
    if tuning and "rate" not in result:
        raise ValueError("rate is missing or damaged")
    flow = result.get("gradients", {})
    if not isinstance(flow, dict) or not all(map(_is_gradient_statistics, flow.values())):
        raise ValueError("gradients must hold statistics of each layer")


def _check_environment(record: dict[str, Any]) -> None:
    environment = record["environment"]
    if environment and not all(isinstance(environment.get(key), str) for key in MACHINE):
        raise ValueError(f"environment must have {', '.join(MACHINE)}")


def _is_gradient_statistics(value: Any) -> bool:
    """Whether this is a list of records as `gradients.statistics` returns it."""
    keys = ("signal", "gradient", "update")
    return isinstance(value, list) and all(
        isinstance(layer, dict) and all(_is_number(layer.get(key)) for key in keys) for layer in value
    )


def _is_number(value: Any, high: float = math.inf) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= high


@dataclasses.dataclass(frozen=True)
class Summary:
    """Test accuracies of n seeds in %: mean, sample standard deviation (n - 1), half width of the mean's 95 % interval.

    sd and half_width are NaN for one seed.  each: in the order of the seeds
    """

    n: int
    mean: float
    sd: float
    half_width: float
    each: tuple[float, ...]

    @property
    def uneven(self) -> str:
        """The median and each seed, if the seeds differ by more than 5 %: mean and deviation would mislead then."""
        if max(self.each) - min(self.each) <= 5:
            return ""
        return f"median {np.median(self.each):.2f}: {', '.join(f'{value:.2f}' for value in self.each)}"

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:.2f} % (1 seed)"
        if self.uneven:
            return f"{self.uneven} %"
        return f"{self.mean:.2f} % (sd {self.sd:.2f}, {self.n} seeds, 95 % interval ± {self.half_width:.2f})"


def summarize(results: Sequence[Result]) -> Summary:
    """`Summary` of a list of results, at least one."""
    values = 100 * np.array([result["accuracy"] for result in results])
    n = len(values)
    if n == 1:
        return Summary(1, float(values[0]), math.nan, math.nan, tuple(values.tolist()))
    sd = float(values.std(ddof=1))
    t = T95[n - 2] if n - 2 < len(T95) else 1.960
    return Summary(n, float(values.mean()), sd, t * sd / math.sqrt(n), tuple(values.tolist()))
