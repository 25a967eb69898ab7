"""Pictures of results.  Each takes lists of results (see results.py) and returns a matplotlib Figure."""

from typing import Any

import numpy as np

from tinycnn.plot import BLUE, GREEN, GRID, LABEL, MUTED, ORANGE, SMALL, TEXT, TITLE, new_figure
from tinycnn.recipes.results import summarize

COLOURS = {"sigmoid": ORANGE, "tanh": BLUE, "relu": GREEN}

# The paper's figure 5, read from its vector graphics to about 0.02: error in % after each pass.
FIGURE5_TRAIN = (
    4.89, 3.05, 1.77, 1.48, 1.22, 0.91, 0.78, 0.70, 0.57, 0.49, 0.47, 0.44, 0.41, 0.39, 0.39, 0.39, 0.39, 0.36, 0.36,
    0.36, 0.36,
)  # fmt: skip
FIGURE5_TEST = (
    2.65, 2.24, 1.48, 1.43, 1.43, 1.09, 1.04, 1.06, 0.99, 0.96, 0.96, 0.99, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96,
    0.96, 0.96,
)  # fmt: skip
# Figure 6, from the same source: thousands of training images, test error, training error.
FIGURE6 = ((15, 1.68, 0.05), (30, 1.14, 0.31), (60, 0.94, 0.35))
FIGURE6_DISTORTED = 0.82


def _errors(results, part):
    """Error in % by seed and epoch: (seeds, epochs)."""
    histories = [result["history"][f"{part}_accuracy"] for result in results]
    shortest = min(map(len, histories))
    return 100 * (1 - np.array([history[:shortest] for history in histories]))


def _plain(ax, x="", y=""):
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.tick_params(labelsize=LABEL, which="both")
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _band(ax, x, values, colour, label, line="-"):
    """The mean of (seeds, points) as a line, from the least to the largest as a band."""
    ax.plot(x, values.mean(axis=0), line, color=colour, label=label, linewidth=1.6)
    if len(values) > 1:
        ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _percent_axis(ax, values):
    """A logarithmic axis with numbers that read as percentages."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    positive = np.concatenate([np.ravel(v) for v in values])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if not positive.size:  # no error at all
        return
    ax.set_yscale("log")
    low, high = positive.min() / 1.2, positive.max() * 1.2
    ax.set_ylim(low, high)
    ticks = [a * 10.0**b for b in range(-3, 3) for a in ((1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 4, 5, 6, 8))]
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def curves(recipe, results):
    """Error over the epochs, training and held out: mean and range of the seeds."""
    fig = new_figure(6.4, 3.9, layout="constrained")
    ax = fig.add_subplot()
    name = "test set" if results[0]["held_out"] == "test" else "validation set"
    _plain(ax, "epoch", "error (%)")
    ax.set_title(f"{recipe.name}: test accuracy {summarize(results)}", fontsize=LABEL + 1, color=TEXT)
    results = [result for result in results if "diverged" not in result]
    if not results:
        return fig
    train, held_out = _errors(results, "train"), _errors(results, "val")
    x = np.arange(1, train.shape[1] + 1)
    _band(ax, x, train, BLUE, "training set (while training)", "--")
    _band(ax, x, held_out, ORANGE, name)
    _percent_axis(ax, [train, held_out])
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.legend(fontsize=LABEL, frameon=False)
    return fig


def claims(rows):
    """Claimed against obtained.  rows: (recipe, results), of which those with a claim and a result are drawn."""
    rows = [(recipe, found) for recipe, found in rows if found and recipe.claimed is not None]
    fig = new_figure(7.4, 0.27 * len(rows) + 1.3, layout="constrained")
    ax = fig.add_subplot()
    for at, (recipe, found) in enumerate(rows):
        s = summarize(found)
        ax.plot([100 - recipe.claimed, 100 - s.mean], [at, at], color=GRID, linewidth=2, zorder=1)
        ax.plot(
            100 - recipe.claimed, at, "D", color=ORANGE, markersize=5, label="claimed" if at == 0 else None, zorder=3
        )
        ax.plot(
            [100 - 100 * result["accuracy"] for result in found], [at] * len(found), "|", color=BLUE, markersize=9,
            label="obtained, each seed" if at == 0 else None, zorder=2,
        )  # fmt: skip
        ax.plot(100 - s.mean, at, "o", color=BLUE, markersize=5, label="obtained, mean" if at == 0 else None, zorder=4)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator([0.3, 0.5, 1, 2, 5, 10, 20, 50]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_yticks(range(len(rows)), [recipe.name for recipe, _ in rows])
    ax.invert_yaxis()
    _plain(ax, "test error on MNIST (%), logarithmic")
    ax.legend(
        fontsize=SMALL,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.45, 1 + 0.42 / (0.27 * len(rows) + 0.5)),
        ncols=3,
    )
    return fig


def figure5(results):
    """Error against passes, ours over the paper's."""
    fig = new_figure(7.2, 4.2, layout="constrained")
    ax = fig.add_subplot()
    train, test = _errors(results, "train"), _errors(results, "val")
    x = np.arange(1, test.shape[1] + 1)
    _plain(ax, "pass through the training set", "error (%)")
    _band(ax, x, test, ORANGE, f"test, ours (mean and range of {len(results)} seeds)")
    _band(ax, x, train, BLUE, "training, ours", "--")
    passes = np.arange(1, 22)
    ax.plot(passes, FIGURE5_TEST, "o", color=ORANGE, markersize=5, fillstyle="none", label="test, the paper's figure 5")
    ax.plot(passes, FIGURE5_TRAIN, "s", color=BLUE, markersize=4.5, fillstyle="none", label="training, the paper's")
    _percent_axis(ax, [train, test, np.array(FIGURE5_TRAIN), np.array(FIGURE5_TEST)])
    ax.set_xticks([1, 5, 10, 15, 20])
    ax.legend(fontsize=LABEL, frameon=False)
    ax.set_title("LeNet-5 of 1998 on MNIST: error against passes", fontsize=TITLE, color=TEXT)
    return fig


