"""Facts about this machine: processor, threads, GPU, versions, and the revision of the code."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import tinycnn
from tinycnn import _gpu
from tinycnn._check import hide_password


def versions() -> dict[str, str]:
    """The versions that the bits of a result depend on."""
    import numba

    return {"tinycnn": tinycnn.__version__, "numpy": np.__version__, "numba": numba.__version__}


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware and threads, for config.json."""
    import numba

    facts = {
        **versions(),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": numba.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *map(hide_password, sys.argv[1:])],
    }
    return facts if device == "cpu" else facts | {"device": device_name(device)}


def device_name(device: str) -> str:
    """The processor and the number of threads, or the GPU."""
    import numba

    if device == "cpu":
        threads = numba.get_num_threads()
        return f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return f"{device}, {_gpu.probe().gpus[int(device.removeprefix('cuda:'))].name}"


def processor() -> str:
    """The processor's name, or its architecture if the system does not know the name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The commit of the checkout that tinycnn is imported from; None for an installed package."""
    root = Path(tinycnn.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
