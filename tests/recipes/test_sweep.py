"""Sweeps: choice of points, number of trials, failed and interrupted trials, and the ranking."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from tinycnn import hardware, plot, recipes, runs  # noqa: E402
from tinycnn.__main__ import main  # noqa: E402
from tinycnn.commands import sweep  # noqa: E402
from tinycnn.recipes import build, report, studies, training  # noqa: E402

ROOT = Path(__file__).parents[2]
TEXT = """
[small]
title = "a small search"
[small.net]
input = [1, 28, 28]
layers = "AvgPool2d(4), Flatten(), Linear(49, 10), $act Linear(10, 10)"
[small.data]
train = 200
validation = 100
[small.training]
optimizer = "SGD()"
lr = "$rate"
epochs = 2
batch = 50
[small.space]
act = ["", "Tanh(),", "ReLU(),"]
rate = [0.1, 0.3]
"""
COMPLETE, FAIL, PRUNED, RUNNING = (
    getattr(optuna.trial.TrialState, n) for n in ("COMPLETE", "FAIL", "PRUNED", "RUNNING")
)


@pytest.fixture
def home(tmp_path, monkeypatch, small_digits):
    """An empty folder; no pictures are drawn, which take longer than the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "save", lambda figure, path: None)
    monkeypatch.setattr(runs.RunFolder, "finish", lambda *args: None)
    (tmp_path / "mine.toml").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(home, capsys):
    """Run the command; returns exit code, stdout and stderr."""

    def run(*args, text=TEXT):
        (home / "mine.toml").write_text(text)
        code = main(["sweep", "mine.toml", *map(str, args)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def trained(monkeypatch):
    """Replace the training: `outcomes` gives (validation, test) accuracy. A list of the points that were run."""

    class Trained(list):
        def outcomes(self, recipe, seed):
            return 0.5 + float(recipe.training["lr"]) / 10, 0.5

    trained = Trained()
    matrix = np.eye(10, dtype=int).tolist()

    def fake(recipe, seed, data, *, on_epoch, on_result, **options):
        trained.append((recipe.net["layers"], recipe.training["lr"], seed, recipe.training["epochs"]))
        validation, test = trained.outcomes(recipe, seed)
        for epoch in range(1, recipe.training["epochs"] + 1):
            on_epoch({"epoch": epoch, "val_accuracy": validation})
        result = {
            "accuracy": test, "precision": test, "recall": test, "f1": test, "confusion": matrix, "cpu_seconds": 1.0,
            "history": {"val_accuracy": [0.1, validation]},
        }  # fmt: skip
        on_result(result)
        return result

    monkeypatch.setattr(training, "run", fake)
    return trained


def study(journal="sweeps/small.journal", name="small"):
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def states(**options):
    return [trial.state for trial in study(**options).trials]


# --- points -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_the_number_of_trials_and_resuming(run, trained, sampler):
    assert run("--trials", 3, "--sampler", sampler)[0] == 0
    assert len(trained) == 3
    code, out, err = run("--trials", 5, "--sampler", sampler)
    assert (code, err) == (0, "")
    assert "3 of 5 trials done" in out
    assert len(trained) == 5
    assert run("--trials", 5, "--sampler", sampler)[0] == 0
    assert len(trained) == 5
    assert states() == [COMPLETE] * 5
    assert all(seed == 0 and epochs == 2 for *_, seed, epochs in trained)


def test_a_grid_tries_every_point_once(run, trained):
    code, out, err = run("--sampler", "grid", "--trials", 10)
    assert (code, err) == (0, "")
    assert "every point of the grid has been tried" in out
    assert len(trained) == len({point[:2] for point in trained}) == 6
    code, out, _ = run("--sampler", "grid", "--trials", 10)
    assert code == 0
    assert len(trained) == 6


def test_random_points_do_not_depend_on_interruptions(run, trained):
    run("--trials", 8, "--out", "whole")
    whole = [*trained]
    trained.clear()
    for trials in (2, 3, 8):
        run("--trials", trials, "--out", "parts")
    assert trained == whole
    assert len({point[:2] for point in trained}) > 2
    trained.clear()
    run("--trials", 8, "--out", "another", "--seed", 1)
    assert [point[:2] for point in trained] != [point[:2] for point in whole]
    assert {seed for *_, seed, _ in trained} == {1}


def test_two_processes_do_not_exceed_the_number_of_trials(run, trained, monkeypatch, home):
    """The second process asks for a trial right after the first one has counted the trials."""
    ask, once = optuna.Study.ask, []

    def slow(self, *args):
        if not once:
            once.append(True)
            assert main(["sweep", "mine.toml", "--trials", "1"]) == 0
        return ask(self, *args)

    monkeypatch.setattr(optuna.Study, "ask", slow)
    assert run("--trials", 1)[0] == 0
    assert len(trained) == 1
    assert states()[:2] == [COMPLETE, FAIL]
    assert study().trials[1].user_attrs["unfinished"] == "one too many"


# --- failed and interrupted trials ------------------------------------------------------------------------------------


def test_a_lost_trial_is_run_again_with_its_own_point(run, trained, home):
    run("--trials", 1)
    code = (
        "import sys, optuna, time; from tinycnn.recipes import studies\n"
        "backend = optuna.storages.journal.JournalFileBackend('sweeps/small.journal')\n"
        "s = optuna.load_study(study_name='small', storage=optuna.storages.JournalStorage(backend))\n"
        "t = s.ask(); t.set_user_attr('process', studies.process_identity())\n"
        "t.suggest_categorical('act', ['', 'Tanh(),', 'ReLU(),']); t.suggest_categorical('rate', [0.1, 0.3])\n"
        "print('asked', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=home,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:  # fmt: skip
        try:
            assert process.stdout.readline() == b"asked\n"
            # The trial counts while its process lives.
            assert run("--trials", 2)[0] == 0
            assert states() == [COMPLETE, RUNNING]
            assert "running" in run("--show")[1]
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(trained) == 1
    code, out, err = run("--trials", 2)
    assert (code, err) == (0, "")
    assert len(trained) == 2
    lost, again = study().trials[1:]
    assert (lost.state, lost.user_attrs["unfinished"]) == (FAIL, "its process was lost")
    assert (again.state, again.params) == (COMPLETE, lost.params)
    assert again.system_attrs["retry_history"] == [lost.number]
    assert "2 trials" in out.split("\n\n")[1]


@pytest.mark.parametrize("sampler", ["random", "grid"])
@pytest.mark.parametrize("storage", ["x.journal", "sqlite:///x.db"])
def test_ctrl_c_requeues_the_trial(run, trained, sampler, storage):
    def interrupted(recipe, seed):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return 0.5, 0.5

    trained.outcomes = interrupted
    code, _, err = run("--trials", 4, "--sampler", sampler, "--storage", storage)
    assert code == 130
    assert "interrupted: the study is kept" in err
    assert run("--trials", 4, "--sampler", sampler, "--storage", storage)[0] == 0
    assert len(trained) == 5
    assert trained[2][:2] == trained[1][:2]
    trials = studies.open_study(storage, "small", heartbeat=30, patience=0, create=False).study.trials
    assert [trial.user_attrs.get("unfinished") for trial in trials] == [None, "interrupted", None, None, None]
    assert trials[2].params == trials[1].params


def test_failures_are_recorded_and_the_sweep_continues(run, trained):
    def outcomes(recipe, seed):
        if len(trained) == 1:
            raise ValueError("no such thing")
        if len(trained) == 2:
            raise MemoryError("too large")
        return 0.5, 0.4

    trained.outcomes = outcomes
    code, out, err = run("--trials", 4)
    assert (code, err) == (0, "")
    assert states() == [FAIL, FAIL, COMPLETE, COMPLETE]
    assert "failed" in out
    assert "(no such thing)" in out
    assert "(too large)" in out


def test_a_full_disk_ends_the_sweep_without_failing_the_trial(run, trained):
    def full(recipe, seed):
        raise OSError("no space left")

    trained.outcomes = full
    code, _, err = run("--trials", 2)
    assert (code, err) == (1, "error: no space left\n")
    assert [trial.user_attrs.get("unfinished") for trial in study().trials] == ["interrupted", None]


def test_unpromising_trials_are_pruned(run, trained):
    trained.outcomes = lambda recipe, seed: (0.9, 0.9) if len(trained) <= 5 else (0.1, 0.9)
    code, out, _ = run("--trials", 6, "--epochs", 10)
    assert code == 0
    assert states() == [COMPLETE] * 5 + [PRUNED]
    assert 3 <= max(study().trials[5].intermediate_values) < 10
    assert "pruned in epoch" in out
    assert run("--trials", 6, "--epochs", 10, "--pruner", "none", "--study", "all")[0] == 0
    assert states(name="all") == [COMPLETE] * 6
    assert run("--trials", 2, "--epochs", 10, "--pruner", "hyperband", "--study", "hyperband")[0] == 0


def test_a_trial_that_another_worker_runs_again(run, trained, capsys):
    """The worker was suspended, and its heartbeats were missed."""

    def outcomes(recipe, seed):
        if len(trained) == 1:
            shared = studies.open_study("sqlite:///x.db", "small", heartbeat=30, patience=0)
            shared.end(shared.study.trials[0], "its process was lost")
        return 0.5, 0.4

    trained.outcomes = outcomes
    code, out, err = run("--trials", 2, "--storage", "sqlite:///x.db")
    assert (code, err) == (0, "")
    assert "    0 was taken for lost by another worker, which runs it again\n" in out
    trials = optuna.load_study(study_name="small", storage="sqlite:///x.db").trials
    assert [trial.state for trial in trials] == [FAIL, COMPLETE, COMPLETE]
    assert trials[1].params == trials[0].params


def test_two_workers_choose_the_same_point_of_a_grid(run, trained, monkeypatch):
    def choose(self, study, trial):
        point = trial.number - (trial.number >= 2)  # trial 2 has the point of trial 1
        study._storage.set_trial_system_attr(trial._trial_id, "search_space", self._search_space)
        study._storage.set_trial_system_attr(trial._trial_id, "grid_id", point)

    monkeypatch.setattr(optuna.samplers.GridSampler, "before_trial", choose)
    code, out, err = run("--sampler", "grid", "--trials", 6)
    assert (code, err) == (0, "")
    assert states() == [COMPLETE, COMPLETE, FAIL, COMPLETE, COMPLETE, COMPLETE, COMPLETE]
    assert len({point[:2] for point in trained}) == len(trained) == 6
    assert "6 trials" in out.split("\n\n")[1]


def test_a_worker_that_is_killed_before_its_trial_has_a_point(run, trained):
    """The next worker does not know which point that is, and waits until the trial is lost."""
    location = "sqlite:///x.db"
    shared = studies.open_study(location, "small", heartbeat=1, patience=0, direction="maximize")
    shared.ask()
    options = ["--storage", location, "--heartbeat", 1, "--sampler", "grid", "--trials", 6]
    code, _, err = run(*options)
    assert (code, err) == (0, "")
    trials = shared.study.trials
    assert trials[0].state == FAIL
    assert sum(trial.state == COMPLETE for trial in trials) == len(trained) == 6
    assert len({point[:2] for point in trained}) == 6


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_the_validation_set_ranks_and_the_test_set_does_not(run, trained):
    trained.outcomes = lambda recipe, seed: [(0.6, 0.99), (0.9, 0.1), (0.7, 0.95)][len(trained) - 1]
    code, out, _ = run("--trials", 3)
    assert code == 0
    assert study().best_trial.number == 1
    assert [trial.value for trial in study().trials] == [0.6, 0.9, 0.7]
    assert [trial.user_attrs["accuracy"] for trial in study().trials] == [0.99, 0.1, 0.95]
    ranking = out.split("\n\n")[1].splitlines()[2:]
    assert [line.split()[:3] for line in ranking[:3]] == [
        ["1", "90.00%", "10.00%"], ["2", "70.00%", "95.00%"], ["0", "60.00%", "99.00%"],
    ]  # fmt: skip
    report = Path("sweeps/small-report/report.md").read_text()
    assert "## Best trial: 1" in report
    assert "90.00%" in report
    # --show changes nothing.
    before = Path("sweeps/small.journal").read_bytes()
    code, shown, _ = run("--show")
    assert code == 0
    assert "\n".join(ranking[:3]) in shown
    assert Path("sweeps/small.journal").read_bytes() == before


def test_a_whole_sweep_with_its_report(run, monkeypatch, home):
    monkeypatch.undo()
    monkeypatch.chdir(home)
    from tinycnn import data

    images, labels = data.synthetic_digits(400, rng=0)
    digits = data.Dataset("digits", images[:300], labels[:300], images[300:], labels[300:], tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda name, *_: digits)
    monkeypatch.setattr(runs.RunFolder, "finish", lambda *args: None)
    text = TEXT.replace("rate = [0.1, 0.3]", "rate = [0.1, 1e38]")
    code, out, err = run("--trials", 6, "--sampler", "grid", text=text)
    assert (code, err) == (0, "")
    rates = {trial.params["rate"]: trial.state for trial in study().trials}
    assert rates == {0.1: COMPLETE, 1e38: FAIL}
    assert out.count("(training diverged at step") == 6  # while it runs, and in the report
    best = study().best_trial
    assert 0.05 < best.value <= 1
    assert (home / "sweeps" / "small-report" / "parallel.png").stat().st_size > 3000
    assert len(list((home / "sweeps" / "small").iterdir())) == 6
    assert math.isclose(sum(map(sum, best.user_attrs["confusion"])), 100)


# --- results of a built-in search -------------------------------------------------------------------------------------

KEPT, TABLE = Path("results/sweep/trials.json"), Path("results/REPRODUCTIONS.md")


@pytest.fixture
def search(home, trained, monkeypatch, capsys):
    """Run the built-in search; returns exit code, stdout and stderr."""
    monkeypatch.setattr(build, "split_sizes", lambda *args: None)  # it needs more images than the data set has

    def search(*args):
        code = main(["sweep", *map(str, args)])
        return code, *capsys.readouterr()

    return search


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_builtin_search_is_saved_and_in_the_table(search, trained, home):
    figures = [(0.96, 0.9951), (0.97, 0.9612), (0.98, 0.9503), None, (0.95, 0.9404), (0.2, 0.9999)]

    def outcomes(recipe, seed):
        found = figures[len(trained) - 1]
        if found is None:
            raise ValueError("no such thing")
        return found

    trained.outcomes = outcomes
    page = home / "docs" / "reproductions.md"
    page.parent.mkdir()
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    code, out, err = search("--trials", 6)
    assert (code, err) == (0, "")
    assert f"results: {KEPT}\ntable: {TABLE}\n" in out
    kept = json.loads(KEPT.read_text())
    trials, (recipe,) = study(name="sweep", journal="sweeps/sweep.journal").trials, recipes.find("sweep")
    assert (kept["recipe"], kept["fingerprint"]) == ("sweep", recipe.fingerprint)
    for number, (record, trial) in enumerate(zip(kept["trials"], trials, strict=True)):
        assert (record["number"], record["point"]) == (number, trial.params)
        assert record["environment"]["device"] == hardware.device_name("cpu")
        assert set(record["environment"]) > {"git_revision", "numpy", "numba", "tinycnn"}
        assert "command" not in record["environment"]
        assert record["finished"] == str(trial.datetime_complete.date())
    values = [[t[key] for key in ("state", "validation", "accuracy", "f1", "cpu_seconds", "failed")]
            for t in kept["trials"]]  # fmt: skip
    assert values == [
        ["COMPLETE", 0.96, 0.9951, 0.9951, 1.0, None],
        ["COMPLETE", 0.97, 0.9612, 0.9612, 1.0, None],
        ["COMPLETE", 0.98, 0.9503, 0.9503, 1.0, None],
        ["FAIL", None, None, None, None, "no such thing"],
        ["COMPLETE", 0.95, 0.9404, 0.9404, 1.0, None],
        ["PRUNED", 0.2, None, None, None, None],
    ]
    # The obtained accuracy is that of the best validation accuracy, not 99.99 or 99.51, the best of the test set.
    lines = TABLE.read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| `sweep` |")]
    assert cells(row)[2:] == ["99.00", "**95.03**", "", "none: 6 trials", "", "1", recipe.why]
    at = lines.index("### 6 trials of `sweep` by rank")
    assert lines.index(row) < at < lines.index("## LuxxxLucy/mnist_LeNet (TensorFlow, 2017)")
    start = next(n for n in range(at, len(lines)) if lines[n].startswith("| rank |")) + 2
    points = [recipes.format_point(trial.params) for trial in trials]
    assert [cells(line) for line in lines[start : start + 10]] == [
        ["1", "99", "95.03", "98.00", points[2]],
        ["2", "98", "96.12", "97.00", points[1]],
        ["3", "98", "99.51", "96.00", points[0]],
        ["4", "96", "94.04", "95.00", points[4]],
        ["5", "96", "–", "pruned at 20.00", points[5]],
        ["6", "96", "–", "failed", points[3] + " (no such thing)"],
        *([str(rank), "95", "–", "–", "–"] for rank in (7, 8, 9, 10)),
    ]
    assert not lines[start + 10].startswith("|")
    assert hardware.device_name("cpu") in lines[-1]
    # Trials are neither in the short table nor in the picture of claims.
    assert "old" not in page.read_text()
    assert "sweep" not in page.read_text()
    assert "claims.png" not in "".join(lines)


def test_an_interrupted_search_keeps_its_trials(search, trained):
    def outcomes(recipe, seed):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return 0.5, 0.4

    trained.outcomes = outcomes
    assert search("--trials", 5)[0] == 130
    assert [trial["number"] for trial in json.loads(KEPT.read_text())["trials"]] == [0, 1]
    assert not TABLE.exists()
    code, out, _ = search("--show")
    assert code == 0
    assert f"table: {TABLE}" in out
    assert "none: 2 trials" in TABLE.read_text()
    assert len(trained) == 3
    assert search("--trials", 5)[0] == 0
    assert [trial["number"] for trial in json.loads(KEPT.read_text())["trials"]] == [0, 1, 3, 4, 5]


def test_only_an_unchanged_builtin_search_is_saved(search, run, trained, home):
    (recipe,) = recipes.find("sweep")
    for args in (["--epochs", 3, "--study", "short"], ["--data", "fashion", "--study", "fashion"]):
        assert search("--trials", 1, *args)[0] == 0
        assert search("--show", "--study", args[-1])[0] == 0
    assert search("--show", *args)[0] == 0
    assert run("--trials", 1)[0] == 0  # a user's recipe,
    assert (
        run("--trials", 1, "--study", "mine", text=TEXT.replace("small", "sweep"))[0] == 0
    )  # and one with the same name
    assert len(trained) == 4
    assert not Path("results").exists()
    own = ["--epochs", recipe.training["epochs"], "--data", "mnist", "--study", "own"]
    assert search("--trials", 1, *own, "--results", "there")[0] == 0
    assert not Path("results").exists()
    assert len(json.loads(Path("there/sweep/trials.json").read_text())["trials"]) == 1
    assert "none: 1 trial |" in Path("there/REPRODUCTIONS.md").read_text()


def test_a_smaller_search_does_not_replace_a_larger_one(search):
    assert search("--trials", 3)[0] == 0
    before = KEPT.read_bytes()
    code, out, _ = search("--trials", 2, "--study", "another", "--seed", 1)
    assert code == 0
    assert "results has more trials of sweep; they are kept" in out
    assert KEPT.read_bytes() == before
    assert search("--trials", 3, "--study", "another", "--seed", 1)[0] == 0
    assert KEPT.read_bytes() != before
    # Those of an earlier version of the recipe do not count.
    KEPT.write_text(KEPT.read_text().replace(recipes.find("sweep")[0].fingerprint, "0" * 16))
    assert search("--trials", 1, "--study", "new")[0] == 0
    assert len(json.loads(KEPT.read_text())["trials"]) == 1


def test_errors_are_found_before_the_first_trial(search, trained, home):
    (home / "file").write_text("in the way")
    code, _, err = search("--results", "file")
    assert code == 1
    assert "file/sweep" in err
    for path in (KEPT, Path("results/default/seed-0.json")):  # the table includes it
        path.parent.mkdir(parents=True)
        path.write_text("{")
        code, _, err = search()
        assert code == 1
        assert err.startswith(f"error: {path} is not a result of recipe {path.parent.name!r} (")
        assert err.endswith("): remove it\n")
        assert path.read_text() == "{"
        path.unlink()
    assert not trained


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Linear(49, 10)", "Liner(49, 10)", "line 6: unknown name 'Liner'"),
        ('"Tanh(),"', '"Tahn(),"', "line 6: unknown name 'Tahn'; did you mean 'Tanh'? (at act Tahn(), rate 0.1)"),
        ("0.3", "-0.3", "line 12: lr must be finite and not negative"),
        ("0.3", '"cosin(1)"', "unknown name 'cosin'"),
        ("validation = 100\n", "", "a sweep needs data.validation"),
        ("validation = 100", "validation = 300", "200 + 300 images are needed, digits has 400"),
        ("[small.space]", "[small.spce]", "line 15: unknown key 'spce'; did you mean 'space'?"),
        ('act = ["", "Tanh(),", "ReLU(),"]\nrate = [0.1, 0.3]', "act = ['']\nrat = [1]", "did you mean 'rat'?"),
    ],
)
def test_an_error_in_the_recipe_is_found_before_training(run, trained, old, new, message):
    assert old in TEXT
    code, out, err = run(text=TEXT.replace(old, new))
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not trained
    assert "validation" not in out


def test_a_list_of_rates_needs_one_per_epoch(run, trained):
    text = TEXT.replace('"$rate"', "[1, 2]").replace("rate = [0.1, 0.3]\n", "")
    code, _, err = run("--epochs", 3, text=text)
    assert code == 1
    assert "line 12: lr must have 3 rates, one per epoch, got 2" in err


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("mine.toml/", "Is a directory"),
        ("sqlite:////nonexistent/dir/x.db", "unable to open database file"),
        ("unknown://x", "cannot be used"),
        (".", "Is a directory"),
        ("mine.toml", "cannot be used"),
        ("mine.toml/x", "cannot be used"),
    ],
)
def test_an_unusable_storage(run, trained, storage, message):
    code, _, err = run("--storage", storage)
    assert code == 1
    assert err.startswith(f"error: the storage {storage} cannot be used: ")
    assert message in err
    assert err.count("\n") == 1
    assert not trained


