"""Ctrl-C at critical moments, and output that cannot be written: files stay complete, without a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.extending import overload

from tinycnn import (
    SGD,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    Sequential,
    _streams,
    checkpoint,
    fit,
    plot as plot_module,
    runs,
)
from tinycnn.__main__ import main
from tinycnn._interrupts import defer_interrupt
from tinycnn.kernels import _jit

FILES = {
    ".lock", "config.json", "checkpoint.safetensors", "model.safetensors", "history.csv", "report.json", "curves.png",
    "confusion.png", "mistakes.png", "filters.png", "feature_maps.png", "reliability.png", "snapshots",
}  # fmt: skip


@pytest.fixture
def handler():
    """Install Python's SIGINT handler, which a background job may not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_deferred_to_the_end(handler, capsys):
    done = []

    def once():
        with defer_interrupt("finishing"):
            ctrl_c()
            done.append(1)

    def twice():
        with defer_interrupt():
            ctrl_c()
            ctrl_c()
            done.append("the second Ctrl-C was deferred")

    def nested():
        with defer_interrupt("outer"):
            with defer_interrupt():
                ctrl_c()
                done.append(2)
            done.append(3)  # the outer block continues

    for call in (once, twice, nested):
        with pytest.raises(KeyboardInterrupt):
            call()
    assert done == [1, 2, 3]
    assert capsys.readouterr().err == "".join(
        f"\n{word} (press Ctrl-C again to stop at once)\n" for word in ("finishing", "outer")
    )
    with defer_interrupt(raises=False) as pressed:
        assert not pressed()
        ctrl_c()
    assert pressed()
    thread = threading.Thread(target=lambda: defer_interrupt().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@overload(ctrl_c)
def _(*_):
    ctrl_c()  # during the compilation of a caller
    return lambda *_: None


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="NUMBA_DISABLE_JIT is 1")
def test_ctrl_c_is_deferred_to_the_end_of_a_compilation(handler, monkeypatch):
    monkeypatch.setattr(_jit, "enable_cache", lambda dispatcher: dispatcher)  # a second run compiles too

    @_jit.serial_kernel
    def double(x):
        ctrl_c()
        x[:] *= 2

    x = np.ones(1, np.float32)
    with pytest.raises(KeyboardInterrupt):
        double(x)
    double(x)  # compiled already
    assert x == 2


@pytest.fixture
def home(tmp_path, monkeypatch, small_digits):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ctrl_c_while_pictures_are_drawn(home, handler, monkeypatch, capsys):
    confusion = plot_module.confusion

    def interrupted(*args):
        ctrl_c()
        return confusion(*args)

    monkeypatch.setattr(plot_module, "confusion", interrupted)
    assert main(["train", "--epochs", "1", "--set", "data.validation=100"]) == 130
    out, err = capsys.readouterr()
    assert err.split("interrupted", 1)[1] == ": finishing the run folder (press Ctrl-C again to stop at once)\n"
    assert "report and pictures in" in out
    (folder,) = (home / "runs" / "default").iterdir()
    assert {path.name for path in folder.iterdir()} == FILES


def test_ctrl_c_while_the_pictures_of_a_recipe_are_drawn(home, handler, monkeypatch, capsys):
    (home / "mine.toml").write_text(
        '[a]\n[a.net]\ninput = [1, 28, 28]\nlayers = "Flatten(), Linear(784, 10)"\n[a.training]\noptimizer = "SGD()"\n'
        "lr = 0.1\nepochs = 1\nbatch = 50\n"
    )
    finish = runs.RunFolder.finish

    def interrupted(*args):
        ctrl_c()
        return finish(*args)

    monkeypatch.setattr(runs.RunFolder, "finish", interrupted)
    assert main(["reproduce", "mine.toml", "--seeds", "2"]) == 130
    assert "finished seeds are kept" in capsys.readouterr().err
    assert [path.name for path in (home / "results" / "a").iterdir()] == ["seed-0.json"]
    (folder,) = (home / "runs" / "a").iterdir()
    assert "confusion.png" in {path.name for path in folder.iterdir()}


def test_ctrl_c_between_the_files_of_an_epoch(home, handler, monkeypatch):
    folder, save = runs.RunFolder.create("runs", "a", {}), checkpoint.save

    def interrupted(*args):
        ctrl_c()
        save(*args)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    folder.on_train_begin(Sequential(Flatten(), input_shape=(1, 2, 2)))
    with pytest.raises(KeyboardInterrupt):
        folder.on_checkpoint([{"epoch": 1}])
    assert runs.read_history(folder.path) == [{"epoch": 1}]


CHILD = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
print("started", flush=True)
runpy.run_module("tinycnn", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0])
def test_ctrl_c_at_the_start(tmp_path, delay):
    command = ["train", "--data", "synthetic", "--epochs", "1000", "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(runs.__file__).parents[1])},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    lines = [line for line in (out + err).splitlines() if "interrupted" in line]
    assert len(lines) == 1
    assert "Traceback" not in err
    for folder in tmp_path.iterdir():
        json.loads((folder / "config.json").read_text())


# --- output that cannot be written ------------------------------------------------------------------------------------


class BrokenPipe(io.StringIO):
    """A stream whose reader has closed the pipe."""

    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return True


def test_output_that_cannot_be_written_is_dropped(monkeypatch):
    full = open("/dev/full", "w") if os.path.exists("/dev/full") else None  # noqa: PTH110, PTH123, SIM115
    for stream in (None, BrokenPipe(), open(os.devnull), full):  # noqa: PTH123, SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        _streams.print_stderr("x")
        with _streams.safe_streams() as failed:
            print("x" * 10_000)
            print("x", file=sys.stderr, flush=True)
        assert failed() == (stream is not None)
        assert sys.stdout is stream
        if stream is not None:
            stream.close()


def test_an_ascii_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    with _streams.safe_streams() as failed:
        print("0.5 ± 0.1")
        sys.stdout.flush()
    assert raw.getvalue() == b"0.5 ? 0.1\n"
    assert not failed()


@pytest.mark.parametrize("stream", [None, BrokenPipe()])
def test_a_training_without_standard_error(monkeypatch, small_digits, stream):
    digits = DeviceDataset(small_digits.train_images, small_digits.train_labels)
    model = Sequential(Flatten(), Linear(784, 10), input_shape=(1, 28, 28), rng=0)
    monkeypatch.setattr(sys, "stderr", stream)
    history = fit(model, CrossEntropyLoss(), SGD(model, 0.1), digits, epochs=2, rng=0)
    assert len(history) == 2
    assert np.isfinite(model.theta).all()


SHELL = (
    ">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "| head -1", "2>&1 >/dev/null | head -c 1",
)  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("to", SHELL)
def test_results_are_kept_when_output_cannot_be_written(tmp_path, to):
    (tmp_path / "mine.toml").write_text(
        '[a]\n[a.net]\ninput = [1, 28, 28]\nlayers = "Flatten(), Linear(784, 10)"\n[a.data]\nname = "synthetic"\n'
        'train = 300\n[a.training]\noptimizer = "SGD()"\nlr = 0.1\nepochs = 1\nbatch = 50\n'
    )
    environment = os.environ | {"PYTHONPATH": str(Path(runs.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        f"'{sys.executable}' -m tinycnn reproduce mine.toml --seeds 2 {to}", shell=True, cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert {path.name for path in (tmp_path / "results" / "a").iterdir()} == {"seed-0.json", "seed-1.json"}
    report = (tmp_path / "runs" / "a" / "report.md").read_text(encoding="utf-8")
    assert "| claimed | – |" in report  # a sign that is not ASCII
    assert "| obtained | " in report
