"""Studies that several workers share through PostgreSQL: killed workers, restarts of the server, and errors.

The servers are real ones, and the workers are processes that train (`tests/support/storage_worker.py`).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("psycopg")

import optuna
import postgres

from tinycnn.errors import StorageError
from tinycnn.recipes import studies

ROOT = Path(__file__).parents[2]
TEXT = """
[grid]
title = "a small search"
[grid.net]
input = [1, 28, 28]
layers = "AvgPool2d(4), Flatten(), $act Linear(49, 10), LeakyReLU($slope)"
[grid.data]
train = 100
validation = 100
[grid.training]
optimizer = "SGD()"
lr = 0.1
epochs = 2
batch = 50
[grid.space]
act = ["", "Tanh(),", "ReLU(),"]
slope = [0.1, 0.2, 0.3, 0.4]
"""
SEEDS = """
[first]
title = "one"
[first.net]
input = [1, 28, 28]
layers = "AvgPool2d(4), Flatten(), Linear(49, 10)"
[first.data]
train = 100
[first.training]
optimizer = "SGD()"
lr = 0.1
epochs = 2
batch = 50
[second]
like = "first"
title = "two"
[second.training]
lr = 0.2
"""
COMPLETE, FAIL, RUNNING, WAITING = (
    getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "FAIL", "RUNNING", "WAITING")
)


@pytest.fixture(scope="module")
def running_server():
    if reason := postgres.unavailable():
        pytest.skip(reason)
    server = postgres.Server()
    yield server
    server.close()


@pytest.fixture
def server(running_server, request):
    """A server, and in its URL an empty database for the test."""
    name = "".join(filter(str.isalnum, request.node.name))[-40:].lower()
    import psycopg

    with psycopg.connect(running_server.url, autocommit=True) as connection:
        connection.execute(f'create database "{name}"')

    class Server:
        url = running_server.url.replace("/postgres?", f"/{name}?")
        stop, start = running_server.stop, running_server.start

    return Server


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(TEXT)
    Path("seeds.toml").write_text(SEEDS)
    return tmp_path


@pytest.fixture
def start(home):
    """Start workers; those that still run at the end are killed."""
    processes = []

    def start(*command, seconds=0.5, **options):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
        script = ROOT / "tests" / "support" / "storage_worker.py"
        output = (home / f"worker-{len(processes)}.txt").open("w+")
        process = subprocess.Popen(
            [sys.executable, "-W", "error", script, home / "log", str(seconds), *map(str, command)], stdout=output,
            stderr=subprocess.STDOUT, cwd=home, env=environment | {"NUMBA_NUM_THREADS": "1"}, **options,
        )  # fmt: skip
        process.output = output
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.output.close()


def finish(process, code=0):
    """What a worker has printed, when it has ended."""
    try:
        found = process.wait(timeout=180)
    finally:
        process.output.seek(0)
        text = process.output.read()
        print(text)
    assert found == code, text
    assert "s3cret" not in text
    return text


def until(condition, seconds=120):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s")


def trained(home, word="end"):
    """What was trained, in the order of the ends: (process, the rest of the line)."""
    path = home / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(line.split(" ", 2)[1:]) for line in lines if line.startswith(word)]


def trials_of(url, name):
    """All trials of a study; none before it exists."""
    storage = studies.open_storage(url)
    if name not in [study.study_name for study in storage.get_all_studies()]:
        return []
    return optuna.load_study(storage=storage, study_name=name).trials


def no_password_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []


def test_a_killed_worker_and_a_restarted_server_lose_and_repeat_nothing(server, home, start):
    command = ["sweep", "mine.toml", "--storage", server.url, "--sampler", "grid", "--trials", 12, "--pruner", "none",
               "--heartbeat", 1]  # fmt: skip
    workers = [start(*command) for _ in range(4)]  # all create the tables and the study of an empty database

    def victim():  # has trained an epoch
        for trial in trials_of(server.url, "grid"):
            for worker in workers:
                name = trial.user_attrs.get("worker", "")
                if trial.state == RUNNING and trial.intermediate_values and name.endswith(f":{worker.pid}"):
                    return trial.number, worker
        return None

    lost, killed = until(victim)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    until(lambda: len(trained(home)) >= 3)
    server.stop()
    time.sleep(3)
    server.start()
    texts = [finish(worker) for worker in workers if worker is not killed]
    assert any("storage cannot be reached, waiting: " in text for text in texts)
    assert all(text.count("every point of the grid has been tried") == 1 for text in texts)

    trials = trials_of(server.url, "grid")
    complete = [trial for trial in trials if trial.state == COMPLETE]
    points = [tuple(trial.params.items()) for trial in complete]
    assert len(set(points)) == len(points) == 12
    (retry,) = [trial for trial in complete if trial.system_attrs.get("retry_history") == [lost]]
    assert trials[lost].state == FAIL
    assert retry.params == trials[lost].params
    # The others that failed never ran: two workers had chosen the same point.
    others = [trial for trial in trials if trial.state not in (COMPLETE, WAITING) and trial.number != lost]
    assert all(trial.state == FAIL and "requeued" in trial.user_attrs for trial in others), others
    assert WAITING not in [trial.state for trial in trials]
    names = [name for _, name in trained(home)]
    assert len(set(names)) == len(names) == 12
    starts = [(pid, name) for pid, name in trained(home, "start") if int(pid) != killed.pid]
    assert len({name for _, name in starts}) == len(starts) == 12
    no_password_in(home)


def test_seeds_of_several_machines(server, home, start):
    """Workers with folders of their own: one is killed, and every folder ends up with all results."""
    (home / "done").mkdir()
    finish(start("reproduce", "seeds.toml", "--seeds", "2,", "--results", "done/results", "--out", "done", seconds=0))
    assert len(trained(home)) == 2

    def worker(folder, seeds=3):
        folders = ["--results", f"{folder}/results", "--out", folder]
        command = ["reproduce", "seeds.toml", "--seeds", seeds, "--storage", server.url, "--heartbeat", 1, *folders]
        return start(*command, seconds=1)

    finish(worker("done", "2,"))
    assert len(trained(home)) == 2
    workers = [worker("a"), worker("b")]
    pid = until(lambda: trained(home, "start")[2:])[0][0]
    (killed,) = [process for process in workers if process.pid == int(pid)]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for process in workers:
        if process is not killed:
            assert finish(process).count("  claimed nothing, obtained ") == 2
    names = [name for _, name in trained(home)]
    assert len(set(names)) == len(names) == 6
    trials = trials_of(server.url, "reproduce")
    assert sum(trial.state == COMPLETE for trial in trials) == 6
    (retry,) = [trial for trial in trials if "retry_history" in trial.system_attrs]
    (number,) = retry.system_attrs["retry_history"]
    assert trials[number].state == FAIL
    assert trials[number].user_attrs["seed"] == retry.user_attrs["seed"]
    # A machine that has trained nothing of this collects the whole table.
    finish(worker("done"))
    assert len(trained(home, "start")) == 7
    survivor = "b" if killed is workers[0] else "a"
    files, others = (
        {path.relative_to(folder): path.read_bytes() for path in Path(folder, "results").rglob("seed-*.json")}
        for folder in ("done", survivor)
    )
    assert len(files) == 6
    assert files == others
    no_password_in(home)


def test_the_code_for_dask(server, home):
    """The code of docs/sweeps.md, on synthetic digits, with two workers."""
    pytest.importorskip("distributed")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL)
    for old, new in [
        ("from tinycnn.__main__ import main\n", "from storage_worker import work\n"),
        ("main(COMMAND)", f"work({str(home / 'log')!r}, 0.2, *COMMAND)"),
        ('["sweep", "--storage", "postgresql://me@host/sweeps", "--trials", "200"',
         f'["sweep", "{home}/mine.toml", "--sampler", "grid", "--storage", "{server.url}", "--out", "{home}/sweeps"'),
        ("n_workers=4", "n_workers=2, dashboard_address=None"),
        ("range(4)", "range(2)"),
    ]:  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    Path("with_dask.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "with_dask.py"], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[0, 0]"], done.stdout + done.stderr
    names = [name for _, name in trained(home)]
    assert len(set(names)) == len(names) >= 10
    assert len({pid for pid, _ in trained(home)}) == 2


def test_a_server_that_stays_away_is_given_up(server, capsys):
    shared = studies.open_study(server.url, "grid", heartbeat=1, patience=1)
    trial = shared.ask()
    server.stop()
    try:
        with pytest.raises(StorageError, match=r"could not be reached for 1 s: .*the same command resumes") as error:
            trial.report(0.5, 1)
        assert "s3cret" not in str(error.value)
        assert capsys.readouterr().err.startswith("storage cannot be reached, waiting: OperationalError: ")
        with pytest.raises(StorageError, match=r"cannot be reached: .*check that the server runs") as error:
            studies.open_storage(server.url)
        assert "s3cret" not in str(error.value)
        assert ":***@" in str(error.value)
        shared.give_back(trial.number, "interrupted")  # neither waits nor fails
    finally:
        server.start()
    wrong = server.url.replace("s3cret", "other")
    with pytest.raises(StorageError, match="password authentication failed") as error:
        studies.open_storage(wrong)
    assert "other" not in str(error.value)
