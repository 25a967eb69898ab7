"""The commands `python -m tinycnn recipes` and `reproduce`."""

import functools
import importlib.util
import time

from tinycnn import experiment, recipes
from tinycnn.recipes import results


def add_options(parser):
    """The options of `reproduce`."""
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="recipes, files of recipes (*.toml), or all")
    add("--seeds", type=_seeds, default=range(3), metavar="K", help="how many, from 0 on, or which: 3,4 (default: 3)")
    add("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    add("--threads", type=experiment.positive_int, help="CPU threads; all by default")
    add("--data", choices=("mnist", "fashion", "kmnist"), help="another data set than the recipe's")
    add("--data-dir", help="folder to look for the data in, and to download it to")
    add("--results", default="results", help="folder of finished seeds (default: results)")
    add("--out", default="runs", help="folder of run folders and reports (default: runs)")
    add("--tensorboard", metavar="DIR", help="write event files for TensorBoard there (needs tensorboardX)")
    return parser


def _seeds(text):
    if "," in text:
        return sorted({experiment.non_negative_int(part) for part in text.rstrip(",").split(",")})
    return range(experiment.positive_int(text))


def listing():
    """Print all recipes."""
    known = recipes.builtin()
    width = max(map(len, known))
    study = None
    for name, recipe in known.items():
        if recipe.study != study:
            study = recipe.study
            print(f"\n{study}")
        claimed = f"{recipe.claimed:.2f} %" if recipe.claimed is not None else ""
        search = f" (a search: python -m tinycnn sweep {name})" if recipe.space else ""
        print(f"  {name:<{width}}  {claimed:>8}  {recipe.title}{search}")
    print("\nThe figures are test accuracies that the sources claim.  Run one: python -m tinycnn reproduce NAME")
    return 0


def main(args):
    """Run what is missing of the recipes in `args`, and print claimed and obtained; returns the exit code."""
    interrupted = "interrupted: finished seeds are kept, and the same command goes on with the next"
    return experiment.run_command(lambda: _run(args, _chosen(args.names)), interrupted)


def _chosen(names):
    """The recipes that are named, each once."""
    chosen: dict[str, recipes.Recipe] = {}
    shipped = recipes.builtin()
    for recipe in (recipe for name in names for recipe in recipes.find(name)):
        if recipe.space:
            raise recipes.RecipeError(f"{recipe.name} is a search: python -m tinycnn sweep {recipe.name}")
        # Results are kept by name, and would replace one another.
        for other in (chosen.get(recipe.name, recipe), shipped.get(recipe.name, recipe)):
            if other.path.resolve() != recipe.path.resolve():
                raise recipes.RecipeError(f"two recipes are called {recipe.name!r}: in {other.path} and {recipe.path}")
        chosen[recipe.name] = recipe
    return list(chosen.values())


def _run(args, chosen):
    from tinycnn import devices
    from tinycnn.recipes import report, training

    for recipe in chosen:
        training.check(recipe)
    device = devices.resolve(args.device)
    devices.get(device)
    devices.set_num_threads(args.threads)
    if args.tensorboard and importlib.util.find_spec("tensorboardX") is None:  # now, not after hours of training
        raise ValueError("--tensorboard needs tensorboardX: pip install 'tinycnn[tensorboard]'")
    root = args.results if args.data is None else f"{args.results}/{args.data}"
    in_table = args.data is None and any(recipe.path.parent == recipes.RECIPES_DIR for recipe in chosen)
    if in_table:
        report.read_all(root)  # a damaged file is told before hours of training
    loaded, todo = {}, []
    for recipe in chosen:
        results.check_owner(root, recipe)
        done = {result["seed"] for result in results.read(root, recipe)}
        missing = [seed for seed in args.seeds if seed not in done]
        name = args.data or recipe.data.get("name", "mnist")
        if missing:
            for folder in (root, args.out):
                results.prepare_folder(folder, recipe)
            if name not in loaded:
                loaded[name] = training.load(recipe, args.data_dir, name)
            training.split_sizes(recipe, loaded[name])
        todo.append((recipe, name, missing))
    for recipe, name, missing in todo:
        print(f"\n{recipe.name}: {recipe.title}")
        for seed in missing:
            print(f"  seed {seed}, {recipe.training['epochs']} epochs:", flush=True)
            result = training.run(
                recipe, seed, loaded[name], device=device, out=args.out, on_message=lambda text: print(f"  {text}"),
                on_epoch=_teller(recipe, seed, args.tensorboard),
                on_result=functools.partial(results.save, root, recipe),
            )  # fmt: skip
            if "diverged" in result:
                print(f"  {result['diverged']}")
            print(
                f"  test accuracy {result['accuracy']:.2%}, {result['training_seconds']:.0f} s of training", flush=True
            )
        found = results.read(root, recipe)
        claimed = "nothing" if recipe.claimed is None else f"{recipe.claimed:.2f} %"
        print(f"  claimed {claimed}, obtained {results.summarize(found)}")
        print(f"  report: {report.write_report(recipe, found, args.out)}")
    if in_table:
        print(f"\ntable: {report.write_table(args.results)}")
    return 0


def _teller(recipe, seed, tensorboard):
    """What is called after each epoch: a line, at most every few seconds, and the event file."""
    epochs, shown = recipe.training["epochs"], [time.monotonic() - 60]
    writer = None
    if tensorboard:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(f"{tensorboard}/{recipe.name}/seed-{seed}")

    def tell(record):
        epoch = record["epoch"]
        if writer is not None:
            for key, value in record.items():
                if key != "epoch":
                    writer.add_scalar(key, value, epoch)
            writer.flush()
            if epoch == epochs:
                writer.close()
        if time.monotonic() - shown[0] > 10 or epoch == epochs:
            shown[0] = time.monotonic()
            left = (epochs - epoch) * record["seconds"]
            held_out = f"held-out error {1 - record['val_accuracy']:.2%}"
            print(
                f"  epoch {epoch:3d}   training error {1 - record['train_accuracy']:.2%}, {held_out}"
                + (f", about {left:.0f} s to go" if left > 10 else ""),
                flush=True,
            )

    return tell
