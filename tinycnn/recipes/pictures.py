"""Pictures of results. Each function takes lists of results (see results.py) and returns a matplotlib Figure."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinycnn._typing import Array
from tinycnn.plot import BLUE, GREEN, GRID, LABEL, MUTED, ORANGE, SMALL, TEXT, TITLE, new_figure
from tinycnn.recipes import Point, Recipe
from tinycnn.recipes.results import Result, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[tuple[Recipe, Sequence[Result]]]

COLOURS = {"sigmoid": ORANGE, "tanh": BLUE, "relu": GREEN}

# Figure 5 of LeCun et al. 1998, read from its vector graphics to about 0.02: error in % after each epoch.
FIGURE5_TRAIN = (
    4.89, 3.05, 1.77, 1.48, 1.22, 0.91, 0.78, 0.70, 0.57, 0.49, 0.47, 0.44, 0.41, 0.39, 0.39, 0.39, 0.39, 0.36, 0.36,
    0.36, 0.36,
)  # fmt: skip
FIGURE5_TEST = (
    2.65, 2.24, 1.48, 1.43, 1.43, 1.09, 1.04, 1.06, 0.99, 0.96, 0.96, 0.99, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96,
    0.96, 0.96,
)  # fmt: skip
# Figure 6 of the same paper: thousands of training images, test error in %, training error in %.
FIGURE6 = ((15, 1.68, 0.05), (30, 1.14, 0.31), (60, 0.94, 0.35))
FIGURE6_DISTORTED = 0.82
# Figure 9: test error in % of each classifier; [deslant], [16x16] and [dist] as in the paper.
FIGURE9 = {
    "linear": 12.0, "[deslant] linear": 8.4, "pairwise linear": 7.6, "3 nearest neighbours": 5.0,
    "[deslant] nearest neighbours": 2.4, "40 PCA + quadratic": 3.3, "1000 RBF + linear": 3.6,
    "[16x16] tangent distance": 1.1, "SVM, degree 4": 1.1, "reduced SVM, degree 5": 1.0,
    "[dist] virtual SVM, degree 9": 0.8,
    "28x28-300-10": 4.7, "[dist] 28x28-300-10": 3.6, "[deslant] 20x20-300-10": 1.6, "28x28-1000-10": 4.5,
    "[dist] 28x28-1000-10": 3.8, "28x28-300-100-10": 3.05, "[dist] 28x28-300-100-10": 2.5, "28x28-500-150-10": 2.95,
    "[dist] 28x28-500-150-10": 2.45, "[16x16] LeNet-1": 1.7, "LeNet-4": 1.1, "LeNet-4 with local learning": 1.1,
    "LeNet-4 with nearest neighbours": 1.1, "LeNet-5": 0.95, "[dist] LeNet-5": 0.8, "[dist] boosted LeNet-4": 0.7,
}  # fmt: skip
# Figure 10: images in % to reject for 0.5 % error.  The paper has none for LeNet-5.
FIGURE10 = {
    "[16x16] LeNet-1": 3.7,
    "LeNet-4": 1.8,
    "LeNet-5": None,
    "[dist] LeNet-5": None,
    "[dist] boosted LeNet-4": 0.5,
}
# Learning rates eta / (mu + h) of the first epoch, section III.B, and the rows of the study.
PAPER_RATES = 7e-5, 0.016
STUDY_EPOCHS = 1, 5, 10, 20


def _errors(results: Sequence[Result], part: str) -> Array:
    """Error in % by seed and epoch: (seeds, epochs); part: "train" or "val"."""
    histories = [result["history"][f"{part}_accuracy"] for result in results]
    shortest = min(map(len, histories))
    errors: Array = 100 * (1 - np.array([history[:shortest] for history in histories]))
    return errors


def _style(ax: "Axes", x: str = "", y: str = "") -> None:
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.tick_params(labelsize=LABEL, which="both")
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _band(ax: "Axes", x: Array, values: Array, colour: str, label: str, line: str = "-") -> None:
    """The mean of (seeds, points) as a line, minimum to maximum as a band."""
    ax.plot(x, values.mean(axis=0), line, color=colour, label=label, linewidth=1.6)
    if len(values) > 1:
        ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _log_axis(ax: "Axes", values: Sequence[Array]) -> None:
    """A logarithmic y axis with plain numbers; linear if no value is positive."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    positive = np.concatenate([np.ravel(v) for v in values])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if not positive.size:
        return
    ax.set_yscale("log")
    low, high = positive.min() / 1.2, positive.max() * 1.2
    ax.set_ylim(low, high)
    ticks = [a * 10.0**b for b in range(-3, 3) for a in ((1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 4, 5, 6, 8))]
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def curves(recipe: Recipe, results: Sequence[Result]) -> "Figure":
    """Training and held-out error over the epochs: mean and range of the seeds."""
    fig = new_figure(6.4, 3.9, layout="constrained")
    ax = fig.add_subplot()
    name = "test set" if results[0]["held_out"] == "test" else "validation set"
    _style(ax, "epoch", "error (%)")
    ax.set_title(f"{recipe.name}: test accuracy {summarize(results)}", fontsize=LABEL + 1, color=TEXT)
    results = [result for result in results if "diverged" not in result]
    if not results:
        return fig
    train, held_out = _errors(results, "train"), _errors(results, "val")
    x = np.arange(1, train.shape[1] + 1)
    _band(ax, x, train, BLUE, "training set (while training)", "--")
    _band(ax, x, held_out, ORANGE, name)
    _log_axis(ax, [train, held_out])
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.legend(fontsize=LABEL, frameon=False)
    return fig


