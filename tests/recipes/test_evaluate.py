"""Saved weights on a test set."""

import json

import numpy as np
import pytest

import tinycnn
from tinycnn import Flatten, Linear, Sequential, checkpoint, plot, runs
from tinycnn.__main__ import main
from tinycnn.recipes.saved import describe_run

TEXT = """
[small]
[small.net]
input = [1, 32, 32]
layers = "AvgPool2d(4), Flatten(), Linear(64, 10)"
[small.data]
padding = 2
train = 300
[small.training]
loss = "OneHotMSELoss()"
optimizer = "Adam()"
lr = 1e-2
epochs = 3
batch = 50
"""


@pytest.fixture
def saved(tmp_path, monkeypatch, small_digits):
    """Names of the pictures that would be saved."""
    monkeypatch.chdir(tmp_path)
    names = []
    monkeypatch.setattr(plot, "save", lambda figure, path: names.append(path.name))
    return names


@pytest.fixture
def folder(saved, tmp_path, monkeypatch, capsys):
    """The run folder of a recipe's seed."""
    (tmp_path / "mine.toml").write_text(TEXT)
    with monkeypatch.context() as context:
        context.setattr(runs.RunFolder, "finish", lambda *args: None)
        assert main(["reproduce", "mine.toml", "--seeds", "1"]) == 0
    (folder,) = (tmp_path / "runs" / "small").glob("*-seed-0")
    saved.clear()
    capsys.readouterr()
    return folder


@pytest.fixture
def old_folder(folder):
    """The folder as version 0.1.0 wrote it: the weights as npz, the network in config.json only."""
    model = tinycnn.load(folder / "model.safetensors")
    metadata = np.frombuffer(b'{"epoch": 3}', np.uint8)
    np.savez(folder / "model.npz", __metadata__=metadata, **model.state_dict())
    config = json.loads((folder / "config.json").read_text())
    del config["format"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "checkpoint.safetensors"):
        (folder / name).unlink()
    return folder


def evaluate(capsys, *args):
    code = main(["evaluate", *map(str, args)])
    return code, *capsys.readouterr()


def test_saved_weights_give_the_accuracy_of_the_result(folder, saved, capsys, tmp_path):
    result = json.loads((tmp_path / "results" / "small" / "seed-0.json").read_text())
    code, out, err = evaluate(capsys, folder)
    assert (code, err) == (0, "")
    assert f"weights of epoch 3, on digits: accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}" in out
    assert result["accuracy"] > 0.3  # better than chance
    assert f"{result['errors']} of 100 wrong" in out
    assert saved == ["predictions.png", "mistakes.png", "confusion.png"]
    assert evaluate(capsys, folder, "--out", tmp_path / "new" / "folder")[0] == 0
    assert (tmp_path / "new" / "folder").is_dir()


