"""Data-parallel training over MPI: the same results with 1, 2 and 4 ranks, and what happens when a rank fails.

One launch of tests/support/mpi_checks.py trains all cases; the command line is launched by itself.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from tinycnn import SGD, CrossEntropyLoss, Flatten, Linear, Sequential, distributed, fit
from tinycnn.__main__ import main
from tinycnn.errors import RankError

ROOT = Path(__file__).parent.parent
SUPPORT = ROOT / "tests" / "support"
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def _missing():
    if importlib.util.find_spec("mpi4py") is None:
        return 'mpi4py is not installed: pip install "tinycnn[mpi]"'
    return None if MPIEXEC else "mpiexec is not installed"


needs_mpi = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))

RECIPE = """
[tiny]
title = "tiny"
net.input = [1, 28, 28]
net.layers = "AvgPool2d(4), Conv2d(1, 2, 3), Tanh(), Flatten(), Dropout(0.1), Linear(50, 10)"
data.name = "synthetic"
data.train = 600
data.validation = 90
training.optimizer = "SGD(momentum=0.9)"
training.lr = 0.05
training.epochs = {epochs}
training.batch = 50
"""


def launch(ranks, *args, env=None, timeout=600, **options):
    """Start `python args` on so many ranks."""
    path = os.pathsep.join([str(ROOT), str(SUPPORT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {k: v for k, v in os.environ.items() if k != "TINYCNN_CUDA"} | {"PYTHONPATH": path, **(env or {})}
    command = [MPIEXEC, "-n", str(ranks), sys.executable, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def finish(process, timeout=600):
    """(exit code, output, errors) of a launch."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# --- without MPI ------------------------------------------------------------------------------------------------------


class _Numbered(distributed.Group):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_are_contiguous_and_nearly_equal(size):
    for n in range(30):
        parts = [_Numbered(rank, size).part(n) for rank in range(size)]
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == n
        sizes = [stop - start for start, stop in parts]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_a_program_started_alone_does_not_import_mpi4py():
    code = "import sys; from tinycnn import distributed as d; d.launched_group(); print('mpi4py' in sys.modules)"
    clean = {k: v for k, v in os.environ.items() if k not in distributed.SIZES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=clean)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("size", "rank"), [("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")])
def test_mpi4py_is_missing(size, rank, monkeypatch, capsys):
    monkeypatch.setenv(size, "4")
    monkeypatch.setenv(rank, "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(["train"]) == 1
    expected = 'error: started with 4 ranks, but mpi4py is not installed: pip install "tinycnn[mpi]"\n'
    assert capsys.readouterr().err == expected
    monkeypatch.setenv(rank, "2")
    with pytest.raises(SystemExit):  # rank 0 has printed it
        main(["train"])
    assert capsys.readouterr() == ("", "")


def test_comm_must_be_a_communicator():
    model = Sequential(Flatten(), Linear(16, 3), input_shape=(1, 4, 4), rng=0)
    images, labels = np.zeros((4, 1, 4, 4), np.float32), np.zeros(4, np.int64)
    with pytest.raises(TypeError, match=r"comm must be an mpi4py communicator, such as MPI.COMM_WORLD, got 'world'"):
        fit(model, CrossEntropyLoss(), SGD(model, 0.1), (images, labels), epochs=1, comm="world")


# --- the same results for any number of ranks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpi")
    code, out, err = finish(launch(4, SUPPORT / "mpi_checks.py", folder))
    assert code == 0, err
    return json.loads(out)["cases"]


AGREE = (
    "plain", "few_images", "random_layers", "large_batches", "weighted", "summed", "numbers", "windows", "optimizers",
    "synchronized", "own_classes", "stream", "callbacks", "repeated", "resumed",
)  # fmt: skip


@needs_mpi
@pytest.mark.parametrize("case", AGREE)
def test_ranks_agree(case, results):
    one = results[case]["1"]
    for ranks in ("2", "4"):
        other = results[case][ranks]
        np.testing.assert_allclose(other["state"], one["state"], rtol=0, atol=1e-6)
        assert [set(record) for record in other["history"]] == [set(record) for record in one["history"]]
        for name in one["history"][0]:
            values = [[record[name] for record in found["history"]] for found in (other, one)]
            np.testing.assert_allclose(*values, rtol=1e-6, err_msg=name)
        if case == "callbacks":  # the loss of each batch
            assert len(one["losses"]) == 7
            np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)


