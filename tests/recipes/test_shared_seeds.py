"""Seeds of `reproduce` that workers share: interruptions, results of others, and errors.  The storage is a journal or
SQLite; `test_storage.py` does it with PostgreSQL and processes."""

from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from tinycnn import plot, recipes, runs  # noqa: E402
from tinycnn.__main__ import main  # noqa: E402
from tinycnn.recipes import results, studies, training  # noqa: E402

TEXT = """
[one]
title = "one"
[one.net]
input = [1, 28, 28]
layers = "AvgPool2d(4), Flatten(), Linear(49, 10)"
[one.data]
train = 100
[one.training]
optimizer = "SGD()"
lr = 0.1
epochs = 1
batch = 50
"""
SEARCH = TEXT.replace("train = 100", "train = 100\nvalidation = 100").replace("lr = 0.1", 'lr = "$lr"') + (
    "[one.space]\nlr = [0.1, 0.2]\n"
)


@pytest.fixture(params=["x.journal", "sqlite:///x.db"])
def storage(request):
    return request.param


@pytest.fixture
def reproduce(tmp_path, monkeypatch, small_digits, capsys, storage):
    """Run the command with the storage; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "save", lambda figure, path: None)
    monkeypatch.setattr(runs.RunFolder, "finish", lambda *args: None)
    Path("one.toml").write_text(TEXT)
    Path("search.toml").write_text(SEARCH)

    def reproduce(*args):
        code = main(["reproduce", "one.toml", "--storage", storage, "--heartbeat", "1", *map(str, args)])
        return code, *capsys.readouterr()

    return reproduce


@pytest.fixture
def trained(monkeypatch):
    """The seeds that were trained; `trained.stop` is raised instead of training one."""

    class Trained(list):
        stop = None

    trained, run = Trained(), training.run

    def note(recipe, seed, *args, **options):
        stop, trained.stop = trained.stop, None
        if stop is not None:
            raise stop
        trained.append(seed)
        return run(recipe, seed, *args, **options)

    monkeypatch.setattr(training, "run", note)
    return trained


def shared(storage):
    return studies.open_study(storage, "reproduce", heartbeat=1, patience=0, create=False)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError("no space left"), ValueError("no such thing")])
def test_an_interrupted_seed_is_given_back(reproduce, trained, storage, stop):
    trained.stop = stop
    code, _, err = reproduce("--seeds", 2)
    assert (code, trained) == (130 if isinstance(stop, KeyboardInterrupt) else 1, [])
    assert err.strip().count("\n") == 0
    code, out, err = reproduce("--seeds", 2)
    assert (code, err) == (0, "")
    assert "obtained " in out
    assert sorted(trained) == [0, 1]
    trials = shared(storage).study.trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[2].system_attrs["retry_history"] == [0]
    assert trials[0].user_attrs["unfinished"] == "interrupted"
    assert reproduce("--seeds", 2)[0] == 0
    assert len(trained) == 2


def test_results_come_from_the_folder_and_from_the_storage(reproduce, trained, storage):
    assert main(["reproduce", "one.toml", "--seeds", "1"]) == 0
    assert reproduce("--seeds", 2)[0] == 0
    assert trained == [0, 1]
    assert reproduce("--seeds", 2, "--results", "elsewhere")[0] == 0
    assert len(trained) == 2
    (recipe,) = recipes.find("one.toml")
    assert results.read("results", recipe) == results.read("elsewhere", recipe) != []
    # Another version of the recipe, or another data set, has other results.
    Path("one.toml").write_text(TEXT.replace("batch = 50", "batch = 25"))
    assert reproduce("--seeds", 1, "--results", "elsewhere")[0] == 0
    assert reproduce("--seeds", 1, "--results", "elsewhere", "--data", "fashion")[0] == 0
    assert len(trained) == 4


def test_a_damaged_result_in_the_storage(reproduce, trained, storage):
    assert reproduce("--seeds", 1)[0] == 0
    trial = shared(storage).study.trials[0]
    for changes, words in [({"fingerprint": "0"}, "it is not of this recipe"), ({"accuracy": 7.0}, "accuracy must be")]:
        study = shared(storage).study
        attributes = {"seed": trial.user_attrs["seed"], "result": trial.user_attrs["result"] | changes}
        study.add_trial(optuna.create_trial(value=1.0, user_attrs=attributes))
        code, _, err = reproduce("--seeds", 1, "--results", f"elsewhere-{len(words)}")
        assert code == 1
        assert err.startswith("error: trial 1 of the study 'reproduce' is not a result of recipe 'one' (")
        assert words in err
        optuna.delete_study(study_name="reproduce", storage=study._storage)
        assert reproduce("--seeds", 1)[0] == 0  # as finished, from the folder
    assert len(trained) == 1


def test_a_seed_whose_worker_is_lost_each_time(reproduce, trained, storage):
    assert reproduce("--seeds", 1)[0] == 0
    one = shared(storage)
    for _ in range(studies.MAX_LOSSES):
        key = [*one.study.trials[0].user_attrs["seed"][:-1], 5]
        if len(one.study.trials) == 1:
            one.study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.WAITING, user_attrs={"seed": key}))
        trial = one.study.trials[-1]
        assert one.claim(trial)
        one.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        one.retry_lost()
    code, _, err = reproduce("--seeds", "0,5")
    assert code == 1
    assert err == "error: one, seeds [5]: the worker was lost each time; --study NEW tries again\n"
    assert len(trained) == 1
    assert reproduce("--seeds", "0,5", "--study", "again")[0] == 0
    assert trained == [0, 5]


def test_a_study_is_of_seeds_or_of_trials(reproduce, trained, storage, capsys):
    assert reproduce("--seeds", 1)[0] == 0
    options = ["--storage", storage, "--heartbeat", "1", "--trials", "1", "--sampler", "grid"]
    assert main(["sweep", "search.toml", "--study", "reproduce", *options]) == 1
    assert "was started with command 'reproduce', not 'sweep': choose another name" in capsys.readouterr().err
    assert main(["sweep", "search.toml", *options]) == 0
    capsys.readouterr()
    code, _, err = reproduce("--study", "one")
    assert code == 1
    assert "was started with command 'sweep', not 'reproduce': choose another name" in err
    assert len(trained) == 2
