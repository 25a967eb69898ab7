"""The commands `train` and `resume`: one run of a recipe, in a folder of its own."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinycnn
from tinycnn import recipes
from tinycnn._interrupts import defer_interrupt
from tinycnn._streams import EXIT_INTERRUPTED
from tinycnn.commands import _common
from tinycnn.errors import DeviceError, RecipeError, ResumeError
from tinycnn.recipes import Recipe

if TYPE_CHECKING:
    from tinycnn.distributed import Group

FINISHING = "interrupted: finishing the run folder"


def main(args: argparse.Namespace, recipe: Recipe | None = None) -> int:
    """Train `recipe`, or the one that is named in `args`.  Returns the exit code."""
    return _common.run_command(lambda: _on_ranks(args, lambda group: _train(args, recipe, group)), as_json=args.json)


def resume(args: argparse.Namespace) -> int:
    """Continue the run in `args`.  Returns the exit code."""
    return _common.run_command(lambda: _on_ranks(args, lambda group: _resume(args, group)), as_json=args.json)


def _on_ranks(args: argparse.Namespace, command: Callable[[Any], tuple[int, Any]]) -> tuple[int, Any]:
    """Call `command` with the group of processes that mpiexec or srun has started.  Rank 0 prints for all; an error is
    printed once."""
    from tinycnn import distributed

    rank = distributed.launched_rank() if distributed.launched_size() > 1 else 0
    try:
        group = distributed.launched_group(args.threads)
        with contextlib.ExitStack() as stack:
            stack.enter_context(group.guard())
            stack.enter_context(group.limit_threads())
            if group.rank > 0:
                null = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123 (it is no file)
                stack.enter_context(contextlib.redirect_stdout(null))
            if group.size > 1:
                threads = f"{group.threads} thread{'s' * (group.threads != 1)}"
                print(f"{group.size} ranks, {threads} each")
            code, document = command(group)
    except Exception as error:
        if not distributed.reports(error, rank):
            raise SystemExit(1) from None
        raise
    if group.rank > 0:
        raise SystemExit(code)
    return code, document


def select(name: str) -> Recipe:
    """The one recipe that is called `name`, or that is in the file `name`.  RecipeError for none or several."""
    found = recipes.find(name)
    if len(found) != 1 or found[0].space:
        names = ", ".join(recipe.name for recipe in found if not recipe.space) or "searches only: tinycnn sweep"
        raise RecipeError(f"{name}: train needs one recipe, got {names}")
    return found[0]


def _train(args: argparse.Namespace, recipe: Recipe | None, group: "Group") -> tuple[int, Any]:
    from tinycnn.recipes import build, training

    with group.together(), group.node_first():
        recipe = select(args.recipe) if recipe is None else recipe
        settings = [("training.epochs", args.epochs), ("training.batch", args.batch_size), ("data.fit", args.fit)]
        settings += [("data.skip_bad", True if args.skip_bad else None)]
        recipe = recipes.with_settings(recipe, args.settings, {k: v for k, v in settings if v is not None})
        device = _use_device(args, group)
        name = args.data or recipe.data.get("name", "mnist")
        recipe, data = build.load_for(recipe, name, args.data_dir)
        build.check(recipe, len(data.classes))
    _require_equal(group, recipe, data, args.seed)
    run = training.Run(recipe, args.seed, data, device=device, out=args.out, group=group)
    return _fit_and_finish(run)


def _use_device(args: argparse.Namespace, group: "Group") -> str:
    from tinycnn import distributed

    args.device = distributed.local_device(args.device, group)
    return _common.use_device(args)


def _require_equal(group: "Group", recipe: Recipe, data: Any, seed: int) -> None:
    """RankError if the ranks are not about to do the same; `fit` compares more."""
    group.require_equal({
        "tinycnn": tinycnn.__version__, "recipe": f"{recipe.name} {recipe.fingerprint}", "seed": seed,
        "data": f"{data.name} {data.sha256}",
    })  # fmt: skip


def _resume(args: argparse.Namespace, group: "Group") -> tuple[int, Any]:
    from tinycnn import runs
    from tinycnn.recipes import build, training

    folder = runs.RunFolder.of_ranks(group, lambda: runs.RunFolder.open(args.run))
    try:
        with group.together(), group.node_first():
            recipe, seed = recipes.from_config(folder.config, folder.path / "config.json"), folder.config.get("seed")
            missing = [key for key in recipes.REQUIRED["training"] if key not in recipe.training]
            if missing or not isinstance(seed, int) or "tuning" not in folder.config:
                problem = ", ".join(missing) or "seed"
                raise ValueError(f"{folder.path}/config.json does not describe a training ({problem})")
            if group.rank == 0 and not folder.checkpoint.exists():
                raise FileNotFoundError(f"{folder.path} has no checkpoint.safetensors: the run cannot be continued")
            before = recipe.training["epochs"]
            if args.epochs is not None:
                recipe = dataclasses.replace(recipe, training=recipe.training | {"epochs": args.epochs})
            saved_device = folder.config.get("device", "cpu")
            args.device = args.device or (saved_device.partition(":")[0] if group.size > 1 else saved_device)
            device = _use_device(args, group)
            data = build.load(recipe, args.data_dir)
        _require_equal(group, recipe, data, seed)
        run = training.Run(recipe, seed, data, device=device, folder=folder, force=args.force, group=group)
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
    print(flush=True)
    interrupted, printer = False, _common.EpochPrinter(epochs)
    try:
        run.fit(
            printer,
            on_compile=lambda total: print(f"compiling {total} kernels; later runs load them ...\n", flush=True),
        )
    except ResumeError as error:
        if epochs_before not in (None, epochs) and "learning rate" in str(error):
            lr = run.recipe.training.get("lr")
            error.args = (
                f"{folder.path} cannot be extended to {epochs} epochs: the rates of lr = {lr!r} depend on the number "
                f"of epochs, and those of {epochs_before} epochs were used; start a new run with --epochs {epochs}",
            )
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
    group: Group = run.group
    return group.on_root(lambda: _finish(run, printer.printed, interrupted))


def _finish(run: Any, printed: int, interrupted: bool) -> tuple[int, Any]:
    """Test, and print the result.   printed: lines of epochs     interrupted: the training was, by Ctrl-C"""
    folder = run.folder
    if not printed:
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