def figure6(by_size, distorted):
    """Error against the size of the training set.  by_size: {thousands of images: results}; distorted: results."""
    fig = new_figure(6.4, 4.2, layout="constrained")
    ax = fig.add_subplot()
    _plain(ax, "training images (thousands)", "error (%)")
    sizes = sorted(size for size, found in by_size.items() if found)
    seen = [np.array([row[1:] for row in FIGURE6])]

    def ours(x, found, part, **looks):
        """Mean and range over the seeds after the last pass."""
        values = [_errors(results, part)[:, -1] for results in found]
        seen.extend(values)
        middle = np.array([v.mean() for v in values])
        spread = [middle - [v.min() for v in values], [v.max() for v in values] - middle]
        ax.errorbar(x, middle, spread, marker=".", markersize=8, capsize=3, linewidth=1.6, **looks)

    for part, colour, name, column in (("val", ORANGE, "test", 1), ("train", BLUE, "training", 2)):
        line, mark = ("-", "o") if part == "val" else ("--", "s")
        ours(sizes, [by_size[size] for size in sizes], part, color=colour, linestyle=line, label=f"{name}, ours")
        paper: dict[str, Any] = {
            "color": colour,
            "fillstyle": "none",
            "markersize": 6,
            "label": f"{name}, the paper's figure 6",
        }
        ax.plot([row[0] for row in FIGURE6], [row[column] for row in FIGURE6], mark, **paper)
    if distorted:
        ours([60], [distorted], "val", color=GREEN, linestyle="", label="test with distortions, ours")
    paper = {"color": GREEN, "fillstyle": "none", "markersize": 6, "label": "test with distortions, the paper's"}
    ax.plot(60, FIGURE6_DISTORTED, "^", **paper)
    _percent_axis(ax, seen)
    ax.set_xticks([15, 30, 60])
    ax.legend(fontsize=SMALL, frameon=False)
    ax.set_title("LeNet-5 of 1998: error against the size of the training set", fontsize=TITLE, color=TEXT)
    return fig


