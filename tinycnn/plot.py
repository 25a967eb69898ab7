"""Pictures of a training run: curves, confusion matrix, mistakes, filters, feature maps.

The functions draw into new figures or the caller's, never through pyplot: no figures to close, no global style, safe on
a server and in threads.  The first call imports matplotlib.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tinycnn._files import atomic_write
from tinycnn._typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000")
TEXT, MUTED, GRID, GAP = "#222222", "#767676", "#D9D9D9", "#A6A6A6"
SIGNED = "RdBu_r"  # blue < 0 < red, 0 is white
TITLE, LABEL, SMALL = 11.0, 9.0, 7.5  # font sizes, points


# ---------------------------------------------------------------------------- training


def learning_curves(history: Sequence[Mapping[str, Any]], *, fig: "Figure | None" = None) -> "Figure":
    """Loss, and error or mean absolute error, over the epochs, training against validation.

    history: one dict for each epoch with any of the keys epoch (default: 1, 2, ...), train_loss, val_loss, the metric
    that `fit` records (accuracy or binary_accuracy, 0 ... 1, or mae, each with train_ and val_), seconds.  Keys may be
    missing in some epochs.
    fig: a Figure or SubFigure to draw into; by default a new one.
    An axis is logarithmic if its values span more than a factor of 3.  The first epoch with a NaN or infinite loss is
    marked.
    Raises ValueError for an empty history.
    """
    if len(history) == 0:
        raise ValueError("history must have at least one epoch, got none")
    fig = new_figure(9.0, 3.9, layout="constrained") if fig is None else fig
    epoch = np.array([record.get("epoch", i + 1) for i, record in enumerate(history)], float)
    losses = {part: _column(history, f"{part}_loss") for part in ("train", "val")}
    metrics = [name for name in ("accuracy", "binary_accuracy", "mae") if any(f"train_{name}" in r for r in history)]
    metric = metrics[0] if metrics else "accuracy"
    errors = {part: _column(history, f"{part}_{metric}") for part in ("train", "val")}
    if metric != "mae":
        errors = {part: 100 * (1 - values) for part, values in errors.items()}
    unit = {"accuracy": " %", "binary_accuracy": " % of the labels", "mae": ""}[metric]

    left, right = fig.subplots(1, 2)
    _curves(left, epoch, losses, "loss")
    _curves(right, epoch, errors, "mean absolute error" if metric == "mae" else f"error ({unit.strip()})")

    notes = [f"{len(epoch)} epoch{'s' * (len(epoch) > 1)}"]
    seconds = _column(history, "seconds")
    if np.isfinite(seconds).any():
        notes[0] += f" in {_duration(float(np.nansum(seconds)))}"
    if np.isfinite(errors["val"]).any():
        best = int(np.nanargmin(errors["val"]))
        value = f"{errors['val'][best]:.3g}" if metric == "mae" else f"{errors['val'][best]:.2f}"
        notes.append(f"lowest validation error {value}{unit} (epoch {epoch[best]:g})")
        right.plot(epoch[best], errors["val"][best], "o", markersize=9, fillstyle="none", color=TEXT)
    losses_or_zero = [_column(history, f"{part}_loss", default=0.0) for part in ("train", "val")]
    non_finite = epoch[~np.isfinite(losses_or_zero).all(axis=0)]
    if non_finite.size:
        notes.append(f"loss not finite at epoch {non_finite[0]:g}")
        left.axvline(non_finite[0], color=MUTED, linewidth=1.2, linestyle=":", zorder=1)
    fig.suptitle(", ".join(notes), fontsize=TITLE, color=TEXT)
    return fig


def compare(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, fig: "Figure | None" = None) -> "Figure":
    """Training loss and validation error of several runs over the epochs.

    histories: name of a run -> its history, as for `learning_curves`.
    Raises ValueError if there is no run, or one without an epoch.
    """
    from matplotlib.ticker import MaxNLocator

    if not histories or not all(map(len, histories.values())):
        raise ValueError("histories must have at least one run, and each run one epoch")
    height = 3.9 + 0.22 * len(histories)
    fig = new_figure(9.0, height, layout="constrained") if fig is None else fig
    axes = fig.subplots(1, 2)
    for number, (name, history) in enumerate(histories.items()):
        epoch = np.array([record.get("epoch", i + 1) for i, record in enumerate(history)], float)
        metric = next((m for m in ("accuracy", "binary_accuracy", "mae") if f"val_{m}" in history[0]), "accuracy")
        error = _column(history, f"val_{metric}")
        error = error if metric == "mae" else 100 * (1 - error)
        colour, line = COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
        marker = "o" if len(history) <= 30 else ""
        for ax, values in zip(axes, (_column(history, "train_loss"), error), strict=True):
            ax.plot(epoch, values, line, color=colour, marker=marker, markersize=4, label=f"{name}: {error[-1]:.3g}")
    unit = "mean absolute error" if metric == "mae" else "validation error (%)"
    for ax, label in zip(axes, ("training loss", unit), strict=True):
        _set_scale(ax, np.concatenate([line.get_ydata() for line in ax.lines]))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        _style(ax, label)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=LABEL, frameon=False,
               title=f"{unit} after the last epoch", title_fontsize=LABEL)  # fmt: skip
    return fig


def _set_scale(ax: "Axes", values: Array) -> bool:
    """Make the y axis logarithmic if the values span more than a factor of 3.  Returns whether it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size or positive.max() <= 3 * positive.min() or (values < 0).any():
        return False
    ax.set_yscale("log", nonpositive="clip")  # 0 is below the axis
    ax.set_ylim(positive.min() / 1.5, positive.max() * 1.5)
    decades = np.log10(positive.max() / positive.min())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    return True


