"""`predict`, `plot`, `export` and `train --data` on a person's own files; bad input is one line and loses nothing."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinycnn
from tests.test_commands import run
from tinycnn import checkpoint, data
from tinycnn.__main__ import main
from tinycnn.commands import small

RECIPE = '''
[net]
[net.net]
input = [1, 28, 28]
layers = """
    Conv2d(1, 8, 5), ReLU(), MaxPool2d(2), Conv2d(8, 16, 5), ReLU(), MaxPool2d(2), Flatten(), Linear(256, 10)
"""
[net.data]
name = "synthetic"
train = 12000
validation = 1000
[net.training]
optimizer = "Adam()"
lr = 3e-3
epochs = 5
batch = 50
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on synthetic digits; do not change it."""
    home = tmp_path_factory.mktemp("trained")
    (home / "net.toml").write_text(RECIPE)
    assert main(["train", str(home / "net.toml"), "--out", str(home / "runs")]) == 0
    (folder,) = home.glob("runs/net/*")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return data.synthetic_dataset(1, 40, rng=5)


def paper(digit, size=90, at=(60, 30), of=(260, 200), ink=40, background=220):
    """A digit written on paper."""
    picture = Image.new("L", of, background)
    mask = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    picture.paste(Image.new("L", mask.size, ink), at, mask)
    return picture


