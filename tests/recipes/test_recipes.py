"""Recipes: file format, training of a seed, stored results, reports and pictures."""

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinycnn
from tinycnn import (
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    Sequential,
    Tanh,
    plot,
    recipes,
    runs,
    schedules,
)
from tinycnn.__main__ import main
from tinycnn.recipes import build, gradients, pictures, report, results, training

ROOT = Path(__file__).parents[2]
TEXT = '''study = "A study"

[small]
title = "a small net"
source = "nobody"
claimed = 50
[small.net]
input = [1, 28, 28]
layers = """
    AvgPool2d(4), Flatten(),
    Linear(49, 10)
"""
init = "xavier_uniform()"
[small.data]
train = 200
validation = 100
[small.training]
optimizer = "Adam()"
lr = 1e-2
epochs = 2
batch = 50
'''
DEEP = TEXT.replace("Linear(49, 10)", "Linear(49, 9), ReLU(), Linear(9, 9), ReLU(), Linear(9, 10)")
DIVERGING = DEEP.replace("Adam()", "SGD()").replace("1e-2", "1e20")


@pytest.fixture
def write(tmp_path):
    """Write recipes into a file; returns its path."""

    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def small(write):
    (recipe,) = recipes.read(write(TEXT)).values()
    return recipe


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than the training."""
    monkeypatch.setattr(plot, "save", lambda figure, path: None)
    monkeypatch.setattr(runs.RunFolder, "finish", lambda *args: None)


@pytest.fixture
def reproduce(tmp_path, monkeypatch, small_digits, no_pictures, write, capsys):
    """Run `reproduce` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def reproduce(text, *args):
        code = main(["reproduce", str(write(text)), *map(str, args)])
        return code, *capsys.readouterr()

    return reproduce


# --- files ------------------------------------------------------------------------------------------------------------

PARAMETERS = {
    "linear1998": 7_850, "mlp1998-300": 266_610, "lenet1-1998": 2_578,  # as the papers of 1990 and 1998 count them
    "lecun1998": 60_000, "lecun1998-distortions": 60_000, "today-dense": 60_900, "default": 61_706,
    "default-relu": 61_706, "adam-5e4": 61_706, "push-tanh": 61_696, "luxxx-base": 3_274_634,
}  # fmt: skip


@pytest.mark.parametrize("name", recipes.builtin())
def test_a_builtin_recipe_can_be_built(name):
    (recipe,) = recipes.find(name)
    assert recipe.title
    assert recipe.source or recipe.study.startswith("1998 to today")
    if recipe.space:
        recipe = recipe.substitute({key: values[-1] for key, values in recipe.space.items()})
    model = build.check(recipe)
    assert len(model.theta) == PARAMETERS.get(name, len(model.theta))
    assert name != "best" or len(model.theta) <= 62_000


