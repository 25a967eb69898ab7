"""The command `python -m tinycnn sweep`: hyperparameter search over the space of a recipe, with Optuna.

A study is stored in a journal file or a database. Processes that open the same storage share the search: see
`tinycnn.recipes.studies`. Trials are ranked by validation accuracy; the test accuracy is recorded, but not used for
selection. Trials of built-in recipes are also saved in results/.
"""

import argparse
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinycnn import recipes
from tinycnn.commands import _common
from tinycnn.data import Dataset
from tinycnn.errors import RecipeError, StorageError
from tinycnn.recipes import Point, Recipe

if TYPE_CHECKING:
    from tinycnn.recipes.studies import SharedStudy

# Optuna is optional: functions get its module as the argument `optuna`, studies and trials have the type Any.


def main(args: argparse.Namespace) -> int:
    """Run trials up to the requested number, then report; returns the exit code."""
    try:
        import optuna
    except ImportError:
        print("error: a sweep needs Optuna: pip install 'tinycnn[sweep]'", file=sys.stderr)
        return 1
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    interrupted = "interrupted: the study is kept; the same command resumes it"
    return _common.run_command(lambda: _sweep(args, optuna), interrupted)


def _sweep(args: argparse.Namespace, optuna: Any) -> int:
    recipe = _recipe(args)
    shared = _study(args, recipe, optuna)
    study = shared.study
    if not args.show:
        _search(args, recipe, shared, optuna)
    code = _report(args, recipe, study, optuna)
    if _is_recorded(recipe, study):
        from tinycnn.recipes import report

        path = _record_trials(args, recipe, study)
        print(f"results: {path}" if path else f"{args.results} has more trials of {recipe.name}; they are kept")
        print(f"table: {report.write_table(args.results)}")
    return code


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe named in the arguments, checked, with the number of epochs from --epochs."""
    from tinycnn.recipes import build

    searches = [recipe for recipe in recipes.find(args.name) if recipe.space]
    if len(searches) != 1:
        raise RecipeError(f"{args.name}: a sweep needs one recipe with a table 'space', found {len(searches)}")
    recipe = searches[0]
    if not recipe.data.get("validation"):
        raise RecipeError(f"{recipe.location('data')[0]}: a sweep needs data.validation to rank the trials")
    if args.epochs:
        recipe = dataclasses.replace(recipe, training=recipe.training | {"epochs": args.epochs})
    for point in _one_at_a_time(recipe.space) if not args.show else ():
        try:
            build.check(recipe.substitute(point))
        except RecipeError as error:
            raise RecipeError(f"{error} (at {recipes.format_point(point)})") from None
    return recipe


def _one_at_a_time(space: dict[str, list[Any]]) -> Iterator[Point]:
    """The point of all first values, and each point that differs from it in one value."""
    first = {name: values[0] for name, values in space.items()}
    yield first
    for name, values in space.items():
        for value in values[1:]:
            yield first | {name: value}


def _study(args: argparse.Namespace, recipe: Recipe, optuna: Any) -> "SharedStudy":
    """Open or create the study. ValueError if its storage cannot be used or it belongs to another recipe."""
    from tinycnn.recipes import studies

    location, name = args.storage or str(Path(args.out) / f"{recipe.name}.journal"), args.study or recipe.name
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=3),
    }
    shared = studies.open_study(
        location, name, heartbeat=args.heartbeat, patience=args.wait, create=not args.show, direction="maximize",
        sampler=_sampler(args, recipe, optuna, 0), pruner=pruners[args.pruner](),
    )  # fmt: skip
    shared.require(_settings(args, recipe), write=not args.show)
    return shared


def _settings(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """What all trials of a study share; --show only needs the same space."""
    settings: dict[str, Any] = {"command": "sweep", "space": recipe.space}
    if args.show:
        return settings
    data = args.data or recipe.data.get("name", "mnist")
    settings |= {"epochs": recipe.training["epochs"], "data": data, "recipe": recipe.fingerprint}
    return settings | {key: getattr(args, key) for key in ("sampler", "pruner", "seed", "heartbeat")}


def _sampler(args: argparse.Namespace, recipe: Recipe, optuna: Any, number: int) -> Any:
    """The sampler for trial `number`; its seed depends only on --seed and the number, not on the process."""
    seed = 10_007 * args.seed + number
    if args.sampler == "random":
        return optuna.samplers.RandomSampler(seed % 2**32)
    if args.sampler == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
            return optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    grid = optuna.samplers.GridSampler(recipe.space, 0)  # the same order for every --seed: trials store only an index
    grid.after_trial = lambda *args: None  # it would call Study.stop, which is an error outside Study.optimize
    return grid


# --- trials -----------------------------------------------------------------------------------------------------------


def _search(args: argparse.Namespace, recipe: Recipe, shared: "SharedStudy", optuna: Any) -> None:
    """Run trials until the study has --trials of them, and the last ones of other workers are finished."""
    from tinycnn.recipes import build, report, results

    study, device = shared.study, _common.use_device(args)
    results.prepare_folder(args.out, recipe)
    is_recorded = _is_recorded(recipe, study)
    if is_recorded:
        results.prepare_folder(args.results, recipe)
        report.read_all(args.results)  # a damaged file is reported before hours of training
    data = build.load(recipe, args.data_dir, args.data)
    build.split_sizes(recipe, data)
    combinations, done = math.prod(map(len, recipe.space.values())), _count_trials(study, optuna)
    print(f"{recipe.title}: {combinations:,} combinations; {done} of {args.trials} trials done\n{HEAD}", flush=True)
    waiting = False
    while True:
        shared.retry_lost()
        shared.require(_settings(args, recipe))  # two workers may have created the study at the same moment
        exhausted = args.sampler == "grid" and _grid_is_exhausted(study, combinations, optuna)
        if exhausted or _count_trials(study, optuna, running=True) >= args.trials:
            running = len(shared.trials(optuna.trial.TrialState.RUNNING))
            if not running or not shared.has_heartbeats or _count_trials(study, optuna) >= args.trials:
                if exhausted:
                    print("every point of the grid has been tried")
                break
            if not waiting:
                print(f"waiting for the last trials of other workers, {running} now", flush=True)
            waiting = True
            shared.wait_for_others()
            continue
        trial = shared.ask()
        if args.sampler != "grid":
            study.sampler = _sampler(args, recipe, optuna, trial.number)
        _trial(args, recipe, trial, shared, data, device, optuna)
        if is_recorded:  # after each trial: an interrupted search keeps them too
            _record_trials(args, recipe, study)


def _trial(
    args: argparse.Namespace, recipe: Recipe, trial: Any, shared: "SharedStudy", data: Dataset, device: str, optuna: Any
) -> None:
    """Train a trial of the study unless another worker has its point, and print its line."""
    try:
        with shared.heartbeat(trial._trial_id):
            point = {name: trial.suggest_categorical(name, values) for name, values in recipe.space.items()}
            if _is_duplicate(args, recipe, trial.number, shared, optuna):
                shared.drop(trial.number)
            elif _count_trials(shared.study, optuna, running=True, below=trial.number) >= args.trials:
                shared.end(shared.study.trials[trial.number], "one too many")  # other workers were faster
            else:
                _train(args, recipe.substitute(point), trial, shared, data, device, optuna)
                print(_format_trial(shared.study.trials[trial.number]), flush=True)
    except optuna.exceptions.UpdateFinishedTrialError:
        print(f"{trial.number:5d} was taken for lost by another worker, which runs it again", flush=True)
    except StorageError:
        raise  # the heartbeats end, and another worker runs the trial again
    except BaseException:
        shared.give_back(trial.number, "interrupted")
        raise


def _train(
    args: argparse.Namespace, recipe: Recipe, trial: Any, shared: "SharedStudy", data: Dataset, device: str, optuna: Any
) -> None:
    """Train one point of the space and report its result, or its failure, to the study."""
    from tinycnn.recipes import training

    states = optuna.trial.TrialState

    def on_epoch(record: dict[str, Any]) -> None:
        trial.report(record["val_accuracy"], record["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    def on_result(result: dict[str, Any]) -> None:
        for key in ("accuracy", "precision", "recall", "f1", "confusion", "cpu_seconds", "diverged"):
            if key in result:
                trial.set_user_attr(key if key != "diverged" else "failed", result[key])
        if "diverged" in result:
            shared.tell(trial.number, state=states.FAIL)
        else:
            shared.tell(trial.number, result["history"]["val_accuracy"][-1])

    try:
        trial.set_user_attr("environment", training.environment(device))
        training.run(
            recipe, args.seed, data, device=device, out=args.out, on_message=lambda text: None, on_epoch=on_epoch,
            on_result=on_result,
        )  # fmt: skip
    except optuna.TrialPruned:
        shared.tell(trial.number, state=states.PRUNED)
    except (ValueError, ArithmeticError, MemoryError) as error:
        trial.set_user_attr("failed", str(error))
        shared.tell(trial.number, state=states.FAIL)


def _is_duplicate(args: argparse.Namespace, recipe: Recipe, number: int, shared: "SharedStudy", optuna: Any) -> bool:
    """Whether an earlier trial has the same point of a grid, or retries the same trial: two workers have chosen it at
    the same moment.  Waits until all earlier trials have a point."""
    from tinycnn.recipes import studies

    while True:
        trials = shared.trials()
        if args.sampler != "grid" or studies.is_second_retry(trials, trials[number]):
            return studies.is_second_retry(trials, trials[number])
        replaced = studies.replaced_numbers(trials)
        earlier = [trial for trial in trials[:number] if trial.number not in replaced]
        if any(trial.params == trials[number].params for trial in earlier):
            return True
        running = optuna.trial.TrialState.RUNNING
        if all(trial.state != running or len(trial.params) == len(recipe.space) for trial in earlier):
            return False
        shared.retry_lost()
        time.sleep(0.2)


def _count_trials(study: Any, optuna: Any, running: bool = False, below: float = math.inf) -> int:
    """Number of finished (with `running`: and running) trials with a number under `below`, without replaced ones."""
    from tinycnn.recipes import studies

    states = optuna.trial.TrialState
    counted = (states.COMPLETE, states.PRUNED, states.FAIL, *((states.RUNNING,) if running else ()))
    trials = study.get_trials(deepcopy=False)
    replaced = studies.replaced_numbers(trials)
    return sum(t.state in counted and t.number not in replaced and t.number < below for t in trials)


def _grid_is_exhausted(study: Any, combinations: int, optuna: Any) -> bool:
    """Whether every point of the grid has been started and none is enqueued."""
    trials = study.get_trials(deepcopy=False)
    started = {trial.system_attrs["grid_id"] for trial in trials if "grid_id" in trial.system_attrs}
    return len(started) >= combinations and all(trial.state != optuna.trial.TrialState.WAITING for trial in trials)


# --- report -----------------------------------------------------------------------------------------------------------

HEAD = "trial  validation   test     F1      point"


def _format_trial(trial: Any) -> str:
    """A trial as a line of the table."""
    state, attributes = trial.state.name, trial.user_attrs
    if state == "COMPLETE":
        scores = f"{trial.value:9.2%} {attributes['accuracy']:9.2%} {attributes['f1']:8.4f}"
    else:
        epoch, accuracy = max(trial.intermediate_values.items(), default=(0, 0.0))
        words = {"PRUNED": f"pruned in epoch {epoch} at {accuracy:.2%}", "FAIL": "failed", "RUNNING": "running"}
        scores = f"{words.get(state, state.lower()):>28}"
    reason = f" ({_failure(trial)})" if _failure(trial) else ""
    return f"{trial.number:5d} {scores}    {recipes.format_point(trial.params)}{reason}"


def _failure(trial: Any) -> str | None:
    """Why a trial has failed."""
    lost = "its worker was lost, each time that it was run" if trial.state.name == "FAIL" else None
    reason: str | None = trial.user_attrs.get("failed", lost)
    return reason


def _ranking(study: Any, optuna: Any) -> list[Any]:
    """All started trials except replaced ones, best first."""
    from tinycnn.recipes import studies

    all_trials, waiting = study.trials, optuna.trial.TrialState.WAITING
    replaced = studies.replaced_numbers(all_trials)
    trials = [t for t in all_trials if t.number not in replaced and t.state != waiting]
    return sorted(trials, key=lambda t: (t.state != optuna.trial.TrialState.COMPLETE, -(t.value or 0), t.number))


def _is_recorded(recipe: Recipe, study: Any) -> bool:
    """Whether results/ keeps the study's trials: only for an unchanged built-in recipe on its own data set."""
    attributes = (study.user_attrs.get("recipe"), study.user_attrs.get("data"))
    expected = (recipe.fingerprint, recipe.data.get("name", "mnist"))
    return recipe == recipes.builtin().get(recipe.name) and attributes == expected