def test_a_database_as_storage(run, trained):
    assert run("--trials", 2, "--storage", "sqlite:///trials.db")[0] == 0
    code, out, _ = run("--show", "--storage", "sqlite:///trials.db")
    assert code == 0
    assert "small, 2 trials" in out
    assert len(optuna.load_study(study_name="small", storage="sqlite:///trials.db").trials) == 2


def test_a_study_has_one_recipe_data_set_and_number_of_epochs(run, trained):
    assert run("--trials", 1)[0] == 0
    for args, text, message in [
        (["--epochs", 3], TEXT, "started with epochs 2, not 3"),
        (["--data", "fashion"], TEXT, "started with data 'mnist', not 'fashion'"),
        (["--sampler", "grid"], TEXT, "started with sampler 'random', not 'grid'"),
        (["--pruner", "none"], TEXT, "started with pruner 'median', not 'none'"),
        (["--seed", 1], TEXT, "started with seed 0, not 1"),
        (["--heartbeat", 1], TEXT, "started with heartbeat 30, not 1"),
        ([], TEXT.replace("batch = 50", "batch = 51"), "started with another version of its recipe"),
        ([], TEXT.replace("0.3", "0.4"), "started with another version of its space"),
    ]:
        code, _, err = run("--trials", 2, *args, text=text)
        assert code == 1
        assert message in err
        assert "--study" in err
        assert err.count("\n") == 1
    assert len(trained) == 1


