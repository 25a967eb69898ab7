"""Replayed steps run on one thread while that is faster, which a clock of our own decides here."""

import numba
import numpy as np
import pytest

import tinycnn
from tinycnn import models
from tinycnn.kernels import _threads

pytestmark = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread only")


@pytest.fixture
def world(monkeypatch):
    """What a step takes, by threads; steps move the clock on."""
    took = {"now": 0.0, 1: 2.0, 2: 1.0}
    monkeypatch.setattr(_threads, "clock", lambda: took["now"])
    before = tinycnn.set_num_threads(None)
    tinycnn.set_num_threads(2)
    yield took
    tinycnn.set_num_threads(before)


def run(pace, world, steps):
    """The threads that so many steps ran on."""
    used = []
    for _ in range(steps):
        with pace:
            used.append(numba.get_num_threads())
            world["now"] += world[used[-1]]
        assert numba.get_num_threads() == 2
    return used


ALONE = [1] * _threads.PROBE_STEPS


def test_all_threads_while_they_are_faster(world):
    pace = _threads.ThreadPolicy()
    used = run(pace, world, 10_000)
    assert used[:100] == ALONE + [2] * (100 - _threads.PROBE_STEPS)
    assert (
        _threads.PROBE_STEPS < used.count(1) <= 2 * _threads.PROBE_STEPS + 10_000 * _threads.PROBE_BUDGET
    )  # probed again


def test_one_while_it_is_faster_and_back(world):
    pace = _threads.ThreadPolicy()
    run(pace, world, 10)
    world[2] = 30.0  # somebody else works: a step takes longer than all of those on one thread
    used = run(pace, world, 20_000)
    assert used[: 4 + _threads.PROBE_STEPS] == [2, *ALONE, 2, 1, 1]
    total = sum(world[n] for n in used)
    assert 2 * world[2] < used.count(2) * world[2] <= 2 * world[2] + _threads.PROBE_BUDGET * total
    world[2] = 1.0
    used = run(pace, world, 10_000)
    assert used[-9:] == [2] * 9


def test_a_little_slower_is_seen_too(world):
    pace = _threads.ThreadPolicy()
    run(pace, world, 10)
    world[2] = 2.1
    used = run(pace, world, 3000)
    assert used.count(2) < 6 * _threads.PROBE_STEPS


def test_a_single_defeat_may_be_chance(world):
    pace = _threads.ThreadPolicy()
    run(pace, world, 10)
    world[2] = 30.0
    assert run(pace, world, 1) == [2]
    world[2] = 1.0
    assert run(pace, world, 300) == ALONE + [2] * (300 - _threads.PROBE_STEPS)


def test_one_thread_is_left_alone(world):
    pace = _threads.ThreadPolicy()
    tinycnn.set_num_threads(1)
    for _ in range(50):
        with pace:
            assert numba.get_num_threads() == 1
    tinycnn.set_num_threads(2)


def test_an_error_leaves_the_threads_as_they_were(world):
    pace = _threads.ThreadPolicy()
    with pytest.raises(ZeroDivisionError), pace:
        1 / 0  # noqa: B018
    assert numba.get_num_threads() == 2


def test_a_model_gives_the_same_bits(world):
    model = models.lenet5(rng=0)
    x = np.random.default_rng(1).standard_normal((64, 1, 28, 28)).astype(np.float32)
    first = model.forward(x)
    for _ in range(20):  # recorded, on one thread, and on two
        np.testing.assert_array_equal(model.forward(x), first)
    assert model.plan(64)._replays[True].run.policy.parallel


def test_what_has_no_threads_is_not_tried(world):
    model = models.lenet5(rng=0)
    for images, paced in ((1, False), (64, True)):
        for _ in range(4):
            model.forward(np.zeros((images, 1, 28, 28)))
        assert isinstance(model.plan(images)._replays[True].run.policy, _threads.ThreadPolicy) is paced