def _record_trials(args: argparse.Namespace, recipe: Recipe, study: Any) -> Path | None:
    """Write the finished trials into the folder of results; see `results.save_trials`."""
    from tinycnn.recipes import results, studies

    all_trials = study.trials
    replaced = studies.replaced_numbers(all_trials)
    trials = [
        {
            "number": t.number, "point": t.params, "state": t.state.name, "validation": t.value,
            **{key: t.user_attrs.get(key) for key in ("accuracy", "f1", "cpu_seconds")}, "failed": _failure(t),
            "environment": t.user_attrs.get("environment", {}), "finished": f"{t.datetime_complete:%Y-%m-%d}",
        }
        for t in all_trials if t.state.is_finished() and t.number not in replaced
    ]  # fmt: skip
    return results.save_trials(args.results, recipe, trials)


def _report(args: argparse.Namespace, recipe: Recipe, study: Any, optuna: Any) -> int:
    """Print the ranking and write report.md with its pictures; returns the exit code."""
    import numpy as np

    from tinycnn import metrics, plot
    from tinycnn.recipes import pictures
    from tinycnn.recipes.report import save_text

    ranked = _ranking(study, optuna)
    complete = [t for t in ranked if t.state == optuna.trial.TrialState.COMPLETE]
    print(f"\n{study.study_name}, {len(ranked)} trials, best validation accuracy first\n{HEAD}")
    print("\n".join(_format_trial(trial) for trial in ranked))
    if not complete:
        print("no trial is complete yet")
        return 0
    best = complete[0]
    folder = Path(args.out) / f"{study.study_name}-report"
    folder.mkdir(parents=True, exist_ok=True)
    importances = None
    if len(complete) >= 4 and len({t.value for t in complete}) > 1:
        importances = optuna.importance.get_param_importances(study)
    points = [(trial.params, trial.value) for trial in complete]
    plot.save(pictures.parallel_coordinates(recipe.space, points), folder / "parallel.png")
    if importances:
        plot.save(pictures.importances(importances), folder / "importances.png")
    matrix = np.array(best.user_attrs["confusion"])
    plot.save(plot.confusion(matrix), folder / "confusion.png")
    lines = [
        f"# Sweep {study.study_name}", "", f"{recipe.title}; {len(ranked)} trials.", "", "```", HEAD,
        *(_format_trial(trial) for trial in ranked), "```", "",
        "Ranked by validation accuracy. The test set was evaluated once per trial and selected nothing.", "",
        "![Trials](parallel.png)", *(["", "![Importances](importances.png)"] if importances else []), "",
        f"## Best trial: {best.number}", "", "```", metrics.format_report(metrics.report(matrix)), "```", "",
        "![Confusion matrix on the test set](confusion.png)", "",
    ]  # fmt: skip
    print(f"report: {save_text(folder / 'report.md', chr(10).join(lines))}")
    return 0
