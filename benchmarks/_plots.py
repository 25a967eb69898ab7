"""Plots of benchmark results, the dictionaries in their JSON files."""

import numpy as np

from benchmarks import _report
from tinycnn import plot
from tinycnn.plot import BLUE, GREEN, GRID, LABEL, MUTED, ORANGE, SMALL, TEXT

# Colours of Okabe and Ito, each with a marker: lines are distinct without colour.
STYLES = {
    "tinycnn": (BLUE, "o"),
    "torch": (ORANGE, "s"),
    "torch.compile": ("#E69F00", "D"),
    "jax": (GREEN, "^"),
    "onnxruntime": ("#CC79A7", "v"),
    "numpy": (MUTED, "x"),
}
PHASES = {"data": MUTED, "forward": BLUE, "loss": GREEN, "backward": ORANGE, "optimizer": "#CC79A7"}


def draw(result, folder):
    """Draw all plots of a result into `folder`, and print the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in PLOTS[result["command"]](result):
        file = folder / f"{result['command']}-{name}.png"
        plot.save(figure, file)
        print(f"wrote {file}")


def train_step(result):
    yield from throughput(result, "LeNet-5, training steps")
    rows = [row for row in rows_near_64(result) if "parts" in row]
    if not rows:
        return
    figure = plot.new_figure(5.2 * len(rows), 6.4, layout="constrained")
    for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        plot_parts(ax, row)
    set_heading(figure, "Times of the parts of a training step", machine_note(result, rows[0]))
    yield "parts", figure
    figure = plot.new_figure(6.4 * len(rows), 4.6, layout="constrained")
    for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        points = [
            (part["part"], part["phase"], part["flops"] / part["bytes"], part["flops"] / part["seconds"] / 1e9)
            for part in row["parts"]
            if part["flops"]
        ]
        plot_roofline(ax, points, row, f"{row['net']}, batch {row['batch']}")
    set_heading(figure, "Roofline of the layers with weights", machine_note(result, rows[0]))
    yield "roofline", figure


def inference(result):
    yield from throughput(result, "LeNet-5, inference")
    rows = [row for row in result["rows"] if "latency" in row]
    rows = [row for row in rows if row["threads"] == rows[-1]["threads"]]
    if rows:
        figure = plot.new_figure(0.6 + 4.4 * len(rows), 3.0, layout="constrained")
        for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            plot_latency(ax, row)
        set_heading(figure, "A single image", machine_note(result, rows[0]))
        yield "latency", figure


def nets(result):
    for use in dict.fromkeys(row["use"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["use"] == use]
        for name, figure in throughput(result | {"rows": rows}, use.capitalize()):
            yield f"{use}-{name}", figure


def conv(result):
    threads = max(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    same = [r for r in rows if (r["shape"]["kernel"], r["shape"]["padding"], r["shape"]["stride"]) == (3, 1, 1)]
    square = [r for r in same if r["shape"]["channels"] == r["shape"]["maps"]]
    channels = [row for row in square if row["shape"]["size"] == 32]
    sizes = [row for row in square if row["shape"]["channels"] == 16]
    for name, key, label, chosen in (
        ("channels", "channels", "input and output channels", channels),
        ("size", "size", "width and height of the image, pixels", sizes),
    ):
        if len({row["shape"][key] for row in chosen}) > 1:
            fixed = "images of 32 x 32" if key == "channels" else "16 channels"
            figure = plot.new_figure(9.6, 4.2, layout="constrained")
            for ax, phase in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
                of_phase = sorted((r for r in chosen if r["phase"] == phase), key=lambda r: r["shape"][key])
                plot_lines(ax, [r["shape"][key] for r in of_phase], [r["gflops"] for r in of_phase])
                plot_gemm_peak(ax, of_phase)
                style_axes(ax, label, "GFLOP/s", phase)
            add_legend(figure, rows)
            title = f"Convolution, 3 x 3, {fixed}, batch {rows[0]['batch']}"
            set_heading(figure, title, machine_note(result, rows[0]))
            yield name, figure
    figure = plot.new_figure(8.4, 5.2, layout="constrained")
    points = [(r["name"], r["phase"], r["flops"] / r["bytes"], r["gflops"]["tinycnn"]) for r in rows]
    plot_roofline(figure.add_subplot(), points, rows[0], "")
    set_heading(figure, f"Roofline of tinycnn's convolutions, batch {rows[0]['batch']}", machine_note(result, rows[0]))
    yield "roofline", figure


def ladder(result):
    threads = max(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    figure = plot.new_figure(7.6, 4.0, layout="constrained")
    ax = figure.add_subplot()
    for y, row in enumerate(rows):
        ours = row["version"] in ("im2col, our GEMM", "MEC", "in use: direct")
        ax.barh(y, row["gflops"], color=BLUE if ours else MUTED, height=0.7)
        label = ax.text(row["gflops"] * 1.08, y, f"{row['gflops']:.3g}", va="center", fontsize=SMALL, color=TEXT)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # the line of the peak may cross it
        text, right = duration(row["seconds_an_image"]), ax.get_yaxis_transform()
        ax.text(1, y, text, transform=right, ha="right", va="center", fontsize=SMALL, color=TEXT)
    ax.set_yticks(range(len(rows)), [row["version"] for row in rows])
    ax.invert_yaxis()
    set_log_scale(ax.xaxis, (1,))
    peak, top = rows[0]["gemm_gflops"], ax.get_xaxis_transform()
    ax.set_xlim(min(row["gflops"] for row in rows) / 2, peak * 12)
    ax.axvline(peak, color=TEXT, linewidth=1, linestyle=":")
    ax.text(peak, 1.01, f"GEMM peak {peak:.0f}", transform=top, ha="center", fontsize=SMALL, color=TEXT)
    ax.text(1, 1.01, "an image", transform=ax.transAxes, ha="right", fontsize=SMALL, color=TEXT)
    style_axes(ax, "GFLOP/s", "", "")
    set_heading(figure, "LeNet-5's C3, forward", machine_note(result, rows[0]))
    ax.grid(False, axis="y")
    yield "versions", figure


def epoch(result):
    threads = result["rows"][0]["threads"]
    rows = [row for row in result["rows"] if row["threads"] == threads and row["seed"] == result["rows"][0]["seed"]]
    figure = plot.new_figure(6.4, 4.2, layout="constrained")
    ax = figure.add_subplot()
    for row in rows:
        colour, marker = STYLES[row["competitor"]]
        seconds, accuracy = ([look[key] for look in row["looks"]] for key in ("seconds", "accuracy"))
        ax.plot(seconds, [100 * (1 - a) for a in accuracy], color=colour, marker=marker, markersize=4, linewidth=1.4)
    ax.axhline(1, color=TEXT, linewidth=1, linestyle=":")
    set_log_scale(ax.yaxis)
    set_log_scale(ax.xaxis)
    style_axes(ax, "seconds of training", "test error (%)", f"{rows[0]['net']}, batch {rows[0]['batch']}")
    add_legend(figure, [{"gflops": {row["competitor"]: 0 for row in rows}}])
    set_heading(figure, "MNIST", machine_note(result, rows[0]))
    yield "accuracy", figure


# --- parts of plots ---------------------------------------------------------------------------------------------------


def throughput(result, title):
    """Images per second over the batch size, and over the number of threads."""
    rows, counts = result["rows"], sorted({row["threads"] for row in result["rows"]})
    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure = plot.new_figure(0.6 + 4.4 * len(nets), 4.4, layout="constrained")
    for ax, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        chosen = [row for row in rows if row["net"] == net and row["threads"] == counts[-1]]
        plot_lines(ax, [row["batch"] for row in chosen], [row["images_per_second"] for row in chosen])
        style_axes(ax, "images per batch", "images/s", net)
    add_legend(figure, rows)
    set_heading(figure, title, machine_note(result, rows[-1]))
    yield "batch", figure
    if len(counts) > 1:
        figure = plot.new_figure(0.6 + 4.4 * len(nets), 4.4, layout="constrained")
        for ax, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
            chosen = [nearest_batch(64, [r for r in rows if r["net"] == net and r["threads"] == n]) for n in counts]
            plot_lines(ax, counts, [row["images_per_second"] for row in chosen])
            for name, rate in chosen[0]["images_per_second"].items():
                ax.plot(counts, [rate * n / counts[0] for n in counts], ":", color=STYLES[name][0], linewidth=1)
            set_linear_scale(ax, counts)
            style_axes(ax, "threads (dotted: linear scaling)", "images/s", f"{net}, batch {chosen[0]['batch']}")
        add_legend(figure, rows)
        set_heading(figure, title, result["hardware"]["processor"] + _report.busy_note(result))
        yield "threads", figure


def plot_parts(ax, row):
    """The kernels of a step in order of execution, from top to bottom."""
    for y, part in enumerate(row["parts"]):
        ax.barh(y, part["seconds"] * 1e6, color=PHASES[part["phase"]], height=0.75)
        ax.plot([part["alone"] * 1e6] * 2, [y - 0.38, y + 0.38], color=TEXT, linewidth=1.4)
    names = [f"{part['part']} {part['phase'] if part['phase'] == 'backward' else ''}".strip() for part in row["parts"]]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    style_axes(
        ax,
        "µs in the step; line: the same call repeated",
        "",
        f"{row['net']}, batch {row['batch']}: a step takes {duration(row['step'])}",
    )
    ax.tick_params(axis="y", labelsize=SMALL)
    ax.grid(False, axis="y")


def plot_latency(ax, row):
    """Median and 99th percentile of each competitor."""
    latencies = row["latency"]
    for y, (name, seconds) in enumerate(latencies.items()):
        median, p99 = seconds["median"] * 1e6, seconds["p99"] * 1e6
        ax.plot([median, p99], [y, y], color=STYLES[name][0], linewidth=1.4)
        ax.plot(median, y, "o", color=STYLES[name][0], markersize=7)
        ax.plot(p99, y, "|", color=STYLES[name][0], markersize=10)
        ax.annotate(f"{median:,.0f}", (median, y), (0, 7), textcoords="offset points", ha="center", fontsize=SMALL)
    ax.set_yticks(range(len(latencies)), list(latencies))
    ax.set_ylim(len(latencies) - 0.5, -0.7)
    set_log_scale(ax.xaxis, (1,))
    style_axes(ax, "µs: median (dot) to 99th percentile", "", row["net"])
    ax.grid(False, axis="y")


def plot_roofline(ax, points, row, title):
    """Roofline plot: points (name, phase, FLOP per byte, GFLOP/s) below the limits of memory and arithmetic."""
    peak, bandwidth = row["gemm_gflops"], row["copy_gb_per_s"]
    knee = peak / bandwidth
    left, right = min(knee, *(p[2] for p in points)) / 2, 2 * max(knee, *(p[2] for p in points))
    low, high = min(bandwidth * left, *(p[3] for p in points)) / 1.6, 1.8 * max(peak, *(p[3] for p in points))
    set_log_scale(ax.xaxis)
    set_log_scale(ax.yaxis)
    ax.set(xlim=(left, right), ylim=(low, high))
    ax.plot([left, knee, right], [bandwidth * left, peak, peak], color=TEXT, linewidth=1.4)
    style: dict = {"textcoords": "offset points", "fontsize": SMALL, "color": TEXT}
    ax.annotate(f"GEMM {peak:.0f} GFLOP/s", (knee, peak), (0, 4), **style)
    ax.annotate(f"copy {bandwidth:.0f} GB/s", (left * 1.3, bandwidth * left * 1.3), (4, -4), va="top", **style)
    for phase, marker in (("forward", "o"), ("backward", "s")):
        chosen = [p for p in points if p[1] == phase]
        ax.plot([p[2] for p in chosen], [p[3] for p in chosen], marker, color=PHASES[phase], markersize=5, label=phase)
    names = [(name, x, y, PHASES[phase]) for name, phase, x, y in points]
    label_points(ax, names, (left, right), (low, high), (knee, peak))
    style_axes(ax, "FLOP per byte of the arrays", "GFLOP/s", title)
    ax.legend(fontsize=SMALL, frameon=False, loc="lower right")


def label_points(ax, points, x_limits, y_limits, knee):
    """Label points (name, x, y, colour) on logarithmic axes without overlapping one another or the roof, which rises to
    the point `knee`, where its label starts, and is flat beyond."""
    width, height = (inches * 72 * 0.82 for inches in ax.figure.get_size_inches())  # approximate, in points
    width /= len(ax.figure.axes)

    def position(value, limits, length):
        return length * np.log(value / limits[0]) / np.log(limits[1] / limits[0])

    spots = [(position(x, x_limits, width), position(y, y_limits, height)) for _, x, y, _ in points]
    boxes = [(x - 3, x + 3, y - 3, y + 3) for x, y in spots]
    x, y = position(knee[0], x_limits, width), position(knee[1], y_limits, height)
    boxes += [(x, width, y - 1, y + 1), (x, x + 80, y, y + 12)]
    rise = y - position(knee[1] * x_limits[0] / knee[0], y_limits, height)
    boxes += [(x - x * k / 20, x - x * (k - 1) / 20, y - rise * k / 20, y - rise * (k - 1) / 20) for k in range(1, 21)]
    for (name, x, y, colour), (left, bottom) in zip(points, spots, strict=True):
        length = 0.6 * SMALL * len(name)
        offsets = [(dx, dy) for dy in (0, 8, -8, 16, -16, 24, -24) for dx in (6, -6 - length)]
        for dx, dy in offsets:
            box = left + dx, left + dx + length, bottom + dy - 4, bottom + dy + 4
            if not any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes):
                break
        else:
            continue  # no room; the table lists all
        boxes.append(box)
        ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", va="center", fontsize=SMALL, color=colour)


def plot_lines(ax, x, values):
    """A line per competitor. values: a dict name -> number for each x."""
    for name, (colour, marker) in STYLES.items():
        points = [(a, value[name]) for a, value in zip(x, values, strict=True) if name in value]
        if points:
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
    set_log_scale(ax.yaxis)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(a) for a in x])
    ax.minorticks_off()


def plot_gemm_peak(ax, rows):
    """A line at the median of the rows' GEMM peaks."""
    peak = float(np.median([row["gemm_gflops"] for row in rows]))
    ax.axhline(peak, color=TEXT, linewidth=1, linestyle=":")
    ax.annotate(f"GEMM peak, {peak:.0f}", (0, peak), (4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=SMALL, color=TEXT)  # fmt: skip


def duration(seconds):
    factor, unit = next(((f, u) for f, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if seconds * f >= 1), (1e9, "ns"))
    return f"{seconds * factor:.3g} {unit}"


def set_log_scale(axis, subs=(1, 2, 5)):
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
    axis.set_minor_formatter(NullFormatter())


def set_linear_scale(ax, x):
    """Linear axes from zero, with a tick at each x."""
    from matplotlib.ticker import AutoLocator, FuncFormatter

    ax.set(xscale="linear", yscale="linear", xlim=(0, max(x) * 1.08), xticks=x, ylim=(0, None))
    ax.yaxis.set_major_locator(AutoLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def set_heading(figure, title, note):
    figure.suptitle(f"{title}\n{note}", fontsize=LABEL + 1, color=TEXT)


def style_axes(ax, x, y, title):
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.set_title(title, fontsize=LABEL, color=TEXT)
    ax.tick_params(labelsize=LABEL)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def add_legend(figure, rows):
    """A legend for all panels, below them."""
    from matplotlib.lines import Line2D

    present = {name for row in rows for name in row.get("images_per_second", row.get("gflops", ()))}
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        for name, (colour, marker) in STYLES.items()
        if name in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=LABEL, frameon=False)


def machine_note(result, row):
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{result['hardware']['processor']}, {threads}{_report.busy_note(result)}"


def nearest_batch(batch, rows):
    return min(rows, key=lambda row: abs(row["batch"] - batch))


def rows_near_64(result):
    """For each net the row with the most threads and the batch size nearest to 64."""
    threads = max(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    nets = dict.fromkeys(row["net"] for row in result["rows"])
    return [nearest_batch(64, [row for row in rows if row["net"] == net]) for net in nets]


def scale(result):
    figure = plot.new_figure(9.6, 4.2, layout="constrained")
    for ax, kind in zip(figure.subplots(1, 2), ("strong", "weak"), strict=True):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        batches = sorted({row["batch"] for row in rows}) if kind == "strong" else [None]
        for batch, (colour, marker) in zip(batches, STYLES.values(), strict=False):
            line = [row for row in rows if batch in (None, row["batch"])]
            label = f"batch {batch}" if batch else f"{line[0]['batch']} images a rank"
            ax.plot(
                [row["ranks"] for row in line], [row["batch"] / row["model"] for row in line], ":", color=colour,
                linewidth=1.4,
            )  # fmt: skip
            measured = [row for row in line if row["measured"]]
            ax.plot(
                [row["ranks"] for row in measured], [row["batch"] / row["seconds"] for row in measured], marker,
                color=colour, label=label, markersize=6,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ranks = sorted({row["ranks"] for row in rows})
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        ax.minorticks_off()
        set_log_scale(ax.yaxis, (1, 2, 5))
        style_axes(ax, "ranks", "images/s" if kind == "strong" else "", f"{kind} scaling")
        ax.legend(fontsize=SMALL, frameon=False)
    note = "points: measured; dotted: the model, beyond the points an extrapolation with a core for each rank"
    set_heading(
        figure, f"{result['rows'][0]['net']}, training over MPI", f"{machine_note(result, result['rows'][0])}\n{note}"
    )
    yield "ranks", figure


PLOTS = {
    "train-step": train_step, "inference": inference, "conv": conv, "ladder": ladder, "epoch": epoch, "scale": scale,
    "nets": nets, "start": lambda result: (), "guard": lambda result: (),
}  # fmt: skip
