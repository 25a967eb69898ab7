"""The command `predict`: what the model of a run sees in pictures."""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn._typing import Array
from tinycnn.commands import _common
from tinycnn.recipes.saved import load_run

TOP = 3
STDIN = "-"


def main(args: argparse.Namespace) -> int:
    """Print the classes of pictures; returns the exit code: 1 if a picture could not be read."""
    return _common.run_command(lambda: _predict(args), as_json=args.json)


def _predict(args: argparse.Namespace) -> tuple[int, Any]:
    from tinycnn import calibration, metrics, plot, runs
    from tinycnn.data import _pictures
    from tinycnn.recipes import build

    folder, device = Path(args.run), _common.use_device(args)
    recipe, model, pixels, _ = load_run(folder, device)
    loss = build.build_loss(recipe)
    fitted = runs.read_report(folder).get("calibration")
    names = model.class_names or tuple(map(str, range(model.shapes[-1][0])))
    channels, height, width = build.picture_shape(recipe)
    own = recipe.data.get("name", "mnist") not in build.DATA
    prepares = recipe.data.get("name", "mnist") in build.DIGITS and not args.no_prepare
    if args.many and not prepares:
        raise ValueError("--many cuts rows of digits: the network must be trained on digits, and --no-prepare is unset")

    files = list(_list(args.files))
    if args.show:
        _check_picture(Path(args.show), files)
    labels, images, problems = [], [], []
    for name in files:
        try:
            if prepares:
                found = _digits(_read(name, _pictures.read_grey), height, args.many)
            else:
                shape, fit = (channels, height, width), recipe.data.get("fit", "pad")
                found = [_read(name, lambda file, s=shape, f=fit: _pictures.read(file, s, f))]
                if not own:  # data sets of this library have a black background
                    found = [255 - image if np.median(_border(image)) > 127 else image for image in found]
        except Exception as error:  # Pillow raises many types for damaged files
            problems.append(f"{name}: {_common.describe(error).removeprefix(f'{name}: ')}")
            print(f"error: {problems[-1]}", file=sys.stderr)
            continue
        labels += [name if len(found) == 1 else f"{name}, {i}" for i in range(1, len(found) + 1)]
        images += found
    if not images:
        return 1, {"error": "; ".join(problems)}

    shown = np.stack(images)
    outputs = build.outputs(recipe, model, shown, pixels, device)
    logits = loss.logits(outputs).astype(np.float64)
    probabilities = metrics.softmax(logits / (fitted["temperature"] if fitted else 1.0))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    scores = calibration.rejection_score(logits)
    is_none = scores < fitted["reject_below"] if fitted and prepares else np.zeros(len(scores), bool)
    if not fitted:
        print("the confidence is not calibrated: the run has no validation data", file=sys.stderr)

    rows, titles = [], []
    longest = max(map(len, labels))
    for label, best, p, none in zip(labels, order, probabilities, is_none, strict=True):
        top = [{"class": names[k], "probability": float(p[k])} for k in best]
        rows.append({"picture": label, "class": None if none else top[0]["class"], "top": top})
        ranking = ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in top)
        answer = f"no digit (most like: {ranking})" if none else ranking
        print(f"{label:<{longest}}  {answer}")
        first = f"{top[0]['class']}, {top[0]['probability']:.1%}"
        titles.append(f"none ({first})" if none else first)
    if args.show:
        plot.save(plot.captioned(shown, [Path(label).name for label in labels], titles), args.show)
        print(f"what the network saw: {args.show}")
    return int(bool(problems)), {"predictions": rows, "errors": problems}


def _check_picture(path: Path, files: list[str]) -> None:
    """ValueError or OSError, before anything is computed, if the picture would replace one of the files, or cannot be
    written."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--show must be a file name ending in .png, .svg or .pdf, got {str(path)!r}")
    if any(name != STDIN and Path(name).resolve() == path.resolve() for name in files):
        raise ValueError(f"--show must be another file than the pictures, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--show: there is no folder {path.parent}")


def _list(files: list[str]) -> Iterator[str]:
    """The pictures in `files`; of a folder those in it, sorted."""
    from tinycnn.data.images import is_picture

    for name in files:
        path = Path(name)
        if name != STDIN and path.is_dir():
            inside = sorted(str(child) for child in path.rglob("*") if is_picture(child))
            if not inside:
                raise ValueError(f"{name} must be a picture or a folder of pictures, got a folder without any")
            yield from inside
        else:
            yield name


def _read(name: str, reader: Any) -> Any:
    """`reader` of the open file `name`."""
    from tinycnn._files import open_regular
    from tinycnn.data._pictures import MAX_BYTES

    if name == STDIN:
        return reader(io.BytesIO(sys.stdin.buffer.read(MAX_BYTES)))
    with open_regular(Path(name), MAX_BYTES) as file:
        return reader(file)


def _digits(picture: Array, size: int, many: bool) -> list[Array]:
    """The digit, or the row of digits, in a picture, prepared as MNIST's were."""
    from tinycnn import digits

    return [digits.prepare(part, size) for part in (digits.split(picture) if many else [picture])]


def _border(image: Array) -> Array:
    """The pixels of the border of an image (..., H, W)."""
    edges = image[..., 0, :], image[..., -1, :], image[..., :, 0], image[..., :, -1]
    return np.concatenate([np.ravel(edge) for edge in edges])
