"""A worker of the tests of shared studies:  python storage_worker.py LOG SECONDS COMMAND...

Runs a command of tinycnn on synthetic digits without drawing pictures.  Each epoch takes SECONDS more, and each
training writes a line "start", and "end" with what it was, to LOG.
"""

import os
import sys
import time
from pathlib import Path

from tinycnn import data, plot, runs
from tinycnn.__main__ import main
from tinycnn.recipes import training


def work(log: str, seconds: float, *command: str) -> int:
    images, labels = data.synthetic_digits(500, rng=0)
    digits = data.Dataset("digits", images[:400], labels[:400], images[400:], labels[400:], tuple("0123456789"))
    train = training.run

    def slow(recipe, seed, *args, on_epoch=None, on_result=None, **options):
        def note(word):
            with Path(log).open("a") as file:
                file.write(f"{word} {os.getpid()} {recipe.name} {recipe.net['layers']} {seed}\n")

        def epoch(record):
            time.sleep(seconds)
            if on_epoch is not None:
                on_epoch(record)

        def result(found):
            on_result(found)
            note("end")

        note("start")
        return train(recipe, seed, *args, on_epoch=epoch, on_result=result, **options)

    data.load = lambda name, *_: digits
    plot.save = lambda figure, path: None
    runs.RunFolder.finish = lambda *args: None
    training.run = slow
    return main([*command])


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], float(sys.argv[2]), *sys.argv[3:]))