def ladder(rows):
    """One change at a time.  rows: (recipe, results) from 1998 to today."""
    rows = [(recipe, found) for recipe, found in rows if found]
    fig = new_figure(7.6, 0.42 * len(rows) + 1.2, layout="constrained")
    ax = fig.add_subplot()
    _plain(ax, "test error on MNIST (%)")
    means = [100 - summarize(found).mean for _, found in rows]
    ax.barh(range(len(rows)), means, color=BLUE, alpha=0.75, height=0.62)
    for at, (mean, (_, found)) in enumerate(zip(means, rows, strict=True)):
        errors = [100 - 100 * result["accuracy"] for result in found]
        ax.plot(errors, [at] * len(errors), "|", color=TEXT, markersize=9)
        change = f"  ({mean - means[at - 1]:+.2f})" if at else ""
        ax.text(max(errors) + 0.02, at, f"{mean:.2f}{change}", va="center", fontsize=LABEL, color=TEXT)
    names = [rows[0][0].title, *(f"+ {recipe.title}" for recipe, _ in rows[1:])]
    ax.set_yticks(range(len(rows)), names)
    ax.set_xlim(0, max(means) * 1.4)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    counts = sorted({len(found) for _, found in rows})
    seeds = f"{counts[0]} seeds each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds each"
    fig.suptitle(f"From 1998 to today, one change at a time ({seeds}, as ticks)", fontsize=TITLE, color=TEXT)
    return fig


UNITS = ("C1", "C3", "C5", "F6", "out")


def gradient_flow(by_activation):
    """How large gradients are in every layer.  by_activation: {"sigmoid": results with "gradients", ...}"""
    times = ("at the start", "after one epoch", "at the end")
    quantities = (
        ("signal", "dL/da of a unit and an image\n(root mean square)"),
        ("gradient", "gradient of the weights\n(norm)"),
        ("update", "update of the weights in one step\n(share of their norm)"),
    )
    fig = new_figure(9.2, 8.2, layout="constrained")
    axes = fig.subplots(3, 3, sharex=True, sharey="row")
    x = np.arange(len(UNITS))
    for row, (key, words) in zip(axes, quantities, strict=True):
        for ax, when in zip(row, times, strict=True):
            _plain(ax)
            ax.set_yscale("log")
            for name, results in by_activation.items():
                values = np.array([[layer[key] for layer in result["gradients"][when]] for result in results])
                rate = results[0].get("rate")
                label = f"{name}, rate {rate:g}" if rate else name
                _band(ax, x, np.maximum(values, 1e-12), COLOURS[name], label)
                if key == "signal" and when == times[0] and name == "sigmoid":
                    claim = values.mean(axis=0)[-1] * 0.25 ** np.arange(len(x) - 1, -1, -1)
                    ax.plot(x, claim, ":", color=MUTED, label="a quarter a layer")
        row[0].set_ylabel(words, fontsize=LABEL)
    for ax, when in zip(axes[0], times, strict=True):
        ax.set_title(when, fontsize=LABEL + 1, color=TEXT)
    for ax in axes[-1]:
        ax.set_xticks(x, UNITS)
    axes[0, 0].legend(fontsize=SMALL, frameon=False, loc="lower right")
    seeds = min(len(results) for results in by_activation.values())
    fig.suptitle(f"How far gradients reach in LeNet-5 (mean and range of {seeds} seeds)", fontsize=TITLE, color=TEXT)
    return fig


