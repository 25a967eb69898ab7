"""The command `python -m tinycnn sweep`: hyperparameter search over the space of a recipe, with Optuna.

A study is stored in a journal file or any storage that Optuna supports. Processes that open the same storage share the
search. Trials are ranked by validation accuracy; the test accuracy is recorded, but not used for selection. Trials of
built-in recipes are also saved in results/.
"""

import argparse
import dataclasses
import datetime
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinycnn import recipes
from tinycnn.commands import _common
from tinycnn.data import Dataset
from tinycnn.errors import RecipeError
from tinycnn.recipes import Point, Recipe

# Optuna is optional: functions get its module as the argument `optuna`, studies and trials have the type Any.
REQUEUED = "requeued"  # user attribute of a trial that did not finish: the reason why its point is run again


def main(args: argparse.Namespace) -> int:
    """Run trials up to the requested number, then report; returns the exit code."""
    try:
        import optuna
    except ImportError:
        print("error: a sweep needs Optuna: pip install optuna", file=sys.stderr)
        return 1
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    interrupted = "interrupted: the study is kept; the same command resumes it"
    return _common.run_command(lambda: _sweep(args, optuna), interrupted)


def _sweep(args: argparse.Namespace, optuna: Any) -> int:
    recipe = _recipe(args)
    study = _study(args, recipe, optuna)
    if not args.show:
        _search(args, recipe, study, optuna)
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


def _study(args: argparse.Namespace, recipe: Recipe, optuna: Any) -> Any:
    """Open or create the study. ValueError if its storage cannot be used or it belongs to another recipe."""
    location, name = args.storage or str(Path(args.out) / f"{recipe.name}.journal"), args.study or recipe.name
    if args.show and "://" not in location and not Path(location).exists():
        raise ValueError(f"there is no journal {location}")
    try:
        if "://" in location:
            storage = optuna.storages.get_storage(location)
        else:
            Path(location).parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(location))
        names = [study.study_name for study in storage.get_all_studies()]
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=3),
        }
        if args.show:
            study = optuna.load_study(storage=storage, study_name=name) if name in names else None
        else:
            study = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, direction="maximize",
                sampler=_sampler(args, recipe, optuna, 0), pruner=pruners[args.pruner](),
            )  # fmt: skip
    except Exception as error:  # storage drivers raise exceptions of any class
        raise ValueError(f"the storage {location} cannot be used: {_first_line(error)}") from error
    if study is None:
        raise ValueError(f"there is no study {name!r} in {location}, only {', '.join(map(repr, names)) or 'nothing'}")
    # All trials of a study share these attributes; --show only needs the same space.
    attributes: dict[str, Any] = {"space": recipe.space}
    if not args.show:
        data = args.data or recipe.data.get("name", "mnist")
        attributes |= {"epochs": recipe.training["epochs"], "data": data, "recipe": recipe.fingerprint}
    for key, value in attributes.items():
        stored = study.user_attrs.get(key)
        if stored is None and not args.show:
            study.set_user_attr(key, value)
        elif stored not in (None, value):
            words = f"{key} {stored!r}, not {value!r}" if key in ("epochs", "data") else f"another version of its {key}"
            raise ValueError(
                f"the study {name!r} in {location} was started with {words}: choose another name with --study"
            )
    return study


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


# --- trials -----------------------------------------------------------------------------------------------------------


def _search(args: argparse.Namespace, recipe: Recipe, study: Any, optuna: Any) -> None:
    """Run trials until the study has --trials of them."""
    from tinycnn.recipes import build, report, results

    device = _common.use_device(args)
    results.prepare_folder(args.out, recipe)
    is_recorded = _is_recorded(recipe, study)
    if is_recorded:
        results.prepare_folder(args.results, recipe)
        report.read_all(args.results)  # a damaged file is reported before hours of training
    data = build.load(recipe, args.data_dir, args.data)
    build.split_sizes(recipe, data)
    combinations, done = math.prod(map(len, recipe.space.values())), _count_trials(study, optuna)
    print(f"{recipe.title}: {combinations:,} combinations; {done} of {args.trials} trials done\n{HEAD}", flush=True)
    while True:
        _requeue_lost(study, optuna)
        if _count_trials(study, optuna, running=True) >= args.trials:
            break
        if args.sampler == "grid" and _grid_is_exhausted(study, combinations, optuna):
            print("every point of the grid has been tried")
            break
        trial = study.ask()
        trial.set_user_attr("process", _process_identity())
        if args.sampler != "grid":
            study.sampler = _sampler(args, recipe, optuna, trial.number)
        point = {name: trial.suggest_categorical(name, values) for name, values in recipe.space.items()}
        if _count_trials(study, optuna, running=True, below=trial.number) >= args.trials:  # other processes were faster
            _requeue(study, study.trials[trial.number], optuna, "one too many")
            continue
        _trial(args, recipe.substitute(point), trial, study, data, device, optuna)
        print(_format_trial(study.trials[trial.number]), flush=True)
        if is_recorded:  # after each trial: an interrupted search keeps them too
            _record_trials(args, recipe, study)


