"""Pictures of what the benchmarks measured, from the dictionaries that they write as JSON."""

import numpy as np

from benchmarks import _harness as harness
from tinycnn import plot
from tinycnn.plot import BLUE, GREEN, GRID, LABEL, MUTED, ORANGE, SMALL, TEXT

# Colours of Okabe and Ito, and a marker each, so that no line is told by its colour alone.
LOOKS = {
    "tinycnn": (BLUE, "o"),
    "torch": (ORANGE, "s"),
    "torch.compile": ("#E69F00", "D"),
    "jax": (GREEN, "^"),
    "onnxruntime": ("#CC79A7", "v"),
    "numpy": (MUTED, "x"),
}
PHASES = {"data": MUTED, "forward": BLUE, "loss": GREEN, "backward": ORANGE, "optimizer": "#CC79A7"}


def draw(result, folder):
    """Every picture of a result into `folder`; prints their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in PICTURES[result["command"]](result):
        file = folder / f"{result['command']}-{name}.png"
        plot.save(figure, file)
        print(f"wrote {file}")


def train_step(result):
    yield from throughput(result, "training steps")
    rows = near_64(result)
    figure = plot.new_figure(5.2 * len(rows), 6.4, layout="constrained")
    for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        parts(ax, row)
    heading(figure, "Where the time of a training step goes", machine(result, rows[0]))
    yield "parts", figure
    figure = plot.new_figure(6.4 * len(rows), 4.6, layout="constrained")
    for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        points = [
            (part["part"], part["phase"], part["flops"] / part["bytes"], part["flops"] / part["seconds"] / 1e9)
            for part in row["parts"]
            if part["flops"]
        ]
        roofline(ax, points, row, f"{row['net']}, batch {row['batch']}")
    heading(figure, "Layers with weights under the roof", machine(result, rows[0]))
    yield "roofline", figure


def inference(result):
    yield from throughput(result, "inference")
    rows = [row for row in result["rows"] if "latency" in row]
    rows = [row for row in rows if row["threads"] == rows[-1]["threads"]]
    if rows:
        figure = plot.new_figure(0.6 + 4.4 * len(rows), 3.0, layout="constrained")
        for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            latency(ax, row)
        heading(figure, "A single image", machine(result, rows[0]))
        yield "latency", figure


def conv(result):
    threads = max(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    same = [r for r in rows if (r["shape"]["kernel"], r["shape"]["padding"], r["shape"]["stride"]) == (3, 1, 1)]
    square = [r for r in same if r["shape"]["channels"] == r["shape"]["maps"]]
    channels = [row for row in square if row["shape"]["size"] == 32]
    sizes = [row for row in square if row["shape"]["channels"] == 16]
    for name, key, label, chosen in (
        ("channels", "channels", "channels in and out", channels),
        ("size", "size", "width and height of the image, pixels", sizes),
    ):
        if len({row["shape"][key] for row in chosen}) > 1:
            fixed = "images of 32 x 32" if key == "channels" else "16 channels"
            figure = plot.new_figure(9.6, 4.2, layout="constrained")
            for ax, phase in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
                of_phase = sorted((r for r in chosen if r["phase"] == phase), key=lambda r: r["shape"][key])
                lines(ax, [r["shape"][key] for r in of_phase], [r["gflops"] for r in of_phase])
                gemm(ax, of_phase)
                dress(ax, label, "GFLOP/s", phase)
            legend(figure, rows)
            what = f"Convolution, 3 x 3, {fixed}, batch {rows[0]['batch']}"
            heading(figure, f"{what}", machine(result, rows[0]))
            yield name, figure
    figure = plot.new_figure(8.4, 5.2, layout="constrained")
    points = [(r["name"], r["phase"], r["flops"] / r["bytes"], r["gflops"]["tinycnn"]) for r in rows]
    roofline(figure.add_subplot(), points, rows[0], "")
    heading(figure, f"tinycnn's convolutions under the roof, batch {rows[0]['batch']}", machine(result, rows[0]))
    yield "roofline", figure


def ladder(result):
    threads = max(row["threads"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["threads"] == threads]
    figure = plot.new_figure(7.6, 4.0, layout="constrained")
    ax = figure.add_subplot()
    for place, row in enumerate(rows):
        ours = row["version"] in ("im2col, our GEMM", "shifted rows", "in use: direct")
        ax.barh(place, row["gflops"], color=BLUE if ours else MUTED, height=0.7)
        number = ax.text(row["gflops"] * 1.08, place, f"{row['gflops']:.3g}", va="center", fontsize=SMALL, color=TEXT)
        number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # the line of the peak may cross it
        words, across = duration(row["seconds_an_image"]), ax.get_yaxis_transform()
        ax.text(1, place, words, transform=across, ha="right", va="center", fontsize=SMALL, color=TEXT)
    ax.set_yticks(range(len(rows)), [row["version"] for row in rows])
    ax.invert_yaxis()
    logarithmic(ax.xaxis, (1,))
    peak, top = rows[0]["gemm_gflops"], ax.get_xaxis_transform()
    ax.set_xlim(min(row["gflops"] for row in rows) / 2, peak * 12)
    ax.axvline(peak, color=TEXT, linewidth=1, linestyle=":")
    ax.text(peak, 1.01, f"GEMM peak {peak:.0f}", transform=top, ha="center", fontsize=SMALL, color=TEXT)
    ax.text(1, 1.01, "an image", transform=ax.transAxes, ha="right", fontsize=SMALL, color=TEXT)
    dress(ax, "GFLOP/s", "", "")
    heading(figure, "LeNet-5's C3, forward", machine(result, rows[0]))
    ax.grid(False, axis="y")
    yield "versions", figure


def epoch(result):
    threads = result["rows"][0]["threads"]
    rows = [row for row in result["rows"] if row["threads"] == threads and row["seed"] == result["rows"][0]["seed"]]
    figure = plot.new_figure(6.4, 4.2, layout="constrained")
    ax = figure.add_subplot()
    for row in rows:
        colour, marker = LOOKS[row["competitor"]]
        seconds, error = ([look[key] for look in row["looks"]] for key in ("seconds", "accuracy"))
        ax.plot(seconds, [100 * (1 - a) for a in error], color=colour, marker=marker, markersize=4, linewidth=1.4)
    ax.axhline(1, color=TEXT, linewidth=1, linestyle=":")
    logarithmic(ax.yaxis)
    logarithmic(ax.xaxis)
    dress(ax, "seconds of training", "test error (%)", f"{rows[0]['net']}, batch {rows[0]['batch']}")
    legend(figure, [{"gflops": {row["competitor"]: 0 for row in rows}}])
    heading(figure, "MNIST", machine(result, rows[0]))
    yield "accuracy", figure


# --- parts of pictures ------------------------------------------------------------------------------------------------


def throughput(result, what):
    """Images a second against the batch, and against the number of threads."""
    rows, counts = result["rows"], sorted({row["threads"] for row in result["rows"]})
    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure = plot.new_figure(0.6 + 4.4 * len(nets), 4.4, layout="constrained")
    for ax, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        chosen = [row for row in rows if row["net"] == net and row["threads"] == counts[-1]]
        lines(ax, [row["batch"] for row in chosen], [row["images_per_second"] for row in chosen])
        dress(ax, "images a batch", "images/s", net)
    legend(figure, rows)
    heading(figure, f"LeNet-5, {what}", machine(result, rows[-1]))
    yield "batch", figure
    if len(counts) > 1:
        figure = plot.new_figure(0.6 + 4.4 * len(nets), 4.4, layout="constrained")
        for ax, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
            chosen = [near(64, [r for r in rows if r["net"] == net and r["threads"] == n]) for n in counts]
            lines(ax, counts, [row["images_per_second"] for row in chosen])
            for name, one in chosen[0]["images_per_second"].items():
                ax.plot(counts, [one * n / counts[0] for n in counts], ":", color=LOOKS[name][0], linewidth=1)
            from_zero(ax, counts)
            dress(ax, "threads (dotted: in proportion)", "images/s", f"{net}, batch {chosen[0]['batch']}")
        legend(figure, rows)
        heading(figure, f"LeNet-5, {what}", result["hardware"]["processor"] + harness.busy_note(result))
        yield "threads", figure


def parts(ax, row):
    """The kernels of a step, from top to bottom in the order in which they run."""
    for place, part in enumerate(row["parts"]):
        ax.barh(place, part["seconds"] * 1e6, color=PHASES[part["phase"]], height=0.75)
        ax.plot([part["alone"] * 1e6] * 2, [place - 0.38, place + 0.38], color=TEXT, linewidth=1.4)
    names = [f"{part['part']} {part['phase'] if part['phase'] == 'backward' else ''}".strip() for part in row["parts"]]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    dress(
        ax,
        "µs in the step; line: the same call repeated",
        "",
        f"{row['net']}, batch {row['batch']}: a step takes {duration(row['step'])}",
    )
    ax.tick_params(axis="y", labelsize=SMALL)
    ax.grid(False, axis="y")


def latency(ax, row):
    """Median and 99th percentile of each competitor."""
    found = row["latency"]
    for place, (name, seconds) in enumerate(found.items()):
        middle, late = seconds["median"] * 1e6, seconds["p99"] * 1e6
        ax.plot([middle, late], [place, place], color=LOOKS[name][0], linewidth=1.4)
        ax.plot(middle, place, "o", color=LOOKS[name][0], markersize=7)
        ax.plot(late, place, "|", color=LOOKS[name][0], markersize=10)
        ax.annotate(f"{middle:,.0f}", (middle, place), (0, 7), textcoords="offset points", ha="center", fontsize=SMALL)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_ylim(len(found) - 0.5, -0.7)
    logarithmic(ax.xaxis, (1,))
    dress(ax, "µs: median (dot) to 99th percentile", "", row["net"])
    ax.grid(False, axis="y")


def roofline(ax, points, row, title):
    """Points (name, phase, operations a byte, GFLOP/s) below what the memory and the multiply-add units allow."""
    peak, bandwidth = row["gemm_gflops"], row["copy_gb_per_s"]
    knee = peak / bandwidth
    least, most = min(knee, *(p[2] for p in points)) / 2, 2 * max(knee, *(p[2] for p in points))
    low, high = min(bandwidth * least, *(p[3] for p in points)) / 1.6, 1.8 * max(peak, *(p[3] for p in points))
    logarithmic(ax.xaxis)
    logarithmic(ax.yaxis)
    ax.set(xlim=(least, most), ylim=(low, high))
    ax.plot([least, knee, most], [bandwidth * least, peak, peak], color=TEXT, linewidth=1.4)
    near: dict = {"textcoords": "offset points", "fontsize": SMALL, "color": TEXT}
    ax.annotate(f"GEMM {peak:.0f} GFLOP/s", (knee, peak), (0, 4), **near)
    ax.annotate(f"copy {bandwidth:.0f} GB/s", (least * 1.3, bandwidth * least * 1.3), (4, -4), va="top", **near)
    for phase, marker in (("forward", "o"), ("backward", "s")):
        chosen = [p for p in points if p[1] == phase]
        ax.plot([p[2] for p in chosen], [p[3] for p in chosen], marker, color=PHASES[phase], markersize=5, label=phase)
    names = [(name, x, y, PHASES[phase]) for name, phase, x, y in points]
    name_points(ax, names, (least, most), (low, high), (knee, peak))
    dress(ax, "operations for each byte of the arrays", "GFLOP/s", title)
    ax.legend(fontsize=SMALL, frameon=False, loc="lower right")


def name_points(ax, points, x_limits, y_limits, knee):
    """Names (name, x, y, colour) beside their points on logarithmic axes, where nothing else stands, the roof included,
    which rises up to the point `knee` and is flat from there on, with some words above it."""
    width, height = (side * 72 * 0.82 for side in ax.figure.get_size_inches())  # points, about
    width /= len(ax.figure.axes)

    def place(value, limits, length):
        return length * np.log(value / limits[0]) / np.log(limits[1] / limits[0])

    spots = [(place(x, x_limits, width), place(y, y_limits, height)) for _, x, y, _ in points]
    boxes = [(x - 3, x + 3, y - 3, y + 3) for x, y in spots]
    x, y = place(knee[0], x_limits, width), place(knee[1], y_limits, height)
    boxes += [(x, width, y - 1, y + 1), (x, x + 80, y, y + 12)]
    rise = y - place(knee[1] * x_limits[0] / knee[0], y_limits, height)
    boxes += [(x - x * k / 20, x - x * (k - 1) / 20, y - rise * k / 20, y - rise * (k - 1) / 20) for k in range(1, 21)]
    for (name, x, y, colour), (left, bottom) in zip(points, spots, strict=True):
        long = 0.6 * SMALL * len(name)
        tries = [(dx, dy) for dy in (0, 8, -8, 16, -16, 24, -24) for dx in (6, -6 - long)]
        for dx, dy in tries:
            box = left + dx, left + dx + long, bottom + dy - 4, bottom + dy + 4
            if not any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes):
                break
        else:
            continue  # it is too crowded there; the table has all
        boxes.append(box)
        ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", va="center", fontsize=SMALL, color=colour)


def lines(ax, x, values):
    """A line for each competitor; values: for each x a dict name -> number."""
    for name, (colour, marker) in LOOKS.items():
        known = [(at, value[name]) for at, value in zip(x, values, strict=True) if name in value]
        if known:
            ax.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
    logarithmic(ax.yaxis)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(at) for at in x])
    ax.minorticks_off()


def gemm(ax, rows):
    """The GEMM peak that was measured with each row."""
    peak = float(np.median([row["gemm_gflops"] for row in rows]))
    ax.axhline(peak, color=TEXT, linewidth=1, linestyle=":")
    ax.annotate(f"GEMM peak, {peak:.0f}", (0, peak), (4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=SMALL, color=TEXT)  # fmt: skip


def duration(seconds):
    factor, unit = next(((f, u) for f, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if seconds * f >= 1), (1e9, "ns"))
    return f"{seconds * factor:.3g} {unit}"


def logarithmic(axis, subs=(1, 2, 5)):
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def from_zero(ax, x):
    """Plain axes, for few numbers x."""
    from matplotlib.ticker import AutoLocator, FuncFormatter

    ax.set(xscale="linear", yscale="linear", xlim=(0, max(x) * 1.08), xticks=x, ylim=(0, None))
    ax.yaxis.set_major_locator(AutoLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def heading(figure, title, note):
    figure.suptitle(f"{title}\n{note}", fontsize=LABEL + 1, color=TEXT)


def dress(ax, x, y, title):
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.set_title(title, fontsize=LABEL, color=TEXT)
    ax.tick_params(labelsize=LABEL)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend(figure, rows):
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    there = {name for row in rows for name in row.get("images_per_second", row.get("gflops", ()))}
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        for name, (colour, marker) in LOOKS.items()
        if name in there
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=LABEL, frameon=False)


def machine(result, row):
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{result['hardware']['processor']}, {threads}{harness.busy_note(result)}"


def near(batch, rows):
    return min(rows, key=lambda row: abs(row["batch"] - batch))


def near_64(result):
    """For each net the row, of those with the most threads, whose batch is nearest to 64."""
    most = max(row["threads"] for row in result["rows"])
    nets = dict.fromkeys(row["net"] for row in result["rows"])
    return [near(64, [r for r in result["rows"] if r["net"] == net and r["threads"] == most]) for net in nets]


PICTURES = {"train-step": train_step, "inference": inference, "conv": conv, "ladder": ladder, "epoch": epoch,
            "start": lambda result: ()}  # fmt: skip
