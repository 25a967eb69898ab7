"""The thread policy: replayed steps run on one thread while that is faster; a simulated clock decides here."""

import numba
import numpy as np
import pytest

import tinycnn
from tinycnn import models
from tinycnn.kernels import _threads

pytestmark = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread only")


@pytest.fixture
def times(monkeypatch):
    """Seconds of a step by number of threads, and the time now, which steps advance."""
    times = {"now": 0.0, 1: 2.0, 2: 1.0}
    monkeypatch.setattr(_threads, "clock", lambda: times["now"])
    before = tinycnn.set_num_threads(None)
    tinycnn.set_num_threads(2)
    yield times
    tinycnn.set_num_threads(before)


def run(policy, times, steps):
    """The number of threads of each step."""
    used = []
    for _ in range(steps):
        with policy:
            used.append(numba.get_num_threads())
            times["now"] += times[used[-1]]
        assert numba.get_num_threads() == 2
    return used


SERIAL = [1] * _threads.PROBE_STEPS


def test_all_threads_while_they_are_faster(times):
    policy = _threads.ThreadPolicy()
    used = run(policy, times, 10_000)
    assert used[:100] == SERIAL + [2] * (100 - _threads.PROBE_STEPS)
    probes = used.count(1) - _threads.PROBE_STEPS  # after the first ones
    assert 0 < probes <= _threads.PROBE_STEPS + 10_000 * _threads.PROBE_BUDGET


def test_one_while_it_is_faster_and_back(times):
    policy = _threads.ThreadPolicy()
    run(policy, times, 10)
    times[2] = 30.0  # another program takes a core: a step takes longer than all serial probes
    used = run(policy, times, 20_000)
    assert used[: 4 + _threads.PROBE_STEPS] == [2, *SERIAL, 2, 1, 1]
    total = sum(times[n] for n in used)
    assert 2 * times[2] < used.count(2) * times[2] <= 2 * times[2] + _threads.PROBE_BUDGET * total
    times[2] = 1.0
    used = run(policy, times, 10_000)
    assert used[-9:] == [2] * 9


def test_a_little_slower_is_seen_too(times):
    policy = _threads.ThreadPolicy()
    run(policy, times, 10)
    times[2] = 2.1
    used = run(policy, times, 3000)
    assert used.count(2) < 6 * _threads.PROBE_STEPS


def test_one_lost_comparison_may_be_chance(times):
    policy = _threads.ThreadPolicy()
    run(policy, times, 10)
    times[2] = 30.0
    assert run(policy, times, 1) == [2]
    times[2] = 1.0
    assert run(policy, times, 300) == SERIAL + [2] * (300 - _threads.PROBE_STEPS)


def test_one_thread_is_not_changed(times):
    policy = _threads.ThreadPolicy()
    tinycnn.set_num_threads(1)
    for _ in range(50):
        with policy:
            assert numba.get_num_threads() == 1
    tinycnn.set_num_threads(2)


def test_an_error_leaves_the_threads_as_they_were(times):
    policy = _threads.ThreadPolicy()
    with pytest.raises(ZeroDivisionError), policy:
        1 / 0  # noqa: B018
    assert numba.get_num_threads() == 2


def test_a_model_gives_the_same_bits(times):
    model = models.lenet5(rng=0)
    x = np.random.default_rng(1).standard_normal((64, 1, 28, 28)).astype(np.float32)
    first = model.forward(x)
    for _ in range(20):  # captured, on one thread, and on two
        np.testing.assert_array_equal(model.forward(x), first)
    assert model.plan(64)._replays[True].run.policy.parallel


def test_a_serial_step_has_no_policy(times):
    model = models.lenet5(rng=0)
    for images, parallel in ((1, False), (64, True)):
        for _ in range(4):
            model.forward(np.zeros((images, 1, 28, 28)))
        assert isinstance(model.plan(images)._replays[True].run.policy, _threads.ThreadPolicy) is parallel