def test_the_recipes_are_listed_with_their_claims(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, recipe in recipes.builtin().items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert recipe.title in line
        assert ("" if recipe.claimed is None else f"{recipe.claimed:.2f} %") in line
    assert not any(recipe.space for recipe in recipes.find("all"))
    assert len(recipes.find("all")) < len(recipes.builtin())


def test_a_closed_pipe_gives_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tinycnn", "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("old", "new", "position", "message"),
    [
        ("optimizer", "optimiser", "optimiser", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("[small.data]", "[small.dta]", "[small.dta]", "unknown key 'dta'; did you mean 'data'?"),
        ("epochs = 2", "epochs = '2'", "epochs", "epochs must be an integer, got '2'"),
        ("epochs = 2", "epochs = true", "epochs", "epochs must be an integer, got True"),
        ("epochs = 2", "epochs = 0", "epochs", "epochs must be at least 1, got 0"),
        ("epochs = 2\n", "", "[small.training]", "training.epochs is missing"),
        ("claimed = 50", "claimed = nan", "claimed", "claimed must be finite, got nan"),
        ("claimed = 50", "claimed = 500", "claimed", "claimed must be from 0 to 100, got 500"),
        ("claimed = 50", "trials = 50", "trials", "trials must be a list, got 50"),
        ("claimed = 50", "trials = [9, 500]", "trials", "trials must be from 0 to 100, got 500"),
        ("claimed = 50", "trials = [9, 'a']", "trials", "trials must hold numbers, got 'a'"),
        ("claimed = 50", "trials = [50]", "trials", "trials need a table 'space': only a search has them"),
        ("lr = 1e-2", "", "[small.training]", "training must have either lr or tune_lr"),
        ("lr = 1e-2", "lr = 1\ntune_lr = [1]", "[small.training]", "training must have either lr or tune_lr"),
        ("lr = 1e-2", "lr = -1", "lr", "lr must be at least 0, got -1"),
        ("lr = 1e-2", "lr = inf", "lr", "lr must be finite, got inf"),
        ("lr = 1e-2", "lr = [1, 'a']", "lr", "lr must hold numbers, got 'a'"),
        ("lr = 1e-2", "lr = [1, 2, 3]", "lr", "lr must have 2 rates, one per epoch, got 3"),
        ("lr = 1e-2", "lr = 'one_cicle(1)'", "lr", "unknown name 'one_cicle'; did you mean 'one_cycle'?"),
        ("lr = 1e-2", "lr = 'cosine'", "lr", "cosine must be called"),
        ("lr = 1e-2", "lr = 'cosine(-1)'", "lr", "cosine(-1): lr must be at least 0, got -1"),
        ("lr = 1e-2", "lr = 'one_cycle(1, warmup=3)'", "lr", "warmup must be at least 0 and at most 1, got 3"),
        ("lr = 1e-2", "tune_lr = []", "tune_lr", "tune_lr must not be empty"),
        ("validation = 100\n", "", None, None),
        ("Linear(49, 10)", "Liner(49, 10)", "Liner", "unknown name 'Liner'; did you mean 'Linear'?"),
        ("Linear(49, 10)", "Linear(49, 10, 2, 3)", "Linear", "Linear(49, 10, 2, 3): Linear.__init__() takes"),
        ("Linear(49, 10)", "Linear(49,, 10)", "Linear", "invalid syntax"),
        ("Linear(49, 10)", "Linear(49, 10", "AvgPool", "a bracket is not closed"),
        ("Linear(49, 10)", "Linear(7*7, 10)", "Linear", "'7 * 7' is neither a call nor a plain value"),
        ("Linear(49, 10)", "Linear(-'a', 10)", "Linear", "is neither a call nor a plain value"),
        ("Linear(49, 10)", "Linear(*(49, 10))", "Linear", "may not unpack"),
        ("Linear(49, 10)", "open('x')", "open", "unknown name 'open'"),
        ("Linear(49, 10)", "Linear.mro()", "Linear", "is neither a call nor a plain value"),
        ("Flatten()", "Flatten", "Flatten", "Flatten must be called"),
        ("Linear(49, 10)", "Linear(48, 10)", "AvgPool", "layer 2: Linear(48, 10) takes (48,), got (49,)"),
        ("Linear(49, 10)", "Linear(49, 9)", "AvgPool", "the last layer must give 10 numbers"),
        ("AvgPool2d(4)", "Conv2d(1, 6, 5), GroupNorm(4, 6)", "Group", "must be divisible by num_groups, got 6 and 4"),
        ("AvgPool2d(4)", "MappedConv2d([[1]], 5)", "Mapped", "connections must be a table"),
        ("AvgPool2d(4)", "MappedConv2d([[True, False]], 5)", "Mapped", "none for output map 1"),
        ("AvgPool2d(4)", "MappedConv2d(connections(), 5)", "Mapped", "layer 0: MappedConv2d"),
        ("xavier_uniform()", "xavier()", "init", "unknown name 'xavier'"),
        ("xavier_uniform()", "xavier_uniform", "init", "xavier_uniform must be called"),
        ("xavier_uniform()", "xavier_uniform(gian=2)", "init", "unexpected keyword argument 'gian'"),
        ("xavier_uniform()", "truncated_normal(-1)", "init", "std must be at least 0, got -1"),
        ("xavier_uniform()", "Linear(3, 4)", "init", "net.init must be calls of"),
        ("Adam()", "Adm()", "optimizer", "unknown name 'Adm'; did you mean 'Adam'?"),
        ("Adam()", "Adam", "optimizer", "Adam must be called"),
        ("Adam()", "Adam(eps=-1)", "optimizer", "Adam(eps=-1): eps must be at least 0, got -1"),
        ("Adam()", "Adam(lr=1)", "optimizer", "multiple values for keyword argument 'lr'"),
        ("Adam()", "Adam(), SGD()", "optimizer", "training.optimizer must be one call of SGD, Adam"),
        ("Adam()", "3", "optimizer", "training.optimizer must be one call of SGD, Adam"),
        ('"Adam()"', "'SDLM()'\nloss = 'OneHotMSELoss()'", "optimizer", "SDLM needs second derivatives"),
        ('"Adam()"', "'Adam()'\nloss = 'MSELoss()'", "loss", "did you mean 'OneHotMSELoss'?"),
        ('"Adam()"', "'Adam()'\nloss = 'CrossEntropyLoss(weight=[1, 2])'", "loss", "weight must have 10 entries"),
        ("batch = 50", "batch = 50\nema = 1", "ema", "decay must be at least 0 and below 1, got 1"),
        ("train = 200", "train = 200\npadding = 2", "input", "net.input must be [1, 32, 32]"),
        ("train = 200", "name = 'minst'", "name", "did you mean 'mnist'?"),
        ("train = 200", "augment = 'RandomAfine(3)'", "augment", "did you mean 'RandomAffine'?"),
        ("train = 200", "augment = 'ColorJitter(), ColorJitter()'", "augment", "augment may hold one ColorJitter"),
        ("train = 200", "std = 0", "std", "std must be at least 1e-06, got 0"),
        ("lr = 1e-2", "lr = '$rate'", "lr", "$rate is not in the space"),
        ("lr = 1e-2", f"lr = 1{'0' * 400}", "lr", "lr must be finite, got 1000"),
        ("lr = 1e-2", f"lr = 0x{'f' * 5000}", "lr", "lr must be finite, got int that is too large to print"),
        ("epochs = 2", "epochs = 1000000000000", "epochs", "epochs must be at most 1000000000, got 1000000000000"),
        ("Linear(49, 10)", f"Linear(49, {'-' * 5000}10)", "AvgPool", "it is nested too deeply"),
        ("Linear(49, 10)", f"Linear(49, {'1' * 4301})", "Linear", "Exceeds the limit (4300 digits)"),
        ("Linear(49, 10)", f"Linear(49, 0x{'f' * 5000})", "AvgPool", ""),
        ("Linear(49, 10)", f"Linear(49, -0x{'f' * 5000})", "Linear", "Call: "),
        ("Linear(49, 10)", "Linear(49, 10), Conv2d(1, 1, 1, 1, 1, 1, 0)", "Linear", "groups must be at least 1"),
        ('"xavier_uniform()"', '"\\u0000"', "init", "null bytes"),
    ],
)  # fmt: skip
def test_an_error_names_its_line(write, capsys, old, new, position, message):
    assert TEXT.count(old) == 1 or old == "Adam()"
    text = TEXT.replace(old, new)
    if position is None:  # an error only without a validation set
        text, position, message = text.replace("lr = 1e-2", "tune_lr = [1]"), "tune_lr", "tune_lr needs data.validation"
    line = next(n for n, line in enumerate(text.splitlines(), 1) if position in line)
    assert main(["reproduce", str(write(text))]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: mine.toml, recipe 'small', line {line}: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.toml: contains no recipe"),
        ("study = 3", "line 1: study must be a string, got 3"),
        ("stdy = 'x'\n" + TEXT, "line 1: unknown key 'stdy'"),
        (TEXT[:140], "mine.toml: Unterminated string"),
        (TEXT + "[small]", "mine.toml: Cannot declare"),
        (TEXT.replace("[small", "['../up'"), "must consist of at most 100 letters, digits, - and _, got '../up'"),
        ("[a]\nnet = 3", "'a', line 2: net must be a table, [a.net]"),
        ("[a]\nlike = 'a'", "'a', line 2: like must name an earlier recipe of the file, got 'a'"),
        ("[a]\nlike = 'b'\n[b]\nlike = 'a'", "'a', line 2: like must name an earlier recipe of the file"),
        (TEXT + "[b]\nlike = 'smal'", "recipe 'b', line 23: like must name an earlier recipe of the file, "
         "got 'smal'; did you mean 'small'?"),
        (TEXT + "[small.space]\nrate = [1]", "'small', line 23: $rate is not used"),
        (TEXT + "[small.space]", "'small', line 22: space must be a table of names and lists of values"),
        (TEXT.replace("1e-2", "'$r'") + "[small.space]\nr = []", "line 23: space.r must be a list of strings or"),
        (TEXT.replace("1e-2", "'$r'") + "[small.space]\nr = [1, 1]", "line 23: space.r must not repeat a value"),
        (TEXT.replace("1e-2", "'$r$'") + "[small.space]\nr = [1]", "line 19: $ must be followed by a name of"),
        (TEXT.replace("1e-2", "'$rte'") + "[small.space]\nrate = [1]", "line 19: $rte is not in the space; did you"),
        (TEXT.replace("[small", "[default"), "two recipes are called 'default'"),
        ('"study" = 3', "line 1: study must be a string, got 3"),
        ("a = " + 5000 * "[" + 5000 * "]", "mine.toml: "),
        ("a = " + 4301 * "1", "mine.toml: "),
        ("[" + 101 * "a" + "]", "mine.toml: a recipe's name must consist of at most 100 letters"),
        (5000 * "x" + " = 1", "line 1: unknown key 'xxx"),
        ("[a]\n" + 5000 * "x" + " = 1", "'a', line 2: unknown key 'xxx"),
        ("[a]\nlike = '" + 5000 * "x" + "'", "'a', line 2: like must name an earlier recipe of the file, got 'xxx"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_refused(write, capsys, text, message):
    assert main(["reproduce", str(write(text))]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 2000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "mine.toml")
    assert main(["reproduce", str(tmp_path / "mine.toml")]) == 1
    assert "mine.toml: expected a regular file, got a named pipe" in capsys.readouterr().err


def test_unknown_names(tmp_path, capsys):
    binary = tmp_path / "x.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for name, message in [
        ("lecun199", "unknown recipe 'lecun199'; did you mean 'lecun1998'?"),
        (str(tmp_path / "no.toml"), "no such file"),
        (str(tmp_path), "unknown recipe"),
        (str(binary), "x.toml: not a text file"),
        ("sweep", "sweep is a search: python -m tinycnn sweep sweep"),
    ]:
        assert main(["reproduce", name]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    for seeds in ("0", "-1", "a", ",", "1,,2"):
        with pytest.raises(SystemExit, match="2"):
            main(["reproduce", "default", "--seeds", seeds])


def test_a_file_with_a_byte_order_mark_and_crlf(write):
    (recipe,) = recipes.read(write("\ufeff" + TEXT.replace("\n", "\r\n"))).values()
    assert build.check(recipe).shapes[-1] == (10,)


def test_line_numbers_ignore_keys_inside_strings(write):
    text = TEXT.replace("Linear(49, 10)", "Linear(49,\nbias=True, out_features=10)").replace("init =", "bias =")
    line = next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith("bias ="))
    with pytest.raises(recipes.RecipeError, match=f"line {line}: unknown key 'bias'"):
        recipes.read(write(text))


def test_like_inherits_missing_keys(write):
    found = recipes.read(write(TEXT + '''
[child]
like = "small"
title = "a child"
[child.data]
train = 300
[child.training]
tune_lr = [1, 2]
[grandchild]
like = "child"
source = "else"
[grandchild.training]
lr = 3
'''))  # fmt: skip
    small, child, grandchild = found.values()
    assert (child.title, child.source, child.claimed, child.study) == ("a child", "nobody", None, "A study")
    assert child.net == small.net
    assert child.data == {"train": 300, "validation": 100}
    assert child.training == {"optimizer": "Adam()", "tune_lr": [1, 2], "epochs": 2, "batch": 50}
    assert (grandchild.title, grandchild.source, grandchild.training["lr"]) == ("", "else", 3)
    assert "tune_lr" not in grandchild.training
    assert grandchild.data == child.data
    assert small.data["train"] == 200
    assert len({recipe.fingerprint for recipe in found.values()}) == 3
    # An error in an inherited key names the line of the earlier recipe.
    with pytest.raises(recipes.RecipeError, match="'child', line 18: unknown name 'Adm'"):
        build.check(recipes.read(write(TEXT.replace("Adam", "Adm") + "[child]\nlike = 'small'"))["child"])


def test_the_fingerprint_changes_only_with_settings_that_change_results(write):
    def fingerprint(old="", new=""):
        return recipes.read(write(TEXT.replace(old, new) if old else TEXT))["small"].fingerprint

    for old, new in [("a small net", "another"), ("nobody", "me"), ("claimed = 50", ""), ("epochs = 2\nbatch = 50",
                     "batch = 50\nepochs = 2")]:  # fmt: skip
        assert fingerprint(old, new) == fingerprint()
    search = TEXT.replace("1e-2", "'$r'") + "[small.space]\nr = [1, 2]"
    recipe = recipes.read(write(search.replace("claimed = 50", "trials = [50, 40]")))["small"]
    assert recipe.trials == [50, 40]
    assert recipe.fingerprint == recipes.read(write(search))["small"].fingerprint
    for old, new in [("Linear(49, 10)", "Linear(49, 11)"), ("train = 200", ""), ("1e-2", "1e-3"), ("= 50\n", "= 51\n")]:
        assert fingerprint(old, new) != fingerprint()


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        ("0.5", [0.5]),
        ("'0.5'", [0.5]),
        ("[1, 2]", [1, 1, 1, 2, 2, 2]),
        ("'constant(2)'", [2] * 6),
        ("'step_decay(1, step_size=3, gamma=0.5)'", [1, 1, 1, 0.5, 0.5, 0.5]),
        ("'step_decay(1, 3, 0.5)'", [1, 1, 1, 0.5, 0.5, 0.5]),
        ("'cosine(1)'", schedules.cosine(1, 6)),
        ("'one_cycle(1, warmup=0.5)'", schedules.one_cycle(1, 6, warmup=0.5)),
    ],
)
def test_the_schedule_of_two_epochs_of_three_steps(write, lr, expected):
    (recipe,) = recipes.read(write(TEXT.replace("1e-2", lr))).values()
    model = build.check(recipe)
    np.testing.assert_allclose(build.build_optimizer(recipe, model, 3).lr_schedule, expected)
    assert build.build_optimizer(recipe, model, 3, lr=7.0).lr == 7


