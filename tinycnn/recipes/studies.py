"""Optuna studies that several workers share: the storage, the heartbeats, and the trials whose worker was lost.

A storage is a database, with an SQLAlchemy URL, or a journal file.  A database that cannot be reached is waited for.
A worker on a database sends heartbeats while it trains.  If they stop, another worker marks the trial as failed and
adds a retry, which Optuna links to it (`retry_history`).  A journal has no heartbeats: a worker that no longer runs is
found by its process ID, on the same machine only.

Importing this module needs Optuna.
"""

import copy
import datetime
import functools
import logging
import os
import platform
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc

from tinycnn._check import has_password, hide_password, one_line
from tinycnn._streams import print_stderr
from tinycnn.errors import StorageError

T = TypeVar("T")

HEARTBEAT, PATIENCE = 30, 600.0  # seconds: between heartbeats, and until an unreachable storage is given up
MISSED = 4  # heartbeats, after which a worker is lost
MAX_LOSSES = 3  # a trial whose worker was lost so often is not retried: it may be what ends the workers

# User attributes of trials.
PROCESS = "process"  # on a journal: machine, process ID, start time
WORKER = "worker"  # on a database: machine and process ID; set after the first heartbeat
UNFINISHED = "unfinished"  # why a trial was ended and its retry added
DUPLICATE = "requeued"  # of a trial that another one replaces (version 0.1.0: also of one that was enqueued again)

# SQLAlchemy's default drivers differ between its versions; these are those of the extra "storage".
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
SERVER_OPTIONS = {  # a server that vanished is noticed after seconds, not after the system's quarter of an hour
    "psycopg": {"connect_timeout": 10, "tcp_user_timeout": 30_000},
    "psycopg2": {"connect_timeout": 10, "tcp_user_timeout": 30_000},
    "pymysql": {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60},
}


# --- storages ---------------------------------------------------------------------------------------------------------


def open_storage(location: str, heartbeat: int = HEARTBEAT, patience: float = PATIENCE) -> Any:
    """Open or create the storage at a URL or the path of a journal file.

    heartbeat  seconds between the heartbeats of a trial, in a database
    patience   seconds to wait for a database that cannot be reached later on

    Raises StorageError if it cannot be reached now, ValueError if it cannot be used.  Messages have no password.
    """
    logging.getLogger("optuna.storages").setLevel(logging.ERROR)  # no SQL where a connection ends
    if "://" not in location:
        try:
            Path(location).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(_JournalFile(location, lock_obj=_JournalLock(location)))
        except Exception as error:  # of any class: the file may hold anything
            raise _unusable(location, error) from error
    if has_password(location) and location.partition("?")[0].count("@") > 1:
        raise _unusable(location, "an @, : or / in the password must be written as %40, %3A or %2F")
    try:
        url = sqlalchemy.make_url(location)
        if url.drivername in DRIVERS:
            url = url.set(drivername=f"{url.drivername}+{DRIVERS[url.drivername]}")
        return _open_database(location, url, heartbeat, patience)
    except exc.NoSuchModuleError:
        scheme = location.partition("://")[0]
        raise _unusable(
            location,
            f"the scheme {scheme!r} is not known, expected postgresql://, mysql://, sqlite:/// or a journal's path",
        ) from None
    except ImportError as error:
        module = getattr(error.__cause__, "name", None) or error.name or url.get_driver_name()
        package = "'tinycnn[storage]'" if url.get_driver_name() in DRIVERS.values() else module
        raise _unusable(location, f"its driver {module} is not installed: pip install {package}") from None
    except exc.DBAPIError as error:
        if error.statement is None and not location.startswith("sqlite"):  # there is no connection
            raise StorageError(
                f"the storage {hide_password(location)} cannot be reached: {_reason(error, location)}; check that the "
                "server runs, and the URL's host, port, database, user and password"
            ) from None
        raise _unusable(location, error) from None
    except StorageError:
        raise
    except Exception as error:  # drivers raise exceptions of any class
        raise _unusable(location, error) from None


