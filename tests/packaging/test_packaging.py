"""Metadata of a release: one version and date in all files that state them, and a complete source archive."""

import re
import sys
from pathlib import Path

import pytest

import tinycnn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def find(pattern, name):
    """The groups of the first line of a file that matches."""
    match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert match, f"no line of {name} matches {pattern}"
    return match.groups()


def test_version_and_date_agree():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "tinycnn/__init__.py"
    version, date = find(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", "CHANGELOG.md")
    assert tinycnn.__version__ == version
    assert find(r"^version: (.+)$", "CITATION.cff") == (version,)
    assert find(r'^date-released: "(.+)"$', "CITATION.cff") == (date,)


def test_license_agrees():
    assert find(r"^license: (.+)$", "CITATION.cff") == (PROJECT["project"]["license"],)
    assert find(r"^(\w+) License$", "LICENSE") == (PROJECT["project"]["license"],)


def test_lowest_python_is_the_same_everywhere():
    (lowest,) = re.findall(r">=3\.(\d+)", PROJECT["project"]["requires-python"])
    minors = [int(c.rpartition(".")[2]) for c in PROJECT["project"]["classifiers"] if ":: Python :: 3." in c]
    assert minors == list(range(int(lowest), minors[-1] + 1))
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{lowest}"
    assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{lowest}"


@pytest.mark.parametrize("name", PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
def test_sdist_entries_exist(name):
    assert (ROOT / name.removeprefix("/")).exists()
