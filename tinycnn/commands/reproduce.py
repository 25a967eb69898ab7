"""The commands `python -m tinycnn recipes` and `reproduce`.

With --storage, workers share the seeds: each (recipe, data set, seed) is a trial of one study in the storage, and its
result is stored there.  Every worker writes all results into its own folder.
"""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinycnn import recipes
from tinycnn.commands import _common
from tinycnn.data import Dataset
from tinycnn.errors import InUseError, RecipeError, StorageError
from tinycnn.recipes import Recipe, results

if TYPE_CHECKING:
    from tinycnn.recipes.studies import SharedStudy


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
    shared = _open_study(args) if args.storage else None
    loaded: dict[str, Any] = {}
    missing_seeds = {}
    for recipe in selected:
        results.check_owner(root, recipe)
        if shared is not None:
            _collect(args, root, recipe, shared)
        done = {result["seed"] for result in results.read(root, recipe)}
        missing_seeds[recipe.name] = [seed for seed in args.seeds if seed not in done]
        name = args.data or recipe.data.get("name", "mnist")
        if missing_seeds[recipe.name]:
            for folder in (root, args.out, *([args.tensorboard] if args.tensorboard else [])):
                results.prepare_folder(folder, recipe)
            if name not in loaded:
                loaded[name] = build.load(recipe, args.data_dir, name)
            build.split_sizes(recipe, loaded[name])
    lost: dict[str, list[int]] = {}
    if shared is not None:
        lost = _share_seeds(args, root, selected, shared, loaded, device)
    for recipe in selected:
        print(f"\n{recipe.name}: {recipe.title}")
        for seed in missing_seeds[recipe.name] if shared is None else ():
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
    for name, seeds in lost.items():
        print(f"error: {name}, seeds {seeds}: the worker was lost each time; --study NEW tries again", file=sys.stderr)
    return 1 if lost else 0


def _train_seed(args: argparse.Namespace, root: str, recipe: Recipe, seed: int, data: Dataset, device: str) -> None:
    """Train a seed and save its result, unless another process does."""
    from tinycnn import runs

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
        print(f"  seed {seed}, {recipe.training['epochs']} epochs:", flush=True)
        _train(args, recipe, seed, data, device, found, functools.partial(results.save, root, recipe))
    finally:
        (folder / f".seed-{seed}.lock").unlink(missing_ok=True)
        lock.release()


def _train(
    args: argparse.Namespace, recipe: Recipe, seed: int, data: Dataset, device: str, found: Sequence[results.Result],
    on_result: Callable[[results.Result], object],
) -> None:  # fmt: skip
    """Train a seed.   found: results of other seeds, for the rate that they have tuned"""
    from tinycnn import callbacks
    from tinycnn.recipes import training

    board = f"{args.tensorboard}/{recipe.name}/seed-{seed}" if args.tensorboard else None
    result = training.run(
        recipe, seed, data, device=device, out=args.out,
        tuning=next((r["tuning"] for r in found if r.get("tuning")), None),
        on_message=lambda text: print(f"  {text}"),
        on_epoch=_common.EpochPrinter(recipe.training["epochs"], interval=10, indent="  "),
        callbacks=[callbacks.TensorBoard(board)] if board else [],
        on_result=on_result,
    )  # fmt: skip
    if "diverged" in result:
        print(f"  {result['diverged']}")
    print(f"  test accuracy {result['accuracy']:.2%}, {result['training_seconds']:.0f} s of training", flush=True)


# --- seeds that several workers share ---------------------------------------------------------------------------------

SEED, RESULT = "seed", "result"  # user attributes of a trial: what it trains, and what came out


def _open_study(args: argparse.Namespace) -> "SharedStudy":
    """The study of --storage, whose trials are seeds."""
    try:
        from tinycnn.recipes import studies
    except ImportError as error:
        raise ValueError(
            f"--storage needs Optuna, and {error.name} is missing: pip install 'tinycnn[storage]'"
        ) from None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shared = studies.open_study(
        args.storage, args.study, heartbeat=args.heartbeat, patience=args.wait, direction="maximize"
    )
    shared.require({"command": "reproduce", "heartbeat": args.heartbeat})
    return shared


def _key(args: argparse.Namespace, recipe: Recipe, seed: int) -> list[Any]:
    """What identifies a seed of a recipe in a study."""
    return [recipe.name, recipe.fingerprint, args.data or recipe.data.get("name", "mnist"), seed]


