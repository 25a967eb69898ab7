"""Descriptions of the machine and the printed tables that all benchmarks share."""

import contextlib
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from tinycnn.hardware import processor

PACKAGES = ("tinycnn", "numpy", "numba", "torch", "jax", "onnxruntime", "onnx", "scipy")


def hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    info: dict[str, Any] = {"processor": processor(), "cores": cores, "system": system}
    with contextlib.suppress(AttributeError, ValueError, OSError):
        info["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return info


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def header(result: dict[str, Any]) -> str:
    """Two lines: the machine and its threads, then the versions of the libraries."""
    info = result["hardware"]
    libraries = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = " and ".join(map(str, result["settings"]["threads"]))
    memory = f"{info['memory_gb']:g} GB, " if "memory_gb" in info else ""
    machine = f"{info['processor']}, {info['cores']} cores, {memory}{info['system']}"
    return f"{machine}; threads: {threads}{busy_note(result)}\n{libraries}"


def busy_note(result: dict[str, Any]) -> str:
    """The number of busy programs during the run, in words (older files do not record it)."""
    programs = result["settings"].get("busy", 0)
    return f", beside {programs} busy program{'s' * (programs > 1)}" if programs > 0 else ""


def table(head: Sequence[str], widths: Sequence[int]) -> Callable[..., None]:
    """Print a header; returns a function that prints a row below it, None as a dash."""

    def print_row(*cells: Any) -> None:
        texts = ["-" if cell is None else str(cell) for cell in cells]
        padded = [f"{t:<{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        print("  ".join(padded).rstrip(), flush=True)

    print_row(*head)
    print("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return print_row
