"""The command `evaluate`: the model of a run on a test set."""

import argparse
from pathlib import Path
from typing import Any

from tinycnn._files import require_writable
from tinycnn._interrupts import defer_interrupt
from tinycnn.commands import _common


def main(args: argparse.Namespace) -> int:
    """Print the report of a run's model on the test set and draw it; returns the exit code."""
    return _common.run_command(lambda: _evaluate(args), as_json=args.json)


def _evaluate(args: argparse.Namespace) -> tuple[int, Any]:
    from tinycnn import metrics, plot, train
    from tinycnn.recipes import build
    from tinycnn.recipes.saved import load_run

    folder, device = Path(args.run), _common.use_device(args)
    recipe, model, pixels, epoch = load_run(folder, device)
    if args.data:
        build.is_own(args.data)
    out = Path(args.out or folder)
    require_writable(out)
    dataset = build.load(recipe, args.data_dir, args.data)
    test_set = build.prepare_test(recipe, dataset, pixels, device)
    loss = build.build_loss(recipe)
    value, accuracy, outputs = train.evaluate(model, test_set, loss)
    logits = loss.logits(outputs)
    predicted, confidence = logits.argmax(axis=1), metrics.confidence(logits)
    matrix = metrics.confusion_matrix(dataset.test_labels, predicted, outputs.shape[1])
    print(f"{folder}, weights of epoch {epoch}, on {dataset.name}: accuracy {accuracy:.2%}, loss {value:.4f}")
    report = metrics.report(matrix, dataset.classes)
    print(metrics.format_report(report))
    answers = dataset.test_images, dataset.test_labels, predicted, confidence, dataset.classes
    with defer_interrupt("interrupted: drawing the pictures"):
        plot.save(plot.predictions(*answers), out / "predictions.png")
        plot.save(plot.mistakes(*answers), out / "mistakes.png")
        plot.save(plot.confusion(matrix, dataset.classes), out / "confusion.png")
    print(f"predictions.png, mistakes.png and confusion.png are in {out}")
    return 0, {"run": str(folder), "data": dataset.name, "epoch": epoch, "loss": value, **report}
