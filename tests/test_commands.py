"""The example and the command line, run as subprocesses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tinycnn
from tinycnn import data

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "lenet5.py"
FILES = {
    ".lock", "config.json", "checkpoint.safetensors", "model.safetensors", "history.csv", "report.json", "curves.png",
    "confusion.png", "mistakes.png", "filters.png", "feature_maps.png", "reliability.png", "snapshots",
}  # fmt: skip


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TINYCNN_CUDA"}  # a user's environment
SYNTHETIC = ("--data", "synthetic")  # needs neither files nor a network


def run(*args, script=EXAMPLE, env=None, timeout=900):
    command = [sys.executable, *([str(script)] if script else ["-m", "tinycnn"]), *map(str, args)]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**ENVIRONMENT, "PYTHONPATH": path, **(env or {})}
    )


def test_the_example_trains_and_writes_a_whole_run_folder(tmp_path):
    done = run(*SYNTHETIC, "--epochs", 2, "--seed", 4, "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "61,706" in done.stdout
    assert "test accuracy" in done.stdout
    (folder,) = (tmp_path / "runs" / "lenet5").iterdir()
    assert {file.name for file in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 4
    assert config["parameters"] == 61_706
    assert config["dataset"]["name"] == "synthetic"
    assert len(config["dataset"]["sha256"]) == 64
    assert {"numba", "numpy", "processor", "threads", "git_revision"} <= set(config["environment"])
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    report = json.loads((folder / "report.json").read_text())
    assert report["total"] == 10_000
    assert set(report["macro"]) == {"precision", "recall", "f1"}
    model = tinycnn.load(folder / "model.safetensors")
    assert model.predict(data.synthetic_digits(9, rng=0)[0][:, None]).shape == (9,)
    for name in FILES:
        if name.endswith(".png"):
            assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_recipe_of_the_script_gives_the_same_weights(tmp_path):
    done = run(*SYNTHETIC, "--epochs", 1, "--activation", "relu", "--pool", "max", "--out", tmp_path / "script")
    assert done.returncode == 0, done.stderr
    done = run("train", "default-relu", *SYNTHETIC, "--epochs", 1, "--out", tmp_path / "recipe", script=None)
    assert done.returncode == 0, done.stderr
    one, other = (tinycnn.load(path).state_dict() for path in tmp_path.glob("*/*/*/model.safetensors"))
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_ctrl_c_leaves_a_complete_folder_and_exit_code_130(tmp_path):
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    # The children of a background job may ignore SIGINT.
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE), *SYNTHETIC]
    with subprocess.Popen(
        [*command, "--epochs", "100000", "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while not list(tmp_path.glob("*/*/history.csv")):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in out
    assert "Traceback" not in err
    (folder,) = (tmp_path / "lenet5").iterdir()
    assert {file.name for file in folder.iterdir()} == FILES
    rows = (folder / "history.csv").read_text().strip().splitlines()
    report = json.loads((folder / "report.json").read_text())
    assert report["interrupted"] is True
    assert report["epochs"] == len(rows) - 1
    assert f"continue with: python -m tinycnn resume {folder}" in out
    done = run("resume", folder, "--epochs", len(rows), script=None)  # one_cycle depends on the number of epochs
    assert done.returncode == 1
    assert f"cannot be extended to {len(rows)} epochs: the rates of lr = 'one_cycle(" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--epochs", "x"], "--epochs: must be a whole number"),
        (["--fit", "squeeze"], "invalid choice"),
        (["--pool", "min"], "invalid choice"),
        (["--seed", "-1"], "--seed: must not be negative"),
    ],
)
def test_invalid_options_are_refused(args, words):
    done = run(*args)
    assert done.returncode == 2
    assert words in done.stderr


def test_user_errors_are_one_line_before_training(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for args, words in [
        ((*SYNTHETIC, "--out", file), f"cannot write the output folder {file}"),
        (("--set", "training.lrr=1"), "--set: unknown key 'training.lrr'; did you mean 'training.lr'?"),
        (("--set", "training.lr"), "--set must be KEY=VALUE, got 'training.lr'"),
        (("--set", "training.epochs=0"), "--set training.epochs: epochs must be at least 1, got 0"),
        (("--set", "training.optimizer=Adan()", *SYNTHETIC), "--set training.optimizer, line 1: unknown name 'Adan'"),
        (("--set", "training.lr=-1", *SYNTHETIC), "--set training.lr: lr must be at least 0, got -1"),
        (("--data", "fashoin"), "or a folder or a file, got 'fashoin'; did you mean 'fashion'?"),
        (("--data", tmp_path / "nowhere.csv"), "nowhere.csv"),
        ((*SYNTHETIC, "--device", "gpu", "--out", tmp_path / "r"), "device must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ((*SYNTHETIC, "--threads", 4096, "--out", tmp_path / "r"), "threads must be at most"),
    ]:
        done = run(*args)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "r").exists()


def test_mnist_that_cannot_be_downloaded_names_the_mirrors(tmp_path):
    proxy = dict.fromkeys(("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    done = run("--data", "mnist", env={"TINYCNN_DATA": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), **proxy})
    assert done.returncode == 1
    assert "ossci-datasets.s3.amazonaws.com: " in done.stderr
    assert "storage.googleapis.com: " in done.stderr
    assert done.stderr.count("\n") == 2
    assert "TINYCNN_DATA" in done.stderr


def test_help_version_and_info():
    for command in ([], ["train"], ["data"]):
        done = run(*command, "--help", script=None)
        assert done.returncode == 0
        assert "usage: tinycnn" in done.stdout
    assert run("--version", script=None).stdout.strip() == f"tinycnn {tinycnn.__version__}"
    assert "threads" in run("info", script=None).stdout


def test_numba_and_matplotlib_load_lazily():
    code = (
        "import sys, tinycnn; from tinycnn import Sequential, Conv2d, Adam, fit, data, models;"
        "print([m for m in ('numba', 'matplotlib', 'tqdm', 'urllib.request') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_exists():
    assert {"Sequential", "fit", "plot", "kernels"} < set(tinycnn.__all__)
    for name in tinycnn.__all__:
        assert getattr(tinycnn, name) is not None
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = tinycnn.nothing