def claims(rows: Rows) -> "Figure":
    """Claimed and obtained error of each recipe. Rows without a claim or a result are left out."""
    rows = [(recipe, found) for recipe, found in rows if found and recipe.claimed is not None]
    fig = new_figure(7.4, 0.27 * len(rows) + 1.3, layout="constrained")
    ax = fig.add_subplot()
    for y, (recipe, found) in enumerate(rows):
        claimed, obtained = 100 - (recipe.claimed or 0), 100 - summarize(found).mean
        seeds = [100 - 100 * result["accuracy"] for result in found]
        label = y == 0  # one entry of the legend each
        ax.plot([claimed, obtained], [y, y], color=GRID, linewidth=2, zorder=1)
        ax.plot(claimed, y, "D", color=ORANGE, markersize=5, label="claimed" if label else None, zorder=3)
        ax.plot(
            seeds, [y] * len(seeds), "|", color=BLUE, markersize=9, label="obtained, each seed" if label else None,
            zorder=2,
        )  # fmt: skip
        ax.plot(obtained, y, "o", color=BLUE, markersize=5, label="obtained, mean" if label else None, zorder=4)
    _log_axis_x(ax, (0.3, 0.5, 1, 2, 5, 10, 20, 50))
    ax.set_yticks(range(len(rows)), [recipe.name for recipe, _ in rows])
    ax.invert_yaxis()
    _style(ax, "test error on MNIST (%), logarithmic")
    above = (0.45, 1 + 0.42 / (0.27 * len(rows) + 0.5))
    ax.legend(fontsize=SMALL, frameon=False, loc="upper center", bbox_to_anchor=above, ncols=3)
    return fig


def figure5(results: Sequence[Result]) -> "Figure":
    """Error over the epochs, ours and the paper's figure 5."""
    fig = new_figure(7.2, 4.2, layout="constrained")
    ax = fig.add_subplot()
    train, test = _errors(results, "train"), _errors(results, "val")
    x = np.arange(1, test.shape[1] + 1)
    _style(ax, "epoch", "error (%)")
    _band(ax, x, test, ORANGE, f"test, ours (mean and range of {len(results)} seeds)")
    _band(ax, x, train, BLUE, "training, ours", "--")
    epochs = np.arange(1, 22)
    ax.plot(
        epochs, FIGURE5_TEST, "o", color=ORANGE, markersize=5, fillstyle="none", label="test, figure 5 of the paper"
    )
    ax.plot(epochs, FIGURE5_TRAIN, "s", color=BLUE, markersize=4.5, fillstyle="none", label="training, figure 5")
    _log_axis(ax, [train, test, np.array(FIGURE5_TRAIN), np.array(FIGURE5_TEST)])
    ax.set_xticks([1, 5, 10, 15, 20])
    ax.legend(fontsize=LABEL, frameon=False)
    ax.set_title("LeNet-5 of 1998 on MNIST: error over the epochs", fontsize=TITLE, color=TEXT)
    return fig


