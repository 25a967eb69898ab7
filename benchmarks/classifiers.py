"""Classifiers of LeCun et al. 1998, section III.C, that are not one network: nearest neighbours, pairwise linear
classifiers, and the boosted LeNet-4.

    python -m benchmarks classifiers [--only boosted] [--seeds 1] [--out results/classifiers1998.json]

Needs MNIST, and scikit-learn for the nearest neighbours.  A seed of the boosted LeNet-4 takes half an hour of a core.
Results of other classifiers in the file are kept.  `python -m tinycnn reproduce` draws them in figure 9.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np

from tinycnn import DeviceDataset, evaluate, fit, metrics, recipes
from tinycnn.dataset import DataLoader
from tinycnn.recipes import build, training

NEIGHBOURS = 3
IMAGES = 60_000  # that train the second and the third net
RIDGE = 10.0  # of the least squares; 1 to 100 are within 0.3 % on 5,000 of the training images
BATCH = 1000  # distorted images made and filtered at once


def nearest_neighbours(digits, _seed):
    """The class of most of the three nearest training images, by Euclidean distance.  Returns no scores."""
    from sklearn.neighbors import KNeighborsClassifier

    flat = [images.reshape(len(images), -1).astype(np.float32) for images in (digits.train_images, digits.test_images)]
    predicted = KNeighborsClassifier(NEIGHBOURS, algorithm="brute").fit(flat[0], digits.train_labels).predict(flat[1])
    return {"accuracy": accuracy(predicted, digits.test_labels)}


def pairwise_linear(digits, _seed):
    """45 units, one a pair of classes, trained on these only, to +1 and -1: least squares by linear systems.

    The score of a class is the sum of its units' outputs, those of the other sign negated.  Outputs are cut at the
    targets: a unit has large ones for classes that it was not trained on.  On validation images the error was 14 %
    without that, and 8 % with it.
    """
    train, test = (with_bias(images) for images in (digits.train_images, digits.test_images))
    groups = [train[digits.train_labels == k] for k in range(10)]
    products, sums = [x.T @ x for x in groups], [x.sum(axis=0) for x in groups]
    scores = np.zeros((len(test), 10))
    for i, j in itertools.combinations(range(10), 2):
        weights = np.linalg.solve(products[i] + products[j] + RIDGE * np.eye(train.shape[1]), sums[i] - sums[j])
        unit = np.clip(test @ weights, -1, 1)
        scores[:, i] += unit
        scores[:, j] -= unit
    # No rejection: cut outputs are often equal.
    return {"accuracy": accuracy(scores.argmax(axis=1), digits.test_labels)}


def with_bias(images):
    flat = images.reshape(len(images), -1) / 255
    return np.hstack([flat, np.ones((len(flat), 1))])


def boosted(digits, seed):
    """Three LeNet-4: the first learns distorted digits, the second those of which the first has half wrong, the third
    those on which the two disagree.  Their outputs are added (Drucker, Schapire and Simard 1993)."""
    recipe = recipes.find("lenet4-1998")[0]
    distortions = recipes.find("lecun1998-distortions")[0].data["augment"]
    streams = iter(np.random.SeedSequence([seed, 4]).spawn(8))

    def generator():
        return np.random.default_rng(next(streams))

    recipe = dataclasses.replace(recipe, data=recipe.data | {"augment": distortions})
    splits = build.prepare_data(recipe, digits, generator(), seed=seed)
    nets = [trained(recipe, splits.train, generator())]
    say(f"seed {seed}, first net: {measured_sum(nets, splits.test, digits)}")

    def is_for_second(images, labels, rng):
        wrong = predict(nets[0], images) != labels
        right = rng.permutation(np.flatnonzero(~wrong))[: wrong.sum()]
        return np.sort(np.concatenate([np.flatnonzero(wrong), right]))

    def is_for_third(images, labels, rng):
        return np.flatnonzero(predict(nets[0], images) != predict(nets[1], images))

    seen = []
    for choose in (is_for_second, is_for_third):
        chosen, count = filtered(splits.train, choose, generator())
        seen.append(count)
        say(f"seed {seed}: {IMAGES:,} of {count:,} distorted images chosen")
        nets.append(trained(recipe, chosen, generator()))
        say(f"seed {seed}: {len(nets)} nets {measured_sum(nets, splits.test, digits)}")
    single = [measured_sum([net], splits.test, digits)["accuracy"] for net in nets]
    return measured_sum(nets, splits.test, digits) | {"nets": single, "distorted_images": seen}


def trained(recipe, train_set, rng):
    """A net after the recipe's passes through the data set."""
    model = build.build_model(recipe, rng)
    optimizer = build.build_optimizer(recipe, model, len(train_set))
    settings = recipe.training
    fit(
        model, build.build_loss(recipe), optimizer, train_set, epochs=settings["epochs"], batch_size=settings["batch"],
        reshuffle=settings["reshuffle"], rng=rng, progress=False,
    )  # fmt: skip
    return model


