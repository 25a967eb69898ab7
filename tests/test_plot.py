"""Every picture draws without a warning, shows the expected text, and changes no global state."""

import subprocess
import sys
import threading

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinycnn import plot

FASHION = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "$Bag",
    "Boot",
]
NAN = float("nan")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_global_state_changes():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def words(figure):
    """Every text in a drawn figure."""
    figure.draw_without_rendering()
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text())


def history(epochs, **changes):
    t = np.arange(epochs) / 10
    return [
        {
            "epoch": i + 1,
            "train_loss": float(np.exp(-t[i])),
            "train_accuracy": float(1 - 0.1 * np.exp(-t[i])),
            "val_loss": float(0.2 + np.exp(-t[i])),
            "val_accuracy": float(0.98 - 0.1 * np.exp(-t[i])),
            "lr": 0.1,
            "seconds": 2.0,
            **changes,
        }
        for i in range(epochs)
    ]


def test_matplotlib_loads_only_when_something_is_drawn():
    code = "import sys, tinycnn.plot; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("epochs", [1, 2, 20, 200])
def test_learning_curves(epochs):
    figure = plot.learning_curves(history(epochs))
    text = words(figure)
    assert f"lowest validation error {100 * (0.02 + 0.1 * np.exp(-(epochs - 1) / 10)):.2f} %" in text
    assert f"(epoch {epochs})" in text
    assert "error (%)" in text
    loss, error = figure.axes
    np.testing.assert_allclose(error.lines[0].get_ydata()[0], 10)
    assert loss.lines[0].get_xdata()[-1] == epochs
    for ax in figure.axes:
        ticks = [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)


def test_learning_curves_of_a_run_that_diverged():
    rows = history(5) + [{**row, "epoch": 6, "train_loss": NAN} for row in history(1)]
    assert "loss not finite at epoch 6" in words(plot.learning_curves(rows))
    assert "no finite values" in words(plot.learning_curves([{"train_loss": NAN}, {"val_loss": float("inf")}]))


def test_learning_curves_with_gaps_and_perfect_epochs():
    rows = history(30)
    for row in rows[::2]:
        del row["val_loss"]
        row["val_accuracy"] = None
    for row in rows[27:]:
        row["train_accuracy"] = 1.0  # error 0 is not on a log axis
    text = words(plot.learning_curves(rows))
    assert "training: 0" in text
    assert "not finite" not in text


def test_learning_curves_draw_into_a_given_figure():
    parent = Figure(layout="constrained")
    part = parent.subfigures(1, 2)[1]
    assert plot.learning_curves(history(3), fig=part) is part
    assert len(part.axes) == 2
    with pytest.raises(ValueError, match="at least one epoch"):
        plot.learning_curves([])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.25, "1.2 s"), (59.97, "1 min 0 s"), (125, "2 min 5 s"), (3 * 3600 + 61, "3 h 1 min")],
)
def test_durations(seconds, text):
    assert f"1 epoch in {text}" in words(plot.learning_curves(history(1, seconds=seconds)))


# --------------------------------------------------------------------------- mistakes


def test_confusion():
    cm = np.array([[95, 5], [1, 99]])
    ax = plot.confusion(cm, ["cat", "dog"])
    assert isinstance(ax, Axes)
    assert ax.get_title() == "97.00 % correct, 6 of 200 wrong"
    assert sorted(text.get_text() for text in ax.texts) == ["1", "5", "95", "99"]
    image = ax.images[0]
    assert image.norm.vmax == 0.05  # the worst error, not the diagonal, sets the scale
    np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()), np.eye(2, dtype=bool))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize("classes", [1, 10, 26, 100])
def test_confusion_of_any_size(classes, rng):
    cm = rng.poisson(1, (classes, classes)) + 50 * np.eye(classes, dtype=int)
    ax = plot.confusion(cm, FASHION if classes == 10 else None)
    assert "% correct" in words(ax.figure)
    assert len(ax.texts) == (classes**2 if classes <= 30 else 0)


def test_confusion_extremes():
    perfect = plot.confusion(np.eye(3, dtype=int) * 7)
    assert "100.00 % correct, 0 of 21 wrong" in words(perfect.figure)
    assert len(perfect.figure.axes) == 1  # no colour bar without errors
    assert "0 of 0 wrong" in words(plot.confusion(np.zeros((2, 2), int)).figure)
    own_ax = Figure().add_subplot()
    assert plot.confusion([[1, 0], [2, 3]], ax=own_ax) is own_ax


def test_mistakes_most_confident_first(rng):
    images = rng.random((6, 28, 28))
    true, predicted = np.array([0, 1, 2, 3, 4, 5]), np.array([0, 2, 2, 4, 5, 6])
    figure = plot.mistakes(images, true, predicted, [0.9, 0.5, 0.9, 0.99, 0.7, 0.6], limit=3)
    assert "3 of 4 mistakes shown" in words(figure)
    captions = [tuple(text.get_text() for text in ax.texts) for ax in figure.axes]
    assert captions == [
        ("true 3", "predicted 4, 99.0 %"),
        ("true 4", "predicted 5, 70.0 %"),
        ("true 5", "predicted 6, 60.0 %"),
    ]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), images[3])


@pytest.mark.parametrize(
    ("shape", "dtype", "count"),
    [
        ((28, 28), np.uint8, 500),
        ((1, 28, 28), np.float32, 1),
        ((1, 28, 28), np.uint8, 1),
        ((3, 32, 32), np.uint8, 9),
        ((3, 32, 32), np.float32, 1),
    ],
)
def test_mistakes_of_any_kind(shape, dtype, count, rng):
    images = (255 * rng.random((count, *shape))).astype(dtype)
    figure = plot.mistakes(images, np.zeros(count, int), np.full(count, 8), rng.random(count), FASHION)
    text = words(figure)
    assert f"{min(count, 40)} of {count} mistake" in text
    assert "predicted $Bag" in text  # a dollar sign is no formula