def test_tune_lr_takes_the_best_rate_on_the_validation_set(reproduce):
    code, out, err = reproduce(DEEP.replace("lr = 1e-2", "tune_lr = [1e-7, 1e-2, 1e20]"), "--seeds", 1)
    assert (code, err) == (0, "")
    result = json.loads(Path("results/small/seed-0.json").read_text())
    assert result["rate"] == 0.01
    assert result["tuning"]["0.01"] > result["tuning"]["1e-07"]
    assert set(result["tuning"]) == {"1e-07", "0.01", "1e+20"}
    assert "rate 0.01" in out
    assert "Learning rate 0.01, chosen by validation accuracy" in Path("runs/small/report.md").read_text()


# --- results ----------------------------------------------------------------------------------------------------------


def made_up(recipe, seed=0, accuracy=0.9, epochs=3, **more):
    """A result without a training."""
    history = {
        "train_loss": np.linspace(1, 0.5, epochs), "train_accuracy": np.linspace(0.5, 0.95, epochs),
        "val_loss": np.linspace(1, 0.6, epochs), "val_accuracy": np.linspace(0.6, accuracy, epochs),
    }  # fmt: skip
    return {
        "recipe": recipe.name, "fingerprint": recipe.fingerprint, "seed": seed, "data": "digits", "parameters": 500,
        "accuracy": accuracy, "errors": round(1000 * (1 - accuracy)), "loss": 0.5, "precision": 0.9, "recall": 0.9,
        "f1": 0.9, "held_out": "test", "history": {key: values.tolist() for key, values in history.items()},
        "confusion": (100 * np.eye(10, dtype=int)).tolist(), "seconds": 2.5, "cpu_seconds": 1.5,
        "environment": {"device": "a machine, 1 thread", "numpy": "2", "numba": "0"}, "finished": "2026-01-01",
    } | more  # fmt: skip


