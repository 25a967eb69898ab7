"""The commands `python -m tinycnn recipes` and `reproduce`."""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

from tinycnn import experiment, recipes
from tinycnn.errors import RecipeError
from tinycnn.recipes import Recipe, results


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of `reproduce`."""
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="recipes, files of recipes (*.toml), or all")
    add("--seeds", type=_seeds, default=range(3), metavar="K", help="number of seeds, or their list: 3,4 (default: 3)")
    add("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    add("--threads", type=experiment.positive_int, help="CPU threads (default: all)")
    add("--data", choices=("mnist", "fashion", "kmnist"), help="data set (default: the recipe's)")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--results", default="results", help="folder of finished seeds (default: results)")
    add("--out", default="runs", help="folder of run folders and reports (default: runs)")
    add("--tensorboard", metavar="DIR", help="write event files for TensorBoard there (needs tensorboardX)")
    return parser


def _seeds(text: str) -> Sequence[int]:
    if "," in text:
        return sorted({experiment.non_negative_int(part) for part in text.rstrip(",").split(",")})
    return range(experiment.positive_int(text))


def listing() -> int:
    """Print all recipes."""
    known = recipes.builtin()
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
    return experiment.run_command(lambda: _run(args, _select(args.names)), interrupted)


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
    from tinycnn import devices
    from tinycnn.recipes import report, training

    for recipe in selected:
        training.check(recipe)
    device = devices.resolve(args.device)
    devices.get(device)
    devices.set_num_threads(args.threads)
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
            for folder in (root, args.out):
                results.prepare_folder(folder, recipe)
            if name not in loaded:
                loaded[name] = training.load(recipe, args.data_dir, name)
            training.split_sizes(recipe, loaded[name])
    for recipe in selected:
        print(f"\n{recipe.name}: {recipe.title}")
        for seed in missing_seeds[recipe.name]:
            print(f"  seed {seed}, {recipe.training['epochs']} epochs:", flush=True)
            result = training.run(
                recipe, seed, loaded[args.data or recipe.data.get("name", "mnist")], device=device, out=args.out,
                on_message=lambda text: print(f"  {text}"),
                on_epoch=_progress_printer(recipe, seed, args.tensorboard),
                on_result=functools.partial(results.save, root, recipe),
            )  # fmt: skip
            if "diverged" in result:
                print(f"  {result['diverged']}")
            print(
                f"  test accuracy {result['accuracy']:.2%}, {result['training_seconds']:.0f} s of training", flush=True
            )
        found = results.read(root, recipe)
        claimed = "nothing" if recipe.claimed is None else f"{recipe.claimed:.2f} %"
        print(f"  claimed {claimed}, obtained {results.summarize(found)}")
        print(f"  report: {report.write_report(recipe, found, args.out)}")
    if in_table:
        print(f"\ntable: {report.write_table(args.results)}")
    return 0


def _progress_printer(recipe: Recipe, seed: int, tensorboard: str | None) -> Callable[[dict[str, Any]], None]:
    """An `on_epoch` callback: prints a line at most every ten seconds; with `tensorboard` writes an event file."""
    epochs, last_print = recipe.training["epochs"], time.monotonic() - 60
    writer: Any = None
    if tensorboard:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(f"{tensorboard}/{recipe.name}/seed-{seed}")

    def on_epoch(record: dict[str, Any]) -> None:
        nonlocal last_print
        epoch = record["epoch"]
        if writer is not None:
            for key, value in record.items():
                if key != "epoch":
                    writer.add_scalar(key, value, epoch)
            writer.flush()
            if epoch == epochs:
                writer.close()
        if time.monotonic() - last_print > 10 or epoch == epochs:
            last_print = time.monotonic()
            remaining = (epochs - epoch) * record["seconds"]
            held_out = f"held-out error {1 - record['val_accuracy']:.2%}"
            print(
                f"  epoch {epoch:3d}   training error {1 - record['train_accuracy']:.2%}, {held_out}"
                + (f", about {remaining:.0f} s remaining" if remaining > 10 else ""),
                flush=True,
            )

    return on_epoch
