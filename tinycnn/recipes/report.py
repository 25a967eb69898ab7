"""Reports of results: one per recipe, and the tables of all recipes."""

from collections.abc import Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinycnn import metrics, plot, recipes
from tinycnn._files import atomic_write
from tinycnn.recipes import Recipe, pictures, results
from tinycnn.recipes.results import Result, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE = "REPRODUCTIONS.md"


def save_text(path: Path, text: str) -> Path:
    """Write a text file atomically; returns its path."""
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def _claim(recipe: Recipe) -> str:
    return "–" if recipe.claimed is None else f"{recipe.claimed:.2f}"


def write_report(
    recipe: Recipe, found: Sequence[Result], out: str | Path, classes: Sequence[str] | None = None
) -> Path:
    """Write the report of one recipe, Markdown with pictures, into the folder out/<recipe>; returns its path.

    found: results of the recipe, at least one
    """
    folder = Path(out) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    matrix = np.sum([result["confusion"] for result in found], axis=0)
    plot.save(pictures.curves(recipe, found), folder / "curves.png")
    plot.save(plot.confusion(matrix, classes), folder / "confusion.png")
    lines = [
        f"# {recipe.name}", "", f"{recipe.title}. {recipe.study}; {recipe.source}.", "",
        "| | test accuracy, % |", "|---|---|", f"| claimed | {_claim(recipe)} |",
        f"| obtained | {results.summarize(found)} |", "",
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
        accuracies = ", ".join(f"{float(rate):g}: {100 * value:.2f} %" for rate, value in tuning.items())
        lines += [f"Learning rate {found[0]['rate']:g}, chosen by validation accuracy ({accuracies}).", ""]
    lines += [
        "![Error over the epochs](curves.png)", "![Confusion matrix, sum over the seeds](confusion.png)", "",
        "```", metrics.format_report(metrics.report(matrix, classes)), "```", "",
        f"Data: {found[0]['data']}. {_machines(found)}", "",
    ]  # fmt: skip
    return save_text(folder / "report.md", "\n".join(lines))


def _machines(found: Sequence[Result | Trial]) -> str:
    """The machines and versions that computed the results."""
    environments = [result["environment"] for result in found if result["environment"]]
    machines = sorted({e["device"] for e in environments})
    versions = sorted({f"NumPy {e['numpy']}, Numba {e['numba']}" for e in environments})
    return f"Computed on {'; '.join(machines)}. {'; '.join(versions)}."


Rows = Sequence[tuple[Recipe, list[Result]]]


def read_all(root: str | Path) -> list[tuple[Recipe, list[Result]]]:
    """(recipe, its results or, for a search, its trials) for all recipes; ValueError if a file is damaged."""
    return [
        (recipe, (results.read_trials if recipe.space else results.read)(root, recipe))
        for recipe in recipes.builtin().values()
    ]


def write_table(root: str | Path) -> Path:
    """Write the table of all recipes and its pictures into the folder of results; returns its path.

    Also replaces the short table in docs/reproductions.md beside that folder, if that file exists.
    """
    root = Path(root)
    rows = read_all(root)
    # Trials of a search are different networks: the table has them, the pictures of seeds do not.
    seeds = [(recipe, found) for recipe, found in rows if not recipe.space]
    classifiers = results.read_classifiers(root)
    lines = [
        "# Claimed and obtained", "",
        "Written by `python -m tinycnn reproduce` and `sweep` from the files in this folder. Accuracies are on MNIST's",
        "test set, in %. sd: standard deviation over the seeds. ±: half width of the 95 % confidence interval of the",
        "mean (Student's t). One wrong image is 0.01 %; the binomial standard error of one run is 0.08 at 99.4 %.",
        "s: processor seconds of one seed or trial for training and evaluation, measured while two processes shared",
        "two virtual cores. A search has trials of different networks instead of seeds. Its obtained accuracy is the",
        "test accuracy of the trial with the best validation accuracy.", "",
    ]  # fmt: skip
    for study, group in groupby(rows, key=lambda row: row[0].study):
        lines += ["", f"## {study}", ""]
        if study == STUDY1998:
            lines += study1998_table([*group])
            continue
        lines += [
            "| recipe | | claimed | obtained | sd | seeds | ± | s | difference and its reason |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        trials: list[str] = []
        more = _classifiers(classifiers) if study == OTHERS1998 else []
        for recipe, found in group:
            lines.append(_row(recipe, found))
            trials += _trials(recipe, found) if recipe.space and found else []
        lines += more + trials
    lines += ["", *_pictures(root, seeds, classifiers)]
    everything = [result for _, found in rows for result in found]
    if everything:
        lines += ["", _machines(everything), ""]
    _replace_table(root.resolve().parent / "docs" / "reproductions.md", short_table(seeds))
    return save_text(root / TABLE, "\n".join(lines))


STUDY1998 = "LeNet-5 of 1998: what the paper leaves open"
OTHERS1998 = "LeCun, Bottou, Bengio and Haffner 1998: other networks"
# Names in figures 9 and 10 of the paper of our recipes and, in classifiers1998.json, classifiers.
IN_FIGURE9 = {
    "linear1998": "linear", "pairwise": "pairwise linear", "knn": "3 nearest neighbours",
    "mlp1998-300": "28x28-300-100-10", "mlp1998-500": "28x28-500-150-10", "lenet1-1998": "[16x16] LeNet-1",
    "lenet4-1998": "LeNet-4", "lecun1998": "LeNet-5", "lecun1998-distortions": "[dist] LeNet-5",
    "boosted": "[dist] boosted LeNet-4",
}  # fmt: skip


def _classifiers(classifiers: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of the classifiers that `python -m benchmarks classifiers` trains."""
    lines = []
    for name, found in classifiers.items():
        values = 100 * np.array([seed["accuracy"] for seed in found["seeds"]])
        sd = f"{values.std(ddof=1):.2f}" if len(values) > 1 else ""
        lines.append(
            f"| {name} (`python -m benchmarks classifiers`) | {found['title']} | {found['claimed']:.2f} "
            f"| **{values.mean():.2f}** | {sd} | {len(values)} | | | {found['why']} |"
        )
    return lines


def study1998_table(rows: Rows) -> list[str]:
    """Lines with what each choice does to the rates of the first epoch, the training error and the validation error.

    The choice is made on validation images, so that the test accuracies are not shown.
    """
    epochs = pictures.STUDY_EPOCHS
    numbers = ", ".join(map(str, epochs))
    lines = [
        "Trained on 55,000 of the training images; the validation error is that of the other 5,000. Means over the",
        "seeds, in %; ±: standard deviation. Rates: smallest and largest eta / (mu + h) of the first epoch.", "",
        f"| recipe | | seeds | rates | training error after epochs {numbers} | validation error, last epoch |",
        "|---|---|---|---|---|---|",
        f"| the paper | figure 5, 60,000 images | 1 | {pictures.PAPER_RATES[0]:.1e} to {pictures.PAPER_RATES[1]:.1e} | "
        f"{', '.join(f'{pictures.FIGURE5_TRAIN[epoch - 1]:.2f}' for epoch in epochs)} | "
        f"test error {pictures.FIGURE5_TEST[-1]:.2f} |",
    ]  # fmt: skip
    for recipe, found in rows:
        found = [result for result in found if "diverged" not in result]
        if not found:
            lines.append(f"| `{recipe.name}` | {recipe.title} | 0 | | | |")
            continue
        low, high = np.mean([result["step_sizes"][0] for result in found], axis=0)
        train = 100 * (1 - np.mean([result["history"]["train_accuracy"] for result in found], axis=0))
        held_out = 100 * (1 - np.array([result["history"]["val_accuracy"][-1] for result in found]))
        spread = f" ± {held_out.std(ddof=1):.2f}" if len(found) > 1 else ""
        shown = ", ".join(f"{train[epoch - 1]:.2f}" for epoch in epochs if epoch <= len(train))
        lines.append(
            f"| `{recipe.name}` | {recipe.title} | {len(found)} | {low:.1e} to {high:.1e} | {shown} "
            f"| {held_out.mean():.2f}{spread} |"
        )
    return lines


BEGIN, END = "<!-- reproductions: written by the command -->", "<!-- end of reproductions -->"


def short_table(rows: Rows) -> list[str]:
    """Lines of the short table: recipes with a result that have a claim or are our own."""
    lines = ["| recipe | claimed, % | obtained, % (mean ± standard deviation) | seeds |", "|---|---|---|---|"]
    for recipe, found in rows:
        if found and (recipe.claimed is not None or recipe.name in ("best", "default", "default-relu")):
            s = results.summarize(found)
            spread = f" ± {s.sd:.2f}" if s.n > 1 else ""
            obtained = s.uneven or f"{s.mean:.2f}{spread}"
            lines.append(f"| `{recipe.name}`: {recipe.title} | {_claim(recipe)} | {obtained} | {s.n} |")
    return lines


def _replace_table(page: Path, table: list[str]) -> None:
    """Replace the lines between the two marks of a page, if the page exists and has them."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        save_text(page, "\n".join([before + BEGIN, *table, END + rest.partition(END)[2]]))


def _row(recipe: Recipe, found: list[Result]) -> str:
    start = f"| `{recipe.name}` | {recipe.title} | {_claim(recipe)} "
    if not found:
        return f"{start}| not run | | 0 | | | |"
    if recipe.space:
        complete = [trial for trial in found if results.is_complete(trial)]
        best = f"**{100 * complete[0]['accuracy']:.2f}**" if complete else "–"
        seconds = f"{np.mean([trial['cpu_seconds'] for trial in complete]):,.0f}" if complete else ""
        return f"{start}| {best} | | none: {_count(found)} | | {seconds} | {recipe.why} |"
    s = results.summarize(found)
    sd, half_width = (f"{s.sd:.2f}", f"{s.half_width:.2f}") if s.n > 1 and not s.uneven else ("", "")
    time = np.mean([result["cpu_seconds"] for result in found])
    diverged = sum("diverged" in result for result in found)
    why = (f"{diverged} of {s.n} seeds diverged. " if diverged else "") + recipe.why
    return f"{start}| **{s.uneven or f'{s.mean:.2f}'}** | {sd} | {s.n} | {half_width} | {time:,.0f} | {why} |"


def _count(trials: Sequence[Trial]) -> str:
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}"


def _trials(recipe: Recipe, found: Sequence[Trial]) -> list[str]:
    """Lines with the trials of a search and those of its source, by rank."""
    lines = [
        "", f"### {_count(found)} of `{recipe.name}` by rank", "",
        "Claimed: test accuracies of the source, best first. Ours: ranked by validation accuracy. A row compares equal",
        "ranks, not equal points.", "",
        "| rank | claimed | ours, test | ours, validation | point of ours |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for rank, (claimed, trial) in enumerate(zip_longest(sorted(recipe.trials, reverse=True), found), 1):
        test, validation, point = ("–", "–", "–") if trial is None else _trial(trial)
        lines.append(f"| {rank} | {'–' if claimed is None else f'{claimed:g}'} | {test} | {validation} | {point} |")
    return lines


def _trial(trial: Trial) -> tuple[str, str, str]:
    """Test accuracy, validation accuracy and point of a trial as text."""
    point = recipes.format_point(trial["point"])
    if results.is_complete(trial):
        return f"{100 * trial['accuracy']:.2f}", f"{100 * trial['validation']:.2f}", point
    if trial["state"] == "PRUNED":
        return "–", "pruned" + (f" at {100 * trial['validation']:.2f}" if trial["validation"] else ""), point
    return "–", "failed", point + (f" ({trial['failed']})" if trial.get("failed") else "")


def _pictures(root: Path, rows: Rows, classifiers: dict[str, dict[str, Any]]) -> list[str]:
    """Draw every picture whose results exist; returns the lines of Markdown that show them."""
    lines: list[str] = []

    def show(name: str, caption: str, figure: "Figure") -> None:
        plot.save(figure, root / name)
        lines.extend(["", f"![{caption}]({name})"])

    # All pictures but the first leave out seeds that diverged.
    done = {recipe.name: [r for r in found if "diverged" not in r] for recipe, found in rows}
    if any(found and recipe.claimed is not None for recipe, found in rows):
        show("claims.png", "Claimed and obtained, all recipes", pictures.claims(rows))
    if done["lecun1998"]:
        show("figure5.png", "Error over the epochs, and figure 5 of the paper", pictures.figure5(done["lecun1998"]))
    study = [(r, done[r.name]) for r, _ in rows if r.study == STUDY1998]
    if any(found for _, found in study):
        show("study1998.png", "What the choices that the paper leaves open do", pictures.study1998(study))
    sizes = {15: done["lecun1998-15k"], 30: done["lecun1998-30k"], 60: done["lecun1998"]}
    if all(sizes.values()):
        distorted = done["lecun1998-distortions"]
        show("figure6.png", "Error against the size of the training set", pictures.figure6(sizes, distorted))
    seeds = done | {name: found["seeds"] for name, found in classifiers.items()}
    ours = {figure: seeds.get(name, []) for name, figure in IN_FIGURE9.items()}
    if all(ours.values()):
        errors = {name: [100 * (1 - r["accuracy"]) for r in found] for name, found in ours.items()}
        show("figure9.png", "Classifiers of 1998, and figure 9 of the paper", pictures.figure9(errors))
        rejected = {name: [100 * r["rejected"] for r in ours[name]] for name in pictures.FIGURE10}
        show("figure10.png", "Images to reject for 0.5 % error", pictures.figure10(rejected))
    steps = [(r, done[r.name]) for r, _ in rows if r.name.startswith("today-")]
    first = [(r, done[r.name]) for r, _ in rows if r.name == "lecun1998-mle"]
    last = [(r, done[r.name]) for r, _ in rows if r.name == "best"]
    if all(found for _, found in first + steps + last):  # the next step would get the credit of a missing one
        show("today.png", "From 1998 to today", pictures.ladder(first + steps + last))
    dead, alive = done["push-tanh"], done["push-tanh-alive"]
    if dead and alive:
        show("dead_start.png", "Vanishing gradients at the start, and the repair", pictures.dead_start(dead, alive))
    flows = {name: done[f"vanishing-{name}"] for name in ("sigmoid", "tanh", "relu")}
    if all(flows.values()):
        show("vanishing.png", "Gradients by layer", pictures.gradient_flow(flows))
    return lines
