"""The places that a new layer, loss or kernel needs.  Each check fails with the file, the line and what to add there.

layer    a class in tinycnn/layers.py with `forward` and `backward`; its name in tinycnn/__init__.pyi; a row in
         tests/test_gradients.py; its function and `_backward` in tinycnn/functional.py, with torch's answers
         (tests/support/make_torch_answers.py), or a reason in NOT_IN_FUNCTIONAL there.  An activation: also a code and
         two functions in tinycnn/scalars.py, and a row in tests/support/reference.py.  Its name in CHANGELOG.md.  A
         row in LAYERS of tinycnn/demo/layers.js, which computes it in a web page
loss     a class in tinycnn/losses.py; its name in tinycnn/__init__.pyi and in CHANGELOG.md; a row in
         tests/test_gradients.py
kernel   a function in tinycnn/kernels/ and one with the same arguments in tinycnn/cuda/, both exported; calls in
         tests/support/cuda_calls.py; a row in a table CASES of the tests, for the same bits with any number of threads.
         NaN in the input must give NaN in the output: exceptions have a reason in NAN_STOPS below

These checks compile no kernels.
"""

import functools
import importlib
import inspect
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference

import tinycnn
from tinycnn import functional, kernels, layers, lecun98, losses

ROOT = Path(__file__).parents[1]

# Names of the backends that are no kernels: services on arrays, and modules of the CPU's only.
SERVICES = {"capture", "copy_to", "empty", "parameter_blocks", "precompile", "to_device", "to_host"}
CPU_MODULES = {"folded", "fused", "layout"}

# Every kernel passes NaN on, so that a diverged run is seen.  Exceptions: activations whose gradient does not, and why.
NAN_STOPS = {
    "relu": "dx is dy unless y <= 0, which is false for NaN",
    "leaky_relu": "dx is dy unless x <= 0, which is false for NaN",
    "elu": "dx is dy unless y <= 0, which is false for NaN",
    "hardtanh": "dx is dy unless y is a limit, which is false for NaN",
    "relu6": "dx is dy unless y is a limit, which is false for NaN",
}

NOT_IN_TORCH = {
    "dropout",
    "scaled_tanh",
}  # functions without answers of torch: tests/test_functional.py has formulas for them
NOT_EXPORTED = {"Parametric"}  # a base class


def place(path, anchor):
    """ "path:line" of the first line that begins with `anchor`."""
    lines = (ROOT / path).read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.lstrip().startswith(anchor)]
    return f"{path}:{numbers[0]}" if numbers else path


def classes(module, base):
    """Public subclasses of `base` that `module` defines."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and issubclass(thing, base) and thing is not base
        if thing.__module__ == module.__name__ and not name.startswith("_") and name not in NOT_EXPORTED
    }


LAYERS = {"tinycnn/layers.py": classes(layers, layers.Layer), "tinycnn/lecun98.py": classes(lecun98, layers.Layer)}
LOSSES = {"tinycnn/losses.py": classes(losses, losses.Loss), "tinycnn/lecun98.py": classes(lecun98, losses.Loss)}
KERNELS = sorted(set(kernels.__all__) - SERVICES - CPU_MODULES)


@functools.cache
def gradient_rows():
    """Rows for layers and for losses, and the layers without a function."""
    tables = importlib.import_module("tests.test_gradients")
    return set(tables.LAYERS), set(tables.LOSSES), set(tables.NOT_IN_FUNCTIONAL)


@functools.cache
def torch_answers():
    return {case["function"] for case in importlib.import_module("tests.test_functional").ABOUT["cases"]}


@functools.cache
def cuda_calls():
    calls = importlib.import_module("cuda_calls")
    with mock.patch.object(kernels, "max_pool2d_forward"):  # it makes the indices of a call: not needed here
        return {name for name, *_ in calls.calls(np.float32, calls.SMALL)}


@functools.cache
def case_files():
    """Rows of every table CASES of the tests, by file."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search("^CASES = ", path.read_text(), re.M)]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    tables = [importlib.import_module(name).CASES for name in names]
    return {str(path.relative_to(ROOT)): table for path, table in zip(files, tables, strict=True)}


