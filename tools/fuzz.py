"""Mutate files of every format that the package reads, and check how each is refused.

    python tools/fuzz.py [--count 100000] [--seed 0] [--only FORMAT] [--keep FOLDER]

A file must be read, or refused with ValueError or OSError (or a subclass in tinycnn/errors.py) whose message is one
line of less than 2,000 characters and names the file.  It must not take longer than SECONDS, nor more memory than three
times the file and ALLOWANCE.  Files that break a rule are kept, and the exit code is 1.

Mutation n of a format depends on the seed and n alone.  Half of the files get correct checksums after they have been
mutated, so that the readers behind the checksum see them.
"""

import argparse
import dataclasses
import faulthandler
import gzip
import io
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 10  # for one file
ALLOWANCE = 32 << 20  # bytes of memory besides three times the file
MAX_MESSAGE = 2000
CHUNK = 250  # files per task of a worker
INTEGERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
WORDS = (
    "0", "-1", "1", "1.5", "-0.0", "1e999", "-1e999", "NaN", "Infinity", "null", "true", '""', "[]", "{}", "[[]]",
    "2147483648", "9223372036854775808", "1000000000000", "9" * 400, "9" * 5000,
    '"\\u0000"', '"\\ud800"', '"\\u001b[31m\\n"',
    '"' + "x" * 5000 + '"', "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000,
)  # fmt: skip
VALUES = (
    None, True, 0, 1, -1, 1.5, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**12, 10**400,
    "", "x" * 5000, "\ud800\n", "1", [], {}, [[]], [1, 2], [-1, 10**9], [10**6, 10**6, 10**6],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: its valid files, its reader, and how a part of a file is mutated behind a checksum.

    read     reads a path, and raises
    name     of the file, relative to the folder of the worker
    files    valid ones
    rewrite  rewrite(mutator, file) returns a file with correct checksums, or None if it has none
    lines    whether a message may have several: a list of damaged files
    """

    read: Callable[[Path], object]
    name: str
    files: list[bytes]
    rewrite: Callable[["Mutator", bytes], bytes] | None = None
    lines: bool = False


class Mutator(random.Random):
    """Random changes of bytes, of text and of JSON."""

    def mutate(self, data: bytes, others: list[bytes]) -> bytes:
        """`data` after one to three random changes.  others: files to take pieces from"""
        mutations = (self.flip, self.cut, self.insert, self.splice, self.duplicate, self.set_integer, self.set_word)
        for _ in range(self.choice((1, 1, 1, 2, 3))):
            data = self.choice(mutations)(data, others)
        return data

    def piece(self, data: bytes) -> tuple[int, int]:
        """Start and end of a piece, more often short than long."""
        start = self.randint(0, len(data))
        return start, min(len(data), start + int(2 ** self.uniform(0, max(1, len(data).bit_length()))))

    def flip(self, data: bytes, others: list[bytes]) -> bytes:
        changed = bytearray(data)
        for _ in range(self.randint(1, 8) if data else 0):
            changed[self.randrange(len(data))] ^= 1 << self.randrange(8)
        return bytes(changed)

    def cut(self, data: bytes, others: list[bytes]) -> bytes:
        start, end = self.piece(data)
        return data[:start] + data[end:] if self.random() < 0.7 else data[:start]

    def insert(self, data: bytes, others: list[bytes]) -> bytes:
        at = self.randint(0, len(data))
        return data[:at] + self.randbytes(self.randint(1, 16)) + data[at:]

    def splice(self, data: bytes, others: list[bytes]) -> bytes:
        other = self.choice(others)
        (a, b), (c, d) = self.piece(data), self.piece(other)
        return data[:a] + other[c:d] + data[b:]

    def duplicate(self, data: bytes, others: list[bytes]) -> bytes:
        start, end = self.piece(data)
        return (
            data[:end] + data[start:end] * self.choice((1, 1, 2, min(100, 1 + 10**6 // (end - start + 1)))) + data[end:]
        )

    def set_integer(self, data: bytes, others: list[bytes]) -> bytes:
        size = self.choice((1, 2, 4, 8))
        at, value = self.randint(0, max(0, min(len(data), self.choice((64, 512, 2**30))) - size)), self.choice(INTEGERS)
        return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, self.choice(("little", "big"))) + data[at + size :]

    def set_word(self, data: bytes, others: list[bytes]) -> bytes:
        """Replace a number or a string of a text."""
        found = list(re.finditer(rb'-?\d[\d.e+-]*|"[^"\n]*"|true|false|null', data[:200_000]))
        if not found:
            return self.set_integer(data, others)
        match = self.choice(found)
        return data[: match.start()] + self.choice(WORDS).encode() + data[match.end() :]

    def change_json(self, content: Any) -> Any:
        """A JSON value with one to three nodes changed."""
        content = {"": json.loads(json.dumps(content))}
        for _ in range(self.choice((1, 1, 2, 3))):
            nodes = [
                (holder, key)
                for holder in containers(content)
                for key in (holder if isinstance(holder, dict) else range(len(holder)))
            ]
            holder, key = self.choice(nodes)
            action = self.random()
            if action < 0.6:
                holder[key] = json.loads(json.dumps(self.choice(VALUES)))
            elif action < 0.75:
                other, name = self.choice(nodes)
                holder[key] = json.loads(json.dumps(other[name]))
            elif isinstance(holder, list):
                del holder[key]
            elif holder is not content:
                value = holder.pop(key)
                if action < 0.9:
                    holder[self.choice(("", "x", "array", "layer", "\x1b[31m", "y" * 3000))] = value
        return content[""]


def containers(content: Any) -> Iterator[Any]:
    """The lists and dictionaries of a JSON value."""
    if isinstance(content, (dict, list)):
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from containers(value)


# --- formats ----------------------------------------------------------------------------------------------------------


def written(save: Callable[[Path], object], name: str) -> bytes:
    """The bytes that `save` writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def rewrite_gzip(mutator: Mutator, data: bytes) -> bytes:
    content = gzip.decompress(data)
    return gzip.compress(mutator.mutate(content, [content]), 1)


def rewrite_safetensors(mutator: Mutator, data: bytes) -> bytes:
    """Another header of the right length; or, in a file of ours, other metadata, with the right checksum."""
    from tinycnn import checkpoint

    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    own = json.loads(header).get("__metadata__", {}).get(checkpoint.KEY)
    if own and mutator.random() < 0.7:
        arrays, _ = checkpoint._unpack(data)
        metadata = json.loads(json.loads(own)["metadata"])
        if mutator.random() < 0.5:
            text = json.dumps(mutator.change_json(metadata))
        else:
            text = mutator.mutate(json.dumps(metadata).encode(), [own.encode()]).decode("latin-1")
        content = {"metadata": text, "names": list(arrays), "sha256": checkpoint._sha256(arrays, text)}
        changed = json.loads(header)
        changed["__metadata__"][checkpoint.KEY] = json.dumps(content)
        header = json.dumps(changed).encode()
    elif mutator.random() < 0.5:
        header = json.dumps(mutator.change_json(json.loads(header))).encode()
    else:
        header = mutator.mutate(header, [header])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def rewrite_zip(mutator: Mutator, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[name, archive.read(name)] for name in archive.namelist()]
    for _ in range(mutator.randint(1, 2)):
        member = mutator.choice(members)
        if mutator.random() < 0.9:
            member[1] = mutator.mutate(member[1], [content for _, content in members])
        else:
            member[0] = mutator.choice(
                (".npy", "x", "../x.npy", "/x.npy", "__metadata__.npy", members[0][0], "y" * 3000 + ".npy")
            )
    out, kind = io.BytesIO(), mutator.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(out, "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repeated names
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def rewrite_json(mutator: Mutator, data: bytes) -> bytes:
    return json.dumps(mutator.change_json(json.loads(data))).encode()


def formats() -> dict[str, Format]:
    """All formats by name."""
    import tinycnn
    from tinycnn import checkpoint, data, lecun98, models, recipes
    from tinycnn.recipes import results
    from tinycnn.recipes.saved import describe_run
    from tinycnn.resume import TrainingCheckpoint

    random_numbers = np.random.default_rng(0)
    arrays = {
        "0.weight": random_numbers.normal(size=(4, 3, 5, 5)).astype("f4"), "0.bias": np.zeros(4), "n": np.array(3),
        "empty": np.zeros((0, 2), "u1"), "1.weight": np.ones((150, 200)), "größe": np.array([True, False]),
    }  # fmt: skip
    idx = [
        written(lambda path, array=array: data.write_idx(path, array), "a")
        for array in (
            random_numbers.integers(0, 256, (5, 7, 7), np.uint8),
            np.zeros(10**5, np.int32),
            np.zeros((2, 2, 2)),
        )
    ]
    layers = tinycnn.Sequential(
        tinycnn.Conv2d(1, 4, 3, padding="same"), tinycnn.BatchNorm2d(4), tinycnn.ReLU(),
        tinycnn.Residual(tinycnn.Conv2d(4, 4, 3, padding=1), tinycnn.Tanh()), tinycnn.MaxPool2d(2),
        tinycnn.BatchNorm2d(4, affine=False, track_running_stats=False), tinycnn.Flatten(), tinycnn.Dropout(0.5),
        tinycnn.Linear(64, 10), input_shape=(1, 8, 8), rng=0,
    )  # fmt: skip
    networks = [layers, models.lenet5(rng=0), lecun98.lenet5(rng=0)]
    for network in networks:
        network.class_names = list("0123456789")
    recipe = recipes.builtin()["adam-5e4"]
    search = next(recipe for recipe in recipes.builtin().values() if recipe.space)
    result = [path.read_bytes() for path in sorted((ROOT / "results" / recipe.name).glob("seed-*.json"))]
    found = {
        "number": 0, "point": {"a": 1}, "state": "COMPLETE", "validation": 0.5, "accuracy": 0.5, "f1": 0.5,
        "cpu_seconds": 1.0, "environment": {}, "finished": "2020-01-01",
    }  # fmt: skip
    trials = {"recipe": search.name, "fingerprint": search.fingerprint, "trials": [found, found | {"number": 1}]}
    config = {
        "dataset": {"name": "mnist"}, "net": {"input": [1, 28, 28], "layers": "Flatten(), Linear(784, 10)"},
        "data": {"padding": 2}, "training": {"loss": "CrossEntropyLoss()"}, "pixels": {"mean": [0.1], "std": [0.3]},
    }  # fmt: skip
    saved = [
        written(lambda path: checkpoint.save(path, arrays, {"epoch": 3, "loss": [0.5, None]}), "a.safetensors"),
        written(lambda path: checkpoint.save(path, {}, {}), "a.safetensors"),
        written(lambda path: save_foreign(path, arrays), "a.safetensors"),
    ]
    text = np.frombuffer(b'{"epoch": 3}', np.uint8)
    npz = [
        written(lambda path: np.savez(path, **arrays, __metadata__=text), "a.npz"),
        written(lambda path: np.savez(path, x=arrays["0.weight"].T), "a.npz"),
    ]
    state = {"history": [{"epoch": 1, "lr": 0.1}], "rng": {"state": 2**100}, "theta": arrays["0.weight"], "n": [None]}
    training = written(lambda path: TrainingCheckpoint(path).write(state), "checkpoint.safetensors")
    toml = [path.read_bytes() for path in sorted((ROOT / "tinycnn" / "recipes").glob("*.toml"))]
    return {
        "IDX": Format(data.read_idx, "a-idx3-ubyte", idx),
        "IDX, gzipped": Format(data.read_idx, "a.gz", [gzip.compress(file, mtime=0) for file in idx], rewrite_gzip),
        "safetensors": Format(checkpoint.load, "a.safetensors", saved, rewrite_safetensors),
        "npz": Format(checkpoint.load, "a.npz", npz, rewrite_zip),
        "model": Format(
            tinycnn.load, "model.safetensors",
            [written(network.save, "a.safetensors") for network in networks], rewrite_safetensors,
        ),
        "training": Format(
            lambda path: TrainingCheckpoint(path).read(), "checkpoint.safetensors", [training], rewrite_safetensors
        ),
        "recipe": Format(recipes.read, "mine.toml", toml),
        "result": Format(
            lambda path: results.read(path.parent.parent, recipe), f"{recipe.name}/seed-0.json", result, rewrite_json
        ),
        "trials": Format(
            lambda path: results.read_trials(path.parent.parent, search), f"{search.name}/trials.json",
            [json.dumps(trials).encode()], rewrite_json,
        ),
        "config.json": Format(
            lambda path: describe_run(path.parent), "run/config.json",
            [json.dumps(config).encode()], rewrite_json,
        ),
        **(image_formats(data.from_files) if hasattr(data, "from_files") else {}),
    }  # fmt: skip


def save_foreign(path: Path, arrays: dict[str, Any]) -> None:
    from safetensors import numpy as safetensors

    safetensors.save_file(arrays, path, {"format": "pt"})


def image_formats(from_files: Callable[..., Any]) -> dict[str, Format]:
    """PNG and JPEG in folders of classes, CSV and npz with images and labels."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)

    def picture(kind: str, mode: str) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(out, kind)
        return out.getvalue()

    valid = {f"{name}/{number}.png": picture("PNG", "L") for name in "ab" for number in "12"}

    def read_folder(path: Path) -> object:
        for name, content in valid.items():
            (path.parent.parent / name).parent.mkdir(exist_ok=True)
            (path.parent.parent / name).write_bytes(content)
        return from_files(path.parent.parent, on_message=str)

    def read_table(path: Path) -> object:
        return from_files(path, shape=(1, 4, 4), on_message=str)

    rows = [f"{i % 3}," + ",".join(str(i * j % 256) for j in range(16)) for i in range(12)]
    head = "label," + ",".join(f"pixel{j}" for j in range(16))
    csv = [("\n".join(lines) + "\n").encode() for lines in ([head, *rows], rows)]
    images, labels = np.arange(192, dtype=np.uint8).reshape(12, 4, 4), np.arange(12) % 3
    npz = [
        written(lambda path: np.savez(path, x=images, y=labels), "a.npz"),
        written(lambda path: np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels), "a.npz"),
    ]
    return {
        "PNG": Format(
            read_folder,
            "pictures/a/0.png",
            [picture("PNG", mode) for mode in ("L", "RGB", "RGBA", "P", "1")],
            lines=True,
        ),
        "JPEG": Format(read_folder, "pictures/a/0.jpg", [picture("JPEG", mode) for mode in ("L", "RGB")], lines=True),
        "CSV of images": Format(read_table, "a.csv", csv),
        "npz of images": Format(read_table, "images.npz", npz, rewrite_zip),
    }


# --- one file ---------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """The reader took longer than SECONDS."""


def on_alarm(*_: object) -> None:
    raise Hang(f"took longer than {SECONDS} s")


def check(kind: Format, path: Path, size: int) -> tuple[str, str, int]:
    """Read a file.  Returns (accepted, refused or failed, the reason of a failure, bytes of memory at the peak)."""
    outcome, reason, resident = "accepted", "", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # the alarm waits for the end of a function in C
    try:
        kind.read(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text, error_type = str(error), type(error).__name__
        outcome = "refused"
        if not isinstance(error, (ValueError, OSError)):
            outcome, reason = "failed", f"{error_type}: {text[:300]}"
        elif path.name not in text:
            outcome, reason = "failed", f"{error_type} does not name the file: {text[:300]}"
        elif len(text) >= MAX_MESSAGE or not (text.replace("\n", "") if kind.lines else text).isprintable():
            outcome, reason = (
                "failed",
                f"{error_type} has a message of {len(text)} characters or more lines: {text[:300]!r}",
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Memory that Python does not allocate shows in the process's own peak.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(peak, unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident))
    if outcome != "failed" and peak > 3 * size + ALLOWANCE:
        outcome, reason = "failed", f"took {peak / 2**20:,.0f} MiB of memory for a file of {size:,} bytes"
    return outcome, reason, peak


def mutated(name: str, kind: Format, seed: int, number: int) -> bytes:
    """File `number` of a format."""
    mutator = Mutator(f"{seed} {name} {number}")
    data = mutator.choice(kind.files)
    if kind.rewrite and mutator.random() < 0.5:
        return kind.rewrite(mutator, data)
    return mutator.mutate(data, kind.files)


@dataclasses.dataclass
class Tally:
    """Of the files of a format.  peak: bytes of memory    ratio: peak / size of the file, for files of over 64 KiB"""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    peak: int = 0
    ratio: float = 0
    seconds: float = 0

    def add(self, other: "Tally") -> None:
        self.accepted, self.refused = self.accepted + other.accepted, self.refused + other.refused
        self.peak, self.ratio = max(self.peak, other.peak), max(self.ratio, other.ratio)
        self.seconds, self.failures = self.seconds + other.seconds, self.failures + other.failures


def run(name: str, kind: Format, seed: int, numbers: range, keep: Path) -> Tally:
    """Check files of a format, in this process.  While a file is read it is in the folder `keep`."""
    tally, start = Tally(), time.perf_counter()
    folder = keep / f"{slug(name)}-{numbers.start}"
    path = folder / kind.name
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = signal.signal(signal.SIGALRM, on_alarm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            data = mutated(name, kind, seed, number)
            path.write_bytes(data)
            outcome, reason, peak = check(kind, path, len(data))
            tally.accepted += outcome == "accepted"
            tally.refused += outcome == "refused"
            tally.peak = max(tally.peak, peak)
            if len(data) > 65536:
                tally.ratio = max(tally.ratio, peak / len(data))
            if outcome == "failed":
                kept = keep / f"{slug(name)}-{seed}-{number}{path.suffix}"
                kept.write_bytes(data)
                tally.failures.append(f"{name}, seed {seed}, number {number}: {reason} ({kept})")
    signal.signal(signal.SIGALRM, previous)
    shutil.rmtree(folder)
    tally.seconds = time.perf_counter() - start
    return tally


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def run_by_name(name: str, seed: int, numbers: range, keep: Path) -> Tally:
    """`run` in a worker."""
    global _formats
    _formats = _formats or formats()
    return run(name, _formats[name], seed, numbers, keep)


_formats: dict[str, Format] = {}  # of a worker: created once


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one format")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz", help="folder for the files that failed")
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(formats())
    each = -(-args.count // len(names))
    args.keep.mkdir(parents=True, exist_ok=True)
    tallies = {name: Tally() for name in names}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tasks = {
            pool.submit(run_by_name, name, args.seed, range(start, min(start + CHUNK, each)), args.keep): name
            for start in range(0, each, CHUNK)
            for name in names
        }
        for task, name in tasks.items():
            try:
                tallies[name].add(task.result())
            except BrokenProcessPool:
                left = sorted(str(path) for path in args.keep.glob("*-*/**/*") if path.is_file())
                tallies[name].failures.append(f"a worker died when it read one of these files: {', '.join(left)}")
                break
            except BaseException:  # Ctrl-C
                pool.shutdown(cancel_futures=True)
                raise
    print(
        f"{'format':16}{'files':>8}{'accepted':>10}{'refused':>9}{'failures':>10}{'MiB':>7}{'x file':>8}{'seconds':>9}"
    )
    for name, tally in tallies.items():
        files = tally.accepted + tally.refused + len(tally.failures)
        ratio = f"{tally.ratio:.1f}" if tally.ratio else "-"
        memory = f"{tally.peak / 2**20:7.1f}{ratio:>8}"
        counts = f"{files:8,}{tally.accepted:10,}{tally.refused:9,}{len(tally.failures):10,}"
        print(f"{name:16}{counts}{memory}{tally.seconds:9.1f}")
    failures = [line for tally in tallies.values() for line in tally.failures]
    print(*failures[:50], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
