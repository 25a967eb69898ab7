"""From a device's name to the module that computes on it."""

import importlib


def get(device):
    """The backend module of `device`; "cpu" is the one there is.  ValueError for others."""
    if device == "cpu":
        return importlib.import_module("tinycnn.kernels")
    raise ValueError(f"device must be 'cpu', got {device!r} (a CUDA backend is planned, and not part of this version)")


def set_threads(threads):
    """Use so many CPU threads from now on; None leaves the choice to Numba.  Returns the number in use."""
    import numba

    from tinycnn import _check

    if threads is not None:
        most: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 (unknown to type checkers)
        if _check.integer("threads", threads, 1) > most:
            raise ValueError(f"threads must be at most {most} on this machine, got {threads}")
        numba.set_num_threads(threads)
    return numba.get_num_threads()