def _style(ax: "Axes", label: str) -> None:
    """Labels, ticks and grid of learning curves."""
    ax.set_xlabel("epoch", fontsize=LABEL)
    ax.set_ylabel(label, fontsize=LABEL)
    ax.tick_params(labelsize=LABEL, which="both")
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _curves(ax: "Axes", epoch: Array, curves: Mapping[str, Array], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = {"train": ("training", BLUE, "--"), "val": ("validation", ORANGE, "-")}
    logarithmic = _set_scale(ax, np.concatenate(list(curves.values())))
    for part, values in curves.items():
        finite = np.isfinite(values)
        if finite.any():
            name, colour, line = styles[part]
            # One epoch needs a marker to be visible; in long runs markers would only thicken the line.
            marker = "o" if finite.sum() <= 30 else ""
            ax.plot(epoch[finite], values[finite], line, color=colour, marker=marker, markersize=4, label=name)
        if logarithmic and (values == 0).any():
            zeros = epoch[values == 0]
            edge: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 3}
            name, colour, _ = styles[part]
            ax.plot(zeros, 0 * zeros, "v", color=colour, markersize=5, label=f"{name}: 0", **edge)
    if ax.lines:
        ax.legend(fontsize=LABEL, frameon=False, loc="best")
    else:
        ax.set_yticks([])
        style: dict[str, Any] = {"fontsize": LABEL, "color": MUTED, "bbox": {"color": "white"}}
        ax.text(0.5, 0.5, "no finite values", transform=ax.transAxes, ha="center", **style)
    margin = max(0.03 * np.ptp(epoch), 0.5)
    ax.set_xlim(epoch.min() - margin, epoch.max() + margin)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    _style(ax, label)


def _column(history: Sequence[Mapping[str, Any]], key: str, default: float = np.nan) -> Array:
    values = (record.get(key) for record in history)
    return np.array([default if value is None else value for value in values], float)


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --------------------------------------------------------------------------- mistakes


