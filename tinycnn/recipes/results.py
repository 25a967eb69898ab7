"""Results of recipes: one small JSON file for each finished seed, and what they say together.

results/<recipe>/seed-0.json
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from tinycnn._files import replacing

# Student's t for a two-sided confidence of 95 %, by degrees of freedom from 1; beyond, the normal distribution's.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

# What the reports need of a result.
KEYS = {
    "fingerprint": str, "seed": int, "data": str, "accuracy": float, "errors": int, "precision": float, "recall": float,
    "f1": float, "cpu_seconds": float, "held_out": str, "history": dict, "confusion": list, "environment": dict,
}  # fmt: skip


def path_of(root, recipe, seed):
    return Path(root) / recipe.name / f"seed-{seed}.json"


def prepare(root, recipe):
    """Make a recipe's folder under `root`; OSError now, not after hours of training, if it cannot be written."""
    folder = path_of(root, recipe, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "try") as file:
        file.write(b"")
    (folder / "try").unlink()


def save(root, recipe, result):
    """Write a seed's result; whatever stood there is replaced."""
    path = path_of(root, recipe, result["seed"])
    with replacing(path) as file:
        file.write((json.dumps(result) + "\n").encode())
    return path


def read(root, recipe, device=None, data=None):
    """The seeds of `recipe` as it is now, in order: a list of results.

    Results of an earlier version of the recipe do not count.  A damaged file is a ValueError that names it.
    """
    found = []
    for path in sorted((Path(root) / recipe.name).glob("seed-*.json"), key=lambda p: (len(p.name), p.name)):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("recipe") != recipe.name:
                raise ValueError("another recipe's, or none's")
            for key, kind in KEYS.items():
                if not isinstance(result.get(key), kind):
                    raise ValueError(f"{key} is missing or damaged")
        except ValueError as error:
            raise ValueError(f"{path} is not a result of recipe {recipe.name!r} ({error}): remove it") from None
        if result["fingerprint"] == recipe.fingerprint and data in (None, result["data"]):
            found.append(result)
    return found


@dataclasses.dataclass(frozen=True)
class Summary:
    """Test accuracies of n seeds in %: their mean, standard deviation (of n - 1) and half of a 95 % interval of the
    mean; sd and half are NaN for one seed."""

    n: int
    mean: float
    sd: float
    half: float

    def __str__(self):
        if self.n == 1:
            return f"{self.mean:.2f} % (1 seed)"
        return f"{self.mean:.2f} % (sd {self.sd:.2f}, {self.n} seeds, 95 % interval ± {self.half:.2f})"


def summary(results):
    """`Summary` of a list of results, at least one."""
    values = 100 * np.array([result["accuracy"] for result in results])
    n = len(values)
    if n == 1:
        return Summary(1, float(values[0]), math.nan, math.nan)
    sd = float(values.std(ddof=1))
    t = T95[n - 2] if n - 2 < len(T95) else 1.960
    return Summary(n, float(values.mean()), sd, t * sd / math.sqrt(n))