def store(root, recipe, *found):
    results.prepare_folder(root, recipe)
    for result in found:
        results.save(root, recipe, result)


def test_results_are_read_as_they_were_saved(small, tmp_path):
    assert results.read(tmp_path, small) == []
    found = [made_up(small, seed, 0.9 + seed / 1000) for seed in (11, 2, 0)]
    store(tmp_path, small, *found)
    assert results.read(tmp_path, small) == found[::-1]  # in numerical order
    again = made_up(small, 2, 0.5)
    store(tmp_path, small, again)
    assert results.read(tmp_path, small)[1] == again
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "seed-0.json", "seed-11.json", "seed-2.json",
    ]  # fmt: skip


def test_the_committed_results_are_complete_and_current():
    """Every file in results/ is of its recipe's current version, so `reproduce` trains no seed again."""
    for recipe in recipes.builtin().values():
        files = sorted(path.name for path in (ROOT / "results" / recipe.name).glob("*"))
        if recipe.space:
            assert files == ["trials.json"]
            assert len(results.read_trials(ROOT / "results", recipe)) == 10
        else:
            assert len(files) >= 3, recipe.name
            assert files == [f"seed-{result['seed']}.json" for result in results.read(ROOT / "results", recipe)]


def test_results_of_a_changed_recipe_do_not_count(small, tmp_path, write):
    store(tmp_path, small, made_up(small))
    (changed,) = recipes.read(write(TEXT.replace("1e-2", "2e-2"))).values()
    assert results.read(tmp_path, changed) == []
    (renamed,) = recipes.read(write(TEXT.replace("a small net", "else"))).values()
    assert len(results.read(tmp_path, renamed)) == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": "small", "accuracy": 0.5}', "\xff"])
def test_a_damaged_result_is_named(small, tmp_path, content):
    store(tmp_path, small, made_up(small))
    path = tmp_path / "small" / "seed-3.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"seed-3\.json is not a result of recipe 'small' .*: remove it"):
        results.read(tmp_path, small)


def deep(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": math.nan}, "accuracy must be from 0 to 1, got nan"),
        ({"accuracy": 7.0}, "accuracy must be from 0 to 1, got 7.0"),
        ({"f1": -0.5}, "f1 must be from 0 to 1"),
        ({"seed": True}, "seed must not be True"),
        ({"errors": -1}, "errors must not be -1"),
        ({"cpu_seconds": math.inf}, "cpu_seconds must be at least 0, got inf"),
        ({"data": "\ud800"}, "surrogates not allowed"),
        ({"held_out": "training"}, "held_out must be"),
        ({"confusion": [[1, 2], [3]]}, "confusion must have 10 rows of 10 counts"),
        ({"confusion": [[1] * 10] * 9 + [[1] * 9]}, "confusion must have 10 rows of 10 counts"),
        ({"confusion": [[0.5] * 10] * 10}, "confusion must hold counts"),
        ({"confusion": [[10**20] * 10] * 10}, "confusion must hold counts"),
        ({"history": {"train_accuracy": [0.5]}}, "history must have val_accuracy"),
        ({"history": {"train_accuracy": [0.5], "val_accuracy": []}}, "history must have val_accuracy"),
        ({"history": {"train_accuracy": [math.nan], "val_accuracy": [1]}}, "history must have train_accuracy"),
        ({"environment": {"device": "a machine"}}, "environment must have device, numpy, numba"),
        ({"diverged": 3}, "diverged must be a string"),
        ({"rate": "fast"}, "rate must be a number"),
        ({"tuning": {"0.1": 0.5}}, "rate is missing"),
        ({"rate": 0.1, "tuning": {"fast": 0.5}}, "could not convert string to float"),
        ({"rate": 0.1, "tuning": {"0.1": 5}}, "tuning must hold a number from 0 to 1 for each rate"),
        ({"gradients": {"at the start": [{"signal": 1}]}}, "gradients must hold statistics"),
    ],
)
def test_an_invalid_result_is_refused(small, tmp_path, change, message):
    results.prepare_folder(tmp_path, small)
    (tmp_path / "small" / "seed-0.json").write_text(json.dumps(made_up(small) | change))
    with pytest.raises(ValueError, match=re.escape(message) + r".*: remove it$") as caught:
        results.read(tmp_path, small)
    assert "seed-0.json is not a result of recipe 'small'" in str(caught.value)


