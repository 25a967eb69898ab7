"""The command `python -m tinycnn sweep`: a search through the space of a recipe, with Optuna.

A study lies in a journal file, or in any storage that Optuna knows; whoever opens the same one takes part in the same
search, from other processes or machines.  A trial is judged by a validation split; what it gets on the test set is
written down beside it and chooses nothing.  The trials of a recipe of the project are kept in results/ as well.
"""

import dataclasses
import datetime
import math
import os
import platform
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from tinycnn import experiment, recipes
from tinycnn.errors import RecipeError


def add_options(parser):
    """The options of `sweep`."""
    non_negative_int, positive_int = experiment.non_negative_int, experiment.positive_int
    add = parser.add_argument
    add("name", nargs="?", default="sweep", metavar="NAME", help="a recipe with a space, or a file (default: sweep)")
    add("--trials", type=positive_int, default=10, help="until the study has so many (default: 10)")
    add("--sampler", choices=("random", "grid", "tpe"), default="random", help="how to choose (default: random)")
    add("--pruner", choices=("none", "median", "hyperband"), default="median",
        help="when to give up a trial that lags behind (default: median)")  # fmt: skip
    add("--epochs", type=positive_int, help="of each trial; the recipe's by default")
    add("--storage", help="an Optuna storage URL, or a journal file (default: sweeps/NAME.journal)")
    add("--study", help="name of the study in the storage (default: NAME)")
    add("--seed", type=non_negative_int, default=0, help="of the sampler, and of every training")
    add("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    add("--threads", type=positive_int, help="CPU threads; all by default")
    add("--data", choices=("mnist", "fashion", "kmnist", "synthetic"), help="another data set than the recipe's")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--results", default="results", help="folder where trials of the project's recipes are kept (default: results)")
    add("--out", default="sweeps", help="folder of journals, run folders and the report (default: sweeps)")
    add("--show", action="store_true", help="print and draw what the study holds, and run nothing")
    return parser


def main(args):
    """Run trials until there are enough, then report; returns the exit code."""
    try:
        import optuna
    except ImportError:
        print("error: a sweep needs Optuna: pip install 'tinycnn[sweep]'", file=sys.stderr)
        return 1
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    interrupted = "interrupted: the study is kept, and the same command goes on"
    return experiment.run_command(lambda: _sweep(args, optuna), interrupted)


def _sweep(args, optuna):
    recipe = _recipe(args)
    study = _study(args, recipe, optuna)
    if not args.show:
        _search(args, recipe, study, optuna)
    code = _report(args, recipe, study, optuna)
    if _is_kept(recipe, study):
        from tinycnn.recipes import report

        kept = _keep(args, recipe, study)
        print(f"results: {kept}" if kept else f"{args.results} holds more trials of {recipe.name}, which stay")
        print(f"table: {report.write_table(args.results)}")
    return code


def _recipe(args):
    """The recipe, with the number of epochs that is asked for."""
    from tinycnn.recipes import training

    with_space = [recipe for recipe in recipes.find(args.name) if recipe.space]
    if len(with_space) != 1:
        raise RecipeError(f"{args.name}: a sweep needs one recipe with a table 'space', found {len(with_space)}")
    recipe = with_space[0]
    if not recipe.data.get("validation"):
        raise RecipeError(f"{recipe.location('data')[0]}: a sweep needs data.validation, to choose by")
    if args.epochs:
        recipe = dataclasses.replace(recipe, training=recipe.training | {"epochs": args.epochs})
    for point in _corner(recipe.space) if not args.show else ():
        try:
            training.check(recipe.substitute(point))
        except RecipeError as error:
            raise RecipeError(f"{error} (at {recipes.format_point(point)})") from None
    return recipe


def _corner(space):
    """The first value of each name together, and every other value with the first ones of the other names."""
    first = {name: values[0] for name, values in space.items()}
    yield first
    for name, values in space.items():
        for value in values[1:]:
            yield first | {name: value}


def _study(args, recipe, optuna):
    """Open the study, or begin it.  ValueError if its storage cannot be reached, or it is of another recipe."""
    where, name = args.storage or str(Path(args.out) / f"{recipe.name}.journal"), args.study or recipe.name
    if args.show and "://" not in where and not Path(where).exists():
        raise ValueError(f"there is no journal {where}")
    try:
        if "://" in where:
            storage = optuna.storages.get_storage(where)
        else:
            Path(where).parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(where))
        there = [study.study_name for study in storage.get_all_studies()]
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=3),
        }
        if args.show:
            study = optuna.load_study(storage=storage, study_name=name) if name in there else None
        else:
            study = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, direction="maximize",
                sampler=_sampler(args, recipe, optuna, 0), pruner=pruners[args.pruner](),
            )  # fmt: skip
    except Exception as error:  # whatever the storage's driver raises
        raise ValueError(f"the storage {where} cannot be used: {_first_line(error)}") from error
    if study is None:
        raise ValueError(f"there is no study {name!r} in {where}, only {', '.join(map(repr, there)) or 'nothing'}")
    # What all trials of a study have in common; to look at it, the same space is enough.
    common = {"space": recipe.space}
    if not args.show:
        data = args.data or recipe.data.get("name", "mnist")
        common |= {"epochs": recipe.training["epochs"], "data": data, "recipe": recipe.fingerprint}
    for key, value in common.items():
        told = study.user_attrs.get(key)
        if told is None and not args.show:
            study.set_user_attr(key, value)
        elif told not in (None, value):
            was = f"{key} {told!r}, not {value!r}" if key in ("epochs", "data") else f"another version of its {key}"
            raise ValueError(f"the study {name!r} in {where} was begun with {was}: choose another name with --study")
    return study