@needs_mpi
def test_trainings_differ(results):
    """The cases above compare something: parameters moved, and other cases have others."""
    states = {case: results[case]["1"]["state"] for case in ("plain", "few_images", "weighted", "summed", "numbers")}
    assert all(np.abs(np.subtract(a, b)).max() > 1e-3 for a in states.values() for b in states.values() if a is not b)
    np.testing.assert_allclose(results["windows"]["4"]["state"], states["plain"], rtol=0, atol=1e-6)  # 3 * 5 images
    own, one = (results["own_statistics"][ranks]["state"] for ranks in ("4", "1"))
    assert np.abs(np.subtract(own, one)).max() > 1e-3  # batch norm with each rank's own statistics


@needs_mpi
def test_divergence_is_reported_as_by_one_process(results):
    messages = {results["diverged"][ranks]["error"] for ranks in ("1", "2", "4")}
    assert len(messages) == 1, messages
    assert "training diverged at step" in messages.pop()
    for ranks in ("2", "4"):  # the weights of the last complete epoch
        np.testing.assert_allclose(
            results["diverged"][ranks]["state"], results["diverged"]["1"]["state"], rtol=0, atol=1e-6
        )


@needs_mpi
def test_problems_are_named_before_training(results):
    assert results["problems"]["1"]["errors"][0][:2] == ["", ""]
    by_rank = results["problems"]["4"]["errors"]
    images, epochs, batch, bad_batch = by_rank[0]
    assert re.match(
        r"RankError: the ranks differ in training data: sha256: '\w{64}' on ranks 0, 1 and 2, '\w{64}' on rank 3; "
        r"training data: mean: ",
        images,
    )
    assert epochs == "RankError: the ranks differ in epochs: 2 on rank 0, 1 on ranks 1, 2 and 3"
    assert batch == "ValueError: batch_size must be at least 4, an image for each rank, got 3"
    assert bad_batch == "ValueError: batch_size must be at least 1, got 0"
    for rank in (1, 2, 3):
        assert by_rank[rank][:3] == by_rank[0][:3]
        assert by_rank[rank][3] == "RankError: rank 0: batch_size must be at least 1, got 0"


# --- the command line -------------------------------------------------------------------------------------------------


def run_folder(out):
    (folder,) = (out / "tiny").iterdir()
    return folder


