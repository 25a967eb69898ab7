"""The commands `train` and `resume`: one run of a recipe, in a folder of its own."""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from tinycnn import recipes
from tinycnn._interrupts import defer_interrupt
from tinycnn._streams import EXIT_INTERRUPTED
from tinycnn.commands import _common
from tinycnn.errors import DeviceError, RecipeError, ResumeError
from tinycnn.recipes import Recipe

FINISHING = "interrupted: finishing the run folder"


def main(args: argparse.Namespace, recipe: Recipe | None = None) -> int:
    """Train `recipe`, or the one that is named in `args`.  Returns the exit code."""
    return _common.run_command(lambda: _train(args, recipe), as_json=args.json)


def resume(args: argparse.Namespace) -> int:
    """Continue the run in `args`.  Returns the exit code."""
    return _common.run_command(lambda: _resume(args), as_json=args.json)


def select(name: str) -> Recipe:
    """The one recipe that is called `name`, or that is in the file `name`.  RecipeError for none or several."""
    found = recipes.find(name)
    if len(found) != 1 or found[0].space:
        names = ", ".join(recipe.name for recipe in found if not recipe.space) or "searches only: tinycnn sweep"
        raise RecipeError(f"{name}: train needs one recipe, got {names}")
    return found[0]


def _train(args: argparse.Namespace, recipe: Recipe | None) -> tuple[int, Any]:
    from tinycnn.recipes import build, training

    recipe = select(args.recipe) if recipe is None else recipe
    settings = [("training.epochs", args.epochs), ("training.batch", args.batch_size), ("data.fit", args.fit)]
    settings += [("data.skip_bad", True if args.skip_bad else None)]
    recipe = recipes.with_settings(recipe, args.settings, {k: v for k, v in settings if v is not None})
    device = _common.use_device(args)
    name = args.data or recipe.data.get("name", "mnist")
    recipe, data = build.load_for(recipe, name, args.data_dir)
    build.check(recipe, len(data.classes))
    run = training.Run(recipe, args.seed, data, device=device, out=args.out)
    return _fit_and_finish(run)


def _resume(args: argparse.Namespace) -> tuple[int, Any]:
    from tinycnn import runs
    from tinycnn.recipes import build, training

    folder = runs.RunFolder.open(args.run)
    try:
        recipe, seed = recipes.from_config(folder.config, folder.path / "config.json"), folder.config.get("seed")
        missing = [key for key in recipes.REQUIRED["training"] if key not in recipe.training]
        if missing or not isinstance(seed, int) or "tuning" not in folder.config:
            raise ValueError(f"{folder.path}/config.json does not describe a training ({', '.join(missing) or 'seed'})")
        if not folder.checkpoint.exists():
            raise FileNotFoundError(f"{folder.path} has no checkpoint.safetensors: the run cannot be continued")
        before = recipe.training["epochs"]
        if args.epochs is not None:
            recipe = dataclasses.replace(recipe, training=recipe.training | {"epochs": args.epochs})
        args.device = args.device or folder.config.get("device", "cpu")
        device = _common.use_device(args)
        data = build.load(recipe, args.data_dir)
        run = training.Run(recipe, seed, data, device=device, folder=folder, force=args.force)
        return _fit_and_finish(run, before)
    finally:
        folder.close()


def _fit_and_finish(run: Any, epochs_before: int | None = None) -> tuple[int, Any]:
    """Train, test, and print what happens.   epochs_before: of a run that is continued"""
    from tinycnn import hardware

    epochs, folder, sizes = run.recipe.training["epochs"], run.folder, run.sizes()
    print(run.model.summary())
    print(
        f"\n{run.data.name}: {sizes['train']:,} images for training, {sizes['validation']:,} for validation, "
        f"{sizes['test']:,} for testing"
    )
    print(f"{hardware.device_name(run.device)}; results in {folder.path}")
    print("preparing kernels (the first run compiles them: 20 seconds or more) ...\n", flush=True)
    interrupted, printer = False, _common.EpochPrinter(epochs)
    try:
        run.fit(printer)
    except ResumeError as error:
        if epochs_before not in (None, epochs) and "learning rate" in str(error):
            lr = run.recipe.training.get("lr")
            raise ResumeError(
                f"{folder.path} cannot be extended to {epochs} epochs: the rates of lr = {lr!r} depend on the number "
                f"of epochs, and those of {epochs_before} epochs were used; start a new run with --epochs {epochs}"
            ) from None
        raise
    except _common.Terminated:
        print(f"the training up to epoch {len(folder.history)} is kept: python -m tinycnn resume {folder.path}")
        raise
    except KeyboardInterrupt:
        if not folder.history:
            print(f"\ninterrupted in the first epoch; start again with: python -m tinycnn resume {folder.path}")
            raise
        interrupted = True
        print(f"\n{FINISHING} as of epoch {len(folder.history)} (press Ctrl-C again to stop at once)")
    except DeviceError:
        print(f"the training up to epoch {len(folder.history)} is kept: python -m tinycnn resume {folder.path}")
        raise
    if not printer.printed:
        print(f"all of the run's {len(folder.history)} epochs are done")
    for difference in run.checkpoint.ignored:
        print(f"ignored: {difference}")

    # After a Ctrl-C during training, the next one stops at once.
    deferred = contextlib.nullcontext(lambda: True) if interrupted else defer_interrupt(FINISHING, raises=False)
    with deferred as was_interrupted:
        result = run.finish(interrupted=interrupted)
    if run.diverged:
        print(f"the last good weights, of epoch {len(folder.history)}, are in {folder.path}")
        raise ArithmeticError(run.diverged)
    total = int(sum(map(sum, result["confusion"])))
    print(
        f"\ntest accuracy {result['accuracy']:.2%} ({result['errors']} of {total:,} wrong), "
        f"{result['training_seconds']:.1f} s of training; report and pictures in {folder.path}"
    )
    if interrupted:
        print(f"continue with: python -m tinycnn resume {folder.path}")
    document = {"run": str(Path(folder.path)), **{k: v for k, v in result.items() if k != "environment"}}
    return EXIT_INTERRUPTED if was_interrupted() else int(bool(run.problems)), document
