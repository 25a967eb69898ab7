"""Runs that are interrupted, killed, or started twice: nothing is lost, and what cannot be done is said in a line."""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tinycnn
from tests.test_commands import ENVIRONMENT, ROOT
from tinycnn import data, plot, runs
from tinycnn.__main__ import main
from tinycnn.resume import TrainingCheckpoint

TEXT = """
[small]
[small.net]
input = [1, 28, 28]
layers = "AvgPool2d(4), Dropout2d(0.1), Flatten(), Linear(49, 10)"
[small.data]
train = 200
validation = 100
augment = "RandomAffine(degrees=9)"
[small.training]
optimizer = "SGD(momentum=0.9)"
lr = 0.1
epochs = 4
batch = 50
"""


@pytest.fixture
def home(tmp_path, monkeypatch, small_digits):
    """An empty folder with a recipe file, mine.toml; pictures are not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "save", lambda figure, path: None)
    (tmp_path / "mine.toml").write_text(TEXT)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch):
    """A function: the training is interrupted (or another exception raised) after so many epochs."""
    original = runs.RunFolder.on_checkpoint

    def interrupt(epochs, error=KeyboardInterrupt):
        def on_checkpoint(folder, history):
            original(folder, history)
            if len(history) == epochs:
                raise error

        monkeypatch.setattr(runs.RunFolder, "on_checkpoint", on_checkpoint)

    yield interrupt
    monkeypatch.setattr(runs.RunFolder, "on_checkpoint", original)


def one_folder(root="runs"):
    (folder,) = Path(root).glob("*/*-seed-*")
    return folder


def content(folder):
    """What two equal runs have in common: weights, and the history without times."""
    with (folder / "history.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]
    model = tinycnn.load(folder / "model.safetensors")
    return rows, {name: array.tobytes() for name, array in model.state_dict().items()}


# --- resume -----------------------------------------------------------------------------------------------------------

KINDS = {
    "dropout and augmentation": [],
    "EMA": ["--set", "training.ema=0.9"],
    "schedule": ["--set", "training.lr=one_cycle(0.1)"],
    "plateau": ["--set", "training.callbacks=ReduceLROnPlateau(patience=0, threshold=0.9)"],
    "early stopping": [
        "--set", 'training.callbacks=EarlyStopping("train_loss", patience=2, min_delta=0.5, restore_best=True)',
    ],
    "second derivatives": ["--set", "training.optimizer=SDLM(patterns=50)", "--set", "training.lr=0.001"],
    "gradients": ["--set", "training.gradients=true"],
    "steps": ["--set", "training.steps_per_epoch=3"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_like_one_that_was_not(home, interrupt, capsys, kind):
    command = ["train", "mine.toml", "--seed", "3", *KINDS[kind]]
    assert main([*command, "--out", "whole"]) == 0
    interrupt(2)
    assert main(command) == 130
    folder = one_folder()
    assert f"continue with: python -m tinycnn resume {folder}" in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["interrupted"] is True
    interrupt(3)
    assert main(["resume", str(folder)]) in (130, 0)  # 0: stopped early
    interrupt(99)
    assert main(["resume", str(folder)]) == 0
    assert content(folder) == content(one_folder("whole"))
    whole, part = (json.loads((f / "report.json").read_text()) for f in (one_folder("whole"), folder))
    assert {**whole, "training_seconds": 0} == {**part, "training_seconds": 0}
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 0  # once more
    assert "epochs are done" in capsys.readouterr().out
    assert content(folder) == content(one_folder("whole"))


def test_more_epochs(home, interrupt, capsys):
    assert main(["train", "mine.toml", "--epochs", "4", "--out", "whole"]) == 0
    assert main(["train", "mine.toml", "--epochs", "2"]) == 0
    assert main(["resume", str(one_folder()), "--epochs", "4"]) == 0  # the learning rate is constant
    assert content(one_folder()) == content(one_folder("whole"))
    assert main(["train", "mine.toml", "--set", "training.lr=cosine(0.1)", "--out", "cosine"]) == 0
    capsys.readouterr()
    assert main(["resume", str(one_folder("cosine")), "--epochs", "9"]) == 1
    assert "cannot be extended to 9 epochs: the rates of lr = 'cosine(0.1)' depend on" in capsys.readouterr().err


def test_a_difference_is_refused_by_name_or_ignored_by_name(home, interrupt, monkeypatch, capsys):
    interrupt(2)
    assert main(["train", "mine.toml"]) == 130
    interrupt(99)
    folder = one_folder()
    config = json.loads((folder / "config.json").read_text())
    config["training"]["batch"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    images, labels = data.synthetic_digits(500, rng=1)
    other = data.Dataset("other", images[:400], labels[:400], images[400:], labels[400:], tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda name, *_: other)
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "batch_size: 50 in the checkpoint, 40 now" in err
    assert "training data: sha256: " in err
    assert main(["resume", str(folder), "--force"]) == 0
    out = capsys.readouterr().out
    assert "ignored: batch_size: 50 in the checkpoint, 40 now" in out
    assert "ignored: training data: sha256: " in out


def test_reproduce_continues_a_seed_that_was_interrupted(home, interrupt, capsys):
    assert main(["reproduce", "mine.toml", "--seeds", "2", "--out", "whole", "--results", "all"]) == 0
    interrupt(3)
    assert main(["reproduce", "mine.toml", "--seeds", "2"]) == 130
    interrupt(99)
    capsys.readouterr()
    assert main(["reproduce", "mine.toml", "--seeds", "2"]) == 0
    assert capsys.readouterr().out.count("continuing runs/small/") == 1
    for seed in (0, 1):
        one, other = (json.loads(Path(root, "small", f"seed-{seed}.json").read_text()) for root in ("all", "results"))
        for result in (one, other):
            for key in ("seconds", "cpu_seconds", "training_seconds", "environment"):
                del result[key]
        assert one == other
    assert len(list(Path("runs/small").glob("*-seed-0"))) == 1


def test_a_run_without_a_checkpoint_or_of_a_newer_version(home, capsys):
    def refused(words):
        assert main(["resume", str(folder)]) == 1
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1

    assert main(["train", "mine.toml", "--epochs", "1"]) == 0
    folder = one_folder()
    config = json.loads((folder / "config.json").read_text())
    checkpoint = (folder / "checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    (folder / "checkpoint.safetensors").write_bytes(checkpoint[:-1])
    refused("checkpoint.safetensors: not a usable checkpoint")
    (folder / "checkpoint.safetensors").unlink()
    refused("has no checkpoint.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"format": 3}))
    refused("config.json was written by a newer version of tinycnn: expected format 2, got 3")
    for key in ("training", "net", "seed"):
        (folder / "checkpoint.safetensors").write_bytes(checkpoint)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        refused("config.json")
    folder = Path("mine.toml")
    refused("mine.toml must be the folder of a run, got a file")
    folder = Path("nowhere")
    refused("nowhere must be the folder of a run: it has no config.json")


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_on_one_run_folder(home, interrupt, capsys):
    interrupt(2)
    assert main(["train", "mine.toml"]) == 130
    interrupt(99)
    path = one_folder()
    folder = runs.RunFolder.open(path)
    capsys.readouterr()
    assert main(["resume", str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path} is in use by another process\n"
    folder.close()
    assert main(["resume", str(path)]) == 0


def test_two_processes_on_the_results_of_one_recipe(home, capsys):
    Path("results/small").mkdir(parents=True)
    lock = runs.lock_file(Path("results/small"), ".seed-0")
    assert main(["reproduce", "mine.toml", "--seeds", "2"]) == 0
    assert "seed 0 is being trained by another process" in capsys.readouterr().out
    assert [path.name for path in Path("results/small").glob("*.json")] == ["seed-1.json"]
    lock.release()
    assert main(["reproduce", "mine.toml", "--seeds", "2"]) == 0
    assert sorted(path.name for path in Path("results/small").iterdir()) == ["seed-0.json", "seed-1.json"]


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_full_disk_names_the_file_and_keeps_the_last_checkpoint(home, interrupt, monkeypatch, capsys, number):
    assert main(["train", "mine.toml", "--out", "whole"]) == 0
    interrupt(2)
    assert main(["train", "mine.toml"]) == 130
    interrupt(99)
    folder, replace = one_folder(), os.replace
    before = TrainingCheckpoint(folder / "checkpoint.safetensors").read()["history"]

    def full(source, target):
        if str(target).endswith("checkpoint.safetensors") and len(written) == 1:
            raise OSError(number, os.strerror(number))
        written.append(target)
        replace(source, target)

    for count in (0, 1, 2):  # files that can be written before the disk is full
        written = [None] * (1 - count) if count < 2 else []
        monkeypatch.setattr(os, "replace", full)
        capsys.readouterr()
        code = main(["resume", str(folder)])
        monkeypatch.setattr(os, "replace", replace)
        err = capsys.readouterr().err
        if code == 1:
            assert err == f"error: {folder}/checkpoint.safetensors: {os.strerror(number).lower()}\n".replace(
                "input/output", "input/output"
            )
        history = TrainingCheckpoint(folder / "checkpoint.safetensors").read()["history"]
        assert history[:2] == before
        assert not list(folder.glob(".*.part"))
    assert main(["resume", str(folder)]) == 0
    assert content(folder) == content(one_folder("whole"))


def test_a_picture_that_cannot_be_written_loses_nothing(home, monkeypatch, capsys):
    def full(figure, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(plot, "save", full)
    assert main(["reproduce", "mine.toml", "--seeds", "1", "--results", "kept"]) == 1  # the report has pictures too
    out = capsys.readouterr().out
    assert "mistakes.png was not written: " in out
    assert Path("kept/small/seed-0.json").exists()
    assert main(["train", "mine.toml", "--out", "other"]) == 1
    out = capsys.readouterr().out
    assert "curves.png was not written: " in out
    assert "test accuracy" in out
    assert (one_folder("other") / "report.json").exists()


def test_a_folder_that_vanishes(home, monkeypatch, capsys):
    original = runs.RunFolder.on_checkpoint

    def vanish(folder, history):
        original(folder, history)
        if len(history) == 2:
            shutil.rmtree(folder.path)

    monkeypatch.setattr(runs.RunFolder, "on_checkpoint", vanish)
    assert main(["train", "mine.toml"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: runs/small/\S+/checkpoint\.safetensors: the folder does not exist\n", err)


def test_a_clock_that_goes_back(home, interrupt, monkeypatch):
    interrupt(2)
    assert main(["train", "mine.toml"]) == 130
    interrupt(99)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "strftime", lambda pattern: "1970-01-01_00-00-00-")
    assert main(["resume", str(one_folder())]) == 0
    for _ in range(2):
        assert main(["train", "mine.toml", "--epochs", "1"]) == 0
    names = sorted(path.name for path in Path("runs/small").iterdir())
    assert names[:2] == ["1970-01-01_00-00-00-seed-0", "1970-01-01_00-00-00-seed-0-2"]


def test_partial_files_of_killed_processes_are_removed(home, interrupt):
    interrupt(2)
    assert main(["train", "mine.toml"]) == 130
    interrupt(99)
    left = one_folder() / f".checkpoint.safetensors.{'0' * 16}.part"
    left.write_bytes(b"half")
    assert main(["resume", str(one_folder())]) == 0
    assert not left.exists()


# --- signals ----------------------------------------------------------------------------------------------------------


def start(tmp_path, *arguments):
    code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "runpy.run_module('tinycnn', run_name='__main__', alter_sys=True)"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_sigterm_says_how_to_go_on(tmp_path):
    (tmp_path / "mine.toml").write_text(TEXT)
    with start(tmp_path, "train", "mine.toml", "--data", "synthetic", "--epochs", "100000") as process:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("runs/small/*/history.csv")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err == "\nterminated\n"
    folder = one_folder(tmp_path / "runs")
    assert f"is kept: python -m tinycnn resume {folder.relative_to(tmp_path)}" in out
    saved = TrainingCheckpoint(folder / "checkpoint.safetensors").read()["history"]
    assert len(saved) - 1 <= len(runs.read_history(folder)) <= len(saved)  # SIGTERM may come between the two files


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_has_all_epochs_but_the_last(tmp_path):
    """Kill the training at random moments, most of them inside a write, and continue it each time.  TINYCNN_KILLS is
    the number of times; docs/robustness.md has the result of 200."""
    (tmp_path / "mine.toml").write_text(TEXT)
    kills, rng = int(os.environ.get("TINYCNN_KILLS", "8")), random.Random(0)
    script = tmp_path / "kill.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(kills), str(rng.randrange(1000))], capture_output=True, text=True,
        cwd=tmp_path, timeout=60 + 20 * kills, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    print(done.stdout)


KILLED = '''
"""Start a training in a child process again and again, kill it, and check what is left."""
import os, random, signal, sys, time
from pathlib import Path
from tinycnn import data, runs
from tinycnn.__main__ import main
from tinycnn.resume import TrainingCheckpoint

kills, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]))
images, labels = data.synthetic_digits(500, rng=0)
digits = data.Dataset("digits", images[:400], labels[:400], images[400:], labels[400:], tuple("0123456789"))
data.load = lambda name, *_: digits
# The child must compile and run everything itself: threads do not survive a fork.
last, inside, fresh = 0, 0, 0
for number in range(kills):
    folders = list(Path("runs/small").glob("*-seed-0")) if Path("runs/small").exists() else []
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdout = open(1, "w", buffering=1)
        command = ["resume", str(folders[0])] if folders else ["train", "mine.toml", "--epochs", "100000"]
        code = main(command)
        os._exit(code + 100)
    os.close(writing)
    seen, deadline = b"", time.monotonic() + 120
    while b"images/s" not in seen:  # the first epoch is done
        assert time.monotonic() < deadline, seen
        part = os.read(reading, 65536)
        assert part, (seen, os.waitpid(child, 0))
        seen += part
    time.sleep(rng.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (status, seen)
    while part := os.read(reading, 65536):
        seen += part
    os.close(reading)
    printed = max(int(line.split()[0]) for line in seen.decode().splitlines() if line.split()[:1] and
                  line.split()[0].isdigit() and line.count("%") == 2)
    (folder,) = Path("runs/small").glob("*-seed-0")
    saved = [r["epoch"] for r in TrainingCheckpoint(folder / "checkpoint.safetensors").read()["history"]]
    rows = [r["epoch"] for r in runs.read_history(folder)]
    assert saved == list(range(1, len(saved) + 1)), saved
    assert rows == list(range(1, len(rows) + 1)), rows
    assert printed - 1 <= len(saved), (printed, len(saved))  # at most one epoch old
    assert len(saved) - 1 <= len(rows) <= len(saved), (len(saved), len(rows))
    assert len(saved) >= last, (last, len(saved))
    inside += bool(list(folder.glob(".*.part")))
    last = len(saved)
print(f"{kills} kills, {inside} of them inside a write, {last} epochs")
'''