def _sampler(args, recipe, optuna, number):
    """The sampler for a trial; with random numbers of its own, whichever process runs it, and whenever."""
    seed = 10_007 * args.seed + number
    if args.sampler == "random":
        return optuna.samplers.RandomSampler(seed % 2**32)
    if args.sampler == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
            return optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    grid = optuna.samplers.GridSampler(recipe.space, 0)  # one order, whatever the seed: a point is known by its place
    grid.after_trial = lambda *args: None  # it would end Study.optimize, which does not run here
    return grid


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


# --- trials -----------------------------------------------------------------------------------------------------------


def _search(args, recipe, study, optuna):
    from tinycnn import devices
    from tinycnn.recipes import report, results, training

    device = devices.resolve(args.device)
    devices.get(device)
    devices.set_num_threads(args.threads)
    results.prepare_folder(args.out, recipe)
    is_kept = _is_kept(recipe, study)
    if is_kept:
        results.prepare_folder(args.results, recipe)
        report.read_all(args.results)  # a damaged file is told before hours of training
    data = training.load(recipe, args.data_dir, args.data)
    training.split_sizes(recipe, data)
    combinations, done = math.prod(map(len, recipe.space.values())), _counted(study, optuna)
    print(f"{recipe.title}: {combinations:,} combinations; {done} of {args.trials} trials done\n{HEAD}", flush=True)
    while True:
        _take_up_lost(study, optuna)
        if _counted(study, optuna, running=True) >= args.trials:
            break
        if args.sampler == "grid" and _grid_done(study, combinations, optuna):
            print("the grid has been gone through")
            break
        trial = study.ask()
        trial.set_user_attr("process", _me())
        if args.sampler != "grid":
            study.sampler = _sampler(args, recipe, optuna, trial.number)
        point = {name: trial.suggest_categorical(name, values) for name, values in recipe.space.items()}
        if _counted(study, optuna, running=True, below=trial.number) >= args.trials:  # others were faster
            _give_back(study, study.trials[trial.number], optuna, "one too many")
            continue
        _trial(args, recipe.substitute(point), trial, study, data, device, optuna)
        print(_line(study.trials[trial.number]), flush=True)
        if is_kept:  # now, and not only at the end, which an interrupted search does not reach
            _keep(args, recipe, study)