def _open_database(location: str, url: sqlalchemy.URL, heartbeat: int, patience: float) -> "DatabaseStorage":
    attempts = 10
    while True:
        attempts -= 1
        try:
            return DatabaseStorage(location, url, heartbeat, patience)
        except (exc.DBAPIError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if not isinstance(cause, exc.DBAPIError):
                raise
            if attempts == 0 or cause.statement is None:
                raise cause from None
        time.sleep(random.uniform(0.05, 0.5))  # another worker is creating the tables


def _unusable(location: str, error: Exception | str) -> ValueError:
    reason = error if isinstance(error, str) else _reason(error, location)
    return ValueError(f"the storage {hide_password(location)} cannot be used: {reason}")


def _reason(error: BaseException, location: str) -> str:
    """Class and first line of an error, without the password."""
    error = getattr(error, "orig", None) or error
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip() if lines else 'no reason given'}"
    with suppress(exc.ArgumentError, ValueError):
        if "://" in location and (password := sqlalchemy.make_url(location).password):
            text = text.replace(str(password), "***")
    return one_line(ValueError(hide_password(text)))


class DatabaseStorage(RDBStorage):
    """Optuna's storage in a database.  An operation that does not reach the database is repeated, with growing pauses,
    for `patience` seconds; then it raises StorageError.  Each operation of Optuna is one transaction.

    reached  time.monotonic() since when no operation has failed
    """

    def __init__(self, location: str, url: sqlalchemy.URL, heartbeat: int, patience: float) -> None:
        self.location, self.patience, self.reached = location, patience, time.monotonic()
        options: dict[str, Any] = {}
        if url.get_backend_name() != "sqlite":
            # A connection for each operation: a server allows few, and hundreds of workers are idle while they train.
            defaults = SERVER_OPTIONS.get(url.get_driver_name(), {})
            connect = {key: value for key, value in defaults.items() if key not in url.query}
            options = {"poolclass": sqlalchemy.pool.NullPool, "connect_args": connect}
        with _quiet():
            super().__init__(
                url.render_as_string(hide_password=False), options, heartbeat_interval=heartbeat,
                grace_period=MISSED * heartbeat, heartbeat_stale_trial_callback=_retry_stale,
            )  # fmt: skip

    def wait_for(self, operation: Callable[[], T]) -> T:
        """The result of `operation`, which is repeated while the database cannot be reached."""
        started, pause = None, 0.25
        while True:
            try:
                result = operation()
            except (StorageInternalError, exc.SQLAlchemyError) as error:
                cause = (error.__cause__ or error) if isinstance(error, StorageInternalError) else error
                shown, reason = hide_password(self.location), _reason(cause, self.location)
                if not self._may_pass(cause):
                    if isinstance(error, exc.IntegrityError):  # the study exists already
                        raise
                    raise StorageError(f"the storage {shown} cannot be used any more: {reason}") from None
                started = started or time.monotonic()
                if time.monotonic() - started >= self.patience:
                    raise StorageError(
                        f"the storage {shown} could not be reached for {self.patience:g} s: {reason}; what is finished "
                        "is kept, and the same command resumes"
                    ) from None
                if pause == 0.25:
                    print_stderr(f"storage cannot be reached, waiting: {reason}")
                time.sleep(min(pause, self.patience) * random.uniform(0.8, 1.2))
                pause = min(2 * pause, 15.0)
            else:
                if started is not None:
                    self.reached = time.monotonic()
                    print_stderr(f"storage reached again after {self.reached - started:.0f} s")
                return result

    def _may_pass(self, error: BaseException) -> bool:
        """Whether the same operation may succeed later."""
        if isinstance(error, exc.PendingRollbackError):  # after an error that Optuna has caught inside a transaction
            return True
        if not isinstance(error, exc.DBAPIError):
            return False
        if self.location.startswith("sqlite"):
            return "locked" in str(error)
        return error.connection_invalidated or isinstance(error, (exc.OperationalError, exc.InterfaceError))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        attempts = 0

        def operation() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                return bool(super(DatabaseStorage, self).set_trial_state_values(trial_id, state, values))
            except UpdateFinishedTrialError:
                if attempts > 1 and self.get_trial(trial_id).state == state:  # only the answer was lost
                    return True
                raise

        return self.wait_for(operation)


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: DatabaseStorage, *args: Any, **options: Any) -> Any:
        return self.wait_for(lambda: method(self, *args, **options))

    return call


# Every method that opens a session.  Those with an underscore are called by the cache that Optuna puts around it.
WAITING = (
    "create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs",
    "get_trial_user_attrs", "get_trial_system_attrs", "get_all_studies", "_create_new_trial", "set_trial_param",
    "_set_trial_param", "get_trial_param", "set_trial_intermediate_value", "set_trial_user_attr",
    "set_trial_system_attr", "get_trial_id_from_study_id_trial_number", "get_trial", "_get_trials",
    "_get_best_trial_id", "record_heartbeat", "_get_stale_trial_ids",
)  # fmt: skip
for _name in WAITING:
    setattr(DatabaseStorage, _name, _waiting(getattr(RDBStorage, _name)))