def confusion(cm: ArrayLike, class_names: Sequence[str] | None = None, *, ax: "Axes | None" = None) -> "Axes":
    """The confusion matrix: counts as text, errors coloured by their fraction of the true class.

    cm: (K, K) integer counts, rows = true.  class_names: K names, by default 0 ... K-1.
    The colour scale excludes the diagonal, whose large counts would make the errors invisible.
    Raises ValueError for a matrix that is not square or not of integers, or the wrong number of names.
    """
    from matplotlib.ticker import FuncFormatter

    cm = np.asarray(cm)
    if not np.issubdtype(cm.dtype, np.integer):
        raise ValueError(f"cm must be integer counts, got dtype {cm.dtype}")
    if cm.ndim != 2 or cm.shape[0] != cm.shape[1] or cm.size == 0:
        raise ValueError(f"cm must be a square matrix (K, K), got shape {cm.shape}")
    classes = len(cm)
    names = _names(class_names, classes)
    if ax is None:
        side = float(np.clip(0.55 * classes, 3.2, 9.0)) + 0.09 * max(map(len, names))
        ax = new_figure(side + 1.9, side + 1.2, layout="constrained").add_subplot()

    fraction = cm / np.maximum(cm.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(classes, dtype=bool)
    worst = float(fraction[~diagonal].max(initial=0.0)) or 1.0
    image = ax.imshow(np.ma.array(fraction, mask=diagonal), cmap="Oranges", vmin=0, vmax=worst)
    ax.set_facecolor("#DCE9F2")  # pale blue, seen through the diagonal
    if fraction[~diagonal].any():
        percent = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03, format=percent)
        bar.set_label("errors: fraction of the true class", fontsize=LABEL)
        bar.ax.tick_params(labelsize=SMALL)
        bar.outline.set_visible(False)

    if classes <= 30:
        cell = min(0.55, 9 / classes) * 72  # points, in a figure of the default size
        size = float(np.clip(cell / (0.7 * len(str(cm.max()))), 4, LABEL))
        for i, j in np.ndindex(classes, classes):
            dark = i != j and fraction[i, j] > 0.6 * worst
            colour = "white" if dark else TEXT if cm[i, j] else "#B0B0B0"
            weight = "bold" if i == j else "normal"
            ax.text(j, i, f"{cm[i, j]}", ha="center", va="center", fontsize=size, color=colour, weight=weight)
    step = next(step for step in (1, 2, 5, 10, 20, 50, classes) if classes <= 40 * step)
    rotated = max(map(len, names)) > 3
    ticks = range(0, classes, step)
    ax.set_xticks(ticks, names[::step], rotation=45 if rotated else 0, parse_math=False)
    if rotated:
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, names[::step], parse_math=False)
    ax.tick_params(length=0, labelsize=LABEL if classes <= 30 else SMALL)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("predicted class", fontsize=LABEL)
    ax.set_ylabel("true class", fontsize=LABEL)
    total, correct = int(cm.sum()), int(np.trace(cm))
    title = f"{100 * correct / max(total, 1):.2f} % correct, {total - correct:,} of {total:,} wrong"
    ax.set_title(title, fontsize=TITLE, color=TEXT)
    return ax


def mistakes(
    images: ArrayLike,
    true: ArrayLike,
    predicted: ArrayLike,
    confidence: ArrayLike,
    class_names: Sequence[str] | None = None,
    *,
    limit: int = 40,
) -> "Figure":
    """The misclassified images, the most confident mistakes first.

    images: (N, H, W), (N, 1, H, W) or (N, 3, H, W), uint8 or float; correctly classified ones are skipped.
    true, predicted: (N,) class indices.  confidence: (N,) probability of the predicted class, 0 ... 1.
    limit: largest number of images drawn.  Raises ValueError for shapes that do not match.
    """
    samples = _check_samples(images, true, predicted, confidence, class_names, limit)
    wrong = np.flatnonzero(samples.true != samples.predicted)
    if wrong.size == 0:
        return _no_mistakes(len(samples.images))
    order = wrong[np.argsort(-samples.confidence[wrong], kind="stable")][:limit]
    fig = _gallery(samples, order)
    _heading(fig, f"{len(order)} of {len(wrong):,} mistake{'s' * (len(wrong) > 1)} shown", "most confident first")
    return fig


def predictions(
    images: ArrayLike,
    true: ArrayLike,
    predicted: ArrayLike,
    confidence: ArrayLike,
    class_names: Sequence[str] | None = None,
    *,
    limit: int = 40,
) -> "Figure":
    """The first images with their predictions, right or wrong; arguments and errors as in `mistakes`."""
    samples = _check_samples(images, true, predicted, confidence, class_names, limit)
    order = np.arange(min(limit, len(samples.images)))
    fig = _gallery(samples, order)
    correct = np.count_nonzero(samples.true[order] == samples.predicted[order])
    _heading(fig, f"the first {len(order)} images", f"{correct} of them correct")
    return fig