def _trial(
    args: argparse.Namespace, recipe: Recipe, trial: Any, study: Any, data: Dataset, device: str, optuna: Any
) -> None:
    """Train one point of the space and report its result, or its failure, to the study."""
    from tinycnn.recipes import training

    def on_epoch(record: dict[str, Any]) -> None:
        trial.report(record["val_accuracy"], record["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    failed = optuna.trial.TrialState.FAIL

    def on_result(result: dict[str, Any]) -> None:
        for key in ("accuracy", "precision", "recall", "f1", "confusion", "cpu_seconds", "diverged"):
            if key in result:
                trial.set_user_attr(key if key != "diverged" else "failed", result[key])
        if "diverged" in result:
            study.tell(trial, state=failed)
        else:
            study.tell(trial, result["history"]["val_accuracy"][-1])

    try:
        trial.set_user_attr("environment", training.environment(device))
        training.run(
            recipe, args.seed, data, device=device, out=args.out, on_message=lambda text: None, on_epoch=on_epoch,
            on_result=on_result,
        )  # fmt: skip
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (ValueError, ArithmeticError, MemoryError) as error:
        trial.set_user_attr("failed", str(error))
        study.tell(trial, state=failed)
    except BaseException:
        _requeue(study, study.trials[trial.number], optuna, "interrupted")
        raise


def _process_identity() -> list[Any]:
    """This process: machine, process ID and start time (process IDs are reused)."""
    return [platform.node(), os.getpid(), _start_time(os.getpid())]


def _start_time(pid: int) -> str | None:
    """The start time of a process where /proc shows it, else "alive"; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"


def _requeue_lost(study: Any, optuna: Any) -> None:
    """Requeue the running trials of processes on this machine that no longer exist."""
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        node, pid, start_time = trial.user_attrs.get("process", (None, 0, None))
        unsigned = node is None and datetime.datetime.now() - trial.datetime_start > datetime.timedelta(minutes=1)
        if unsigned or (node == platform.node() and _start_time(pid) != start_time):
            _requeue(study, trial, optuna, "its process was lost")


def _requeue(study: Any, trial: Any, optuna: Any, reason: str) -> None:
    """End an unfinished trial and enqueue its point for the next one."""
    with suppress(ValueError, RuntimeError):  # another process has already requeued it
        study._storage.set_trial_user_attr(trial._trial_id, REQUEUED, reason)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if len(trial.params) == len(study.user_attrs["space"]):
            study.enqueue_trial(trial.params)


def _count_trials(study: Any, optuna: Any, running: bool = False, below: float = math.inf) -> int:
    """Number of finished (with `running`: and running) trials with a number under `below`, without requeued ones."""
    states = optuna.trial.TrialState
    counted = (states.COMPLETE, states.PRUNED, states.FAIL, *((states.RUNNING,) if running else ()))
    trials = study.get_trials(deepcopy=False, states=counted)
    return sum(REQUEUED not in trial.user_attrs and trial.number < below for trial in trials)


def _grid_is_exhausted(study: Any, combinations: int, optuna: Any) -> bool:
    """Whether every point of the grid has been started and none is enqueued."""
    trials = study.get_trials(deepcopy=False)
    started = sum("grid_id" in trial.system_attrs for trial in trials)
    return started >= combinations and all(trial.state != optuna.trial.TrialState.WAITING for trial in trials)


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
    reason = f" ({attributes['failed']})" if "failed" in attributes else ""
    return f"{trial.number:5d} {scores}    {recipes.format_point(trial.params)}{reason}"


def _ranking(study: Any, optuna: Any) -> list[Any]:
    """All started trials except requeued ones, best first."""
    waiting = optuna.trial.TrialState.WAITING
    trials = [t for t in study.trials if REQUEUED not in t.user_attrs and t.state != waiting]
    return sorted(trials, key=lambda t: (t.state != optuna.trial.TrialState.COMPLETE, -(t.value or 0), t.number))


def _is_recorded(recipe: Recipe, study: Any) -> bool:
    """Whether results/ keeps the study's trials: only for an unchanged built-in recipe on its own data set."""
    attributes = (study.user_attrs.get("recipe"), study.user_attrs.get("data"))
    expected = (recipe.fingerprint, recipe.data.get("name", "mnist"))
    return recipe == recipes.builtin().get(recipe.name) and attributes == expected


def _record_trials(args: argparse.Namespace, recipe: Recipe, study: Any) -> Path | None:
    """Write the finished trials into the folder of results; see `results.save_trials`."""
    from tinycnn.recipes import results

    trials = [
        {
            "number": t.number, "point": t.params, "state": t.state.name, "validation": t.value,
            **{key: t.user_attrs.get(key) for key in ("accuracy", "f1", "cpu_seconds", "failed")},
            "environment": t.user_attrs.get("environment", {}), "finished": f"{t.datetime_complete:%Y-%m-%d}",
        }
        for t in study.trials if t.state.is_finished() and REQUEUED not in t.user_attrs
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