@functools.cache
def cuda_kernels():
    """The CUDA backend's functions by name."""
    cuda = importlib.import_module("tinycnn.cuda")
    return {name: getattr(cuda, name) for name in cuda.__all__}


def snake_case(name):
    """The function of a layer, as in torch: max_pool2d for MaxPool2d, leaky_relu for LeakyReLU."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.replace("LU", "lu")).lower()


def missing_for_layer(name, layer, path):
    """What a layer lacks, one line each."""
    for method in ("forward", "backward"):
        if getattr(layer, method) is getattr(layers.Layer, method) and not layer.is_view:
            yield f"{place(path, f'class {name}')}: {name} needs a method {method}"
    if name not in gradient_rows()[0]:
        where = place("tests/test_gradients.py", "LAYERS = {")
        yield f'{where}: add a row "{name}": a strategy of (layer, input shape, how inputs are drawn)'
    if not re.search(rf"^    {name}[,:]", (ROOT / "tinycnn/demo/layers.js").read_text(), re.MULTILINE):
        where = place("tinycnn/demo/layers.js", "const LAYERS = {")
        yield f"{where}: add {name}: {{forward, backward}}, the layer in a web page"
    if path != "tinycnn/layers.py":
        return
    if not hasattr(tinycnn, name):
        where = place("tinycnn/__init__.pyi", "from .layers import")
        yield f"{where}: add {name} as {name}"
    yield from missing_in_changelog(name)
    if name not in gradient_rows()[2]:
        yield from missing_for_function(snake_case(name))
    if layer.activation_code is not None and snake_case(name) not in reference.ACTIVATIONS:
        where = place("tests/support/reference.py", "ACTIVATIONS = {")
        yield f'{where}: add a row "{snake_case(name)}": (value, derivative, what backward reads, constants)'


def missing_in_changelog(name):
    if f"`{name}`" not in (ROOT / "CHANGELOG.md").read_text():
        yield f"{place('CHANGELOG.md', '## Unreleased')}: add `{name}`, for users"


def missing_for_function(name):
    for function in (name, f"{name}_backward"):
        if not hasattr(functional, function):
            yield (
                f"tinycnn/functional.py: add {function}, or its layer with a reason to NOT_IN_FUNCTIONAL in "
                f"{place('tests/test_gradients.py', 'NOT_IN_FUNCTIONAL = {')}"
            )
    if name not in torch_answers() | NOT_IN_TORCH:
        where = place("tests/support/make_torch_answers.py", "def add(")
        yield f'{where}: add a case of "{name}" and run the script, which needs torch'


def missing_for_loss(name, path):
    if name not in gradient_rows()[1]:
        where = place("tests/test_gradients.py", "LOSSES = {")
        yield f'{where}: add a row "{name}": a function of (draw, N, K, rng) that returns (loss, target)'
    if path != "tinycnn/losses.py":
        return
    yield from missing_in_changelog(name)
    if not hasattr(tinycnn, name):
        where = place("tinycnn/__init__.pyi", "from .losses import")
        yield f"{where}: add {name} as {name}"


def missing_for_kernel(name, kernel):
    if name not in cuda_kernels():
        where = place("tinycnn/cuda/__init__.py", "__all__ = [")
        yield f'{where}: add "{name}", the CUDA version of the CPU kernel'
    else:
        arguments, cuda_arguments = (list(inspect.signature(f).parameters) for f in (kernel, cuda_kernels()[name]))
        arguments = [name for name in arguments if name != "threads"]  # which the caller does not pass
        if arguments != cuda_arguments:
            yield f"tinycnn/cuda: {name} has the arguments {cuda_arguments}, and on the CPU {arguments}"
    if name not in cuda_calls():
        where = place("tests/support/cuda_calls.py", "def calls(")
        yield f'{where}: add a call, yield "{name}", "", (arguments), (positions of outputs)'
    rows = sum(list(table).count(name) for table in case_files().values())
    if rows != 1:
        files = ", ".join(place(path, "CASES = ") for path in sorted(case_files()))
        yield f'add "{name}" to one of the tables CASES, where it is {rows} times: {files}'
    base = re.sub("_(forward|backward)$", "", name)
    if base != name:
        for way in ("forward", "backward"):
            if f"{base}_{way}" not in kernels.__all__:
                yield f"{place('tinycnn/kernels/__init__.py', '__all__ = [')}: add {base}_{way}, the pair of {name}"


def report(missing):
    missing = list(missing)
    assert not missing, "forgotten:\n" + "\n".join(f"  {line}" for line in missing)


@pytest.mark.parametrize(("name", "path"), [(name, path) for path, found in LAYERS.items() for name in found])
def test_layer(name, path):
    report(missing_for_layer(name, LAYERS[path][name], path))


@pytest.mark.parametrize(("name", "path"), [(name, path) for path, found in LOSSES.items() for name in found])
def test_loss(name, path):
    report(missing_for_loss(name, path))


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name):
    report(missing_for_kernel(name, getattr(kernels, name)))


def test_function():
    """Functions without a layer, too."""
    public = {n for n, f in vars(functional).items() if inspect.isfunction(f) and f.__module__ == functional.__name__}
    names = {name.removesuffix("_backward") for name in public if not name.startswith("_")}
    report(line for name in sorted(names) for line in missing_for_function(name))


def test_nothing_is_exported_by_one_backend_only():
    public = {name for name, f in vars(kernels).items() if inspect.isroutine(f) and not name.startswith("_")}
    differs = sorted((public | CPU_MODULES) ^ set(kernels.__all__))
    assert not differs, f"tinycnn/kernels/__init__.py: imported or in __all__, not both: {differs}"
    differs = sorted(set(cuda_kernels()) ^ set(kernels.__all__))
    assert not differs, f"in __all__ of tinycnn/cuda/__init__.py or of tinycnn/kernels/__init__.py, not both: {differs}"


def test_no_row_is_left_over():
    """No test has a row for a layer, loss or kernel that does not exist."""
    names = [{name for found in kinds.values() for name in found} for kinds in (LAYERS, LOSSES)]
    layer_rows, loss_rows, not_in_functional = gradient_rows()
    gone = (layer_rows | not_in_functional) - names[0] | loss_rows - names[1]
    assert not gone, f"tests/test_gradients.py has rows of what is gone: {sorted(gone)}"
    where = "what tinycnn/kernels/__init__.py does not export"
    gone = cuda_calls() - set(KERNELS)
    assert not gone, f"tests/support/cuda_calls.py calls {where}: {sorted(gone)}"
    gone = {row for table in case_files().values() for row in table} - set(KERNELS)
    assert not gone, f"tables CASES have rows of {where}: {sorted(gone)}"
    assert NAN_STOPS.keys() <= reference.ACTIVATIONS.keys()
    needless = {name for name in not_in_functional if hasattr(functional, snake_case(name))}
    assert not needless, f"tests/test_gradients.py: NOT_IN_FUNCTIONAL has layers with a function: {sorted(needless)}"


# --- the checks themselves --------------------------------------------------------------------------------------------


def test_what_is_forgotten_is_named():
    class Swish(layers.Layer):
        activation_code = 99, 1.0, 1.0

    with pytest.raises(AssertionError) as caught:
        report(missing_for_layer("Swish", Swish, "tinycnn/layers.py"))
    for words in (
        "a method forward", "a method backward", "tests/test_gradients.py:", "tinycnn/__init__.pyi:", "add swish,",
        "add swish_backward", "make_torch_answers.py:", "tests/support/reference.py:", "CHANGELOG.md:",
        "tinycnn/demo/layers.js:",
    ):  # fmt: skip
        assert words in str(caught.value)

    assert [snake_case(name) for name in ("PReLU", "MaxPool2d", "LeakyReLU")] == ["prelu", "max_pool2d", "leaky_relu"]

    def swish_forward(y, x):
        pass

    with pytest.raises(AssertionError) as caught:
        report(missing_for_kernel("swish_forward", swish_forward))
    for words in ("tinycnn/cuda/__init__.py", "cuda_calls.py", "tables CASES", "add swish_backward"):
        assert words in str(caught.value)
    with pytest.raises(AssertionError, match=r"tests/test_gradients\.py:\d+: add a row \"Hinge\""):
        report(missing_for_loss("Hinge", "tinycnn/losses.py"))
