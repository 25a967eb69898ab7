"""Studies that several workers share, with SQLite and journal files: what happens to trials that do not end, and errors
in opening.  `test_storage.py` does it with PostgreSQL and processes."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

import sqlalchemy  # noqa: E402
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError  # noqa: E402

from tinycnn import hardware  # noqa: E402
from tinycnn._check import hide_password  # noqa: E402
from tinycnn.errors import StorageError  # noqa: E402
from tinycnn.recipes import studies  # noqa: E402

ROOT = Path(__file__).parents[2]
COMPLETE, FAIL, RUNNING, WAITING = (
    getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "FAIL", "RUNNING", "WAITING")
)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A study in an SQLite file."""
    monkeypatch.chdir(tmp_path)
    return studies.open_study("sqlite:///x.db", "x", heartbeat=1, patience=1, direction="maximize")


def ask(shared):
    trial = shared.ask()
    trial.suggest_categorical("a", [1, 2])
    return trial


def silent_since(shared, trial, seconds):
    """Set the time of the last heartbeat, and of the last outage of the storage."""
    with sqlite3.connect("x.db") as connection:
        connection.execute(
            "update trial_heartbeats set heartbeat = datetime('now', ?) where trial_id = ?",
            (f"-{seconds} seconds", trial._trial_id),
        )
    connection.close()
    shared.storage.reached = time.monotonic() - 100


def states(shared):
    return [trial.state for trial in shared.study.trials]


# --- trials whose worker was lost -------------------------------------------------------------------------------------


def test_a_trial_without_heartbeats_is_retried_with_its_point(shared):
    trial = ask(shared)
    with shared.heartbeat(trial._trial_id):
        shared.retry_lost()
        assert states(shared) == [RUNNING]
    silent_since(shared, trial, 3)
    shared.retry_lost()
    assert states(shared) == [RUNNING]
    silent_since(shared, trial, 10)
    shared.storage.reached = time.monotonic()  # after an outage all heartbeats are old
    shared.retry_lost()
    assert states(shared) == [RUNNING]
    silent_since(shared, trial, 10)
    shared.retry_lost()
    shared.retry_lost()
    lost, retry = shared.study.trials
    assert (lost.state, retry.state) == (FAIL, WAITING)
    assert retry.params == lost.params == trial.params
    assert retry.system_attrs["retry_history"] == [0]
    assert studies.WORKER not in retry.user_attrs  # another one would take the retry for running
    with pytest.raises(UpdateFinishedTrialError):
        shared.tell(0, 0.5)
    assert shared.ask().number == 1


def test_heartbeats_are_sent(shared):
    trial = ask(shared)
    with shared.heartbeat(trial._trial_id):
        silent_since(shared, trial, 100)
        time.sleep(1.8)
        shared.storage.reached = time.monotonic() - 100
        shared.retry_lost()
        assert states(shared) == [RUNNING]


def test_a_worker_that_is_killed_before_its_first_heartbeat(shared):
    trial = shared.ask()
    shared.retry_lost()  # sends the first one
    assert states(shared) == [RUNNING]
    silent_since(shared, trial, 10)
    shared.retry_lost()
    assert states(shared) == [FAIL, WAITING]


def test_a_worker_that_is_killed_while_it_adds_a_retry(shared):
    trial = ask(shared)
    shared.study.tell(trial.number, state=FAIL)
    other = studies.open_study("sqlite:///x.db", "x", heartbeat=1, patience=1)
    shared.retry_lost()
    other.retry_lost()
    first, retry = shared.study.trials
    assert retry.params == first.params
    # If two add one at the same moment, the second is dropped.
    studies._retry(shared.study, first)
    trials = shared.study.trials
    assert [studies.is_second_retry(trials, trial) for trial in trials] == [False, False, True]
    shared.claim(trials[2])
    shared.drop(2)
    shared.retry_lost()
    assert len(shared.study.trials) == 3
    assert studies.replaced_numbers(shared.study.trials) == {0, 2}


def test_a_trial_that_ends_its_workers_is_not_retried_forever(shared):
    reasons = ["its process was lost", "interrupted", "its process was lost", "interrupted", "its process was lost"]
    for number, reason in enumerate(reasons):
        trial = shared.ask()
        assert trial.number == number
        if reason == "interrupted":
            shared.end(shared.study.trials[number], reason)
        else:
            with shared.heartbeat(trial._trial_id):
                pass
            silent_since(shared, trial, 10)
            shared.retry_lost()
    shared.retry_lost()
    assert states(shared) == [FAIL] * 5
    assert studies.replaced_numbers(shared.study.trials) == {0, 1, 2, 3}


def test_only_one_worker_gets_a_waiting_trial(shared):
    shared.study.add_trial(optuna.create_trial(state=WAITING))
    other = studies.open_study("sqlite:///x.db", "x", heartbeat=1, patience=1)
    (trial,) = other.study.trials
    assert shared.claim(trial)
    assert not other.claim(trial)
    shared.tell(0, 1.0)
    assert not other.claim(trial)