def _trial(args, recipe, trial, study, data, device, optuna):
    """Train one point of the space and tell the study; one that fails is written down as such."""
    from tinycnn.recipes import training

    def on_epoch(record):
        trial.report(record["val_accuracy"], record["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    failed = optuna.trial.TrialState.FAIL

    def on_result(result):
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
        _give_back(study, study.trials[trial.number], optuna, "interrupted")
        raise


def _me():
    """This process: machine, number, and when it began (numbers are used again)."""
    return [platform.node(), os.getpid(), _began(os.getpid())]


def _began(pid):
    """Something that two processes with the same number do not share; None if there is no such process."""
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


def _take_up_lost(study, optuna):
    """Trials of processes of this machine that are gone (killed, say) are put back to be run again."""
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        node, pid, began = trial.user_attrs.get("process", (None, 0, None))
        unsigned = node is None and datetime.datetime.now() - trial.datetime_start > datetime.timedelta(minutes=1)
        if unsigned or (node == platform.node() and _began(pid) != began):
            _give_back(study, trial, optuna, "its process was lost")


def _give_back(study, trial, optuna, why):
    """End a trial that was not finished, and let the next one run its point."""
    with suppress(ValueError, RuntimeError):  # another process was faster: then it gives it back
        study._storage.set_trial_user_attr(trial._trial_id, "given back", why)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if len(trial.params) == len(study.user_attrs["space"]):
            study.enqueue_trial(trial.params)


def _counted(study, optuna, running=False, below=math.inf):
    """Trials (with numbers below `below`) that are done: all but those that were given back to be run again."""
    states = optuna.trial.TrialState
    ended = (states.COMPLETE, states.PRUNED, states.FAIL, *((states.RUNNING,) if running else ()))
    trials = study.get_trials(deepcopy=False, states=ended)
    return sum("given back" not in trial.user_attrs and trial.number < below for trial in trials)


def _grid_done(study, combinations, optuna):
    """Whether every point of the grid has been begun, and none waits to be run again."""
    trials = study.get_trials(deepcopy=False)
    begun = sum("grid_id" in trial.system_attrs for trial in trials)
    return begun >= combinations and all(trial.state != optuna.trial.TrialState.WAITING for trial in trials)


# --- what was found ---------------------------------------------------------------------------------------------------

HEAD = "trial  validation   test     F1      point"


def _line(trial):
    """A trial as a line of the table."""
    point = recipes.format_point(trial.params)
    state, told = trial.state.name, trial.user_attrs
    if state == "COMPLETE":
        figures = f"{trial.value:9.2%} {told['accuracy']:9.2%} {told['f1']:8.4f}"
    else:
        last = max(trial.intermediate_values.items(), default=(0, 0.0))
        words = {"PRUNED": f"given up in epoch {last[0]} at {last[1]:.2%}", "FAIL": "failed", "RUNNING": "running"}
        figures = f"{words.get(state, state.lower()):>28}"
    why = f" ({told['failed']})" if "failed" in told else ""
    return f"{trial.number:5d} {figures}    {point}{why}"


def _ranking(study, optuna):
    """All trials but those that were given back or not begun, the best first."""
    waiting = optuna.trial.TrialState.WAITING
    trials = [t for t in study.trials if "given back" not in t.user_attrs and t.state != waiting]
    return sorted(trials, key=lambda t: (t.state != optuna.trial.TrialState.COMPLETE, -(t.value or 0), t.number))


def _is_kept(recipe, study):
    """Whether results of the study are kept: of a recipe of the project as it stands there, on its own data set."""
    begun = (study.user_attrs.get("recipe"), study.user_attrs.get("data"))
    own = (recipe.fingerprint, recipe.data.get("name", "mnist"))
    return recipe == recipes.builtin().get(recipe.name) and begun == own


def _keep(args, recipe, study):
    """Write the trials that have ended into the folder of results, as `results.save_trials` does."""
    from tinycnn.recipes import results

    trials = [
        {
            "number": t.number, "point": t.params, "state": t.state.name, "validation": t.value,
            **{key: t.user_attrs.get(key) for key in ("accuracy", "f1", "cpu_seconds", "failed")},
            "environment": t.user_attrs.get("environment", {}), "finished": f"{t.datetime_complete:%Y-%m-%d}",
        }
        for t in study.trials if t.state.is_finished() and "given back" not in t.user_attrs
    ]  # fmt: skip
    return results.save_trials(args.results, recipe, trials)


def _report(args, recipe, study, optuna):
    """Print the ranking; write report.md and its pictures."""
    import numpy as np

    from tinycnn import metrics, plot
    from tinycnn.recipes import pictures
    from tinycnn.recipes.report import save_text

    ranked = _ranking(study, optuna)
    complete = [t for t in ranked if t.state == optuna.trial.TrialState.COMPLETE]
    print(f"\n{study.study_name}, {len(ranked)} trials, the best on validation images first\n{HEAD}")
    print("\n".join(_line(trial) for trial in ranked))
    if not complete:
        print("no trial has been completed yet")
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
        *(_line(trial) for trial in ranked), "```", "",
        "Chosen by accuracy on validation images; the test set was looked at once a trial and chose nothing.", "",
        "![Trials](parallel.png)", *(["", "![Importances](importances.png)"] if importances else []), "",
        f"## The best: trial {best.number}", "", "```", metrics.format_report(metrics.report(matrix)), "```", "",
        "![Confusion matrix on the test set](confusion.png)", "",
    ]  # fmt: skip
    print(f"report: {save_text(folder / 'report.md', chr(10).join(lines))}")
    return 0