def figure6(by_size: Mapping[int, Sequence[Result]], distorted: Sequence[Result]) -> "Figure":
    """Error against the size of the training set, ours and the paper's figure 6.

    by_size: {thousands of images: results}    distorted: results with random distortions, drawn if there are any
    """
    fig = new_figure(6.4, 4.2, layout="constrained")
    ax = fig.add_subplot()
    _style(ax, "training images (thousands)", "error (%)")
    sizes = sorted(size for size, found in by_size.items() if found)
    drawn = [np.array([row[1:] for row in FIGURE6])]

    def ours(x: Sequence[int], found: Sequence[Sequence[Result]], part: str, **style: Any) -> None:
        """Mean and range over the seeds after the last epoch."""
        values = [_errors(results, part)[:, -1] for results in found]
        drawn.extend(values)
        mean = np.array([v.mean() for v in values])
        spread = [mean - [v.min() for v in values], [v.max() for v in values] - mean]
        ax.errorbar(x, mean, spread, marker=".", markersize=8, capsize=3, linewidth=1.6, **style)

    for part, colour, name, column in (("val", ORANGE, "test", 1), ("train", BLUE, "training", 2)):
        line, mark = ("-", "o") if part == "val" else ("--", "s")
        ours(sizes, [by_size[size] for size in sizes], part, color=colour, linestyle=line, label=f"{name}, ours")
        x, y = [row[0] for row in FIGURE6], [row[column] for row in FIGURE6]
        ax.plot(x, y, mark, color=colour, fillstyle="none", markersize=6, label=f"{name}, figure 6 of the paper")
    if distorted:
        ours([60], [distorted], "val", color=GREEN, linestyle="", label="test with distortions, ours")
    paper: dict[str, Any] = {"color": GREEN, "fillstyle": "none", "markersize": 6}
    ax.plot(60, FIGURE6_DISTORTED, "^", label="test with distortions, the paper's", **paper)
    _log_axis(ax, drawn)
    ax.set_xticks([15, 30, 60])
    ax.legend(fontsize=SMALL, frameon=False)
    ax.set_title("LeNet-5 of 1998: error against the size of the training set", fontsize=TITLE, color=TEXT)
    return fig