def filtered(train_set, choose, rng):
    """IMAGES distorted images that choose(images, labels, rng) returns the numbers of, and how many were made."""
    loader = DataLoader(train_set, augment=True)
    x = np.empty((BATCH, *train_set.image_shape), np.float32)
    images, labels = [], []
    found = made = 0
    while found < IMAGES:
        loader.start_epoch(rng.permutation(len(train_set)))
        for position, n in loader.batches(BATCH):
            loader.seek(position)
            target = loader.next(x[:n])
            index = choose(x[:n], target, rng)
            images.append(x[index])
            labels.append(target[index])
            found, made = found + len(index), made + n
    loader.close()
    keep = slice(IMAGES)
    return DeviceDataset(np.concatenate(images)[keep], np.concatenate(labels)[keep], mean=0, std=1), made


def predict(net, images):
    """Class of each normalised image: the nearest code."""
    return net(images).argmin(axis=1)


def measured_sum(nets, test_set, digits):
    """Result of the nets' outputs added."""
    loss = build.build_loss(recipes.find("lenet4-1998")[0])
    return measured(-sum(evaluate(net, test_set, loss)[2] for net in nets), digits.test_labels)


def measured(scores, labels):
    """Accuracy, and the fraction of the images to reject for 0.5 % error."""
    return {
        "accuracy": accuracy(scores.argmax(axis=1), labels), "rejected": metrics.rejection_rate(scores, labels),
    }  # fmt: skip


def accuracy(predicted, labels):
    return float(np.mean(predicted == labels))


def say(text):
    print(f"{time.strftime('%H:%M')} {text}", flush=True)


# name: (function, whether a seed changes anything, title, the paper's accuracy in %, why ours differs)
CLASSIFIERS = {
    "pairwise": (
        pairwise_linear, False, "pairwise linear classifier, by linear systems", 92.4,
        "least squares with bounded outputs; how the paper trained its units, and whether they are bounded, is open",
    ),
    "knn": (
        nearest_neighbours, False, "three nearest neighbours (scikit-learn)", 95.0,
        "the paper does not say why its error is larger; MNIST's page lists 3.09 % for this method by another author",
    ),
    "boosted": (boosted, True, "boosted LeNet-4, with distortions", 99.3, "the first net alone has 99.04"),
}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CLASSIFIERS, nargs="+", default=list(CLASSIFIERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/classifiers1998.json"))
    args = parser.parse_args(argv)
    digits = build.load(recipes.find("lenet4-1998")[0])
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        function, is_random, title, claimed, why = CLASSIFIERS[name]
        found[name] = {
            "title": title,
            "claimed": claimed,
            "why": why,
            "seeds": [],
            "environment": training.environment("cpu"),
        }
        for seed in range(args.seeds if is_random else 1):
            found[name]["seeds"].append(function(digits, seed))
            say(f"{name}, seed {seed}: {found[name]['seeds'][-1]}")
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
