"""The commands `demo` and `watch`, and what they refuse."""

import json
import re

import numpy as np
import pytest

from tinycnn import Linear, Sequential, __main__ as program, checkpoint, demo, layers, runs
from tinycnn.demo._net import choose_epochs
from tinycnn.demo._run import choose_examples


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A short training on synthetic digits."""
    out = tmp_path_factory.mktemp("runs")
    options = ["--data", "synthetic", "--epochs", "2", "--out", str(out), "--set", "data.train=1000"]
    assert program.main(["train", "default", *options]) == 0
    (folder,) = (out / "default").iterdir()
    return folder


def content(path):
    """What the scripts of a page read."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_demo_without_a_run(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    path = tmp_path / "page.html"
    assert program.main(["demo", "--out", str(path)]) == 0
    assert opened == [path.as_uri()]
    today, published = content(path)["nets"]
    assert (today["title"], published["title"]) == ("LeNet-5 today", "LeNet-5 of 1998")
    for net in (today, published):
        assert re.search(r"It gets 9\d\.\d\d% of the 10,000 test images of MNIST right\.", net["about"])
        assert [snapshot["epoch"] for snapshot in net["snapshots"]][:4] == [0, 0.1, 1, 3]
        assert sorted(example["label"] for example in net["examples"]) == list(range(10))
        assert all(example["label"] != example["predicted"] for example in net["mistakes"])
        assert net["mistakes"]
    assert path.stat().st_size < 1_300_000
    assert "page.html" in capsys.readouterr().out


def test_page_of_a_run(run_folder, tmp_path):
    path = tmp_path / "page.html"
    assert program.main(["watch", str(run_folder), "--no-open", "--out", str(path)]) == 0
    read = content(path)
    (net,) = read["nets"]
    assert read["start"] == "training"
    history = runs.read_history(run_folder)
    assert net["history"]["val_loss"] == [record["val_loss"] for record in history]
    assert [filters["epoch"] for filters in net["filters"]] == [0, 1, 2]
    assert [snapshot["epoch"] for snapshot in net["snapshots"]] == [0, 1]
    assert np.sum(net["confusion"]) == 10_000
    wrong = np.sum(net["confusion"]) - np.trace(net["confusion"])
    assert len(net["mistakes"]) == min(wrong, 90)
    assert net["digits"] is True


def test_snapshots_are_the_weights(run_folder):
    snapshots = runs.read_snapshots(run_folder)
    assert list(snapshots) == [0, 1, 2]
    arrays, _ = checkpoint.load(run_folder / "model.safetensors")
    for name, array in snapshots[2].items():
        np.testing.assert_allclose(array, arrays[name], atol=abs(arrays[name]).max() / 250)
    assert abs(snapshots[2]["0.weight"] - snapshots[0]["0.weight"]).max() > 0.01


def test_a_damaged_snapshot_is_named(run_folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    damaged = copy / "snapshots" / "epoch-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert program.main(["demo", str(copy), "--no-open", "--out", str(tmp_path / "p.html")]) == 1
    assert "epoch-1.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_large_networks_keep_their_first_filters_only(tmp_path):
    model = Sequential(
        layers.Conv2d(1, 4, 5), layers.Flatten(), Linear(4 * 576, 300), Linear(300, 10), input_shape=(1, 28, 28), rng=0
    )
    runs.write_snapshot(tmp_path, 3, model)
    assert list(runs.read_snapshots(tmp_path)[3]) == ["0.weight"]
    net = demo.from_model(model)
    net.snapshots, net.epochs = runs.read_snapshots(tmp_path), 4
    assert net.content()["snapshots"] == []
    assert [filters["epoch"] for filters in net.content()["filters"]] == [3, 4]


def test_a_network_that_is_too_large_is_refused():
    model = Sequential(layers.Flatten(), Linear(784, 3000), input_shape=(1, 28, 28), rng=0)
    with pytest.raises(ValueError, match=r"network is too large for a page: it has 2,355,000 parameters, .* 2,000,000"):
        demo.from_model(model)
    model = Sequential(layers.Conv2d(1, 300, 9, padding=4), layers.Conv2d(300, 1, 9), input_shape=(1, 64, 64), rng=0)
    with pytest.raises(ValueError, match=r"too large for a page: a picture takes \d+,\d+,\d+ multiply-adds"):
        demo.from_model(model)


class OwnLayer(layers.Layer):
    pass


@pytest.mark.parametrize(
    ("chain", "shape", "error", "words"),
    [
        ((OwnLayer(), layers.Flatten()), (1, 9, 9), TypeError, r"layer 0, OwnLayer\(\), cannot be computed by a web"),
        ((layers.Linear(4, 2),), (4,), ValueError, r"draws images \(channels, height, width\), got a network of \(4,"),
        ((layers.Conv2d(1, 2, 3),), None, ValueError, "input_shape is not known yet"),
    ],
)
def test_networks_that_are_refused(chain, shape, error, words):
    with pytest.raises(error, match=words):
        demo.from_model(Sequential(*chain, input_shape=shape))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "page.png"], "--out must be a file name ending in .html, got 'page.png'"),
        (["--out", "no/folder/page.html"], "there is no folder no/folder"),
        (["nowhere"], "nowhere must be the folder of a run"),
    ],
)
def test_wrong_arguments(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.main(["demo", "--no-open", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_of_write(tmp_path):
    net = demo.from_model(Sequential(layers.Flatten(), Linear(4, 2), input_shape=(1, 2, 2)))
    with pytest.raises(ValueError, match="path must be a file name ending in"):
        demo.write([net], tmp_path / "page.txt")
    with pytest.raises(ValueError, match="nets must be one network or more"):
        demo.write([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="start"):
        demo.write([net], tmp_path / "page.html", start="middle")
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        demo.write([net], tmp_path / "no" / "page.html")


def test_choose_epochs():
    assert choose_epochs([0, 1, 2], 3) == [0, 1, 2]
    assert choose_epochs([0, 0.1, 1, 3, 10], 10) == [0, 0.1, 1, 3]
    chosen = choose_epochs(list(range(31)), 30)
    assert chosen[0] == 0
    assert len(chosen) <= 5
    assert chosen == sorted(set(chosen))


def test_digits_are_square_and_grey():
    model = Sequential(layers.Flatten(), Linear(768, 10), input_shape=(1, 16, 48))
    with pytest.raises(ValueError, match=r"digits must be False for pictures of \(1, 16, 48\)"):
        demo.from_model(model, digits=True)


def test_one_mistake_of_each_kind_is_kept():
    labels, predicted = np.array([0] * 200 + [1] * 3 + [2]), np.array([1] * 200 + [2] * 3 + [2])
    confidence = np.concatenate([np.linspace(1, 0.9, 200), [0.3, 0.2, 0.1], [1]])
    _, mistakes = choose_examples(np.zeros((204, 1, 2, 2), np.uint8), labels, predicted, confidence)
    kinds = [(example.label, example.predicted) for example in mistakes]
    assert len(kinds) == 90
    assert kinds[0] == (0, 1)
    assert (1, 2) in kinds