class _JournalFile(JournalFileBackend):
    """Optuna's journal file; an error in writing names it."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file_path) from None


class _JournalLock(JournalFileSymlinkLock):
    """Optuna's lock for writing a journal.  It drops an incomplete last record, of a writer that was killed or whose
    disk was full: the next record would be appended to it, and both could not be read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = Path(path)

    def acquire(self) -> bool:
        acquired = super().acquire()
        try:
            with self.path.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 1, 0))
                if size and file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return acquired


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that heartbeats are experimental and meant for Study.optimize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
        yield


# --- studies ----------------------------------------------------------------------------------------------------------


def open_study(
    location: str, name: str, *, heartbeat: int, patience: float, create: bool = True, **options: Any
) -> "SharedStudy":
    """Open a study; create it if it does not exist.  Raises as `open_storage` does.

    create   False: ValueError if it does not exist, and nothing is written
    options  of optuna.create_study
    """
    if not create and "://" not in location and not Path(location).exists():
        raise ValueError(f"there is no journal {location}")
    storage = open_storage(location, heartbeat, patience)
    if not create:
        names = [study.study_name for study in storage.get_all_studies()]
        if name not in names:
            known = ", ".join(map(repr, names)) or "nothing"
            raise ValueError(f"there is no study {name!r} in {hide_password(location)}, only {known}")
        return SharedStudy(storage, optuna.load_study(storage=storage, study_name=name), location)
    try:
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, **options)
    except StorageError:
        raise
    except Exception as error:  # of any class: the journal may hold anything, or be read-only
        raise _unusable(location, error) from error
    return SharedStudy(storage, study, location)


class SharedStudy:
    """A study, and what a worker does so that no trial is lost or run twice.

    storage, study, location  of `open_storage` and `open_study`
    """

    def __init__(self, storage: Any, study: Any, location: str) -> None:
        self.storage, self.study, self.location = storage, study, location
        self.watched: set[int] = set()  # trials that this worker has sent the first heartbeat for

    @property
    def has_heartbeats(self) -> bool:
        return isinstance(self.storage, DatabaseStorage)

    def require(self, settings: dict[str, Any], write: bool = True) -> None:
        """Store the settings that all workers of the study must share.  ValueError names one that differs.

        write  store those that the study does not have
        """
        stored = self.study.user_attrs
        if "space" in stored:
            stored = {"command": "sweep"} | stored  # version 0.1.0 did not store it
        for key, value in settings.items():
            if key not in stored and write:
                self.study.set_user_attr(key, value)
            elif stored.get(key) not in (None, value):
                words = f"{key} {stored[key]!r}, not {value!r}"
                if isinstance(value, dict) or key == "recipe":
                    words = f"another version of its {key}"
                where = f"{self.study.study_name!r} in {hide_password(self.location)}"
                raise ValueError(f"the study {where} was started with {words}: choose another name with --study")

    def ask(self) -> Any:
        with _quiet():
            return self.study.ask()

    def claim(self, trial: FrozenTrial) -> bool:
        """Take a waiting trial; False if another worker has it."""
        with suppress(UpdateFinishedTrialError):
            return bool(self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING))
        return False

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        found: list[FrozenTrial] = self.study.get_trials(deepcopy=False, states=states or None)
        return found

    def tell(self, number: int, value: float | None = None, state: TrialState | None = None) -> None:
        """Finish a trial.  UpdateFinishedTrialError if another worker has taken it for lost."""
        try:
            self.study.tell(number, value, state=state)
        except ValueError:
            if self.study.trials[number].state.is_finished():
                raise UpdateFinishedTrialError(f"trial {number} is finished") from None
            raise

    @contextmanager
    def heartbeat(self, trial_id: int) -> Iterator[None]:
        """Send heartbeats for a trial from a thread, inside the block, and sign it."""
        if not self.has_heartbeats:
            self.storage.set_trial_user_attr(trial_id, PROCESS, process_identity())
            yield
            return
        self.storage.record_heartbeat(trial_id)
        self.storage.set_trial_user_attr(trial_id, WORKER, f"{platform.node()}:{os.getpid()}")
        ended = threading.Event()

        def send() -> None:
            pause = interval = float(self.storage.get_heartbeat_interval())
            while not ended.wait(pause):
                try:
                    RDBStorage.record_heartbeat(self.storage, trial_id)
                    pause = interval
                except Exception:  # not reached: the first heartbeat when it is back must not be late
                    pause = min(1.0, interval)

        thread = threading.Thread(target=send, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(5)

    def give_back(self, number: int, reason: str) -> None:
        """End a trial that this worker does not finish, and add its retry.  Does not wait for a storage that cannot be
        reached: the heartbeats end, and another worker does the same."""
        if self.has_heartbeats:
            self.storage.patience = 0
        with suppress(StorageError, UpdateFinishedTrialError):
            self.end(self.study.trials[number], reason)

    def end(self, trial: FrozenTrial, reason: str) -> None:
        """Mark an unfinished trial as failed, and add its retry unless another worker does."""
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial._trial_id, UNFINISHED, reason)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            _retry(self.study, self.study.trials[trial.number])

    def drop(self, number: int) -> None:
        """End a trial that another one replaces."""
        with suppress(UpdateFinishedTrialError):
            trial_id = self.study.trials[number]._trial_id
            self.storage.set_trial_user_attr(trial_id, DUPLICATE, "another trial has the same point")
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def retry_lost(self) -> None:
        """Add retries for the trials whose workers were lost."""
        if self.has_heartbeats:
            for trial in self.trials(TrialState.RUNNING):  # lost before its first heartbeat: Optuna would not notice
                if WORKER not in trial.user_attrs and trial._trial_id not in self.watched:
                    self.storage.record_heartbeat(trial._trial_id)
                    self.watched.add(trial._trial_id)
            # After an outage of the database the heartbeats of all workers are old: they get time to send new ones.
            if time.monotonic() - self.storage.reached > self.storage.grace_period:
                with _quiet():
                    optuna.storages.fail_stale_trials(self.study)
        else:
            for trial in self.trials(TrialState.RUNNING):
                if _process_is_lost(trial):
                    self.end(trial, "its process was lost")
        trials = self.trials()
        retried = retried_numbers(trials)
        for trial in trials:  # a worker was lost between failing the trial and adding its retry
            if (
                trial.state == TrialState.FAIL and trial.number not in retried
                and not {"failed", DUPLICATE} & trial.user_attrs.keys() and losses(trials, trial) < MAX_LOSSES
            ):  # fmt: skip
                _retry(self.study, trial)

    def wait_for_others(self) -> None:
        """Sleep until another look at the trials of the other workers is worthwhile."""
        time.sleep(min(self.storage.get_heartbeat_interval(), 5) if self.has_heartbeats else 1)