def _collect(args: argparse.Namespace, root: str, recipe: Recipe, shared: "SharedStudy") -> list[results.Result]:
    """Write the results of the storage that the folder does not have; returns all of the recipe."""
    from optuna.trial import TrialState

    done = {result["seed"] for result in results.read(root, recipe)}
    for trial in shared.trials(TrialState.COMPLETE):
        result = trial.user_attrs.get(RESULT)
        key = trial.user_attrs.get(SEED)
        if not isinstance(result, dict) or key != _key(args, recipe, result.get("seed", -1)) or key[-1] in done:
            continue
        results.check(recipe, result, f"trial {trial.number} of the study {shared.study.study_name!r}")
        results.prepare_folder(root, recipe)
        results.save(root, recipe, result)
    return results.read(root, recipe)


def _share_seeds(
    args: argparse.Namespace, root: str, selected: Sequence[Recipe], shared: "SharedStudy", loaded: dict[str, Any],
    device: str,
) -> dict[str, list[int]]:  # fmt: skip
    """Train seeds until all are finished, by this worker or by others, and collect the results.  Returns the seeds by
    recipe whose worker was lost each time."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    from tinycnn.recipes import studies

    wanted = [(recipe, seed, _key(args, recipe, seed)) for recipe in selected for seed in args.seeds]
    _register(root, wanted, shared)
    waiting = False
    while True:
        shared.retry_lost()
        trials = shared.trials()
        replaced = studies.replaced_numbers(trials)
        first: dict[str, Any] = {}  # key -> its trial: two workers may have registered a seed at the same moment
        for trial in trials:
            if trial.number not in replaced:
                first.setdefault(json.dumps(trial.user_attrs.get(SEED)), trial)
        mine = [(recipe, seed, first[json.dumps(key)]) for recipe, seed, key in wanted]
        claimed = next((m for m in mine if m[2].state == TrialState.WAITING and shared.claim(m[2])), None)
        if claimed is not None:
            recipe, seed, trial = claimed
            print(f"\n{recipe.name}, seed {seed}, {recipe.training['epochs']} epochs:", flush=True)
            try:
                _train_claimed(args, root, recipe, seed, trial, shared, loaded, device)
            except UpdateFinishedTrialError:
                print("  was taken for lost by another worker, which trains it again", flush=True)
        elif all(trial.state.is_finished() for _, _, trial in mine):
            break
        elif not any(trial.state == TrialState.WAITING for _, _, trial in mine):
            running = sum(trial.state == TrialState.RUNNING for _, _, trial in mine)
            if not waiting:
                print(f"waiting for the seeds of other workers, {running} now", flush=True)
            waiting = True
            shared.wait_for_others()
    for recipe in selected:
        _collect(args, root, recipe, shared)
    lost: dict[str, list[int]] = {}
    for recipe, seed, trial in mine:
        if trial.state == TrialState.FAIL:
            lost.setdefault(recipe.name, []).append(seed)
    return lost


def _register(root: str, wanted: Sequence[tuple[Recipe, int, list[Any]]], shared: "SharedStudy") -> None:
    """Add the seeds that the study does not have: as finished if their results are in the folder."""
    import optuna
    from optuna.trial import TrialState

    known = [trial.user_attrs.get(SEED) for trial in shared.trials()]
    found = {recipe.name: {result["seed"]: result for result in results.read(root, recipe)} for recipe, *_ in wanted}
    for recipe, seed, key in wanted:
        if key in known:
            continue
        result = found[recipe.name].get(seed)
        if result is None:
            trial = optuna.create_trial(state=TrialState.WAITING, user_attrs={SEED: key})
        else:
            trial = optuna.create_trial(value=result["accuracy"], user_attrs={SEED: key, RESULT: result})
        shared.study.add_trial(trial)


def _train_claimed(
    args: argparse.Namespace, root: str, recipe: Recipe, seed: int, trial: Any, shared: "SharedStudy",
    loaded: dict[str, Any], device: str,
) -> None:  # fmt: skip
    """Train the seed of a trial that this worker has claimed, and store its result."""
    from optuna.exceptions import UpdateFinishedTrialError

    from tinycnn.recipes import build

    def finish(result: results.Result) -> None:
        results.save(root, recipe, result)
        shared.storage.set_trial_user_attr(trial._trial_id, RESULT, result)
        shared.tell(trial.number, result["accuracy"])

    try:
        with shared.heartbeat(trial._trial_id):
            found = _collect(args, root, recipe, shared)
            if known := next((result for result in found if result["seed"] == seed), None):
                finish(known)  # the storage was lost before it had the result
                return
            name = args.data or recipe.data.get("name", "mnist")
            if name not in loaded:
                loaded[name] = build.load(recipe, args.data_dir, name)
            _train(args, recipe, seed, loaded[name], device, found, finish)
    except (StorageError, UpdateFinishedTrialError):
        raise  # the heartbeats end, and another worker trains the seed again; or one already does
    except BaseException:
        shared.give_back(trial.number, "interrupted")
        raise
