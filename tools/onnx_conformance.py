"""ONNX's own node tests on tinycnn, as a list of passes and of what is left out.      python -m tools.onnx_conformance

Writes docs/onnx_conformance.md.  Fails if a test whose operator and attributes tinycnn has does not pass.
"""

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "onnx_conformance.md"
FAMILIES = {
    "Convolution": ("Conv", "ConvTranspose"),
    "Pooling": ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"),
    "Activations": (
        "Relu", "LeakyRelu", "Elu", "Gelu", "Sigmoid", "Tanh", "Softplus", "Swish", "Clip", "Celu", "HardSigmoid",
        "HardSwish", "Mish", "PRelu", "Selu", "Softsign", "ThresholdedRelu",
    ),
    "Softmax": ("Softmax", "LogSoftmax", "Hardmax"),
    "Normalization": (
        "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LRN",
        "MeanVarianceNormalization", "RMSNormalization",
    ),
    "Dropout": ("Dropout",),
    "Dense": ("Gemm", "MatMul"),
    "Shapes": ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity"),
    "Resizing": ("Resize", "Upsample", "Pad"),
    "Losses": ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"),
}  # fmt: skip
FAMILY_OF = {op: family for family, ops in FAMILIES.items() for op in ops}


class Result(NamedTuple):
    """reason: why the test is left out, or what failed; passed: None if it is left out"""

    family: str
    name: str
    passed: bool | None
    reason: str = ""


def cases() -> list[tuple[str, Any]]:
    """(family, test case) of all node tests with one node of these families."""
    import onnx
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests of other operators overflow
        loaded = load_model_tests(kind="node")
    found = []
    for case in loaded:
        if case.model is None:
            case.model = onnx.load(Path(case.model_dir) / "model.onnx")
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in FAMILY_OF and "_expanded" not in case.name:
            found.append((FAMILY_OF[nodes[0].op_type], case))
    order = list(FAMILIES)
    return sorted(found, key=lambda pair: (order.index(pair[0]), pair[1].name))


def data_sets(case: Any) -> list[tuple[Any, Any]]:
    """(inputs, outputs) of a test, which older versions of onnx have in files."""
    import onnx

    def arrays(folder: Path, kind: str, values: Any) -> list[Any]:
        files = [folder / f"{kind}_{n}.pb" for n in range(len(values))]
        return [  # a list for a sequence or an optional value, which the backend refuses
            onnx.numpy_helper.to_array(onnx.load_tensor(file)) if value.type.HasField("tensor_type") else []
            for file, value in zip(files, values, strict=True)
        ]

    if case.data_sets is not None:
        return list(case.data_sets)
    graph = case.model.graph
    folders = Path(case.model_dir).glob("test_data_set_*")
    return [(arrays(folder, "input", graph.input), arrays(folder, "output", graph.output)) for folder in folders]


def check(family: str, case: Any) -> Result:
    """The result of one test."""
    import tinycnn.onnx
    from tinycnn.errors import OnnxError
    from tinycnn.onnx._backend import OPERATORS

    op = case.model.graph.node[0].op_type
    if op not in OPERATORS:
        return Result(family, case.name, None, f"tinycnn has no {op}")

    try:
        rep = tinycnn.onnx.prepare(case.model)
        for inputs, expected in data_sets(case):
            outputs = rep.run(inputs)
            assert len(outputs) == len(expected), f"{len(expected)} outputs expected, got {len(outputs)}"
            for y, reference in zip(outputs, expected, strict=True):
                assert y.dtype == reference.dtype, f"dtype {reference.dtype} expected, got {y.dtype}"
                assert y.shape == reference.shape, f"shape {reference.shape} expected, got {y.shape}"
                np.testing.assert_allclose(y, reference, rtol=case.rtol, atol=case.atol)
    except OnnxError as error:
        reason = str(error).partition("): ")[2].partition("; known operators")[0]
        return Result(family, case.name, None, reason)
    except AssertionError as error:
        return Result(family, case.name, False, " ".join(str(error).split())[:200])
    return Result(family, case.name, True)


def report(results: list[Result]) -> str:
    """The page docs/onnx_conformance.md."""
    import onnx

    passed = [result for result in results if result.passed]
    lines = [
        "# Conformance with ONNX",
        "",
        "<!-- Written by python -m tools.onnx_conformance. -->",
        "",
        f"`tinycnn.onnx` is a backend of ONNX. Of the {len(results)} node tests of onnx {onnx.__version__} in these "
        f"families {len(passed)} pass;",
        "the others are left out, with the reason. The arithmetic is that of `tinycnn.functional` and its kernels.",
        "Tests named `..._expanded`, the same functions in primitive operators, are not counted.",
        "",
        "| family | pass | left out |",
        "|---|---:|---:|",
    ]
    for family in FAMILIES:
        own = [result for result in results if result.family == family]
        done = sum(result.passed is True for result in own)
        lines.append(f"| {family} | {done} | {len(own) - done} |")
    for family in FAMILIES:
        own = [result for result in results if result.family == family]
        lines += ["", f"## {family}", "", "Pass:", ""]
        lines += [f"- {result.name}" for result in own if result.passed]
        others = [result for result in own if not result.passed]
        if others:
            lines += ["", "Left out:", ""]
            lines += [f"- {result.name}: {result.reason}" for result in others]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the tests and write the page; 1 if one fails."""
    results = [check(family, case) for family, case in cases()]
    failed = [result for result in results if result.passed is False]
    for result in failed:
        print(f"FAILED {result.name}: {result.reason}")
    OUTPUT.write_text(report(results), encoding="utf-8")
    print(f"{sum(result.passed is True for result in results)} of {len(results)} pass; {len(failed)} fail; {OUTPUT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
