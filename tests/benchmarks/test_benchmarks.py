"""The benchmarks on tiny sizes: they check before they measure, and write the files that they document. The GPU
benchmark is rehearsed without a GPU, as PTX on the CPU. No other library is needed, and no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from cuda_on_cpu import ON_GPU

from benchmarks import (
    __main__ as entry,
    _competitors,
    _harness as harness,
    _plots,
    augment,
    conv,
    guard,
    ladder,
    nets,
    scale,
    start,
    train_step,
)
from tests.test_commands import ENVIRONMENT, ROOT

QUICK = ["--turns", "1", "--seconds", "0.001", "--threads", "1"]


class WrongLoss(_competitors.NumPy):
    """A competitor with a wrong loss."""

    def step(self, index):
        return super().step(index) * 1.001


class NeedsMissingLibrary(_competitors.Competitor):
    def __init__(self, net, threads):
        import no_such_library  # type: ignore # noqa: F401


class Fails(_competitors.NumPy):
    def losses(self):
        raise RuntimeError("no compiler\nand many more lines")


@pytest.fixture
def run(tmp_path):
    """Run a command; returns its JSON and the sizes of its plots by name."""

    def run(*arguments):
        file, plots = tmp_path / "r.json", tmp_path / "plots"
        entry.main([*arguments, *QUICK, "--json", str(file), "--plots", str(plots)])
        return json.loads(file.read_text()), {p.name: p.stat().st_size for p in plots.glob("*")}

    return run


def test_every_command_is_listed_and_has_options(capsys):
    entry.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"    {command} " in listed for command in entry.COMMANDS)
    for command in entry.COMMANDS:
        with pytest.raises(SystemExit) as done:
            entry.main([command, "--help"])
        assert done.value.code == 0, command
    with pytest.raises(SystemExit, match="unknown command 'conf'"):
        entry.main(["conf"])


def test_result_records_hardware_versions_and_settings(run):
    result, plots = run("ladder", "--images", "10")
    assert set(result) == {"command", "hardware", "versions", "revision", "settings", "rows"}
    assert {"processor", "cores", "system"} <= set(result["hardware"])
    assert {"python", "numpy", "numba", "tinycnn"} <= set(result["versions"])
    assert result["settings"]["threads"] == [1]
    assert [row["version"] for row in result["rows"]] == list(ladder.VERSIONS)
    for row in result["rows"]:
        assert set(row) == {"threads", "version", "seconds_an_image", "gflops", "gemm_gflops", "copy_gb_per_s"}
        assert all(row[key] > 0 for key in row if key != "version")
    assert set(plots) == {"ladder-versions.png"}


def test_busy_programs_run_and_end(run, capsys):
    result, _ = run("ladder", "--images", "10", "--busy", "1")
    assert result["settings"]["busy"] == 1
    assert "threads: 1, beside 1 busy program\n" in capsys.readouterr().out
    with harness.busy(2) as programs:
        assert [program.poll() for program in programs] == [None, None]
    assert all(program.returncode for program in programs)


@pytest.mark.parametrize("images", [3, 17])
def test_all_rungs_of_the_ladder_agree(images):
    threads = numba.get_num_threads()
    rungs = ladder.Ladder(threads, images)
    want = rungs.reference()
    for name in ladder.VERSIONS:
        got = rungs.answer(name)
        assert len(got) == rungs.images(name)
        np.testing.assert_allclose(got, want[: len(got)], atol=ladder.TOLERANCE * abs(want).max(), err_msg=name)


def test_training_step_and_its_parts(run):
    result, plots = run("train-step", "--only", "numpy", "--batches", "16")
    assert [row["net"] for row in result["rows"]] == train_step.NETS
    for row in result["rows"]:
        assert set(row["images_per_second"]) == set(row["losses"]) == set(row["share_of_gemm"]) == {"tinycnn", "numpy"}
        assert {part["phase"] for part in row["parts"]} == {"data", "forward", "loss", "backward", "optimizer"}
        assert sum(part["flops"] for part in row["parts"]) == row["batch"] * train_step.STEP_FLOPS
    assert set(plots) == {f"train-step-{name}.png" for name in ("batch", "parts", "roofline")}


def test_wrong_competitor_is_refused(monkeypatch):
    monkeypatch.setitem(train_step.COMPETITORS, "numpy", WrongLoss)
    with pytest.raises(SystemExit, match=r"the loss after 20 steps: numpy differs from tinycnn by 1\.0e-03"):
        entry.main(["train-step", "--only", "numpy", "--batches", "4", "--nets", "tanh+avg", *QUICK])


def test_failing_competitors_are_skipped_with_a_reason(capsys):
    competitors = {"numpy": _competitors.NumPy, "absent": NeedsMissingLibrary, "broken": Fails}
    workers = harness.start_workers(1, competitors, "tanh+avg", 1)
    assert set(workers) == {"numpy", "broken"}
    assert (
        "absent is skipped: no_such_library is not installed (pip install no_such_library)" in capsys.readouterr().out
    )
    weights = _competitors.initial_weights("tanh+avg")
    harness.call_all(workers, "start", 2, weights)
    assert set(harness.call_all(workers, "losses")) == set(workers) == {"numpy"}
    assert "broken is skipped: RuntimeError: no compiler\n" in capsys.readouterr().out
    harness.stop_workers(workers)
    with pytest.raises(SystemExit) as done:
        entry.main(["inference", "--only", "tensorfow"])
    assert done.value.code == 2
    assert "unknown tensorfow, expected tinycnn, torch" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [1.01, np.nan, [1.0, 1.0]])
def test_assert_agree(answer):
    harness.assert_agree("it", {"ours": 1.0, "theirs": 1.001}, "ours", 0.01)
    with pytest.raises(SystemExit, match="it: theirs"):
        harness.assert_agree("it", {"ours": 1.0, "theirs": answer}, "ours", 0.001)


@pytest.mark.parametrize("net", train_step.NETS)
def test_numpy_net_learns_like_tinycnn(net):
    weights = _competitors.initial_weights(net)
    reference, ours = _competitors.NumPy(net, 1), _competitors.TinyCNN(net, numba.get_num_threads())
    reference.start(8, weights)
    ours.start(8, weights)
    np.testing.assert_allclose(ours.infer(), reference.infer(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.losses(), reference.losses(), rtol=1e-4)


def test_inference_and_the_latency_of_one_image(run):
    result, plots = run("inference", "--only", "numpy", "--batches", "1", "3", "--nets", "relu+max")
    single, batch = result["rows"]
    assert set(single["latency"]) == {"tinycnn", "numpy"}
    assert all(0 < found["median"] <= found["p99"] and found["calls"] >= 1 for found in single["latency"].values())
    assert "latency" not in batch
    assert set(plots) == {"inference-batch.png", "inference-latency.png"}


@pytest.mark.parametrize("net", nets.NETS)
def test_larger_networks(run, net):
    result, plots = run("nets", "--only", "onnxruntime", "--uses", "inference", "--batches", "2", "--nets", net)
    (row,) = result["rows"]
    assert (row["net"], row["use"], row["batch"]) == (net, "inference", 2)
    assert {"tinycnn"} <= set(row["images_per_second"]) <= {"tinycnn", "onnxruntime"}
    assert set(plots) == {"nets-inference-batch.png"}


def test_parts_of_a_larger_networks_step_in_cpu_time(run, capsys, monkeypatch):
    monkeypatch.setattr(harness.Worker, "clock", harness.Worker.clock)  # restored
    result, plots = run("nets", "--cpu-time", "--only", "--uses", "training", "--batches", "64", "--nets", "resnet20")
    assert harness.Worker.clock == "process_time"
    (row,) = result["rows"]
    adds = sum(part["flops"] for part in row["parts"] if part["phase"] == "forward") / 2 / row["batch"]
    assert f" {adds:,.0f} multiply-adds" in capsys.readouterr().out
    assert set(plots) == {"nets-training-batch.png"}
    with pytest.raises(SystemExit):
        entry.main(["nets", "--cpu-time", "--threads", "2"])
    assert "--cpu-time needs --threads 1" in capsys.readouterr().err


def test_guard_compares_two_revisions(run, capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    result, _ = run("guard", "--against", "HEAD", "--cases", "LeNet-5, one image")
    (row,) = result["rows"]
    assert row["verdict"] == ""
    assert all(len(seconds) == 1 for seconds in row["seconds"].values())
    assert "\ntoo few rounds to tell\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="git rev-parse"):
        run("guard", "--against", "no-such-revision")


@pytest.mark.parametrize(("factor", "error"), [(1, 0), (1.1, 0), (0.9, 0), (1, 0.01)])
def test_guard_reports_what_noise_does_not_explain(factor, error, monkeypatch, capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    rng = np.random.default_rng(0)

    def run_worker(tree, cache, names, seconds, threads):
        new = tree == guard.ROOT
        time = 1e-3 * rng.normal(1, 0.02) * (factor if new else 1)
        return {name: {"seconds": time, "results": [1.0, 2.0 + error * new]} for name in names}

    monkeypatch.setattr(guard, "run_worker", run_worker)
    if error:
        with pytest.raises(SystemExit, match=r"new differs from old by 5\.0e-03"):
            guard.main(["--against", "HEAD", "--cases", "LeNet-5, one image"])
        return
    guard.main(["--against", "HEAD", "--cases", "LeNet-5, one image"])
    printed = capsys.readouterr().out
    assert f"slower than the noise explains: {'LeNet-5, one image' if factor > 1 else 'nothing'}\n" in printed
    assert ("faster" in printed) == (factor < 1)


def test_false_alarms_of_the_guard():
    rng = np.random.default_rng(0)
    noise = np.exp(0.05 * rng.standard_t(2, (2, 1000, 12)))  # with outliers
    verdicts = [guard.compare(new, old)["verdict"] for new, old in zip(*noise, strict=True)]
    assert verdicts.count("slower") <= 10
    assert verdicts.count("faster") <= 10
    assert guard.interval([3, 1, 4, 2, 8, 6, 7, 5]) == (1, 8)
    assert guard.interval(range(7)) == (0, np.inf)
    assert guard.interval(range(12)) == (1, 10)


@pytest.mark.parametrize(("batch", "path"), [(2, "mec"), (16, "direct")])
def test_convolutions_and_their_path(run, batch, path):
    shapes = ["C3", "8-channels", "4-channels"] if batch == 2 else ["C5"]
    result, plots = run("conv", "--only", "numpy", "--batch", str(batch), "--shapes", *shapes)
    assert len(result["rows"]) == 2 * len(shapes)
    for row in result["rows"]:
        assert set(row["gflops"]) == {"tinycnn", "numpy"}
        kernels = f"linear_{row['phase']}" if row["name"] == "C5" else f"{row['phase']}_{path}"
        assert kernels in row["choices"]["tinycnn"].split()
    assert "conv-roofline.png" in plots
    assert ("conv-channels.png" in plots) == (len(shapes) > 1)


def test_wrong_convolution_is_refused():
    shape, wrong = conv.Shape("", 2, 3, 3, 6, 1), conv.TinyCNN(numba.get_num_threads())
    wrong.start(shape, 4)

    class Near:
        def call(self, method):
            y, dx, dw, db = wrong.outputs()
            return [y, dx, dw * 1.001, db]

    with pytest.raises(SystemExit, match=r"dw: theirs differs from float64 by 1\.0e-03"):
        conv.check(shape, 4, {"theirs": Near()})


def test_epochs_on_few_digits(run, small_digits, monkeypatch):
    from tinycnn import data

    monkeypatch.setattr(data, "mnist", lambda: small_digits)
    result, plots = run("epoch", "--only", "numpy", "--epochs", "2", "--looks", "2", "--seeds", "1")
    assert [row["competitor"] for row in result["rows"]] == ["tinycnn", "numpy"]
    for row in result["rows"]:
        assert len(row["looks"]) == 4
        assert row["epoch_seconds"] > 0
        assert row["looks"][-1]["loss"] < row["looks"][0]["loss"]
    assert set(plots) == {"epoch-accuracy.png"}


def test_epoch_without_mnist_is_skipped(monkeypatch, capsys):
    from tinycnn import data

    def absent():
        raise OSError("there is none")

    monkeypatch.setattr(data, "mnist", absent)
    entry.main(["epoch", *QUICK])
    assert "skipped: no MNIST: there is none" in capsys.readouterr().out


def test_installed_size_includes_requirements():
    assert start.installed_bytes("numpy") > 5e6
    assert start.installed_bytes("tinycnn") > start.installed_bytes("numba") > start.installed_bytes("llvmlite")
    assert start.installed_bytes("no-such-package") == 0


def test_start_is_timed_in_a_separate_process(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "CACHES", {})  # the cache of these tests: an empty one takes half a minute
    np.savez(tmp_path / "weights.npz", **_competitors.initial_weights(start.NET))
    found = start.launch("tinycnn", 32, 1, tmp_path, tmp_path / "weights.npz")
    assert all(found[key] > 0 for key in ("import", "first_step", "second_step", "answer"))
    assert found["memory"] > 5e7


def test_committed_results_can_be_plotted(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": []}))
    files = [*map(str, Path(ROOT, "benchmarks", "results").glob("*.json")), str(old)]
    entry.main(["plot", *files, "--plots", str(tmp_path)])
    assert f"{old} is skipped: no plots for it" in capsys.readouterr().out
    assert set(_plots.PLOTS) <= set(entry.COMMANDS)


@pytest.mark.gpu
def test_gpu_benchmark_rehearsal():
    command = [
        sys.executable,
        *([] if ON_GPU else [str(ROOT / "tests" / "support" / "cuda_on_cpu")]),
        *["-m", "benchmarks.gpu", "--rehearse", "--only", "work", "ceilings", "launches", "steps", "kernels"],
    ]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts done" in done.stdout
    assert "batch 64, tanh + avg: 16 launches" in done.stdout
    for part in ("work:", "ceilings:", "launches:", "steps:", "kernels:"):
        assert part in done.stdout
    assert ON_GPU or "PTX on the CPU" in done.stdout


def test_gpu_benchmark_without_driver_is_refused(tmp_path):
    arguments = ["--skip-tests", "--only", "launches", "--out", str(tmp_path / "r")]
    code = "import sys, tinycnn._gpu as g; g.load_driver = lambda: None; from benchmarks import gpu; "
    code += "sys.exit(gpu.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no NVIDIA driver was found" in done.stderr
    assert not (tmp_path / "r").exists()


def test_augmentation_is_compared_and_timed(tmp_path, capsys):
    threads = numba.get_num_threads()
    augment.main(["--batches", "1", "--turns", "1", "--threads", "1", "--json", str(tmp_path / "r.json")])
    numba.set_num_threads(threads)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["distortion"] for row in rows] == ["affine", "elastic", "both"]
    assert all(0 < row["difference"] < augment.TOLERANCE and row["ratio"] > 0 for row in rows)
    assert "largest difference" in capsys.readouterr().out


def test_the_model_of_scaling():
    latency, bandwidth = scale.fit_line([[n, 5e-6 + n / 2e9] for n in (8, 4096, 2**20, 2**22)])
    assert latency == pytest.approx(5e-6)
    assert bandwidth == pytest.approx(2e9)
    link = latency, bandwidth
    assert scale.allreduce_time(2, 2e6, *link) == pytest.approx(5e-6 + 1e-3)
    assert scale.allreduce_time(64, 2e6, *link) == pytest.approx(6 * 5e-6 + 2 * 63 / 64 * 1e-3)
    alone = {8: 1e-3, 64: 4e-3}
    assert scale.model(1, 64, alone, 2e6, link, 2) == 4e-3
    assert scale.model(8, 64, alone, 0, link, 8) == pytest.approx(1e-3 + 3 * 5e-6)
    assert scale.model(8, 64, alone, 0, link, 2) == pytest.approx(4e-3 + 3 * 5e-6)  # four ranks on each core
    assert scale.model(64, 64, alone, 0, link, 64) == pytest.approx(1e-3 + 6 * 5e-6)  # no step is shorter


def test_scaling_over_ranks(run, capsys):
    pytest.importorskip("mpi4py")
    if scale.MPIEXEC is None:
        pytest.skip("mpiexec is not installed")
    result, _ = run("scale", "--ranks", "1", "2", "--batches", "16", "--weak", "8")
    rows = [row for row in result["rows"] if row["measured"]]
    assert [(row["kind"], row["batch"], row["ranks"]) for row in rows] == [
        ("strong", 16, 1), ("strong", 16, 2), ("weak", 8, 1), ("weak", 16, 2),
    ]  # fmt: skip
    assert all(row["model"] > 0 for row in result["rows"])
    assert {row["ranks"] for row in result["rows"] if not row["measured"]} == set(scale.EXTRAPOLATED)
    assert "* extrapolation" in capsys.readouterr().out