def retried_numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of the trials that have a retry."""
    return {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}


def replaced_numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of the trials that do not count, because another trial replaces them."""
    return retried_numbers(trials) | {trial.number for trial in trials if DUPLICATE in trial.user_attrs}


def is_second_retry(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> bool:
    """Whether an earlier trial is a retry of the same one: two workers have added one at the same time."""
    last = trial.system_attrs.get("retry_history", [])[-1:]
    earlier = trials[: trial.number]
    return bool(last) and any(other.system_attrs.get("retry_history", [])[-1:] == last for other in earlier)


def losses(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """How often a failed trial and those that it retries have lost their worker.  Ctrl-C does not count."""
    history = [trials[number] for number in trial.system_attrs.get("retry_history", ())]
    return sum(t.user_attrs.get(UNFINISHED, "lost").endswith("lost") for t in [*history, trial])


with _quiet():
    _retry_callback: Any = RetryHeartbeatStaleTrialCallback()


def _retry(study: Any, trial: FrozenTrial) -> None:
    """Add a waiting trial with the parameters of a failed one, linked to it."""
    retry = copy.deepcopy(trial)
    not_inherited = {PROCESS, WORKER, UNFINISHED, "failed"}
    retry.user_attrs = {key: value for key, value in retry.user_attrs.items() if key not in not_inherited}
    _retry_callback(study, retry)


def _retry_stale(study: Any, trial: FrozenTrial) -> None:
    if losses(study.get_trials(deepcopy=False), trial) < MAX_LOSSES:
        _retry(study, trial)


# --- processes on this machine ----------------------------------------------------------------------------------------


def process_identity() -> list[Any]:
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


def _process_is_lost(trial: FrozenTrial) -> bool:
    """Whether the process that runs a trial no longer exists on this machine, or ended before it signed the trial."""
    if PROCESS not in trial.user_attrs:
        started = trial.datetime_start
        return started is not None and datetime.datetime.now() - started > datetime.timedelta(minutes=1)
    node, pid, start_time = trial.user_attrs[PROCESS]
    return bool(node == platform.node() and _start_time(pid) != start_time)
