"""`tinycnn.onnx` as a backend of ONNX: ONNX's own node tests, against the list in docs/onnx_conformance.md."""

import unittest

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

import tinycnn.onnx  # noqa: E402
from tinycnn.errors import OnnxError  # noqa: E402
from tools import onnx_conformance  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # ONNX's reference data overflow


@pytest.fixture(scope="module")
def results():
    return [onnx_conformance.check(family, case) for family, case in onnx_conformance.cases()]


def test_the_page_lists_what_passes(results):
    """Every test passes, or is left out for the reason in the page."""
    assert [result for result in results if result.passed is False] == []
    assert sum(result.passed is True for result in results) >= 150
    page = onnx_conformance.OUTPUT.read_text(encoding="utf-8")
    if f"onnx {onnx.__version__} " in page:
        assert onnx_conformance.report(results) == page
    else:  # another version has other tests
        lines = {line for line in page.splitlines() if line.startswith("- ")}
        missing = {f"- {result.name}" for result in results if not result.passed} & lines
        assert not missing


def test_every_operator_of_the_backend_is_tested(results):
    from tinycnn.onnx._backend import OPERATORS

    tested = {op for ops in onnx_conformance.FAMILIES.values() for op in ops}
    assert set(OPERATORS) <= tested
    left_out = [result for result in results if result.passed is None and "has no" not in result.reason]
    assert all(result.reason for result in left_out)


def test_onnx_runs_its_tests_on_the_module(results):
    """By ONNX's own runner, which is what a user of backends would call."""
    import onnx.backend.test

    suite = onnx.backend.test.BackendTest(tinycnn.onnx, "tinycnn_conformance")
    chosen = [result.name for result in results if result.passed][::5]
    for name in chosen:
        suite.include(f"^{name}_cpu$")
    tests = unittest.TestSuite(suite.test_cases["OnnxBackendNodeModelTest"](f"{name}_cpu") for name in chosen)
    outcome = unittest.TestResult()
    tests.run(outcome)
    assert outcome.testsRun == len(chosen) > 40
    assert not outcome.failures
    assert not outcome.errors
    assert not outcome.skipped


def test_backend_class():
    from onnx.backend.base import Backend

    from tinycnn.onnx._backend import Backend as Ours

    assert issubclass(Ours, Backend)
    assert tinycnn.onnx.supports_device("CPU")
    assert not tinycnn.onnx.supports_device("CUDA")
    node = helper.make_node("Relu", ["x"], ["y"])
    (y,) = tinycnn.onnx.run_node(node, [np.float32([-1, 2])])
    np.testing.assert_array_equal(y, [0, 2])


def model(*nodes):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 4, 4])
    y = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["N", "M"])
    return helper.make_model(helper.make_graph(list(nodes), "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])


def test_graphs_of_several_nodes():
    proto = model(
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Constant", [], ["s"], value_ints=[0, -1]),
        helper.make_node("Reshape", ["p", "s"], ["y"]),
    )
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    assert tinycnn.onnx.is_compatible(proto)
    (y,) = tinycnn.onnx.run_model(proto, [x])
    np.testing.assert_array_equal(y, [[5, 6, 7, 9, 10, 11, 13, 14, 15]])
    (y,) = tinycnn.onnx.prepare(proto).run({"x": x})
    assert y.shape == (1, 9)


def test_refusals():
    proto = model(helper.make_node("Erf", ["x"], ["y"], name="e"))
    assert not tinycnn.onnx.is_compatible(proto)
    with pytest.raises(OnnxError, match=r"node 'e' \(Erf\): the operator is not known; known operators: "):
        tinycnn.onnx.prepare(proto)
    with pytest.raises(OnnxError, match="device must be CPU, got 'CUDA'"):
        tinycnn.onnx.prepare(model(helper.make_node("Relu", ["x"], ["y"])), "CUDA")
    with pytest.raises(OnnxError, match=r"\(Relu\): tinycnn computes in float32 and float64, got int64"):
        tinycnn.onnx.run_node(helper.make_node("Relu", ["x"], ["y"]), [np.arange(3)])