@pytest.mark.parametrize(
    "content", [deep(100_000), '{"a": ' + deep(100_000) + "}", "1" * 5000, '{"a": ' + "1" * 5000 + "}"]
)
def test_json_that_python_cannot_parse(small, tmp_path, content):
    results.prepare_folder(tmp_path, small)
    (tmp_path / "small" / "seed-0.json").write_text(content)
    with pytest.raises(ValueError, match=r"seed-0\.json is not a result of recipe 'small' \(.*\): remove it"):
        results.read(tmp_path, small)


@pytest.mark.parametrize("key", results.RESULT_KEYS)
def test_a_missing_key_of_a_result_is_named(small, tmp_path, key):
    result = made_up(small)
    del result[key]
    results.prepare_folder(tmp_path, small)
    (tmp_path / "small" / "seed-0.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"{key} is missing or damaged"):
        results.read(tmp_path, small)


def made_up_trial(number=0, validation=0.9, **more):
    return {
        "number": number, "point": {"activation": "Tanh()", "norm1": ""}, "state": "COMPLETE", "validation": validation,
        "accuracy": 0.9, "f1": 0.9, "cpu_seconds": 30.0, "failed": None, "finished": "2026-01-01",
        "environment": {"device": "a machine, 1 thread", "numpy": "2", "numba": "0"},
    } | more  # fmt: skip


def test_trials_are_read_in_the_order_of_their_validation_accuracy(tmp_path):
    (search,) = recipes.find("sweep")
    assert results.read_trials(tmp_path, search) == []
    best, again, worst = made_up_trial(3, 0.99, accuracy=0.1), made_up_trial(5, 0.99), made_up_trial(0, 0.5)
    pruned = made_up_trial(1, 0.999, state="PRUNED", accuracy=None, f1=None, cpu_seconds=None)
    failed = made_up_trial(2, None, state="FAIL", accuracy=None)
    results.save_trials(tmp_path, search, [again, failed, pruned, worst, best])
    assert results.read_trials(tmp_path, search) == [best, again, worst, pruned, failed]
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["trials.json"]
    other = dataclasses.replace(search, training=search.training | {"epochs": 3})
    assert results.read_trials(tmp_path, other) == []


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "\xff", '{"recipe": "sweep"}', '{"recipe": "small", "fingerprint": "", "trials": []}',
        '{"recipe": "sweep", "fingerprint": "", "trials": {}}', '{"recipe": "sweep", "fingerprint": "", "trials": [3]}',
    ],
)  # fmt: skip
def test_damaged_trials_are_named(tmp_path, content):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "trials.json").write_bytes(content.encode("latin-1"))
    for read in (report.write_table, lambda root: results.read_trials(root, recipes.find("sweep")[0])):
        with pytest.raises(ValueError, match=r"trials\.json is not a result of recipe 'sweep' .*: remove it"):
            read(tmp_path)


@pytest.mark.parametrize("key", [*results.TRIAL_KEYS, *results.TRIAL_METRICS])
def test_a_missing_key_of_a_trial_is_named(tmp_path, key):
    (search,) = recipes.find("sweep")
    trial = made_up_trial()
    del trial[key]
    results.save_trials(tmp_path, search, [trial])
    with pytest.raises(ValueError, match=f"{key} is missing or damaged"):
        results.read_trials(tmp_path, search)


def test_summary_against_numbers_computed_by_hand(small):
    one = results.summarize([made_up(small, accuracy=0.9876)])
    assert one.mean == pytest.approx(98.76)
    assert math.isnan(one.sd)
    assert str(one) == "98.76 % (1 seed)"
    # 99.0, 99.1, 99.5: mean 99.2, squares 0.04 + 0.01 + 0.09 = 0.14, sd sqrt(0.07), t(2) = 4.303, over sqrt(3)
    three = results.summarize([made_up(small, accuracy=a) for a in (0.990, 0.991, 0.995)])
    assert three.n == 3
    assert three.mean == pytest.approx(99.2)
    assert three.sd == pytest.approx(math.sqrt(0.07))
    assert three.half_width == pytest.approx(4.303 * math.sqrt(0.07 / 3))
    assert str(three) == "99.20 % (sd 0.26, 3 seeds, 95 % interval ± 0.66)"
    many = [0.9 + 0.001 * (i % 7) for i in range(40)]
    s = results.summarize([made_up(small, accuracy=a) for a in many])
    assert s.sd == pytest.approx(100 * statistics.stdev(many))
    assert s.half_width == pytest.approx(1.96 * s.sd / math.sqrt(40))


def test_seeds_that_differ_much_are_listed(write):
    small = recipes.read(write(TEXT))["small"]
    s = results.summarize([made_up(small, seed, accuracy=a) for seed, a in enumerate((0.99, 0.1, 0.98))])
    assert s.uneven == "median 98.00: 99.00, 10.00, 98.00"
    assert str(s) == "median 98.00: 99.00, 10.00, 98.00 %"
    assert results.summarize([made_up(small, accuracy=a) for a in (0.99, 0.95)]).uneven == ""


def test_students_t_is_that_of_the_tables():
    scipy = pytest.importorskip("scipy.stats")
    np.testing.assert_allclose(results.T95, scipy.t.ppf(0.975, np.arange(1, 31)), atol=6e-4)


# --- the command ------------------------------------------------------------------------------------------------------


def test_only_missing_seeds_are_run_and_bits_repeat(reproduce, monkeypatch, tmp_path):
    ran, run = [], training.run

    def counted(recipe, seed, *args, **options):
        ran.append(seed)
        return run(recipe, seed, *args, **options)

    monkeypatch.setattr(training, "run", counted)
    code, out, err = reproduce(TEXT, "--seeds", 2)
    assert (code, err, ran) == (0, "", [0, 1])
    first = results.read("results", recipes.read("mine.toml")["small"])
    assert f"claimed 50.00 %, obtained {results.summarize(first)}" in out
    assert reproduce(TEXT, "--seeds", 2)[0] == 0
    assert ran == [0, 1]
    assert reproduce(TEXT, "--seeds", 3)[0] == 0
    assert ran == [0, 1, 2]
    assert reproduce(TEXT, "--seeds", "1,5,5")[0] == 0
    assert ran == [0, 1, 2, 5]
    # The same seeds in another folder.
    assert reproduce(TEXT, "--seeds", 2, "--results", "again")[0] == 0
    second = results.read("again", recipes.read("mine.toml")["small"])
    for a, b in zip(first, second, strict=True):
        for key in ("accuracy", "loss", "history", "confusion", "precision", "recall", "f1", "errors"):
            assert a[key] == b[key]
    assert first[0]["history"] != first[1]["history"]
    assert len(first[0]["history"]["val_accuracy"]) == 2
    assert np.sum(first[0]["confusion"]) == 100
    assert first[0]["accuracy"] == np.trace(first[0]["confusion"]) / 100
    assert first[0]["held_out"] == "validation"
    # A changed recipe has no results yet.
    ran.clear()
    assert reproduce(TEXT.replace("1e-2", "2e-2"), "--seeds", 2)[0] == 0
    assert ran == [0, 1]


