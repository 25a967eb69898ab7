"""Callbacks: when they are called, what they may do, and the files that they write."""

import csv
import json
import os
import sys
import time

import numpy as np
import pytest

from tinycnn import (
    EMA,
    SGD,
    CrossEntropyLoss,
    CSVLogger,
    DeviceDataset,
    Dropout,
    EarlyStopping,
    Flatten,
    Linear,
    ModelCheckpoint,
    ReduceLROnPlateau,
    Sequential,
    Tanh,
    TensorBoard,
    TrainingCheckpoint,
    WandB,
    evaluate,
    fit,
    load,
)
from tinycnn.kernels import _capture

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (60, 8, 8), np.uint8), RNG.integers(0, 4, 60)
DATA = DeviceDataset(IMAGES, LABELS)


def net():
    return Sequential(Flatten(), Linear(64, 8), Tanh(), Dropout(0.2), Linear(8, 4), input_shape=(1, 8, 8), rng=0)


def learn(model, callbacks=(), **options):
    options = {"epochs": 3, "batch_size": 16, "rng": 0, "progress": False, **options}
    optimizer = options.pop("optimizer", None) or SGD(model, 0.1)
    return fit(model, CrossEntropyLoss(), optimizer, options.pop("train", DATA), callbacks=callbacks, **options)


class Recorder:
    """Writes down every call.  `actions`: functions by name of the method"""

    def __init__(self, **actions):
        self.calls, self.actions = [], actions

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        return self.actions.get(name, lambda *_: None)(*arguments)

    def on_train_begin(self, model):
        return self._call("begin", model)

    def on_batch_end(self, record):
        return self._call("batch", record)

    def on_epoch_end(self, record):
        return self._call("epoch", record)

    def on_train_end(self):
        return self._call("end")

    def names(self):
        return [call[0] for call in self.calls]


def test_when_callbacks_are_called():
    recorder, model = Recorder(epoch=lambda record: record.update(extra=record["epoch"])), net()
    optimizer = SGD(model, np.linspace(0.1, 0.2, 12))
    history = learn(model, [recorder], optimizer=optimizer, validation=DATA)
    assert recorder.names() == [
        "begin",
        *["batch"] * 4,
        "epoch",
        *["batch"] * 4,
        "epoch",
        *["batch"] * 4,
        "epoch",
        "end",
    ]
    assert recorder.calls[0][1] is model
    records = [call[1] for call in recorder.calls if call[0] == "batch"]
    assert [(r["epoch"], r["batch"], r["images"]) for r in records] == [
        (epoch, batch, 12 if batch == 4 else 16) for epoch in (1, 2, 3) for batch in (1, 2, 3, 4)
    ]
    np.testing.assert_allclose([r["lr"] for r in records], optimizer.lr_schedule)
    for record in history:
        assert record["extra"] == record["epoch"]
        mine = [r for r in records if r["epoch"] == record["epoch"]]
        mean = sum(r["loss"] * r["images"] for r in mine) / 60
        assert record["train_loss"] == pytest.approx(mean, rel=1e-6)
    plain = net()
    learn(plain, optimizer=SGD(plain, np.linspace(0.1, 0.2, 12)), validation=DATA)
    assert plain.theta.tobytes() == model.theta.tobytes()


def test_a_batch_hook_reads_the_loss_of_captured_steps(monkeypatch):
    made, init = [], _capture.CapturedStep.__init__
    monkeypatch.setattr(_capture.CapturedStep, "__init__", lambda self, step: (made.append(self), init(self, step))[1])
    learn(net(), [Recorder()], epochs=5)
    assert len(made) == 2  # batches of 16, the last of 12