def test_show_without_a_study(run, trained, home):
    code, _, err = run("--show")
    assert (code, err) == (1, "error: there is no journal sweeps/small.journal\n")
    assert not (home / "sweeps").exists()
    run("--trials", 1)
    code, _, err = run("--show", "--study", "smal")
    assert (code, err) == (1, "error: there is no study 'smal' in sweeps/small.journal, only 'small'\n")
    assert len(study().get_trials()) == 1


def test_other_errors(run, trained, home, capsys):
    (home / "file").write_text("in the way")
    assert run("--out", "file")[0] == 1
    assert run("--out", "file", "--storage", "x.journal")[0] == 1
    assert run("--threads", 4096)[0] == 1
    assert main(["sweep", "lecun1998"]) == 1
    assert "a sweep needs one recipe with a table 'space', found 0" in capsys.readouterr().err
    assert main(["sweep", "swep"]) == 1
    assert "did you mean 'sweep'?" in capsys.readouterr().err
    for args in (["--trials", "0"], ["--sampler", "best"], ["--seed", "-1"], ["--pruner", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(["sweep", *args])
    assert not trained


def test_the_builtin_space_is_that_of_its_source():
    (recipe,) = recipes.find("sweep")
    assert math.prod(map(len, recipe.space.values())) == 3200
    points = list(sweep._one_at_a_time(recipe.space))
    assert len(points) == 1 + sum(len(values) - 1 for values in recipe.space.values())
    for point in points:
        build.check(recipe.substitute(point))
