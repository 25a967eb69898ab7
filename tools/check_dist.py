"""Check a release: contents of the wheel and the sdist, then install and use each outside the checkout.

    python tools/check_dist.py [dist]

The folder must hold one wheel and one sdist, as `python -m build` makes them. Each is installed into an empty virtual
environment of this Python, and runs the sdist's example for one epoch on synthetic digits. Both environments have the
same path, one after the other: compiled kernels are cached by path, so the second one compiles nothing.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SDIST_FILES = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml",
    "examples/lenet5.py", "docs/cuda.md", "benchmarks/__main__.py", "tests/conftest.py", "tools/check_dist.py",
)  # fmt: skip
REPORT = "import tinycnn; print(tinycnn.__version__, tinycnn.__file__)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    folder = parser.parse_args(argv).folder.resolve()
    wheel, sdist = only(folder, "*.whl"), only(folder, "*.tar.gz")
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extract(next(m for m in archive if m.name.endswith("/examples/lenet5.py")), work)
        example = next(work.glob("*/examples/lenet5.py"))
        for archive in (wheel, sdist):
            check_installed(archive, work, example)
    print(f"{wheel.name} and {sdist.name} install and run")


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} must hold one file {pattern}, it holds {len(found)}; make dist builds it")
    return found[0]


def check_contents(wheel: Path, sdist: Path) -> None:
    """Stop unless both archives hold exactly the package's files, and the sdist also SDIST_FILES."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tinycnn").rglob("*") if path.is_file()}
    package = {path for path in package if "__pycache__" not in path}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive if member.isfile()}
    for name, want, got in (
        (wheel.name, package, in_wheel),
        (sdist.name, package, {path for path in in_sdist if path.startswith("tinycnn/")}),
        (sdist.name, set(SDIST_FILES), in_sdist & set(SDIST_FILES)),
    ):
        if want != got:
            sys.exit(f"{name}: missing {sorted(want - got)}, not in the checkout {sorted(got - want)}")


def check_installed(archive: Path, work: Path, example: Path) -> None:
    """Install an archive into an empty environment and use it from a folder without sources."""
    environment, home = work / "environment", work / "home"
    home.mkdir(exist_ok=True)
    print(f"--- {archive.name}", flush=True)
    venv.create(environment, clear=True, with_pip=True)
    python = environment / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", archive], home)
    version, path = run([python, "-c", REPORT], home).strip().split(maxsplit=1)
    if not Path(path).is_relative_to(environment):
        sys.exit(f"tinycnn was imported from {path}, not from the environment")
    if version != archive.name.split("-")[1].removesuffix(".tar.gz"):
        sys.exit(f"{archive.name} installs version {version}")
    program = environment / "bin" / "tinycnn"
    if (output := run([program, "--version"], home).strip()) != f"tinycnn {version}":
        sys.exit(f"tinycnn --version prints {output!r}, expected tinycnn {version}")
    listed = run([program, "recipes"], home)
    for file in (ROOT / "tinycnn" / "recipes").glob("*.toml"):
        for recipe in re.findall(r"^\[([\w-]+)\]$", file.read_text(encoding="utf-8"), re.MULTILINE):
            if f"\n  {recipe} " not in listed:
                sys.exit(f"tinycnn recipes does not list {recipe} of {file.name}")
    print(run([python, "-m", "tinycnn", "info"], home), end="")
    print(run([python, example, "--data", "synthetic", "--epochs", "1", "--out", home / "runs"], home), end="")
    if not list((home / "runs").glob("*/*/report.json")):
        sys.exit("the example left no report")
    print(run([program, "demo", "--no-open", "--out", home / "demo.html"], home), end="")


def run(command: list[str | Path], folder: Path) -> str:
    """The standard output of a command that must succeed. It sees neither the checkout nor the user's caches."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "NUMBA_CACHE_DIR", "TINYCNN_DATA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"NUMBA_CACHE_DIR": str(folder.parent / "cache"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{' '.join(map(str, command))} failed with exit status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
