"""What machine this is: versions, processor, threads, GPU, and the revision of the code."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

import tinycnn
from tinycnn import _gpu


def environment(device="cpu"):
    """Versions, hardware and threads, for config.json."""
    import numba

    found = {
        "tinycnn": tinycnn.__version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": numba.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    return found if device == "cpu" else found | {"device": device_name(device)}


def device_name(device):
    """What computes: the processor and the number of threads, or the GPU."""
    import numba

    if device == "cpu":
        threads = numba.get_num_threads()
        return f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return f"{device}, {_gpu.probe().gpus[int(device.removeprefix('cuda:'))].name}"


def processor():
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision():
    """The commit of the checkout that tinycnn runs from; None where it is installed."""
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