def test_a_run_of_train_can_be_evaluated(saved, tmp_path, capsys):
    assert main(["train", "--epochs", "1", "--set", "data.validation=100"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test accuracy")]
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    code, out, err = evaluate(capsys, folder)
    assert (code, err) == (0, "")
    accuracy = out.split("accuracy ")[1].split(",")[0]
    assert f"test accuracy {accuracy}" in lines[0]


def changed(config, *path, value=None):
    """A copy of the config with the value at `path` replaced, or removed if it is None."""
    config = json.loads(json.dumps(config))
    table = config
    for key in path[:-1]:
        table = table[key]
    if value is None:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return config


def test_a_message_about_a_long_value_is_short(tmp_path):
    config = {"data": {"name": "mnist"}, "net": {"input": [1, 2, 2], "layers": "Flatten()"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pixels": {"mean": ["x\n" * 5000], "std": [1]}}))
    with pytest.raises(ValueError, match=r"config\.json does not describe a network \(ValueError: could not") as caught:
        describe_run(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("net",), None, "does not describe a network"),
        (("net", "input"), None, "does not describe a network"),
        (("net", "input"), 3, "input must be a list, got 3"),
        (("net", "input"), ["a"], "input_shape must be an integer"),
        (("net", "input"), [1, 28, 28], "takes (64,), got (49,)"),
        (("net", "layers"), 3, "layers must be a string, got 3"),
        (("net", "layers"), "Liner(3)", "unknown name 'Liner'"),
        (("format",), 99, "was written by a newer version of tinycnn: expected format 2, got 99"),
        (("net", "layers"), "AvgPool2d(4), Flatten(), Linear(64, 12)", "state does not fit the model"),
        (("net", "layers"), "AvgPool2d(4), Flatten()", "state does not fit the model"),
        (("net", "init"), 3, "init must be a string"),
        (("pixels",), None, "does not describe a network"),
        (("pixels",), {"a": 1}, "does not describe a network"),
        (("pixels", "std"), None, "does not describe a network"),
        (("pixels", "std"), [0], "std must be positive"),
        (("pixels", "mean"), ["a"], "does not describe a network"),
        (("pixels", "mean"), [0, 1], "one mean and one std a channel"),
        (("data", "padding"), "a", "padding must be an integer"),
        (("data", "padding"), 3, "the model takes images (1, 32, 32), got (1, 34, 34)"),
        (("data", "resize"), 0, "resize must be at least 1"),
        (("training", "loss"), 3, "loss must be a string"),
        (("training", "loss"), "Foo()", "unknown name 'Foo'"),
    ],
)
def test_a_damaged_config(old_folder, saved, capsys, path, value, message):
    config = json.loads((old_folder / "config.json").read_text())
    (old_folder / "config.json").write_text(json.dumps(changed(config, *path, value=value)))
    code, _, err = evaluate(capsys, old_folder)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not saved


def test_a_run_of_version_0_1_0(old_folder, saved, capsys, tmp_path):
    result = json.loads((tmp_path / "results" / "small" / "seed-0.json").read_text())
    code, out, err = evaluate(capsys, old_folder)
    assert (code, err) == (0, "")
    assert f"weights of epoch 3, on digits: accuracy {result['accuracy']:.2%}" in out


def test_the_result_as_json(folder, saved, capsys):
    code, out, err = evaluate(capsys, folder, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["epoch"] == 3
    assert f"accuracy {report['accuracy']:.2%}" in err
    (folder / "model.safetensors").unlink()
    code, out, _ = evaluate(capsys, folder, "--json")
    assert code == 1
    assert "model.safetensors" in json.loads(out)["error"]


def test_damaged_and_missing_files(folder, saved, capsys, tmp_path):
    weights, config = folder / "model.safetensors", folder / "config.json"
    content, text = weights.read_bytes(), config.read_text()

    def refused(message, *args):
        code, _, err = evaluate(capsys, *(args or (folder,)))
        assert code == 1
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1

    weights.write_bytes(content[:500])
    refused("model.safetensors: not a usable checkpoint")
    checkpoint.save(weights, {"2.weight": np.zeros((10, 49), np.float32), "2.bias": np.zeros(10, np.float32)})
    refused("holds no model")
    Sequential(Flatten(), Linear(784, 10), input_shape=(1, 28, 28)).save(weights)
    refused("model.safetensors must take images [1, 32, 32] as config.json says, got (1, 28, 28)")
    weights.unlink()
    refused("model.safetensors")
    weights.write_bytes(content)
    for damaged in ("", "{", "[]", "3", text[:100]):
        config.write_text(damaged)
        refused("config.json does not describe")
    config.unlink()
    refused("config.json")
    config.write_text(text)
    (tmp_path / "file").write_text("in the way")
    refused("file", folder, "--out", tmp_path / "file" / "x")
    refused("config.json", tmp_path / "nowhere")
    refused("device must be", folder, "--device", "gpu")
    assert evaluate(capsys, folder)[0] == 0