@needs_mpi
def test_command_line(tmp_path):
    """Two ranks train an epoch, four continue; one process does the same."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(epochs=1))
    arguments = ["-m", "tinycnn", "train", recipe, "--out", tmp_path / "runs", "--json"]
    code, out, err = finish(launch(2, *arguments))
    assert code == 0, err
    document = json.loads(out)  # of rank 0 alone
    folder = run_folder(tmp_path / "runs")
    assert document["run"] == str(folder)
    assert re.search(r"^2 ranks, \d+ threads? each$", err, re.MULTILINE)
    assert json.loads((folder / "config.json").read_text())["ranks"] == 2
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoint.safetensors", "model.safetensors", "history.csv", "report.json", "confusion.png"} <= names
    code, out, err = finish(launch(4, "-m", "tinycnn", "resume", folder, "--epochs", 2))
    assert code == 0, err
    assert out.count("test accuracy") == 1
    assert out.count("epoch   train loss") == 1

    recipe.write_text(RECIPE.format(epochs=2))
    code, out, err = finish(launch(1, "-m", "tinycnn", "train", recipe, "--out", tmp_path / "alone"))
    assert code == 0, err
    from tinycnn import checkpoint

    (theirs, _), (ours, _) = (
        checkpoint.load(path / "checkpoint.safetensors") for path in (folder, run_folder(tmp_path / "alone"))
    )
    np.testing.assert_allclose(theirs["theta"], ours["theta"], rtol=0, atol=1e-6)
    assert (theirs["buffers.4._counter"] == ours["buffers.4._counter"]).all()


@needs_mpi
def test_a_killed_rank_ends_the_job_and_keeps_the_checkpoint(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(epochs=100_000))
    process = launch(2, "-m", "tinycnn", "train", recipe, "--out", tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("tiny/*/history.csv")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ranks = [int(pid) for pid in _descendants(process.pid) if b"tinycnn" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert finish(process, 60)[0] != 0
    from tinycnn import checkpoint

    _, metadata = checkpoint.load(run_folder(tmp_path) / "checkpoint.safetensors")  # checks its hash
    assert metadata["state"]["items"]["history"]


def _descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*children, *(d for child in children for d in _descendants(child))]


@needs_mpi
def test_an_exception_on_one_rank_ends_the_job_with_a_line(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\n"
        "from mpi4py import MPI\n"
        "from tinycnn import SGD, CrossEntropyLoss, Flatten, Linear, Sequential, fit\n"
        "class Fails:\n"
        "    def on_epoch_end(self, record):\n"
        "        if MPI.COMM_WORLD.rank == 1 and record['epoch'] == 2: raise KeyError('a bug')\n"
        "model = Sequential(Flatten(), Linear(16, 3), input_shape=(1, 4, 4), rng=0)\n"
        "data = np.zeros((8, 1, 4, 4), np.float32), np.arange(8) % 3\n"
        "fit(model, CrossEntropyLoss(), SGD(model, 0.1), data, epochs=9, batch_size=4, rng=0, progress=False,\n"
        "    callbacks=[Fails()], checkpoint='c.safetensors', comm=MPI.COMM_WORLD)\n"
        "print('finished')\n"
    )
    code, out, err = finish(launch(2, program, cwd=tmp_path))
    assert code != 0
    assert "finished" not in out
    lines = [line for line in err.splitlines() if line.startswith("error on rank")]
    assert len(lines) == 1
    assert lines[0].startswith("error on rank 1 of 2: KeyError: 'a bug'")
    assert "Traceback" not in err
    assert (tmp_path / "c.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="pipes of Windows do not say what is unread")
def test_what_was_printed_is_read_before_ranks_are_killed():
    read, write = os.pipe()
    reader = threading.Timer(0.2, os.read, (read, 100))
    with os.fdopen(write, "w") as stream:
        stream.write("error on rank 1\n")
        stream.flush()
        with pytest.raises(TimeoutError):
            _wait(stream, 0.1)
        reader.start()
        _wait(stream, 60)
    reader.join()
    os.close(read)
    distributed._wait_until_read(stream, None)  # closed, and none


def _wait(stream, timeout):
    """`_wait_until_read`, TimeoutError if it gave up."""
    start = time.monotonic()
    distributed._wait_until_read(stream, timeout=timeout)
    if time.monotonic() - start >= timeout:
        raise TimeoutError


@needs_mpi
def test_ranks_with_other_recipes(tmp_path):
    """An error that concerns all ranks is printed once."""
    program = tmp_path / "program.py"
    for epochs, name in ((1, "0"), (2, "1")):
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(epochs=epochs))
    program.write_text(
        "import os, sys\n"
        "from tinycnn.__main__ import program\n"
        f"sys.argv = ['tinycnn', 'train', r'{tmp_path}/' + os.environ['PMI_RANK'] + '.toml', '--out', r'{tmp_path}']\n"
        "sys.exit(program())\n"
    )
    code, _, err = finish(launch(2, program))
    assert code != 0
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert re.fullmatch(r"error: the ranks differ in recipe: 'tiny \w+' on rank 0, 'tiny \w+' on rank 1", errors[0])
    assert not (tmp_path / "tiny").exists()


@needs_mpi
@pytest.mark.gpu
def test_gpus(tmp_path):
    """Two ranks on a GPU: gradients go through pinned memory."""
    program = [] if ON_GPU else [SUPPORT / "cuda_on_cpu"]
    cases = "plain,random_layers,synchronized"
    code, out, err = finish(launch(2, *program, SUPPORT / "mpi_checks.py", tmp_path, "cuda", cases))
    assert code == 0, err
    for found in json.loads(out)["cases"].values():
        np.testing.assert_allclose(found["2"]["state"], found["1"]["state"], rtol=0, atol=1e-6)


def test_a_rank_has_the_gpu_of_its_local_rank(monkeypatch):
    group = _Numbered(5, 8)
    group.local_rank = 5
    monkeypatch.setattr(distributed._gpu, "probe", lambda: SimpleNamespace(gpus=["a", "b", "c"]))
    devices = [distributed.local_device(device, group) for device in ("cuda", "auto", "cuda:1", "cpu")]
    assert devices == ["cuda:2", "cuda:2", "cuda:1", "cpu"]
    assert distributed.local_device("cuda", distributed.ALONE) == "cuda"


def test_rank_names():
    assert distributed._rank_names([3]) == "rank 3"
    assert distributed._rank_names([0, 1, 2]) == "ranks 0, 1 and 2"
    assert issubclass(RankError, RuntimeError)