def test_an_answer_that_is_lost(shared, monkeypatch, capsys):
    """The database has done it, but the connection ends before it says so."""
    trial, answer, lost = ask(shared), optuna.storages.RDBStorage.set_trial_state_values, []

    def lose(self, *args):
        done = answer(self, *args)
        if not lost:
            lost.append(True)
            raise StorageInternalError from sqlalchemy.exc.OperationalError(
                "commit", {}, Exception("database is locked")
            )
        return done

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", lose)
    shared.tell(trial.number, 0.5)
    assert (states(shared), shared.study.best_value) == ([COMPLETE], 0.5)
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "storage cannot be reached, waiting: Exception: database is locked",
        "storage reached again after 0 s",
    ]


def test_every_operation_of_the_database_waits():
    """`_create_scoped_session` begins a transaction of Optuna."""
    methods = {name: method for name, method in vars(optuna.storages.RDBStorage).items() if hasattr(method, "__code__")}
    begin = {name for name, method in methods.items() if "_create_scoped_session" in method.__code__.co_names}
    # Its code is in a function inside, or it calls one of the others.
    begin |= {"_create_new_trial"}
    assert len(begin) > 20
    assert begin - {*studies.WAITING} <= {"set_trial_state_values", "get_best_trial", "_set_trial_attr_without_commit"}


# --- journals ---------------------------------------------------------------------------------------------------------


def test_a_journal_with_half_a_record(tmp_path):
    path = str(tmp_path / "x.journal")
    shared = studies.open_study(path, "x", heartbeat=1, patience=1)
    shared.tell(shared.ask().number, 0.5)
    with Path(path).open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","stu')  # a writer was killed
    shared.tell(shared.ask().number, 0.75)
    again = studies.open_study(path, "x", heartbeat=1, patience=1)
    assert [trial.value for trial in again.study.trials] == [0.5, 0.75]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.journal"]


def test_a_journal_on_a_full_disk(tmp_path):
    """The limit on the size of files ends a write in the middle, as a full disk does."""
    code = (
        "import resource; from tinycnn.recipes import studies\n"
        "s = studies.open_study('x.journal', 'x', heartbeat=1, patience=1); t = s.ask()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "for i in range(100): t.set_user_attr('k', i)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large: 'x.journal'"
    path = tmp_path / "x.journal"
    assert not path.read_bytes().endswith(b"\n")
    shared = studies.open_study(str(path), "x", heartbeat=1, patience=1)
    assert shared.study.trials[0].user_attrs["k"] > 3
    shared.tell(0, 0.5)
    assert studies.open_study(str(path), "x", heartbeat=1, patience=1).study.best_value == 0.5


# --- errors in opening ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgres://u:s3cret@h/d", "the scheme 'postgres' is not known, expected postgresql://, mysql://, sqlite:///"),
        ("postgresql://u:s3c@s3cret@h/d", "an @, : or / in the password must be written as %40, %3A or %2F"),
        ("postgresql://u:s3cret@h:port/d", "cannot be used: "),
        ("://u:s3cret@h", "cannot be used: "),
        ("sqlite:////nowhere/x.db?uri=true&password=s3cret", "unable to open database file"),
        ("oracle+oracledb://u:s3cret@h/d", "driver oracledb is not installed: pip install oracledb"),
    ],
)
def test_a_storage_that_cannot_be_used(url, words):
    with pytest.raises(ValueError, match=r"^the storage ") as error:
        studies.open_storage(url)
    assert words in str(error.value)
    assert "***" in str(error.value)
    assert "s3c" not in str(error.value)


@pytest.mark.parametrize(("url", "module"), [("postgresql", "psycopg"), ("mysql", "pymysql")])
def test_a_driver_that_is_not_installed(url, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"its driver {module} is not installed: pip install 'tinycnn.storage.'"):
        studies.open_storage(f"{url}://user:s3cret@/x")


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError) as error:
        studies.open_storage(f"postgresql://user:s3cret@/x?host={tmp_path}")
    assert str(error.value).startswith(f"the storage postgresql://user:***@/x?host={tmp_path} cannot be reached: Opera")
    assert str(error.value).endswith(
        "check that the server runs, and the URL's host, port, database, user and password"
    )


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:word@host:5432/x", "postgresql://me:***@host:5432/x"),
        ("--storage=mysql+pymysql://me:wo@r/d:@host/x", "--storage=mysql+pymysql://me:***@host/x"),
        ("postgresql://me@host/x?password=word&sslmode=require", "postgresql://me@host/x?password=***&sslmode=require"),
        ("postgresql://host/x?sslmode=require&passwd=word", "postgresql://host/x?sslmode=require&passwd=***"),
        ("postgresql://me@host:5432/x", "postgresql://me@host:5432/x"),
        ("sweeps/me:word@host.journal", "sweeps/me:word@host.journal"),
        ("training.optimizer=SGD(momentum=0.9)", "training.optimizer=SGD(momentum=0.9)"),
    ],
)
def test_passwords_are_hidden(text, hidden, monkeypatch):
    assert hide_password(text) == hidden
    monkeypatch.setattr(sys, "argv", ["x.py", text])
    assert hardware.environment()["command"] == ["x.py", hidden]
