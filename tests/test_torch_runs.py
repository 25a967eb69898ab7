"""Twenty training steps against PyTorch's, from equal weights (tests/support/torch_runs.py has the runs)."""

import json

import numpy as np
import pytest
import torch_runs

import tinycnn
from tinycnn import train_step

ANSWERS = json.loads(torch_runs.FILE.read_text())


def losses(run, dtype, device="cpu"):
    model = run.model(dtype, device)
    data = run.dataset(device)
    criterion = getattr(tinycnn, run.loss)(**run.loss_options)
    optimizer = run.make_optimizer(model)
    return [train_step(model, criterion, optimizer, data, order) for order in run.orders()]


def test_all_runs_have_answers():
    assert list(ANSWERS) == list(torch_runs.RUNS)
    assert all(len(values) == torch_runs.STEPS for values in ANSWERS.values())
    assert all(values[-1] != values[0] for values in ANSWERS.values())


@pytest.mark.parametrize("name", torch_runs.RUNS)
def test_float64(name):
    np.testing.assert_allclose(losses(torch_runs.RUNS[name], np.float64), ANSWERS[name], rtol=1e-7)


@pytest.mark.parametrize("name", torch_runs.RUNS)
def test_float32(name):
    np.testing.assert_allclose(losses(torch_runs.RUNS[name], np.float32), ANSWERS[name], rtol=2e-3, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", torch_runs.RUNS)
def test_cuda(name):
    np.testing.assert_allclose(losses(torch_runs.RUNS[name], np.float64, "cuda"), ANSWERS[name], rtol=1e-7)
