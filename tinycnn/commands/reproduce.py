"""The commands `python -m tinycnn recipes` and `reproduce`."""

import argparse
import functools
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from tinycnn import recipes
from tinycnn.commands import _common
from tinycnn.data import Dataset
from tinycnn.errors import InUseError, RecipeError
from tinycnn.recipes import Recipe, results


def listing(args: argparse.Namespace) -> int:
    """Print all recipes."""
    known = recipes.builtin()
    if args.json:
        rows = [
            {"name": r.name, "study": r.study, "title": r.title, "claimed": r.claimed, "search": bool(r.space)}
            for r in known.values()
        ]
        print(json.dumps(rows))
        return 0
    width = max(map(len, known))
    study = None
    for name, recipe in known.items():
        if recipe.study != study:
            study = recipe.study
            print(f"\n{study}")
        claimed = f"{recipe.claimed:.2f} %" if recipe.claimed is not None else ""
        search = f" (a search: python -m tinycnn sweep {name})" if recipe.space else ""
        print(f"  {name:<{width}}  {claimed:>8}  {recipe.title}{search}")
    print("\nThe numbers are the test accuracies that the sources claim.  Train one: python -m tinycnn reproduce NAME")
    return 0


def main(args: argparse.Namespace) -> int:
    """Train the missing seeds of the recipes in `args` and print claimed and obtained; returns the exit code."""
    interrupted = "interrupted: finished seeds are kept; the same command resumes with the next seed"
    return _common.run_command(lambda: _run(args, _select(args.names)), interrupted)


def _select(names: Sequence[str]) -> list[Recipe]:
    """The named recipes, without duplicates."""
    selected: dict[str, Recipe] = {}
    builtin = recipes.builtin()
    for recipe in (recipe for name in names for recipe in recipes.find(name)):
        if recipe.space:
            raise RecipeError(f"{recipe.name} is a search: python -m tinycnn sweep {recipe.name}")
        # Results are stored by name: equal names would overwrite each other's.
        for other in (selected.get(recipe.name, recipe), builtin.get(recipe.name, recipe)):
            if other.path.resolve() != recipe.path.resolve():
                raise RecipeError(f"two recipes are called {recipe.name!r}: in {other.path} and {recipe.path}")
        selected[recipe.name] = recipe
    return list(selected.values())


def _run(args: argparse.Namespace, selected: Sequence[Recipe]) -> int:
    from tinycnn.recipes import build, report

    for recipe in selected:
        build.check(recipe)
    device = _common.use_device(args)
    if args.tensorboard and importlib.util.find_spec("tensorboardX") is None:  # before hours of training
        raise ValueError("--tensorboard needs tensorboardX: pip install tensorboardX")
    root = args.results if args.data is None else f"{args.results}/{args.data}"
    in_table = args.data is None and any(recipe.path.parent == recipes.RECIPES_DIR for recipe in selected)
    if in_table:
        report.read_all(root)  # a damaged file is reported before hours of training
    loaded: dict[str, Any] = {}
    missing_seeds = {}
    for recipe in selected:
        results.check_owner(root, recipe)
        done = {result["seed"] for result in results.read(root, recipe)}
        missing_seeds[recipe.name] = [seed for seed in args.seeds if seed not in done]
        name = args.data or recipe.data.get("name", "mnist")
        if missing_seeds[recipe.name]:
            for folder in (root, args.out, *([args.tensorboard] if args.tensorboard else [])):
                results.prepare_folder(folder, recipe)
            if name not in loaded:
                loaded[name] = build.load(recipe, args.data_dir, name)
            build.split_sizes(recipe, loaded[name])
    for recipe in selected:
        print(f"\n{recipe.name}: {recipe.title}")
        for seed in missing_seeds[recipe.name]:
            name = args.data or recipe.data.get("name", "mnist")
            _train_seed(args, root, recipe, seed, loaded[name], device)
        found = results.read(root, recipe)
        if not found:
            print("  no seed is finished")
            continue
        claimed = "nothing" if recipe.claimed is None else f"{recipe.claimed:.2f} %"
        print(f"  claimed {claimed}, obtained {results.summarize(found)}")
        print(f"  report: {report.write_report(recipe, found, args.out)}")
    if in_table:
        print(f"\ntable: {report.write_table(args.results)}")
    return 0


def _train_seed(args: argparse.Namespace, root: str, recipe: Recipe, seed: int, data: Dataset, device: str) -> None:
    """Train a seed and save its result, unless another process does."""
    from tinycnn import callbacks, runs
    from tinycnn.recipes import training

    folder = results.result_path(root, recipe, seed).parent
    try:
        lock = runs.lock_file(folder, f".seed-{seed}")
    except InUseError:
        print(f"  seed {seed} is being trained by another process")
        return
    try:
        found = results.read(root, recipe)
        if any(result["seed"] == seed for result in found):  # by another process, in the meantime
            return
        epochs = recipe.training["epochs"]
        print(f"  seed {seed}, {epochs} epochs:", flush=True)
        board = f"{args.tensorboard}/{recipe.name}/seed-{seed}" if args.tensorboard else None
        result = training.run(
            recipe, seed, data, device=device, out=args.out,
            tuning=next((r["tuning"] for r in found if r.get("tuning")), None),
            on_message=lambda text: print(f"  {text}"),
            on_epoch=_common.EpochPrinter(epochs, interval=10, indent="  "),
            callbacks=[callbacks.TensorBoard(board)] if board else [],
            on_result=functools.partial(results.save, root, recipe),
        )  # fmt: skip
    finally:
        (folder / f".seed-{seed}.lock").unlink(missing_ok=True)
        lock.release()
    if "diverged" in result:
        print(f"  {result['diverged']}")
    print(f"  test accuracy {result['accuracy']:.2%}, {result['training_seconds']:.0f} s of training", flush=True)
