"""The emulation finds what it is there to find: each test plants one fault in a kernel that is right without it."""

import numpy as np
import pytest

from tinycnn.cuda import _emulate
from tinycnn.cuda._emulate import cuda, kernel, phase

NT = 64


@phase
def put(tid, nt, room, x):
    room[tid] = x[tid]


@phase
def take_reversed(tid, nt, y, room):
    y[tid] = room[nt - 1 - tid]


@phase
def first_to_all(tid, nt, y, x):
    y[tid] = x[0]
    x[tid] = x[tid] + x.dtype.type(1)


@phase
def beyond(tid, nt, y, x):
    y[tid] = x[tid + 1]


@phase
def keep(tid, nt, register, x):
    register[0] = x[tid]


@phase
def give(tid, nt, register, y):
    y[tid] = register[0]


@phase
def give_second(tid, nt, register, y):
    y[tid] = register[1]


def in_every_order(function, *arrays):
    """The first array after a run of `function` in each order of threads."""
    found = []
    for order in _emulate.orders(NT):
        _emulate._state["order"] = order
        copies = [a.copy() for a in arrays]
        kernel(NT, registers=32)(function)[2](*copies)
        found.append(copies[0])
    _emulate._state["order"] = "forward"
    return found


X = np.arange(NT, dtype=np.float32)
NOTHING = np.full(NT, np.nan, np.float32)


def reverse(y, x):
    room = cuda.shared.array(NT, np.float32)
    put(cuda.threadIdx.x, NT, room, x)
    cuda.syncthreads()
    take_reversed(cuda.threadIdx.x, NT, y, room)


def test_a_kernel_without_fault():
    for y in in_every_order(reverse, NOTHING, X):
        np.testing.assert_array_equal(y, X[::-1])


def test_a_missing_barrier_shows_as_nan():
    def without(y, x):
        room = cuda.shared.array(NT, np.float32)
        put(cuda.threadIdx.x, NT, room, x)
        take_reversed(cuda.threadIdx.x, NT, y, room)

    for y in in_every_order(without, NOTHING, X):
        assert np.isnan(y).any()


def test_a_race_gives_different_results():
    def race(y, x):
        first_to_all(cuda.threadIdx.x, NT, y, x)

    found = in_every_order(race, NOTHING, X)
    assert not np.array_equal(found[0], found[1])


def test_an_index_out_of_bounds_is_an_error():
    def outside(y, x):
        beyond(cuda.threadIdx.x, NT, y, x)

    with pytest.raises(IndexError, match="out of bounds"):
        in_every_order(outside, NOTHING, X)


def test_registers_are_each_threads_own_and_start_as_nan():
    def right(y, x):
        register = cuda.local.array(2, np.float32)
        keep(cuda.threadIdx.x, NT, register, x)
        cuda.syncthreads()
        give(cuda.threadIdx.x, NT, register, y)

    def wrong(y, x):
        register = cuda.local.array(2, np.float32)
        keep(cuda.threadIdx.x, NT, register, x)
        give_second(cuda.threadIdx.x, NT, register, y)

    for y in in_every_order(right, NOTHING, X):
        np.testing.assert_array_equal(y, X)
    for y in in_every_order(wrong, X, X):
        assert np.isnan(y).all()


def test_the_thread_number_is_for_phases_only():
    def divergent(y, x):
        if cuda.threadIdx.x < 3:
            put(cuda.threadIdx.x, NT, y, x)

    with pytest.raises(TypeError):
        in_every_order(divergent, NOTHING, X)


def test_a_grid_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        kernel(NT, registers=32)(reverse)[0](X, X)
