"""The network of a run's folder, with its training and what it does with the test set."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinycnn import checkpoint, metrics, runs, train
from tinycnn._typing import Array
from tinycnn.demo._net import Example, Net
from tinycnn.errors import DataUnavailableError
from tinycnn.recipes import Recipe, build
from tinycnn.recipes.saved import load_run

SHIPPED = Path(__file__).parent / "nets"  # trained with tools/make_demo_runs.py
MOST_MISTAKES = 90
NAMES = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "kmnist": "KMNIST", "synthetic": "the synthetic digits"}


def from_run(
    folder: str | os.PathLike[str], data_dir: str | None = None, on_message: Callable[[str], object] = print
) -> Net:
    """The network of a run folder: weights, snapshots, history, and examples from its test set if that is at hand.

    data_dir    folder to look for the data in; nothing is downloaded
    on_message  called with a line if the data is not found

    Raises ValueError or OSError for a folder that is no run's, or whose network is too large for a page.
    """
    folder = Path(folder)
    recipe, model, pixels, epochs = load_run(folder, "cpu")
    report, history = runs.read_report(folder), runs.read_history(folder)
    config = runs.read_config(folder)
    calibration = report.get("calibration") or {}
    names = model.class_names or config.get("dataset", {}).get("classes") or map(str, range(model.shapes[-1][0]))
    settings: dict[str, Any] = {
        "class_names": list(names), "title": str(config.get("label", recipe.name)),
        "about": about(recipe, len(model.theta), epochs, report),
        "mean": pixels["mean"], "std": pixels["std"], "resize": recipe.data.get("resize"),
        "picture": build.picture_shape(recipe), "padding": recipe.data.get("padding", 0),
        "digits": recipe.data.get("name", "mnist") in build.DIGITS,
        "temperature": calibration.get("temperature", 1.0), "reject_below": calibration.get("reject_below"),
        "epochs": len(history), "snapshots": runs.read_snapshots(folder),
        "held_out": "validation" if recipe.data.get("validation") else "test",
    }  # fmt: skip
    if history:
        keys = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
        settings["history"] = {key: [record[key] for record in history] for key in keys if key in history[0]}
        if len(settings["history"]) < len(keys):
            del settings["history"]
    net = Net(model, **settings)  # before the data is read: the network may be too large
    kept = folder / "examples.safetensors"
    if kept.exists():  # of a run that ships: chosen from synthetic digits
        arrays, _ = checkpoint.load(kept)
        examples = list(map(Example, arrays["images"], arrays["labels"].tolist(), arrays["predicted"].tolist()))
        net.examples = [example for example in examples if example.label == example.predicted]
        net.mistakes = [example for example in examples if example.label != example.predicted]
        net.examples_title = "Or choose a synthetic digit"
        return net
    try:
        dataset = build.load(recipe, data_dir, download=False, on_message=on_message)
    except (DataUnavailableError, ValueError, OSError) as error:
        reason = getattr(error, "reason", error)
        on_message(f"the page has no examples and no confusion matrix, as the run's data was not found ({reason})")
        return net
    test, loss = build.prepare_test(recipe, dataset, pixels), build.build_loss(recipe)
    logits = loss.logits(train.evaluate(model, test, loss)[2])
    predicted, labels = logits.argmax(axis=1), dataset.test_labels
    net.confusion = metrics.confusion_matrix(labels, predicted, logits.shape[1])
    images = dataset.test_images.reshape(len(labels), *net.picture)
    net.examples_title = f"Or choose a test image of {NAMES.get(dataset.name, 'the run')}"
    net.examples, net.mistakes = choose_examples(images, labels, predicted, metrics.confidence(logits))
    return net


def choose_examples(
    images: Array, labels: Array, predicted: Array, confidence: Array
) -> tuple[list[Example], list[Example]]:
    """(the first right image of each class, at most twelve; the mistakes, the most confident first)."""
    right, wrong = np.flatnonzero(labels == predicted), np.flatnonzero(labels != predicted)
    firsts = [right[labels[right] == k][:1] for k in range(int(labels.max()) + 1)]
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    _, first = np.unique(labels[wrong] * (labels.max() + 1) + predicted[wrong], return_index=True)
    rest = np.setdiff1d(np.arange(len(wrong)), first)
    wrong = wrong[np.sort(np.concatenate([first, rest])[:MOST_MISTAKES])]  # one of each kind at least
    chosen = np.concatenate(firsts)[:12], wrong
    both = [[Example(images[n], int(labels[n]), int(predicted[n])) for n in index] for index in chosen]
    return both[0], both[1]


def about(recipe: Recipe, parameters: int, epochs: int | str, report: dict[str, Any]) -> str:
    """One or two sentences about a run."""
    words = f"Recipe {recipe.name}, {recipe.title}: {parameters:,} parameters, trained for {epochs} epochs."
    if "accuracy" in report and "total" in report:
        data = NAMES.get(report["data"], report["data"])
        words += f" It gets {report['accuracy']:.2%} of the {report['total']:,} test images of {data} right."
    return words