def captioned(images: ArrayLike, names: Sequence[str], answers: Sequence[str], *, limit: int = 64) -> "Figure":
    """The first images, each with its name above and an answer below.

    images: (N, H, W), (N, 1, H, W) or (N, 3, H, W), uint8 or float.  names, answers: N texts.
    """
    shown = _images(images)[:limit]
    columns = min(len(shown), 8)
    rows = -(-len(shown) // columns)
    cell, text, side, head = 1.4, 0.42, 0.2, 0.15
    width = max(columns * cell + 2 * side, 2.2)
    fig = new_figure(width, rows * (cell + text) + head)
    left = (width - columns * cell) / 2
    for k, image in enumerate(shown):
        row, column = divmod(k, columns)
        top = head + row * (cell + text) + 0.18
        ax = _axes(fig, left + column * cell + 0.08, top, cell - 0.16, cell - 0.16)
        _draw_image(ax, image, shown)
        style: dict[str, Any] = {"transform": ax.transAxes, "ha": "center", "parse_math": False, "fontsize": SMALL}
        name = names[k] if len(names[k]) <= 20 else "… " + names[k][-18:]
        ax.text(0.5, 1.03, name, va="bottom", color=MUTED, **style)
        ax.text(0.5, -0.04, answers[k], va="top", color=BLUE, **style)
    return fig


def reliability(
    before: Sequence[ArrayLike], after: Sequence[ArrayLike] | None = None, *, fig: "Figure | None" = None
) -> "Figure":
    """Reliability diagram: accuracy over confidence, before and after temperature scaling.

    before, after: (confidence, accuracy, count) of bins, as `calibration.reliability` gives them.
    """
    fig = new_figure(4.4, 4.2, layout="constrained") if fig is None else fig
    ax = fig.subplots()
    ax.plot([0, 1], [0, 1], color=GAP, linewidth=1)
    for name, bins, colour in (("as trained", before, ORANGE), ("calibrated", after, BLUE)):
        if bins is None:
            continue
        confidence, accuracy, count = map(np.asarray, bins)
        used = count > 0
        error = float(abs(confidence - accuracy) @ count / count.sum())
        size = 12 + 120 * np.sqrt(count[used] / count.sum())
        ax.scatter(confidence[used], accuracy[used], size, colour, alpha=0.75, label=f"{name}: ECE {error:.2%}")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    ax.legend(fontsize=LABEL, frameon=False, loc="upper left")
    _style(ax, "accuracy")
    ax.set_xlabel("confidence", fontsize=LABEL)
    return fig


def image_rows(rows: Mapping[str, ArrayLike], *, title: str = "") -> "Figure":
    """Rows of images, each with its name: the same images before and after a network, for example.

    rows: name -> (N, H, W), (N, 1, H, W) or (N, 3, H, W), as many images in each row.  Floats: 0 is black, 1 white.
    Raises ValueError for no rows, or rows of different lengths.
    """
    pictures = {name: _images(images) for name, images in rows.items()}
    counts = {len(images) for images in pictures.values()}
    if len(counts) != 1:
        raise ValueError(f"rows must have as many images each, got {[len(images) for images in pictures.values()]}")
    count = counts.pop()
    cell, head, label = 0.8, 0.45 if title else 0.12, 0.12 + 0.085 * max(map(len, pictures))
    fig = new_figure(label + count * cell + 0.15, head + len(pictures) * cell + 0.1)
    if title:
        _heading(fig, title)
    for row, (name, images) in enumerate(pictures.items()):
        scale = np.array([0, 255 if images.dtype == np.uint8 else 1], images.dtype)
        for column, image in enumerate(images):
            ax = _axes(fig, label + column * cell + 0.03, head + row * cell + 0.03, cell - 0.06, cell - 0.06)
            _draw_image(ax, image, scale)
            if column == 0:
                ax.text(-0.12, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=LABEL, color=TEXT)
    return fig


class _Samples(NamedTuple):
    images: Array
    true: Array
    predicted: Array
    confidence: Array
    names: list[str]


def _check_samples(
    images: ArrayLike,
    true: ArrayLike,
    predicted: ArrayLike,
    confidence: ArrayLike,
    class_names: Sequence[str] | None,
    limit: int,
) -> _Samples:
    """The arguments of `mistakes`, checked."""
    pictures = _images(images)
    true, predicted, confidence = np.asarray(true), np.asarray(predicted), np.asarray(confidence, float)
    for name, values in {"true": true, "predicted": predicted, "confidence": confidence}.items():
        if values.shape != (len(pictures),):
            raise ValueError(f"{name} must have shape ({len(pictures)},), got {values.shape}")
        if name != "confidence" and not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be integer class indices, got dtype {values.dtype}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    names = _names(class_names, int(max(true.max(), predicted.max())) + 1, allow_more=True)
    return _Samples(pictures, true, predicted, confidence, names)


def _gallery(samples: _Samples, order: Array) -> "Figure":
    """The images `order` with their true and predicted classes; wrong predictions in another colour."""
    images, true, predicted, confidence, names = samples
    shown = images[order]
    captions = [
        (f"true {names[true[k]]}", f"predicted {names[predicted[k]]}, {100 * confidence[k]:.1f} %") for k in order
    ]
    columns = min(len(order), 8)
    rows = -(-len(order) // columns)
    longest = max(len(line) for caption in captions for line in caption)
    cell = float(np.clip(0.063 * longest, 1.2, 1.6))  # inches
    text, head, side = 0.36, 0.68, 0.2
    width, height = max(columns * cell + 2 * side, 4.2), rows * (cell + text) + head
    size = min(SMALL, 1.7 * 72 * (cell - 0.06) / longest)  # an average letter is 0.6 of its size wide
    fig = new_figure(width, height)
    left = (width - columns * cell) / 2
    for k, (image, (true_line, predicted_line)) in enumerate(zip(shown, captions, strict=True)):
        row, column = divmod(k, columns)
        ax = _axes(fig, left + column * cell + 0.08, head + row * (cell + text), cell - 0.16, cell - 0.16)
        _draw_image(ax, image, shown)
        below: dict[str, Any] = {"transform": ax.transAxes, "ha": "center", "va": "top", "parse_math": False}
        ax.text(0.5, -0.04, true_line, color=BLUE, fontsize=size, **below)
        colour = BLUE if true[order[k]] == predicted[order[k]] else ORANGE
        ax.text(0.5, -0.04 - 0.155 / (cell - 0.16), predicted_line, color=colour, fontsize=size, **below)
    return fig


def _no_mistakes(count: int) -> "Figure":
    fig = new_figure(4.2, 2.6)
    fig.text(0.5, 0.62, "\N{CHECK MARK}", ha="center", va="center", fontsize=56, color=GREEN)
    fig.text(0.5, 0.26, "No mistakes", ha="center", va="center", fontsize=TITLE + 3, color=TEXT)
    fig.text(0.5, 0.12, f"all {count:,} images correct", ha="center", va="center", fontsize=LABEL, color=MUTED)
    return fig


# --------------------------------------------------------------------- inside the network


def filters(weight: ArrayLike, *, title: str | None = None, max_outputs: int = 32, max_inputs: int = 16) -> "Figure":
    """The kernels of a convolution: one column for each output channel, one row for each input channel.

    weight: (O, C, KH, KW) real numbers.  All kernels share one colour scale, with 0 in white.
    Only the first max_outputs x max_inputs are drawn; the heading says so.
    Raises ValueError for another number of dimensions or an empty array.
    """
    weight = np.asarray(weight, float)
    if weight.ndim != 4 or weight.size == 0:
        raise ValueError(f"weight must have shape (O, C, KH, KW), got {weight.shape}")
    O, C, KH, KW = weight.shape
    part = weight[:max_outputs, :max_inputs]
    columns, rows = part.shape[:2]
    tile = float(np.clip(min(9.0 / columns, 7.0 / rows), 0.26, 0.62))  # inches
    left, head, foot, bar = 0.65, 0.85, 0.5, 0.95
    mosaic_width, mosaic_height = columns * tile, rows * tile * KH / KW
    label_width = max(mosaic_width, 0.8)
    width = max(left + label_width + bar, 4.4)
    height = head + max(mosaic_height, 1.0) + foot
    fig = new_figure(width, height)
    left += (width - left - label_width - bar) / 2
    top = head + (max(mosaic_height, 1.0) - mosaic_height) / 2

    ax = _axes(fig, left, top, mosaic_width, mosaic_height)
    image = _mosaic(ax, part.transpose(1, 0, 2, 3).reshape(-1, KH, KW), columns)
    ax.set_xticks(*_channel_ticks(columns))
    ax.set_yticks(*_channel_ticks(rows))
    ax.set_xlabel("output channel", fontsize=LABEL)
    ax.set_ylabel("input channel", fontsize=LABEL)
    _colour_bar(fig, image, left + label_width + 0.15, head, 0.12, max(mosaic_height, 1.0), "weight")

    notes = [f"{O} × {C} kernels of {KH} × {KW}"]
    if part.shape != weight.shape:
        notes.append(f"the first {columns} × {rows} shown")
    if (non_finite := weight.size - int(np.isfinite(weight).sum())) > 0:
        notes.append(f"not finite: {non_finite}")
    _heading(fig, "Filters" if title is None else title, ", ".join(notes))
    return fig


def feature_maps(
    image: ArrayLike, maps: Sequence[ArrayLike], names: Sequence[str], *, max_channels: int = 32
) -> "Figure":
    """The output of each stage of the network for one image.

    image: (H, W), (1, H, W) or (3, H, W).  maps: an array (C, H, W) for each stage.  names: one for each stage.
    Every stage has its own colour scale, with 0 in white.  Only the first max_channels maps of a stage are drawn; its
    label says so.
    Raises ValueError for wrong shapes, a wrong number of names, or no stage.
    """
    arrays = [np.asarray(stage, float) for stage in maps]
    if not arrays or len(arrays) != len(names):
        raise ValueError(f"names must be {len(arrays) or 'some'} names, one for each array in maps, got {len(names)}")
    for name, stage in zip(names, arrays, strict=True):
        if stage.ndim != 3 or stage.size == 0:
            raise ValueError(f"maps must have shape (C, H, W) for {name!r}, got {stage.shape}")
    picture = _images(np.asarray(image)[None])[0]

    columns, tile, gap = 8, 0.85, 0.28  # inches
    left, head, bar = 0.45 + 0.1 * max(8, *map(len, names)), 0.6, 0.9
    shown = [stage[:max_channels] for stage in arrays]
    rows = [-(-len(stage) // columns) for stage in shown]
    widest = max(2, *(min(len(stage), columns) for stage in shown))  # in maps; the input is 2 wide
    height = head + 1.6 + gap + sum(rows) * tile + len(rows) * gap
    fig = new_figure(left + widest * tile + bar, height)

    _draw_image(_axes(fig, left, head, 1.6, 1.6), picture, picture)
    y = head + 1.6 + gap
    _stage_label(fig, left, head, "input", " × ".join(map(str, np.shape(image))))
    for name, stage, part, count in zip(names, arrays, shown, rows, strict=True):
        across = min(len(part), columns)
        ax = _axes(fig, left, y, across * tile, count * tile)
        mosaic = _mosaic(ax, part, across)
        size = " × ".join(map(str, stage.shape))
        _stage_label(fig, left, y, name, size if len(stage) == len(part) else f"{size}\nfirst {len(part)}")
        _colour_bar(fig, mosaic, left + across * tile + 0.12, y, 0.1, min(count, 1.5) * tile)
        y += count * tile + gap
    _heading(fig, "Feature maps")
    return fig


# -------------------------------------------------------------------------------- files


def save(fig_or_ax: Any, path: str | os.PathLike[str]) -> None:
    """Write a Figure, or the Figure of an Axes, to `path` (`*.png`, `*.svg` or `*.pdf`) atomically.

    PNG: 150 dots per inch, or fewer, so that neither side is longer than 2400 pixels.
    Raises ValueError for another suffix, OSError if writing fails.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"path must be a file name ending in .png, .svg or .pdf, got {str(path)!r}")
    figure = (fig_or_ax if hasattr(fig_or_ax, "savefig") else fig_or_ax.figure).canvas.figure
    dpi = min(150.0, 2400 / max(figure.get_size_inches()))
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=dpi)


# ------------------------------------------------------------------------------- helpers


def new_figure(width: float, height: float, layout: Any = None) -> "Figure":
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), facecolor="white", layout=layout)
    if layout:
        engine: Any = fig.get_layout_engine()
        engine.set(w_pad=0.1, h_pad=0.08)
    return fig


def _axes(fig: "Figure", x: float, y: float, width: float, height: float) -> "Axes":
    """Empty axes at a position in inches; y is measured from the top."""
    W, H = fig.get_size_inches()
    ax = fig.add_axes((x / W, 1 - (y + height) / H, width / W, height / H))
    ax.set(xticks=[], yticks=[])
    ax.tick_params(length=0, labelsize=SMALL, pad=2)
    ax.spines[:].set_visible(False)
    return ax


def _heading(fig: "Figure", title: str, note: str = "") -> None:
    H = fig.get_size_inches()[1]
    fig.text(0.5, 1 - 0.12 / H, title, ha="center", va="top", fontsize=TITLE, color=TEXT)
    fig.text(0.5, 1 - 0.36 / H, note, ha="center", va="top", fontsize=LABEL, color=MUTED)


def _stage_label(fig: "Figure", left: float, y: float, name: str, note: str) -> None:
    W, H = fig.get_size_inches()
    x = (left - 0.15) / W
    fig.text(x, 1 - y / H, name, ha="right", va="top", fontsize=TITLE, color=TEXT, parse_math=False)
    fig.text(x, 1 - (y + 0.22) / H, note, ha="right", va="top", fontsize=SMALL, color=MUTED)


def _mosaic(ax: "Axes", tiles: Array, columns: int) -> Any:
    """Draw tiles (n, H, W) as one image, row by row; tile (i, j) covers the unit square at x = j, y = i."""
    n, H, W = tiles.shape
    rows = -(-n // columns)
    limit = float(np.abs(tiles[np.isfinite(tiles)]).max(initial=0.0)) or 1.0
    scale = -(-20 // max(H, W))  # enlarge small tiles, to make the gap look thin
    tiles = tiles.repeat(scale, 1).repeat(scale, 2)
    tiles = np.pad(tiles, ((0, rows * columns - n), (0, 1), (0, 1)), constant_values=np.nan)
    H, W = tiles.shape[1:]
    mosaic = tiles.reshape(rows, columns, H, W).swapaxes(1, 2).reshape(rows * H, columns * W)
    mosaic = np.pad(mosaic, ((1, 0), (1, 0)), constant_values=np.nan)
    ax.set_facecolor(GAP)  # shows in gaps, missing tiles and NaN
    return ax.imshow(
        np.ma.masked_invalid(mosaic), SIGNED, vmin=-limit, vmax=limit, extent=(0, columns, rows, 0), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip


def _draw_image(ax: "Axes", image: Array, images: Array) -> None:
    """Draw an (H, W) image in dark on white, or (H, W, 3) in colour, with the value range of `images`."""
    low, high = (0, 255) if image.dtype == np.uint8 else (float(np.nanmin(images)), float(np.nanmax(images)))
    if image.ndim == 3:
        image = np.clip((image - low) / ((high - low) or 1), 0, 1)
    ax.imshow(image, "gray_r", vmin=low, vmax=high)


def _channel_ticks(count: int) -> tuple[Array, list[str]]:
    channels = np.arange(0, count, -(-count // 16))
    return channels + 0.5, [str(k) for k in channels]


def _colour_bar(fig: "Figure", image: Any, x: float, y: float, width: float, height: float, label: str = "") -> None:
    from matplotlib.ticker import MaxNLocator

    bar = fig.colorbar(image, cax=_axes(fig, x, y, width, height), ticks=MaxNLocator(4, symmetric=True))
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.set_label(label, fontsize=LABEL)
    bar.outline.set_visible(False)


def _images(images: ArrayLike) -> Array:
    """Images of any accepted shape as (N, H, W) or (N, H, W, 3)."""
    array: Array = np.asarray(images)
    if array.ndim == 4 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim == 4 and array.shape[1] == 3:
        return np.moveaxis(array, 1, 3)
    if array.ndim != 3:
        raise ValueError(f"images must be (N, H, W), (N, 1, H, W) or (N, 3, H, W), got {array.shape}")
    return array


def _names(class_names: Sequence[str] | None, classes: int, allow_more: bool = False) -> list[str]:
    names = [str(k) for k in range(classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) < classes or (len(names) > classes and not allow_more):
        raise ValueError(f"class_names must be {classes} names, got {len(names)}")
    return [name if len(name) <= 20 else name[:19] + "…" for name in names]