def test_a_run_folder_and_a_report_are_written(reproduce, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    images, labels = tinycnn.data.synthetic_digits(300, rng=0)
    digits = tinycnn.data.Dataset("digits", images[:200], labels[:200], images[200:], labels[200:], tuple("0123456789"))
    monkeypatch.setattr(tinycnn.data, "load", lambda name, *_: digits)
    text = TEXT.replace("train = 200\nvalidation = 100", 'augment = "RandomAffine(5)"').replace(
        "Adam()", "SGD(momentum=0.9)"
    )
    code, out, err = reproduce(text.replace("batch = 50", "batch = 50\nema = 0.5\nsteps_per_epoch = 3"), "--seeds", 1)
    assert (code, err) == (0, "")
    (folder,) = (tmp_path / "runs" / "small").glob("*-seed-0")
    assert {"config.json", "history.csv", "model.safetensors", "report.json", "curves.png"} <= {
        p.name for p in folder.iterdir()
    }
    (result,) = results.read("results", recipes.read("mine.toml")["small"])
    text = (tmp_path / "runs" / "small" / "report.md").read_text()
    assert "| claimed | 50.00 |" in text
    assert f"| obtained | {100 * result['accuracy']:.2f} % (1 seed) |" in text
    assert result["held_out"] == "test"
    for name in ("curves.png", "confusion.png"):
        assert f"({name})" in text
        assert (tmp_path / "runs" / "small" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "table" not in out  # only for built-in recipes


def test_a_seed_that_diverges_is_recorded(reproduce):
    code, out, err = reproduce(DIVERGING, "--seeds", 2)
    assert (code, err) == (0, "")
    found = results.read("results", recipes.read("mine.toml")["small"])
    assert [result["seed"] for result in found] == [0, 1]
    for result in found:
        assert "training diverged at step" in result["diverged"]
        assert result["history"] == {}
    assert out.count("training diverged at step") == 2
    assert "| 0 (training diverged at step" in Path("runs/small/report.md").read_text()


def test_the_table_has_claimed_obtained_and_deviation(reproduce, monkeypatch, tmp_path):
    (recipe,) = recipes.find("adam-5e4")
    store(
        "results", recipe, made_up(recipe, 0, 0.990), made_up(recipe, 1, 0.991), made_up(recipe, 2, 0.995, diverged="x")
    )
    code, out, err = reproduce(TEXT, "adam-5e4", "--seeds", 3)
    assert (code, err) == (0, "")
    assert "claimed 99.02 %, obtained 99.20 % (sd 0.26, 3 seeds, 95 % interval ± 0.66)" in out
    table = Path("results/REPRODUCTIONS.md").read_text()
    assert "table: results/REPRODUCTIONS.md" in out
    (row,) = [line for line in table.splitlines() if "`adam-5e4`" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:9] == ["99.02", "**99.20**", "0.26", "3", "0.66", "2"]
    assert "1 of 3 seeds diverged" in cells[9]
    assert "| `lecun1998` | LeNet-5 as published | 99.05 | not run |" in table


def test_the_study_of_1998_in_the_table():
    """Rates, training errors and validation errors; no test accuracy, on which nothing may be chosen."""
    recipe, other, *_ = recipes.find("study1998") + recipes.find("study1998-half")
    found = [
        made_up(recipe, 0, 0.99, epochs=5, step_sizes=[[1e-5, 0.02], [1, 2]]),
        made_up(recipe, 1, 0.97, epochs=5, step_sizes=[[3e-5, 0.01], [1, 2]]),
        made_up(recipe, 2, 0.1, history={}, diverged="training diverged"),
    ]
    lines = report.study1998_table([(recipe, found), (other, [])])
    (paper,) = [line for line in lines if line.startswith("| the paper |")]
    assert "| 7.0e-05 to 1.6e-02 | 4.89, 1.22, 0.49, 0.36 | test error 0.96 |" in paper
    assert lines[-2].endswith("| 2 | 2.0e-05 to 1.5e-02 | 50.00, 5.00 | 2.00 ± 1.41 |")
    assert lines[-1] == f"| `study1998-half` | {other.title} | 0 | | | |"


def test_a_damaged_file_of_classifiers_is_refused(tmp_path):
    path = tmp_path / "classifiers1998.json"
    for content, words in (("{", "classifiers1998.json"), ('{"knn": {"title": "no seeds"}}', "damaged at 'knn'")):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            report.write_table(tmp_path)


def test_a_search_in_the_table(tmp_path):
    (search,) = recipes.find("sweep")
    (best,) = recipes.find("sweep-best")
    store(tmp_path, best, made_up(best))

    def table(*trials):
        results.save_trials(tmp_path, search, list(trials))
        lines = report.write_table(tmp_path).read_text().splitlines()
        (row,) = [line for line in lines if "| `sweep` |" in line]
        start = lines.index("| rank | claimed | ours, test | ours, validation | point of ours |") + 2
        return row, lines[start : lines.index("", start)], lines

    row, ranks, _ = table(made_up_trial(state="FAIL", validation=None, failed="diverged"))
    assert "| 99.00 | – | | none: 1 trial | |  |" in row
    assert ranks[0] == "| 1 | 99 | – | failed | activation Tanh(), norm1 - (diverged) |"
    assert ranks[1:3] == ["| 2 | 98 | – | – | – |", "| 3 | 98 | – | – | – |"]
    assert len(ranks) == 10
    many = [made_up_trial(n, 0.9 + n / 1000, accuracy=0.9 + n / 500, cpu_seconds=100.0 * n) for n in range(12)]
    many[1]["environment"] = {}  # an old trial without an environment
    row, ranks, lines = table(*many)
    assert "| 99.00 | **92.20** | | none: 12 trials | | 550 |" in row
    assert ranks[0] == "| 1 | 99 | 92.20 | 91.10 | activation Tanh(), norm1 - |"
    assert ranks[9:] == [
        f"| {rank} | {claimed} | {test} | {validation} | activation Tanh(), norm1 - |"
        for rank, claimed, test, validation in [
            (10, 95, "90.40", "90.20"), (11, "–", "90.20", "90.10"), (12, "–", "90.00", "90.00"),
        ]
    ]  # fmt: skip
    assert "![Claimed and obtained, all recipes](claims.png)" in lines  # of sweep-best


def test_the_short_table_and_the_picture_of_claims_leave_searches_out(tmp_path, monkeypatch, no_pictures):
    (search,), (best,) = recipes.find("sweep"), recipes.find("sweep-best")
    store(tmp_path, best, made_up(best))
    results.save_trials(tmp_path, search, [made_up_trial()])
    drawn = []
    monkeypatch.setattr(pictures, "claims", lambda rows: drawn.extend(r.name for r, found in rows if found))
    root, page = tmp_path / "results", tmp_path / "docs" / "reproductions.md"
    page.parent.mkdir()
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    root.mkdir()
    for name in ("sweep", "sweep-best"):
        (tmp_path / name).rename(root / name)
    report.write_table(root)
    assert drawn == ["sweep-best"]
    assert [line for line in page.read_text().splitlines() if "sweep" in line] == [
        f"| `sweep-best`: {best.title} | 99.00 | 90.00 | 1 |"
    ]


def test_tensorboard_gets_the_scalars(reproduce):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    assert reproduce(TEXT, "--seeds", 1, "--tensorboard", "events")[0] == 0
    (file,) = Path("events/small/seed-0").iterdir()
    content, at, scalars = file.read_bytes(), 0, {}
    while at < len(content):  # records: length, its checksum, event, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    (result,) = results.read("results", recipes.read("mine.toml")["small"])
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert [step for step, _ in scalars[key]] == [1, 2]
        np.testing.assert_allclose([value for _, value in scalars[key]], result["history"][key], rtol=1e-5)
    assert {"lr", "seconds"} <= set(scalars)


def test_errors_are_found_before_training(reproduce, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "run", lambda *args, **options: pytest.fail("trained"))
    (tmp_path / "file").write_text("in the way")
    other = TEXT.replace("[small", "[other").replace('study = "A study"', "")
    for text, args, message in [
        (TEXT, ["--results", "file"], "file/small"),
        (TEXT, ["--out", "file"], "file/small"),
        (TEXT, ["--tensorboard", "file"], "file/small"),
        (TEXT, ["--device", "gpu"], "device must be"),
        (TEXT, ["--threads", 4096], "threads must be at most"),
        # An error in the last recipe is found before the first one is trained.
        (TEXT + other.replace("Linear(49", "Linear(48"), [], "recipe 'other', line 31"),
        (TEXT + other.replace("200", "301"), [], "line 36: 301 + 100 images are needed"),
        (TEXT.replace("batch = 50", "batch = 50\nsteps_per_epoch = 5"), [], "line 22: 5 batches of 50 images are"),
        (TEXT.replace("train = 200\nvalidation = 100", "validation = 400"), [], "line 15: 1 + 400 images are needed"),
    ]:  # fmt: skip
        code, _, err = reproduce(text, *args)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    results.prepare_folder("results", recipes.find("default")[0])
    (tmp_path / "results" / "default" / "seed-0.json").write_text("{")
    code, _, err = reproduce(TEXT, "adam-5e4")  # whose table includes it
    assert code == 1
    assert "seed-0.json is not a result" in err


def test_two_recipes_with_one_name_are_refused(reproduce, write):
    other = write(TEXT.replace("1e-2", "2e-2"), "other.toml")
    code, _, err = reproduce(TEXT, other)
    assert code == 1
    assert "two recipes are called 'small'" in err


def test_results_of_a_recipe_from_another_file_are_kept(reproduce, write, tmp_path):
    assert reproduce(TEXT, "--seeds", 1)[0] == 0
    kept = Path("results/small/seed-0.json").read_text()
    other = write(TEXT.replace("1e-2", "2e-2"), "other.toml")
    assert main(["reproduce", str(other), "--seeds", "1"]) == 1
    assert Path("results/small/seed-0.json").read_text() == kept
    assert main(["reproduce", str(other), "--seeds", "1", "--results", "elsewhere"]) == 0
    write(TEXT, "copy.toml")  # the same recipe has the same results
    assert main(["reproduce", "copy.toml", "--seeds", "1"]) == 0
    assert Path("results/small/seed-0.json").read_text() == kept
    assert reproduce(TEXT.replace("1e-2", "2e-2"), "--seeds", 1)[0] == 0  # a new version of the first recipe
    assert Path("results/small/seed-0.json").read_text() != kept


def test_a_large_learning_rate_may_be_an_integer(write):
    (recipe,) = recipes.read(write(TEXT.replace("1e-2", "1" + "0" * 20))).values()
    build.check(recipe)
    assert build.lr_schedule(recipe, 3) == 1e20


def test_ctrl_c_keeps_finished_seeds(reproduce, monkeypatch):
    run = training.run

    def interrupted(recipe, seed, *args, **options):
        if seed == 1:
            raise KeyboardInterrupt
        return run(recipe, seed, *args, **options)

    monkeypatch.setattr(training, "run", interrupted)
    code, _, err = reproduce(TEXT, "--seeds", 3)
    assert code == 130
    assert "interrupted: finished seeds are kept" in err
    assert [result["seed"] for result in results.read("results", recipes.read("mine.toml")["small"])] == [0]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_statistics_of_a_net_of_two_layers(small_digits, reduction):
    images, labels = small_digits.train_images[:60], small_digits.train_labels[:60]
    batches = DeviceDataset(images, labels, mean=0.1, std=0.05)  # some units are saturated
    model = Sequential(Flatten(), Linear(784, 20), Tanh(), Linear(20, 10), input_shape=(1, 28, 28), rng=0)
    before = model.theta.copy()
    found = gradients.statistics(model, CrossEntropyLoss(reduction=reduction), batches, 0.1)
    assert np.array_equal(model.theta, before)
    w1, b1, w2, b2 = (np.asarray(p, np.float64) for p in model.parameters())
    x = (images.reshape(60, -1) / 255 - 0.1) / 0.05
    h = np.tanh(x @ w1.T + b1)
    p = np.exp(h @ w2.T + b2)
    p /= p.sum(axis=1, keepdims=True)
    d2 = p - np.eye(10)[labels]  # of one image's loss
    d1 = (d2 @ w2) * (1 - h**2)
    for record, name, signal, weight, gradient in (
        (found[0], "Linear(784, 20)", d1, w1, d1.T @ x / 60),
        (found[1], "Linear(20, 10)", d2, w2, d2.T @ h / 60),
    ):
        assert record["layer"] == name
        np.testing.assert_allclose(record["signal"], math.sqrt(np.mean(signal**2)), rtol=1e-4)
        np.testing.assert_allclose(record["gradient"], np.linalg.norm(gradient), rtol=1e-4)
        np.testing.assert_allclose(record["weight"], np.linalg.norm(weight), rtol=1e-6)
        np.testing.assert_allclose(record["update"], 0.1 * np.linalg.norm(gradient) / np.linalg.norm(weight), rtol=1e-4)
    np.testing.assert_allclose(found[0]["slope"], np.mean(1 - h**2), rtol=1e-4)
    assert found[0]["saturated"] == np.mean(1 - h**2 < 0.05) > 0
    assert found[1]["slope"] is found[1]["saturated"] is None
    assert len(found) == 2


# --- pictures ---------------------------------------------------------------------------------------------------------


def layers_of(seed):
    keys = ("signal", "gradient", "weight", "update")
    return [{"layer": "Linear", **dict.fromkeys(keys, 10.0 ** (-5 + i) + seed)} for i in range(5)]


FLOW = {when: layers_of(0) for when in ("at the start", "after one epoch", "at the end")}


def test_every_picture_is_drawn(small, tmp_path):
    found = [made_up(small, 0, 0.9), made_up(small, 1, 0.95)]
    flows = [made_up(small, seed, gradients=FLOW, rate=0.1) for seed in (0, 1)]
    space = {"activation": ["Tanh()", "ReLU()"], "norm": ["", "BatchNorm2d(6),"], "drop": [0, 0.25]}
    points = [({"activation": "Tanh()", "norm": "", "drop": d}, 0.9 + d / 10) for d in (0, 0.25)]
    perfect = [made_up(small, accuracy=1.0, epochs=1)]
    for key in ("train_accuracy", "val_accuracy"):
        perfect[0]["history"][key] = [1.0]
    diverged = made_up(small, 2, 0.1, history={}, diverged="training diverged")
    drawn = {
        "curves": pictures.curves(small, found),
        "curves of one": pictures.curves(small, found[:1]),
        "curves with one diverged": pictures.curves(small, [*found, diverged]),
        "curves, all diverged": pictures.curves(small, [diverged]),
        "curves without error": pictures.curves(small, perfect),
        "claims": pictures.claims([(small, found), (small, []), (small, perfect)]),
        "figure 5": pictures.figure5(found),
        "figure 6": pictures.figure6({15: found, 30: found[:1], 60: found}, found),
        "figure 9": pictures.figure9({"linear": [11.0, 12.0], "LeNet-5": [1.0]}),
        "figure 10": pictures.figure10({"LeNet-5": [1.0, 1.5]}),
        "figure 6, not distorted": pictures.figure6({15: found, 30: found, 60: found}, []),
        "study": pictures.study1998([(small, [made_up(small, step_sizes=[[1e-5, 0.02]])]), (small, [])]),
        "ladder": pictures.ladder([(small, found), (small, []), (small, found[:1])]),
        "gradients": pictures.gradient_flow({"sigmoid": flows, "tanh": flows[:1], "relu": flows}),
        "parallel": pictures.parallel_coordinates(space, points),
        "parallel, one": pictures.parallel_coordinates(space, points[:1]),
        "importances": pictures.importances({"activation": 0.7, "norm": 0.3}),
    }
    for name, figure in drawn.items():
        path = tmp_path / f"{name}.png"
        plot.save(figure, path)
        assert len(path.read_bytes()) > 3000, name


def lines_of(figure, axes=0):
    return {line.get_label(): np.array(line.get_ydata()) for line in figure.axes[axes].lines}


def test_curves_are_means_over_the_seeds(small):
    lines = lines_of(pictures.curves(small, [made_up(small, 0, 0.9), made_up(small, 1, 0.8)]))
    np.testing.assert_allclose(lines["test set"], [40, 27.5, 15])
    np.testing.assert_allclose(lines["training set (while training)"], [50, 27.5, 5])


def test_the_table_shows_every_picture(tmp_path):
    measured = {"gradients": FLOW, "step_sizes": [[7e-5, 0.016]], "rejected": 0.02}
    seeds = [{"accuracy": 0.95, "rejected": 0.1}, {"accuracy": 0.97, "rejected": 0.2}]
    classifier = {"title": "not a network", "claimed": 95.0, "why": "unlike", "seeds": seeds}
    (tmp_path / "classifiers1998.json").write_text(
        json.dumps(dict.fromkeys(("pairwise", "knn", "boosted"), classifier))
    )
    for recipe in recipes.builtin().values():
        if not recipe.space:
            store(tmp_path, recipe, *(made_up(recipe, seed, 0.98 + seed / 100, **measured) for seed in (0, 1)))
            store(tmp_path, recipe, made_up(recipe, 2, 0.1, history={}, gradients={}, diverged="training diverged"))
    text = report.write_table(tmp_path).read_text()
    row = "| knn (`python -m benchmarks classifiers`) | not a network | 95.00 | **96.00** | 1.41 | 2 | | | unlike |"
    assert row in text.splitlines()
    for name in ("claims", "figure5", "figure6", "figure9", "figure10", "study1998", "today", "vanishing"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 3000
    assert "not run" not in "".join(line for line in text.splitlines() if "`sweep`" not in line)