def predict(capsys, *arguments):
    capsys.readouterr()
    code = main(["predict", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def accuracy(document, labels):
    return np.mean([row["class"] == str(label) for row, label in zip(document["predictions"], labels, strict=True)])


@pytest.mark.parametrize(("ink", "background"), [(40, 220), (250, 10)])
def test_digits_on_paper(trained, home, digits, capsys, ink, background):
    for number, digit in enumerate(digits.test_images):
        at = (10 + 7 * (number % 20), number % 30)
        paper(digit, 60 + number, at, ink=ink, background=background).convert("RGB").save(
            f"{number:02}.jpg", quality=60
        )
    code, document, _ = predict(capsys, trained, ".")
    assert code == 0
    assert [row["picture"] for row in document["predictions"]] == [f"{n:02}.jpg" for n in range(40)]
    assert accuracy(document, digits.test_labels) > 0.85
    _, unprepared, _ = predict(capsys, trained, ".", "--no-prepare")
    assert accuracy(unprepared, digits.test_labels) < 0.6
    top = document["predictions"][0]["top"]
    assert len(top) == 3
    assert [entry["probability"] for entry in top] == sorted((entry["probability"] for entry in top), reverse=True)


def test_several_digits_in_a_row(trained, home, digits, capsys):
    row = Image.new("L", (700, 150), 235)
    for number in range(5):
        mask = Image.fromarray(digits.test_images[number]).resize((110, 110))
        row.paste(Image.new("L", mask.size, 20), (20 + 132 * number, 15 + 5 * (number % 3)), mask)
    row.save("row.png")
    code, document, _ = predict(capsys, trained, "row.png", "--many", "--show", "seen.png")
    assert code == 0
    assert [row["picture"] for row in document["predictions"]] == [f"row.png, {n}" for n in range(1, 6)]
    assert accuracy(document, digits.test_labels[:5]) >= 0.8
    assert Path("seen.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_no_digit_is_said_to_be_none(trained, home, digits, capsys):
    shutil.copytree(trained, "run")
    report = json.loads(Path("run/report.json").read_text())
    Image.fromarray(data.not_digits(1, rng=1)[0]).save("letter.png")
    paper(digits.test_images[0]).save("digit.png")
    low, high = report["calibration"]["reject_below"], 1e6
    for threshold, expected in ((low, str(digits.test_labels[0])), (high, None)):
        report["calibration"]["reject_below"] = threshold
        Path("run/report.json").write_text(json.dumps(report))
        _, document, _ = predict(capsys, "run", "digit.png")
        assert document["predictions"][0]["class"] == expected
    assert main(["predict", "run", "letter.png"]) == 0
    assert "letter.png  no digit (most like: " in capsys.readouterr().out


def test_stdin(trained, home, digits, monkeypatch, capsys):
    content = io.BytesIO()
    paper(digits.test_images[0]).save(content, "PNG")
    content.seek(0)
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": content}))
    code, document, _ = predict(capsys, trained, "-")
    assert code == 0
    assert document["predictions"][0]["class"] == str(digits.test_labels[0])


def bad_pictures(digit):
    """name -> words of the message.  Writes the files."""
    paper(digit).save("good.png")
    whole = Path("good.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("text.png").write_text("no picture")
    Path("empty.png").touch()
    Image.new("L", (40, 40), 200).save("blank.png")
    Image.new("L", (1, 1), 0).save("dot.png")
    os.mkfifo("pipe.png")
    return {
        "cut.png": "cut.png: ", "text.png": "text.png: not a picture", "empty.png": "empty.png: an empty file",
        "blank.png": "blank.png: ", "dot.png": "dot.png: ", "missing.png": "missing.png: no such file or directory",
        "pipe.png": "pipe.png: expected a regular file, got a named pipe",
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_bad_pictures_are_a_line_each_and_the_others_are_predicted(trained, home, digits, capsys):
    words = bad_pictures(digits.test_images[0])
    code, document, err = predict(capsys, trained, *words, "good.png")
    assert code == 1
    assert [row["picture"] for row in document["predictions"]] == ["good.png"]
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(words) == len(document["errors"])
    for line, expected in zip(lines, words.values(), strict=True):
        assert line.startswith(f"error: {expected}")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes_of_pictures(trained, home, digits, capsys, mode):
    grey = paper(digits.test_images[3])
    picture = {
        "1": lambda: grey.point(lambda value: 255 * (value > 128)).convert("1"), "P": lambda: grey.quantize(16),
        "CMYK": lambda: grey.convert("RGB").convert("CMYK"),
        "I;16": lambda: Image.fromarray(np.asarray(grey, np.uint16) * 257),
    }.get(mode, lambda: grey.convert(mode))()  # fmt: skip
    suffix = "jpg" if mode == "CMYK" else "png"
    picture.save(f"a.{suffix}")
    code, document, err = predict(capsys, trained, f"a.{suffix}")
    assert code == 0, err
    assert document["predictions"][0]["class"] == str(digits.test_labels[3])


@pytest.mark.parametrize("ink", [0, 255])
def test_ink_on_a_transparent_picture(trained, home, digits, capsys, ink):
    alpha = Image.fromarray(digits.test_images[3]).resize((90, 90), Image.Resampling.BICUBIC)
    picture = Image.new("RGBA", (200, 150), (ink, ink, ink, 0))
    picture.paste((ink, ink, ink, 255), (50, 30), alpha)
    picture.save("a.png")
    code, document, err = predict(capsys, trained, "a.png")
    assert code == 0, err
    assert document["predictions"][0]["class"] == str(digits.test_labels[3])


def test_the_drawn_picture_does_not_replace_another(trained, home, digits, capsys):
    paper(digits.test_images[0]).save("a.png")
    before = Path("a.png").read_bytes()
    for arguments, words in [
        (["a.png", "--show", "a.png"], "--show must be another file than the pictures, got 'a.png'"),
        ([".", "--show", str(home / "a.png")], "--show must be another file than the pictures"),
        (["a.png", "--show", "no/b.png"], "there is no folder no"),
        (["a.png", "--show", "b.jpg"], "ending in .png, .svg or .pdf, got 'b.jpg'"),
    ]:
        assert main(["predict", str(trained), *arguments]) == 1
        out, err = capsys.readouterr()
        assert words in err
        assert out == ""
    assert Path("a.png").read_bytes() == before


def test_a_picture_of_50_megapixels(trained, home, digits, capsys):
    paper(digits.test_images[0], 3000, (2000, 1500), (8000, 6250)).save("large.jpg")
    code, document, _ = predict(capsys, trained, "large.jpg")
    assert code == 0
    assert document["predictions"][0]["class"] == str(digits.test_labels[0])


# --- your own images --------------------------------------------------------------------------------------------------


def write_folder(root, count=24, size=(30, 20)):
    """Pictures of three classes that differ in colour and pattern."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    patterns = {"across": np.sin(x), "down": np.sin(y), "flat": 0 * x}
    for name, pattern in patterns.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = 128 + 90 * pattern[..., None] * [1, 0.7, 0.4] + rng.normal(0, 8, (*pattern.shape, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")


def test_a_folder_of_images(home, capsys):
    write_folder(home / "mine")
    (home / "mine" / "flat" / "bad.png").write_bytes(b"no picture")
    assert main(["train", "--data", "mine"]) == 1
    err = capsys.readouterr().err
    assert "flat/bad.png" in err
    assert "--skip-bad" in err
    assert not Path("runs").exists()
    options = ["--epochs", "20", "--batch-size", "10", "--set", "training.lr=0.003", "--skip-bad"]
    assert main(["train", "--data", "mine", *options]) == 0
    out = capsys.readouterr().out
    assert "3 classes: the last layer is Linear(84, 3)" in out
    assert "flat/bad.png" in out
    (folder,) = Path("runs/default").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["accuracy"] > 0.9
    assert tinycnn.load(folder / "model.safetensors").class_names == ("across", "down", "flat")
    code, document, _ = predict(capsys, folder, "mine/across/0.png", "mine/down/0.png", "mine/flat/0.png")
    assert code == 0
    assert [row["class"] for row in document["predictions"]] == ["across", "down", "flat"]
    assert main(["evaluate", str(folder)]) == 0
    assert main(["resume", str(folder), "--epochs", "21"]) == 0
    for kind in ("curves", "mistakes", "reliability"):
        assert main(["plot", str(folder), "--kind", kind]) == 0
        assert Path(f"{kind}.png").exists()
    Image.new("RGB", (30, 20)).save("mine/flat/new.png")
    capsys.readouterr()
    assert main(["resume", str(folder), "--epochs", "22"]) == 1
    assert "training data: images: " in capsys.readouterr().err
    assert main(["predict", str(folder), "mine/flat/0.png", "--many"]) == 1
    assert "--many cuts rows of digits" in capsys.readouterr().err


def test_colour_images_and_arrays(home, capsys):
    write_folder(home / "mine", count=6)
    layers = 'net.layers="Conv2d(3, 4, 3), ReLU(), MaxPool2d(2), Flatten(), Linear(196, 3)"'
    options = ["--set", "net.input=[3, 16, 16]", "--set", layers, "--fit", "crop", "--epochs", "1", "--batch-size", "4"]
    assert main(["train", "--data", "mine", *options]) == 0
    assert "converted" not in capsys.readouterr().out
    rng = np.random.default_rng(0)
    np.savez("arrays.npz", x=rng.integers(0, 256, (40, 28, 28), np.uint8), y=np.arange(40) % 4)
    assert main(["train", "--data", "arrays.npz", "--epochs", "1", "--batch-size", "4"]) == 0
    rows = np.column_stack([np.arange(30) % 3, rng.integers(0, 256, (30, 784))])
    np.savetxt("pixels.csv", rows, "%d", ",", header="label," + ",".join(map(str, range(784))), comments="")
    assert main(["train", "--data", "pixels.csv", "--epochs", "1", "--batch-size", "4"]) == 0
    sizes = [json.loads(path.read_text())["total"] for path in sorted(Path("runs/default").glob("*/report.json"))]
    assert sorted(sizes) == [3, 6, 8]


def test_bad_folders_are_one_line_before_training(home, capsys):
    write_folder(home / "one")
    shutil.rmtree("one/down")
    shutil.rmtree("one/flat")
    Path("empty").mkdir()
    write_folder(home / "mine", count=4)
    for arguments, words in [
        (["--data", "nowhere"], "or a folder or a file, got 'nowhere'"),
        (["--data", "empty"], "empty"),
        (["--data", "one"], "one"),
        (["--data", "mine/flat/0.png"], "0.png"),
        (["--data", "mine", "--set", "net.input=[3, 28, 28]"], "takes (1, height, width), got (3, 28, 28)"),
        (["--data", "mine", "--set", "net.input=[28]"], "net.input must be [channels, height, width], got [28]"),
        (
            ["--data", "mine", "--set", "net.layers=Flatten(), Linear(784, 9)"],
            "must give 3 numbers, one per class, got",
        ),
        (["--data", "mine", "--set", "data.validation=99"], "+ 99 images are needed"),
        (["--data", "mine", "--out", "mine/flat/0.png"], "cannot write the output folder mine/flat/0.png"),
        (["mine.toml"], "mine.toml"),
        (["empty"], "unknown recipe 'empty'"),
        (["sweep"], "train needs one recipe, got searches only"),
    ]:
        assert main(["train", *arguments]) == 1, arguments
        err = capsys.readouterr().err
        assert words in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert not Path("runs").exists()


# --- other commands ---------------------------------------------------------------------------------------------------


def test_export(trained, home, capsys):
    assert main(["export", str(trained), "weights.safetensors"]) == 0
    arrays, _ = checkpoint.load("weights.safetensors")
    model = tinycnn.load(trained / "model.safetensors")
    assert {name: a.tobytes() for name, a in arrays.items()} == {n: a.tobytes() for n, a in model.state_dict().items()}
    capsys.readouterr()
    for file, words in [
        ("weights.pt", "ending in .onnx or .safetensors"),
        ("no/w.safetensors", "the folder does not exist"),
    ]:
        assert main(["export", str(trained), file]) == 1
        assert words in capsys.readouterr().err


def test_export_of_onnx(trained, home, capsys, digits, monkeypatch):
    """The graph takes pixels as they are."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert main(["export", str(trained), "model.onnx", "--opset", "21"]) == 0
    assert "model.onnx: an ONNX graph of uint8 pixels (N, 1, 28, 28), the weights of epoch" in capsys.readouterr().out
    assert onnx.load("model.onnx").opset_import[0].version == 21
    images = digits.test_images[:3, None]
    (got,) = onnxruntime.InferenceSession("model.onnx").run(None, {"input": images})
    model = tinycnn.load(trained / "model.safetensors")
    np.testing.assert_allclose(got, model.outputs(images), rtol=0, atol=1e-5)
    for arguments, message in (
        (["w.safetensors", "--opset", "17"], "--opset needs a FILE ending in .onnx, got 'w.safetensors'"),
        (["other.onnx", "--opset", "5"], "opset must be in 13 ... "),
    ):
        assert main(["export", str(trained), *arguments]) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(trained), "other.onnx"]) == 1
    assert capsys.readouterr().err == 'error: tinycnn.onnx needs onnx: pip install "tinycnn[onnx]"\n'
    assert not Path("other.onnx").exists()


def test_curves_of_several_runs(trained, home, capsys):
    assert main(["plot", str(trained), str(trained), "--out", "both.svg"]) == 0
    assert "<svg" in Path("both.svg").read_text()
    assert main(["plot", str(trained), str(trained), "--kind", "confusion"]) == 0
    assert len(list(Path().glob("net-*-confusion.png"))) == 1
    capsys.readouterr()
    for arguments, words in [
        (["nowhere"], "nowhere must be the folder of a run"),
        ([str(trained), "--out", "a.doc"], "a.doc"),
    ]:
        assert main(["plot", *arguments]) == 1
        assert words in capsys.readouterr().err


def test_a_run_that_is_damaged(trained, home, capsys):
    shutil.copytree(trained, "run")
    for name, content, words in [
        ("report.json", "{}", None),  # not finished: predictions are not calibrated
        ("report.json", '{"calibration": {"temperature": "a", "reject_below": 1}}', "report.json must be the report"),
        ("config.json", "{", "config.json does not describe a run"),
        ("model.safetensors", "x" * 500, "model.safetensors: not a usable checkpoint"),
    ]:
        kept = Path("run", name).read_bytes()
        Path("run", name).write_text(content)
        Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save("a.png")
        code, document, err = predict(capsys, "run", "a.png")
        assert code == (0 if words is None else 1)
        assert (words or "the confidence is not calibrated") in err
        assert words is None or words in document["error"]
        Path("run", name).write_bytes(kept)


def test_completion_and_warmup(home, capsys):
    done = run("completion", "bash", script=None)
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout
    assert "--skip-bad" in done.stdout
    done = run("warmup", "default", script=None)
    assert done.returncode == 0, done.stderr
    assert "default: the kernels for cpu were ready after" in done.stdout
    small.print_compiled(0, 12, "", 0.0)
    small.print_compiled(3, 12, "linear.linear_forward", 1.25)
    assert capsys.readouterr().out == "compiling 12 kernels\n  3 of 12    1.2 s  linear.linear_forward\n"


def test_json_of_lists(home):
    recipes = json.loads(run("recipes", "--json", script=None).stdout)
    assert [r["search"] for r in recipes if r["name"] in ("default", "sweep")] == [False, True]
    assert "numba" in json.loads(run("info", "--json", script=None).stdout)
    found = json.loads(run("data", "synthetic", "--json", script=None).stdout)
    assert found["train"] == 60_000