def test_callbacks_may_use_and_change_everything():
    """Evaluate and predict, switch modes, change rates and layers, between batches and epochs."""
    found = []
    for between in (False, True):
        model = net()
        optimizer = SGD(model, 0.1)

        def change(record, model=model, optimizer=optimizer):
            if (record["epoch"], record.get("batch", 4)) == (1, 4):
                optimizer.lr, model.layers[3].p = 0.02, 0.5
            if record["epoch"] == 2:
                model.layers[3].p = 0.1

        def use(record, model=model):
            evaluate(model, DATA)
            model.predict(np.ones((70, 1, 8, 8)))
            model.eval()
            model.backward(np.ones((2, 4)) + 0 * model.forward(np.ones((2, 1, 8, 8))))

        hooks = [Recorder(batch=use, epoch=use), Recorder(epoch=change)] if between else [Recorder(epoch=change)]
        learn(model, hooks, optimizer=optimizer)
        found.append(model.theta.tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_a_batch_hook_stops_at_its_batch(accumulation_steps):
    recorder, model = Recorder(batch=lambda record: (record["epoch"], record["batch"]) == (2, 2)), net()
    optimizer = SGD(model, 0.1)
    history = learn(model, [recorder], optimizer=optimizer, validation=DATA, accumulation_steps=accumulation_steps)
    assert recorder.names() == ["begin", *["batch"] * 4, "epoch", "batch", "batch", "epoch", "end"]
    assert [record["epoch"] for record in history] == [1, 2]
    assert optimizer.steps == (6 if accumulation_steps == 1 else 3)
    losses = [call[1]["loss"] for call in recorder.calls if call[0] == "batch"]
    assert history[1]["train_loss"] == pytest.approx(np.mean(losses[4:]), rel=1e-6)
    assert history[1]["val_loss"] == evaluate(model, DATA)[0]


@pytest.mark.parametrize("name", ["begin", "batch", "epoch", "end"])
@pytest.mark.parametrize("kind", [ValueError, ZeroDivisionError, KeyboardInterrupt])
def test_a_callback_that_raises_leaves_the_last_complete_epoch(name, kind):
    def fail(*arguments):
        if (
            not arguments
            or not isinstance(arguments[0], dict)
            or (arguments[0]["epoch"], arguments[0].get("batch", 3)) == (2, 3)
        ):
            raise kind("on purpose")

    model, weights = net(), []
    weights.append(model.theta.copy())
    keep = Recorder(epoch=lambda record: weights.append(model.theta.copy()))
    with pytest.raises(kind, match="on purpose"):
        learn(model, [keep, Recorder(**{name: fail})])
    expected = {"begin": 0, "batch": 1, "epoch": 2, "end": 3}[name]
    np.testing.assert_array_equal(model.theta, weights[expected])


def test_stop_of_one_callback_does_not_hide_the_others():
    first, second = Recorder(epoch=lambda record: True), Recorder(epoch=lambda record: "stop")
    assert len(learn(net(), [first, second], on_epoch=lambda record: None)) == 1
    assert second.names()[-2:] == ["epoch", "end"]
    assert len(learn(net(), [second])) == 3


def test_early_stopping_is_a_callback():
    model = net()
    rates = np.concatenate([np.full(4, 0.1), np.full(100, 20.0)])
    stopping, seen = EarlyStopping("train_loss", patience=2, restore_best=model), []
    history = learn(
        model,
        [stopping],
        optimizer=SGD(model, rates),
        epochs=20,
        on_epoch=lambda record: seen.append(model.theta.copy()),
    )
    assert len(history) == stopping.best_epoch + 2 < 20
    np.testing.assert_array_equal(model.theta, seen[stopping.best_epoch - 1])


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (Recorder(), "callbacks must be a list, got"),
        (print, "callbacks must be a list, got"),
        ([print], r"callbacks\[0\] must be an object with a method on_train_begin or .*; a function goes to on_epoch"),
        ([Recorder(), 3], r"callbacks\[1\] must be an object with a method"),
        ([EarlyStopping], r"callbacks\[0\] must be .* got the class EarlyStopping: call it"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, words):
    with pytest.raises(TypeError, match=words):
        learn(net(), callbacks)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", [False, True])
def test_the_checkpoint_holds_the_best_model(tmp_path, averaged):
    path, model = tmp_path / "best.safetensors", net()
    optimizer = SGD(model, [0.1] * 8 + [20.0] * 8)
    best, seen, epochs = ModelCheckpoint(path), [], []

    def after(record):
        seen.append((record["val_loss"], evaluate(load(path), DATA)[0]))
        epochs.append(best.best_epoch)

    learn(
        model, [best], optimizer=EMA(optimizer, 0.5) if averaged else optimizer, epochs=4, validation=DATA,
        on_epoch=after,
    )  # fmt: skip
    losses = [loss for loss, _ in seen]
    assert [saved for _, saved in seen] == list(np.minimum.accumulate(losses))
    assert epochs == [int(np.argmin(losses[:n])) + 1 for n in range(1, 5)]
    assert best.best == min(losses)
    assert best.best_epoch < 4


def test_a_checkpoint_of_every_epoch_needs_no_monitor(tmp_path):
    path, model, same = tmp_path / "last.safetensors", net(), []

    def after(record):
        same.append(np.array_equal(load(path).theta, model.theta))

    learn(model, [ModelCheckpoint(path, save_best_only=False)], on_epoch=after)
    assert same == [True] * 3
    highest = ModelCheckpoint(path, "val_accuracy", "max")
    highest.on_train_begin(net())
    for epoch, value in enumerate([0.1, np.nan, 0.3, 0.2], 1):
        highest.on_epoch_end({"epoch": epoch, "val_accuracy": value})
    assert (highest.best, highest.best_epoch) == (0.3, 3)
    with pytest.raises(ValueError, match="monitor must be one of 'epoch', 'train_loss'"):
        learn(net(), [ModelCheckpoint(path)])


def test_the_csv_file_has_a_row_for_each_epoch(tmp_path):
    path = tmp_path / "history.csv"
    counts = []
    logger = CSVLogger(path)
    history = learn(net(), [logger], on_epoch=lambda record: counts.append(len(path.read_text().splitlines())))
    assert counts == [2, 3, 4]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history
    learn(net(), [logger], epochs=1)  # replaces the file
    assert len(path.read_text().splitlines()) == 2
    learn(net(), [CSVLogger(path, append=True)], epochs=2, validation=DATA)  # a column is new
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].endswith(",val_loss,val_accuracy")
    assert lines[1].endswith(",,")
    assert {line.count(",") for line in lines} == {7}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "history.csv"
    logger = CSVLogger(path)
    learn(net(), [logger], epochs=1)
    before = path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logger.on_epoch_end({"epoch": 2})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard_gets_the_numbers_of_each_epoch(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    class Note:
        def on_epoch_end(self, record):
            record["note"] = "text is left out"

    history = learn(net(), [Note(), TensorBoard(tmp_path / "run")], validation=DATA)
    (path,) = (tmp_path / "run").iterdir()
    content, found = path.read_bytes(), {}
    while content:  # length (8 bytes), checksum (4), event, checksum (4)
        length = int.from_bytes(content[:8], "little")
        event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    for record in history:
        assert found["val_loss", record["epoch"]] == pytest.approx(record["val_loss"], rel=1e-6)
    assert len(found) == 3 * (len(history[0]) - 2)


def logged(path):
    """(id, {(name, step): number}) of a run in a file run-<id>.wandb."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, ended, deadline = {}, False, time.monotonic() + 60
    while not ended:  # wandb's own process writes the file
        assert time.monotonic() < deadline, "the run did not end"
        time.sleep(0.05)
        content = path.read_bytes()[7:]
        while len(content) > 7:  # checksum (4 bytes), length (2), type (1: a whole record), record
            length = int.from_bytes(content[4:6], "little")
            assert content[6] == 1
            record, content = Record.FromString(content[7 : 7 + length]), content[7 + length :]
            ended = ended or record.WhichOneof("record_type") == "exit"
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found |= {(name, row["_step"]): value for name, value in row.items()}
    return path.stem.removeprefix("run-"), found


def runs(folder):
    """`logged` of the runs in a folder, oldest first."""
    return [logged(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)]


@pytest.fixture
def wandb(monkeypatch):
    """wandb, with nothing of the user's settings."""
    module = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    return module


def test_wandb_gets_the_numbers_of_each_epoch_offline(tmp_path, wandb):
    class Note:
        def on_epoch_end(self, record):
            record["note"] = "text is left out"

    callback = WandB("digits", "first", {"lr": 0.1}, log_dir=tmp_path, tags=["small"])
    history = learn(net(), [Note(), callback], validation=DATA)
    assert wandb.run is None
    ((_, found),) = runs(tmp_path)
    for record in history:
        numbers = {name: value for name, value in record.items() if name not in ("epoch", "note")}
        assert {name: found[name, record["epoch"]] for name in numbers} == numbers
    assert {step for _, step in found} == {1, 2, 3}
    assert "note" not in {name for name, _ in found}
    assert repr(callback).startswith("WandB('digits', name='first', config={'lr': 0.1}, log_dir=")
    assert repr(callback).endswith("tags=['small'])")


def test_wandb_uses_the_active_run_and_leaves_it_open(tmp_path, wandb):
    with wandb.init(project="sweep", mode="offline", dir=str(tmp_path)) as run:
        learn(net(), [WandB("digits")], epochs=1)
        assert wandb.run is run
        run.log({"later": 1})
    ((run_id, found),) = runs(tmp_path)
    assert run_id == run.id
    assert ("train_loss", 1) in found


def test_wandb_continues_the_run_of_a_resumed_training(tmp_path, wandb):
    class Interrupt:
        def on_epoch_end(self, record):
            if record["epoch"] == 2:
                raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(net(), [Interrupt(), WandB("digits", log_dir=tmp_path)], checkpoint=checkpoint)
    wandb.run.finish()
    learn(net(), [WandB("digits", log_dir=tmp_path)], checkpoint=TrainingCheckpoint(checkpoint, force=True))
    (first, before), (second, after) = runs(tmp_path)
    assert first == second
    assert [{step for _, step in found} for found in (before, after)] == [{1}, {2, 3}]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: WandB(3), TypeError, "project must be a string, got 3"),
        (lambda path: WandB("p", config=[1]), TypeError, r"config must be a dictionary, got \[1\]"),
        (lambda path: WandB("p", mode="of"), ValueError, "mode must be one of 'offline', 'online', .*got 'of'"),
        (lambda path: WandB("p", log_dir=0), TypeError, "log_dir must be a path, got 0"),
        (lambda path: learn(net(), [WandB("p", log_dir=path / "no")]), FileNotFoundError, "folder does not exist"),
    ],
)
def test_bad_arguments_of_wandb(tmp_path, monkeypatch, make, error, words):
    monkeypatch.setattr(WandB, "_module", lambda self: None)  # not needed for this
    with pytest.raises(error, match=words):
        make(tmp_path)


