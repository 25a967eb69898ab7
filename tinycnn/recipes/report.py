"""What the results say: a report for each recipe, and the table of all of them."""

from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np

from tinycnn import metrics, plot, recipes
from tinycnn._files import atomic_write
from tinycnn.recipes import pictures, results

TABLE = "REPRODUCTIONS.md"


def save_text(path, text):
    """Write a text file, completely or not at all; returns its path."""
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def _claim(recipe):
    return "–" if recipe.claimed is None else f"{recipe.claimed:.2f}"


def write_report(recipe, found, out, classes=None):
    """The report of one recipe, Markdown with pictures, into the folder out/<recipe>; returns its path.

    found: its results, at least one
    """
    folder = Path(out) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    matrix = np.sum([result["confusion"] for result in found], axis=0)
    plot.save(pictures.curves(recipe, found), folder / "curves.png")
    plot.save(plot.confusion(matrix, classes), folder / "confusion.png")
    s = results.summarize(found)
    lines = [
        f"# {recipe.name}", "", f"{recipe.title}. {recipe.study}; {recipe.source}.", "",
        "| | test accuracy, % |", "|---|---|", f"| claimed | {_claim(recipe)} |", f"| obtained | {s} |", "",
        "| seed | accuracy, % | wrong | precision | recall | F1 | processor seconds |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in found:
        scores = " | ".join(f"{result[name]:.4f}" for name in ("precision", "recall", "f1"))
        note = f" ({result['diverged']})" if "diverged" in result else ""
        lines.append(
            f"| {result['seed']}{note} | {100 * result['accuracy']:.2f} | {result['errors']} | {scores} "
            f"| {result['cpu_seconds']:.0f} |"
        )
    lines += ["", "Precision, recall and F1 are means over the classes.", ""]
    if recipe.why:
        lines += [recipe.why, ""]
    if tuning := found[0].get("tuning"):
        told = ", ".join(f"{float(rate):g}: {100 * value:.2f} %" for rate, value in tuning.items())
        lines += [f"Rate {found[0]['rate']:g}, chosen by accuracy on validation images ({told}).", ""]
    lines += [
        "![Error over the epochs](curves.png)", "![Confusion matrix, all seeds together](confusion.png)", "",
        "```", metrics.format_report(metrics.report(matrix, classes)), "```", "",
        f"Data: {found[0]['data']}. {_machines(found)}", "",
    ]  # fmt: skip
    return save_text(folder / "report.md", "\n".join(lines))


def _machines(found):
    """On what the results were computed."""
    environments = [result["environment"] for result in found if result["environment"]]
    machines = sorted({e["device"] for e in environments})
    versions = sorted({f"NumPy {e['numpy']}, Numba {e['numba']}" for e in environments})
    return f"Computed on {'; '.join(machines)}. {'; '.join(versions)}."


def read_all(root):
    """(recipe, its results, or the trials of a search) for all recipes; ValueError if a file is damaged."""
    return [
        (recipe, (results.read_trials if recipe.space else results.read)(root, recipe))
        for recipe in recipes.builtin().values()
    ]


def write_table(root):
    """Write the table of all recipes, and its pictures, into the folder of results; returns its path."""
    root = Path(root)
    rows = read_all(root)
    # A search's trials are no seeds of one network: they are in the table, but not in what is drawn of seeds.
    seeds = [(recipe, found) for recipe, found in rows if not recipe.space]
    # Pictures are of seeds that were trained to the end.
    done = {recipe.name: [r for r in found if "diverged" not in r] for recipe, found in seeds}
    lines = [
        "# Claimed and obtained", "",
        "Written by `python -m tinycnn reproduce` and `sweep` from the files beside it, not by hand. Accuracies are on",
        "MNIST's test set, in %. sd: standard deviation over the seeds. ±: half of the 95 % interval of the mean",
        "(Student's t). One wrong image more is 0.01; the binomial standard error of a run is 0.08 at 99.4 %. s:",
        "seconds of processor time for one seed or trial, training and evaluation; two processes shared the two",
        "virtual cores. A search has trials, each another network, and no seeds: obtained is the test accuracy of the",
        "trial that is best on validation images.", "",
    ]  # fmt: skip
    for study, group in groupby(rows, key=lambda row: row[0].study):
        lines += [
            "", f"## {study}", "",
            "| recipe | | claimed | obtained | sd | seeds | ± | s | where they differ, and why |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        trials: list[str] = []
        for recipe, found in group:
            lines.append(_row(recipe, found))
            trials += _trials(recipe, found) if recipe.space and found else []
        lines += trials
    lines += ["", *_pictures(root, seeds, done)]
    everything = [result for _, found in rows for result in found]
    if everything:
        lines += ["", _machines(everything), ""]
    _refresh(root.resolve().parent / "README.md", short_table(seeds))
    return save_text(root / TABLE, "\n".join(lines))


BEGIN, END = "<!-- reproductions: written by the command -->", "<!-- end of reproductions -->"


def short_table(rows):
    """The table of README.md, lines: what has a result and a claim, or is of our own making."""
    lines = ["| recipe | claimed, % | obtained, % (mean ± standard deviation) | seeds |", "|---|---|---|---|"]
    for recipe, found in rows:
        if found and (recipe.claimed is not None or recipe.name in ("best", "default", "default-relu")):
            s = results.summarize(found)
            spread = f" ± {s.sd:.2f}" if s.n > 1 else ""
            lines.append(f"| `{recipe.name}`: {recipe.title} | {_claim(recipe)} | {s.mean:.2f}{spread} | {s.n} |")
    return lines


def _refresh(readme, table):
    """Replace what stands between the two marks of a README that lies beside the folder of results, if one does."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        save_text(readme, "\n".join([before + BEGIN, *table, END + rest.partition(END)[2]]))


def _row(recipe, found):
    name = f"| `{recipe.name}` | {recipe.title} | {_claim(recipe)} "
    if not found:
        return f"{name}| not run | | 0 | | | |"
    if recipe.space:
        ended = [trial for trial in found if results.is_complete(trial)]
        best = f"**{100 * ended[0]['accuracy']:.2f}**" if ended else "–"
        seconds = f"{np.mean([trial['cpu_seconds'] for trial in ended]):,.0f}" if ended else ""
        return f"{name}| {best} | | none: {_count(found)} | | {seconds} | {recipe.why} |"
    s = results.summarize(found)
    sd, half = (f"{s.sd:.2f}", f"{s.half_width:.2f}") if s.n > 1 else ("", "")
    time = np.mean([result["cpu_seconds"] for result in found])
    diverged = sum("diverged" in result for result in found)
    why = (f"{diverged} of {s.n} seeds diverged. " if diverged else "") + recipe.why
    return f"{name}| **{s.mean:.2f}** | {sd} | {s.n} | {half} | {time:,.0f} | {why} |"


def _count(trials):
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}"


def _trials(recipe, found):
    """The trials of a search in order, beside those that its source tells; lines."""
    lines = [
        "", f"### {_count(found)} of `{recipe.name}`, in order", "",
        "Claimed are the source's test accuracies, the best first. Ours are in the order of validation accuracy; the",
        "test set has chosen nothing. What is in one row is of one rank, not of one point.", "",
        "| rank | claimed | ours, test | ours, validation | point of ours |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for rank, (claimed, trial) in enumerate(zip_longest(sorted(recipe.trials, reverse=True), found), 1):
        test, validation, point = ("–", "–", "–") if trial is None else _trial(trial)
        lines.append(f"| {rank} | {'–' if claimed is None else f'{claimed:g}'} | {test} | {validation} | {point} |")
    return lines


def _trial(trial):
    """Test accuracy, validation accuracy and point of a trial."""
    point = recipes.format_point(trial["point"])
    if results.is_complete(trial):
        return f"{100 * trial['accuracy']:.2f}", f"{100 * trial['validation']:.2f}", point
    if trial["state"] == "PRUNED":
        return "–", "given up" + (f" at {100 * trial['validation']:.2f}" if trial["validation"] else ""), point
    return "–", "failed", point + (f" ({trial['failed']})" if trial.get("failed") else "")


def _pictures(root, rows, done):
    """Draw what there is; the lines of Markdown that show it."""
    lines = []

    def show(name, caption, figure):
        plot.save(figure, root / name)
        lines.extend(["", f"![{caption}]({name})"])

    if any(found and recipe.claimed is not None for recipe, found in rows):
        show("claims.png", "Claimed and obtained, all recipes", pictures.claims(rows))
    if done["lecun1998"]:
        show("figure5.png", "Error against passes, and the paper's figure 5", pictures.figure5(done["lecun1998"]))
    sizes = {15: done["lecun1998-15k"], 30: done["lecun1998-30k"], 60: done["lecun1998"]}
    if all(sizes.values()):
        distorted = done["lecun1998-distortions"]
        show("figure6.png", "Error against the size of the training set", pictures.figure6(sizes, distorted))
    steps = [(r, done[r.name]) for r, _ in rows if r.name.startswith("today-")]
    first = [(r, done[r.name]) for r, _ in rows if r.name == "lecun1998"]
    last = [(r, done[r.name]) for r, _ in rows if r.name == "best"]
    if all(found for _, found in first + steps + last):  # a missing step would be credited to the next
        show("today.png", "From 1998 to today", pictures.ladder(first + steps + last))
    dead, alive = done["push-tanh"], done["push-tanh-alive"]
    if dead and alive:
        show("dead_start.png", "A dead start, and what repairs it", pictures.dead_start(dead, alive))
    flows = {name: done[f"vanishing-{name}"] for name in ("sigmoid", "tanh", "relu")}
    if all(flows.values()):
        show("vanishing.png", "How far gradients reach", pictures.gradient_flow(flows))
    return lines