def dead_start(dead, alive):
    """A network that nothing reaches at first, and what wakes it.  dead, alive: results with "gradients"."""
    fig = new_figure(9.2, 3.9, layout="constrained")
    left, right = fig.subplots(1, 2)
    _plain(left, "epoch", "accuracy on the test set (%)")
    _plain(right, "", "gradient of the weights (norm)")
    right.set_yscale("log")
    for results, colour, name in ((dead, ORANGE, "centres from N(0, 1)"), (alive, BLUE, "centres from N(0, 0.2²)")):
        accuracy = 100 - _errors(results, "val")[:, :15]
        _band(left, np.arange(1, accuracy.shape[1] + 1), accuracy, colour, name)
        for when, line in (("at the start", ":"), ("after one epoch", "--"), ("at the end", "-")):
            values = np.array([[layer["gradient"] for layer in result["gradients"][when]] for result in results])
            _band(right, np.arange(len(UNITS)), np.maximum(values, 1e-25), colour, f"{name}, {when}", line)
    left.set_ylim(0, 101)
    left.legend(fontsize=LABEL, frameon=False, loc="lower right")
    right.set_xticks(range(len(UNITS)), UNITS)
    right.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(0.01, 0.66))  # between the two nets
    fig.suptitle("Gaussian outputs: drawn too far apart, the centres see nothing", fontsize=TITLE, color=TEXT)
    return fig


def parallel_coordinates(space, trials):
    """Trials of a sweep as lines through their values.  space: {name: values}; trials: ({name: value}, accuracy)."""
    from matplotlib.colors import Normalize

    fig = new_figure(1.15 * len(space) + 3.0, 4.4, layout="constrained")
    ax = fig.add_subplot()
    accuracies = 100 * np.array([accuracy for _, accuracy in trials])
    low, high = accuracies.min(), accuracies.max()
    scale, colours = Normalize(low, high if high > low else low + 1), _sequential()
    rng = np.random.default_rng(0)
    columns = [*space, "accuracy"]
    for number in np.argsort(accuracies, kind="stable"):
        point, accuracy = trials[number][0], accuracies[number]
        at = [_place(space[name], point[name]) for name in space]
        at = [y + 0.02 * rng.uniform(-1, 1) for y in at] + [(accuracy - low) / ((high - low) or 1)]
        ax.plot(range(len(columns)), at, color=colours(scale(accuracy)), linewidth=1.8, alpha=0.9)
    for column, name in enumerate(space):
        ax.axvline(column, color=GRID, linewidth=0.8, zorder=0)
        for value in space[name]:
            ax.text(
                column, _place(space[name], value), _short(value), ha="center", va="center", fontsize=SMALL, color=TEXT,
                bbox={"color": "white", "alpha": 0.85, "pad": 1.0},
            )  # fmt: skip
    last = len(columns) - 1
    ax.axvline(last, color=TEXT, linewidth=0.8, zorder=0)
    for share in (0, 0.25, 0.5, 0.75, 1):
        ax.text(last + 0.08, share, f"{low + share * (high - low):.2f} %", va="center", fontsize=SMALL, color=TEXT)
    ax.set_xticks(range(len(columns)), [*space, "validation\naccuracy"])
    ax.tick_params(length=0, labelsize=LABEL)
    ax.set(yticks=[], ylim=(-0.08, 1.08), xlim=(-0.5, last + 0.7))
    ax.spines[:].set_visible(False)
    ax.set_title(f"{len(trials)} trials; yellow is best", fontsize=TITLE, color=TEXT)
    return fig


def _sequential():
    from matplotlib import colormaps

    return colormaps["viridis"]


def _place(values, value):
    """Where a value stands among those of its axis, 0 to 1."""
    return values.index(value) / max(len(values) - 1, 1)


def _short(value):
    """A value of a space as a label."""
    return (
        (str(value).rstrip(",").removesuffix("()").split("(")[0] or "none") if isinstance(value, str) else f"{value:g}"
    )


def importances(found):
    """How much each value matters, by Optuna's analysis of variance.  found: {name: share}"""
    fig = new_figure(6.0, 0.36 * len(found) + 1.2, layout="constrained")
    ax = fig.add_subplot()
    names = sorted(found, key=lambda name: found[name])
    ax.barh(names, [found[name] for name in names], color=BLUE, alpha=0.8, height=0.6)
    _plain(ax, "share of the variance of the validation accuracy (functional ANOVA)")
    ax.grid(False, axis="y")
    ax.set_xlim(0, 1)
    return fig