def test_wandb_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'WandB needs wandb: pip install "tinycnn\[wandb\]"'):
        WandB("digits")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda path: ModelCheckpoint(path / "best.pt"),
            ValueError,
            r"path must be a file name ending in \.safetensors",
        ),
        (lambda path: ModelCheckpoint(3), TypeError, "path must be a path, got 3"),
        (lambda path: ModelCheckpoint(path / "best.safetensors", mode="least"), ValueError, "mode must be one of"),
        (lambda path: ModelCheckpoint(path / "best.safetensors", monitor=1), TypeError, "monitor must be the name"),
        (lambda path: CSVLogger(""), TypeError, "path must be a path"),
        (lambda path: TensorBoard(None), TypeError, "log_dir must be a path"),
        (
            lambda path: learn(net(), [ModelCheckpoint(path / "no" / "a.safetensors")]),
            FileNotFoundError,
            "folder does not exist",
        ),
        (lambda path: learn(net(), [CSVLogger(path / "no" / "a.csv")]), OSError, "folder does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path, make, error, words):
    with pytest.raises(error, match=words):
        make(tmp_path)


def test_tensorboard_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'TensorBoard needs tensorboardX: pip install "tinycnn\[tensorboard\]"'):
        TensorBoard(tmp_path)


def test_a_plateau_lowers_the_rate_from_a_callback():
    model = net()
    optimizer = SGD(model, 0.1)
    plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=100.0, threshold_mode="abs")
    history = learn(model, optimizer=optimizer, on_epoch=lambda record: plateau.step(record["train_loss"]))
    assert [record["lr"] for record in history] == pytest.approx([0.1, 0.1, 0.01])


def test_class_names_go_to_the_model():
    model = net()
    learn(model, train=DeviceDataset(IMAGES, LABELS, class_names=("a", "b", "c", "d")))
    assert model.class_names == ("a", "b", "c", "d")
    for names, error in ((["a"], ValueError), ("abcd", TypeError), ([1, 2, 3, 4], TypeError)):
        with pytest.raises(error, match="class_names must"):
            DeviceDataset(IMAGES, LABELS, class_names=names)