def study1998(rows: Rows) -> "Figure":
    """What choices that the paper leaves open do: learning rates of the first epoch, training and validation error.

    rows: (recipe, results with "step_sizes")
    """
    rows = [(recipe, found) for recipe, found in rows if found]
    fig = new_figure(10.5, 0.5 * len(rows) + 1.7, layout="constrained")
    rates, training, validation = fig.subplots(1, 3, sharey=True, width_ratios=(1, 1.3, 1))
    _style(rates, "smallest and largest learning rate,\nfirst epoch")
    _style(training, "training error (%) after epochs " + ", ".join(map(str, STUDY_EPOCHS)))
    _style(validation, "validation error (%), last epoch")
    rates.set_xscale("log")
    rates.axvspan(*PAPER_RATES, color=ORANGE, alpha=0.25, linewidth=0, label="the paper's")
    for epoch in STUDY_EPOCHS:
        label = "the paper's" if epoch == STUDY_EPOCHS[0] else None
        training.axvline(FIGURE5_TRAIN[epoch - 1], color=ORANGE, linewidth=1.2, label=label)
    validation.axvline(FIGURE5_TEST[-1], color=ORANGE, linewidth=1.2, label="the paper's, test set")
    validation_errors = [_errors(found, "val")[:, -1] for _, found in rows]
    everything = np.array([FIGURE5_TEST[-1], *np.concatenate(validation_errors)])
    validation.set_xlim(everything.min() / 1.1, everything.max() * 1.1)
    for y, (_, found) in enumerate(rows):
        low, high = np.array([result["step_sizes"][0] for result in found]).mean(axis=0)
        rates.plot([low, high], [y, y], "|-", color=BLUE, linewidth=1.6, markersize=8)
        errors = _errors(found, "train")
        for epoch in STUDY_EPOCHS:
            if epoch <= errors.shape[1]:
                values = errors[:, epoch - 1]
                training.plot(values, [y] * len(values), "|", color=BLUE, markersize=8)
                training.plot(values.mean(), y, "o", color=BLUE, markersize=4)
        values = validation_errors[y]
        validation.plot(values, [y] * len(values), "|", color=BLUE, markersize=8)
        validation.plot(values.mean(), y, "o", color=BLUE, markersize=4)
    labels = [f"{r.name}, {len(found)} seed{'s' * (len(found) > 1)}\n{_wrapped(r.title, 44)}" for r, found in rows]
    rates.set_yticks(range(len(rows)), labels, fontsize=SMALL)
    rates.set_ylim(len(rows) - 0.5, -0.5)
    _log_axis_x(training, (0.3, 0.5, 1, 2, 5, 10, 20))
    _log_axis_x(validation, (1, 1.2, 1.5, 2, 3, 5))
    for ax in (rates, training, validation):
        ax.legend(fontsize=SMALL, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    fig.suptitle("LeNet-5 of 1998: choices that the paper leaves open", fontsize=TITLE, color=TEXT)
    return fig


def figure9(errors: Mapping[str, Sequence[float]]) -> "Figure":
    """Test errors of the classifiers in the paper's figure 9, and ours.  errors: {name in FIGURE9: in %, by seed}"""
    return _beside_the_paper(FIGURE9, errors, "test error on MNIST (%)", "Classifiers of 1998 (figure 9 of the paper)")


def figure10(rejected: Mapping[str, Sequence[float]]) -> "Figure":
    """Images to reject for 0.5 % error, the paper's figure 10 and ours.  rejected: {name in FIGURE10: in %, by seed}"""
    label = "images rejected for 0.5 % error of the others (%)"
    return _beside_the_paper(FIGURE10, rejected, label, "Rejection (figure 10 of the paper)")


def _beside_the_paper(
    paper: Mapping[str, float | None], ours: Mapping[str, Sequence[float]], label: str, title: str
) -> "Figure":
    """Two bars for each name in `paper`: its value, and the mean of ours with a tick for each seed."""
    fig = new_figure(7.6, 0.34 * len(paper) + 1.4, layout="constrained")
    ax = fig.add_subplot()
    _style(ax, label)
    for y, (name, value) in enumerate(paper.items()):
        if value is not None:
            ax.barh(y - 0.2, value, 0.38, color=ORANGE, alpha=0.75, label="the paper" if y == 0 else None)
            ax.text(value, y - 0.2, f" {value:g}", va="center", fontsize=SMALL, color=TEXT)
        if found := ours.get(name):
            ax.barh(y + 0.2, np.mean(found), 0.38, color=BLUE, alpha=0.75)
            ax.plot(found, [y + 0.2] * len(found), "|", color=TEXT, markersize=6)
            ax.text(max(found), y + 0.2, f"  {np.mean(found):.2f}", va="center", fontsize=SMALL, color=TEXT)
    ax.barh(0, 0, color=BLUE, alpha=0.75, label="ours: mean, and each seed as a tick")
    ax.set_yticks(range(len(paper)), list(paper), fontsize=LABEL)
    ax.set_xlim(0, 1.1 * max([v for v in paper.values() if v is not None] + [max(found) for found in ours.values()]))
    ax.set_ylim(len(paper) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.legend(fontsize=LABEL, frameon=False, loc="lower right")
    fig.suptitle(title, fontsize=TITLE, color=TEXT)
    return fig


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _log_axis_x(ax: "Axes", ticks: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def ladder(rows: Rows) -> "Figure":
    """Error after each of a sequence of changes. rows: (recipe, results) from 1998 to today."""
    rows = [(recipe, found) for recipe, found in rows if found]
    fig = new_figure(7.6, 0.42 * len(rows) + 1.2, layout="constrained")
    ax = fig.add_subplot()
    _style(ax, "test error on MNIST (%)")
    means = [100 - summarize(found).mean for _, found in rows]
    ax.barh(range(len(rows)), means, color=BLUE, alpha=0.75, height=0.62)
    for y, (mean, (_, found)) in enumerate(zip(means, rows, strict=True)):
        errors = [100 - 100 * result["accuracy"] for result in found]
        ax.plot(errors, [y] * len(errors), "|", color=TEXT, markersize=9)
        change = f"  ({mean - means[y - 1]:+.2f})" if y else ""
        ax.text(max(errors) + 0.02, y, f"{mean:.2f}{change}", va="center", fontsize=LABEL, color=TEXT)
    names = [rows[0][0].title, *(f"+ {recipe.title}" for recipe, _ in rows[1:])]
    ax.set_yticks(range(len(rows)), names)
    ax.set_xlim(0, max(means) * 1.4)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    counts = sorted({len(found) for _, found in rows})
    seeds = f"{counts[0]} seeds each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds each"
    fig.suptitle(f"From 1998 to today, one change at a time ({seeds}, as ticks)", fontsize=TITLE, color=TEXT)
    return fig


LAYERS = ("C1", "C3", "C5", "F6", "out")


def gradient_flow(by_activation: Mapping[str, Sequence[Result]]) -> "Figure":
    """Size of the gradients in every layer. by_activation: {"sigmoid": results with "gradients", ...}"""
    times = ("at the start", "after one epoch", "at the end")
    quantities = (
        ("signal", "dL/da of one unit and image\n(root mean square)"),
        ("gradient", "gradient of the weights\n(norm)"),
        ("update", "update of the weights in one step\n(relative to their norm)"),
    )
    fig = new_figure(9.2, 8.2, layout="constrained")
    axes = fig.subplots(3, 3, sharex=True, sharey="row")
    x = np.arange(len(LAYERS))
    for row, (key, label) in zip(axes, quantities, strict=True):
        for ax, when in zip(row, times, strict=True):
            _style(ax)
            ax.set_yscale("log")
            for name, results in by_activation.items():
                values = np.array([[layer[key] for layer in result["gradients"][when]] for result in results])
                rate = results[0].get("rate")
                curve = f"{name}, learning rate {rate:g}" if rate else name
                _band(ax, x, np.maximum(values, 1e-12), COLOURS[name], curve)
                if key == "signal" and when == times[0] and name == "sigmoid":
                    bound = values.mean(axis=0)[-1] * 0.25 ** np.arange(len(x) - 1, -1, -1)
                    ax.plot(x, bound, ":", color=MUTED, label="factor 1/4 per layer")
        row[0].set_ylabel(label, fontsize=LABEL)
    for ax, when in zip(axes[0], times, strict=True):
        ax.set_title(when, fontsize=LABEL + 1, color=TEXT)
    for ax in axes[-1]:
        ax.set_xticks(x, LAYERS)
    axes[0, 0].legend(fontsize=SMALL, frameon=False, loc="lower right")
    seeds = min(len(results) for results in by_activation.values())
    fig.suptitle(f"Gradients by layer in LeNet-5 (mean and range of {seeds} seeds)", fontsize=TITLE, color=TEXT)
    return fig


def dead_start(dead: Sequence[Result], alive: Sequence[Result]) -> "Figure":
    """Training with vanishing initial gradients, and with a repaired start. dead, alive: results with "gradients"."""
    fig = new_figure(9.2, 3.9, layout="constrained")
    left, right = fig.subplots(1, 2)
    _style(left, "epoch", "accuracy on the test set (%)")
    _style(right, "", "gradient of the weights (norm)")
    right.set_yscale("log")
    for results, colour, name in ((dead, ORANGE, "centres from N(0, 1)"), (alive, BLUE, "centres from N(0, 0.2²)")):
        accuracy = 100 - _errors(results, "val")[:, :15]
        _band(left, np.arange(1, accuracy.shape[1] + 1), accuracy, colour, name)
        for when, line in (("at the start", ":"), ("after one epoch", "--"), ("at the end", "-")):
            values = np.array([[layer["gradient"] for layer in result["gradients"][when]] for result in results])
            _band(right, np.arange(len(LAYERS)), np.maximum(values, 1e-25), colour, f"{name}, {when}", line)
    left.set_ylim(0, 101)
    left.legend(fontsize=LABEL, frameon=False, loc="lower right")
    right.set_xticks(range(len(LAYERS)), LAYERS)
    right.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(0.01, 0.66))  # between the curves
    fig.suptitle("Gaussian outputs: distant centres make the gradients vanish at the start", fontsize=TITLE, color=TEXT)
    return fig


def parallel_coordinates(space: Mapping[str, list[Any]], trials: Sequence[tuple[Point, float]]) -> "Figure":
    """Trials of a sweep as lines through their values. space: {name: values}; trials: (point, accuracy)."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    fig = new_figure(1.15 * len(space) + 3.0, 4.4, layout="constrained")
    ax = fig.add_subplot()
    accuracies = 100 * np.array([accuracy for _, accuracy in trials])
    low, high = accuracies.min(), accuracies.max()
    scale, colours = Normalize(low, high if high > low else low + 1), colormaps["viridis"]
    rng = np.random.default_rng(0)
    columns = [*space, "accuracy"]
    for number in np.argsort(accuracies, kind="stable"):
        point, accuracy = trials[number][0], accuracies[number]
        y = [_position(space[name], point[name]) for name in space]
        y = [value + 0.02 * rng.uniform(-1, 1) for value in y] + [(accuracy - low) / ((high - low) or 1)]
        ax.plot(range(len(columns)), y, color=colours(scale(accuracy)), linewidth=1.8, alpha=0.9)
    for column, name in enumerate(space):
        ax.axvline(column, color=GRID, linewidth=0.8, zorder=0)
        for value in space[name]:
            ax.text(
                column, _position(space[name], value), _label(value), ha="center", va="center", fontsize=SMALL,
                color=TEXT, bbox={"color": "white", "alpha": 0.85, "pad": 1.0},
            )  # fmt: skip
    last = len(columns) - 1
    ax.axvline(last, color=TEXT, linewidth=0.8, zorder=0)
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        ax.text(
            last + 0.08, fraction, f"{low + fraction * (high - low):.2f} %", va="center", fontsize=SMALL, color=TEXT
        )
    ax.set_xticks(range(len(columns)), [*space, "validation\naccuracy"])
    ax.tick_params(length=0, labelsize=LABEL)
    ax.set(yticks=[], ylim=(-0.08, 1.08), xlim=(-0.5, last + 0.7))
    ax.spines[:].set_visible(False)
    ax.set_title(f"{len(trials)} trials; yellow is best", fontsize=TITLE, color=TEXT)
    return fig


def _position(values: list[Any], value: Any) -> float:
    """Position of a value on its axis, 0 to 1."""
    return values.index(value) / max(len(values) - 1, 1)


def _label(value: Any) -> str:
    """A value of a space as a label."""
    return f"{value:g}" if not isinstance(value, str) else value.rstrip(",").partition("(")[0] or "none"


def importances(importance: Mapping[str, float]) -> "Figure":
    """Importance of each hyperparameter by Optuna's functional ANOVA. importance: {name: fraction}"""
    fig = new_figure(6.0, 0.36 * len(importance) + 1.2, layout="constrained")
    ax = fig.add_subplot()
    names = sorted(importance, key=lambda name: importance[name])
    ax.barh(names, [importance[name] for name in names], color=BLUE, alpha=0.8, height=0.6)
    _style(ax, "fraction of the variance of the validation accuracy (functional ANOVA)")
    ax.grid(False, axis="y")
    ax.set_xlim(0, 1)
    return fig