def test_predictions_in_the_order_of_the_images(rng):
    images, true, predicted = rng.random((5, 6, 6)), np.arange(5), np.array([0, 1, 2, 9, 4])
    figure = plot.predictions(images, true, predicted, np.full(5, 0.5), limit=4)
    assert "the first 4 images" in words(figure)
    assert "3 of them correct" in words(figure)
    colours = [text.get_color() for ax in figure.axes for text in ax.texts if text.get_text().startswith("predicted")]
    assert colours == [plot.BLUE] * 3 + [plot.ORANGE]


def test_no_mistakes():
    figure = plot.mistakes(np.zeros((1234, 2, 2)), np.zeros(1234, int), np.zeros(1234, int), np.ones(1234))
    assert "No mistakes" in words(figure)
    assert "all 1,234 images correct" in words(figure)


# --------------------------------------------------------------------- inside the network


@pytest.mark.parametrize("shape", [(6, 1, 5, 5), (16, 6, 5, 5), (1, 1, 1, 1), (8, 4, 1, 7), (1, 40, 3, 3)])
def test_filters(shape, rng):
    figure = plot.filters(rng.normal(size=shape), title="C1")
    O, C, KH, KW = shape
    assert f"{O} × {C} kernels of {KH} × {KW}" in words(figure)
    assert ("shown" in words(figure)) == (C > 16)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high < 0


def test_filters_put_outputs_in_columns():
    weight = np.arange(6.0).reshape(3, 2, 1, 1)  # [o, c] = 2 o + c
    image = plot.filters(weight).axes[0].images[0].get_array()
    height, width = image.shape
    middles = image[height // 4 :: height // 2, width // 6 :: width // 3]
    np.testing.assert_array_equal(middles[:2, :3], [[0, 2, 4], [1, 3, 5]])


def test_filters_of_a_large_a_dead_and_a_diverged_layer(rng):
    assert "the first 32 × 16 shown" in words(plot.filters(rng.normal(size=(256, 128, 3, 3))))
    words(plot.filters(np.zeros((2, 2, 3, 3))))
    assert "not finite: 2" in words(plot.filters(np.array([1, NAN, np.inf, 2]).reshape(1, 1, 2, 2)))


@pytest.mark.parametrize("image", [np.zeros((28, 28)), np.ones((1, 28, 28), np.uint8), np.eye(32)[None] * [[[1]]] * 3])
def test_feature_maps(image, rng):
    maps = [rng.normal(size=shape) for shape in [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120, 1, 1)]]
    figure = plot.feature_maps(image, maps, ["C1", "S2", "C3", "S4", "C5"])
    text = words(figure)
    for label in ("input", "C1 | 6 × 28 × 28", "S4 | 16 × 5 × 5", "C5 | 120 × 1 × 1\nfirst 32"):
        assert label in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.confusion([1, 2]), "cm must be a square"),
        (lambda: plot.confusion([[0.5]]), "cm must be integer"),
        (lambda: plot.confusion([[1]], ["a", "b"]), "class_names must be 1"),
        (lambda: plot.mistakes(np.zeros((2, 2)), [0], [1], [1.0]), "images must be"),
        (lambda: plot.mistakes(np.zeros((1, 2, 2)), [0, 1], [1], [1.0]), r"true must have shape \(1,\)"),
        (lambda: plot.mistakes(np.zeros((1, 2, 2)), [0], [1.0], [1.0]), "predicted must be integer"),
        (lambda: plot.mistakes(np.zeros((1, 2, 2)), [0], [1], [1.0], ["a"]), "class_names must be 2"),
        (lambda: plot.mistakes(np.zeros((1, 2, 2)), [0], [1], [1.0], limit=0), "limit must be"),
        (lambda: plot.filters(np.zeros((6, 5, 5))), "weight must have shape"),
        (lambda: plot.feature_maps(np.zeros((2, 2)), [np.zeros((1, 2, 2))], []), "names must be 1"),
        (lambda: plot.feature_maps(np.zeros((2, 2)), [], []), "names must be some"),
        (lambda: plot.feature_maps(np.zeros((2, 2)), [np.zeros((2, 2))], ["C1"]), "maps .* 'C1'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["figure", "axes", "axes in a subfigure", "subfigure"])
def test_save(tmp_path, kind):
    figure = Figure(figsize=(4, 2))
    part = figure.subfigures(1, 2)[0]
    ax = part.add_subplot() if "sub" in kind else figure.add_subplot()
    target = {"figure": figure, "subfigure": part}.get(kind, ax)
    plot.save(target, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (600, 300)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_saved_pictures_are_small(tmp_path, rng):
    plot.save(plot.filters(rng.normal(size=(256, 128, 7, 7))), tmp_path / "a.png")
    plot.save(Figure(figsize=(90, 10)), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size < 500_000
    assert int.from_bytes((tmp_path / "b.png").read_bytes()[16:20], "big") == 2400


def test_the_old_picture_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    figure = Figure()

    def fail(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        plot.save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"ending in \.png, \.svg or \.pdf"):
        plot.save(figure, tmp_path / "a.jpg")


def test_threads(tmp_path):
    def work(k):
        plot.save(plot.confusion(np.eye(3, dtype=int)), tmp_path / f"{k}.png")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
