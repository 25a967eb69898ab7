"""A forked child of a process whose kernels run on several threads."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal
import numba, numpy as np
from tinycnn import SGD, DeviceDataset, CrossEntropyLoss, Flatten, Linear, Sequential, Tanh, data, fit

def new():
    model = Sequential(Flatten(), Linear(784, 60), Tanh(), Linear(60, 10), input_shape=(1, 28, 28), rng=0)
    return model, SGD(model, 0.1, momentum=0.9)

def train(model, optimizer):
    fit(model, CrossEntropyLoss(), optimizer, digits, epochs=2, batch_size=100, rng=0, progress=False)
    return model.theta.tobytes()

images, labels = data.synthetic_digits(300, rng=0)
digits, first = DeviceDataset(images, labels), new()
train(*first)
x = np.random.default_rng(0).standard_normal((200, 1, 28, 28), np.float32)
want = [first[0].forward(x).tobytes() for _ in range(4)][-1]  # captured, and replayed
assert numba.get_num_threads() == 2
reading, writing = os.pipe()
child = os.fork()
if not child:
    signal.alarm(100)  # in case the child waits for threads that do not exist
    again = first[0].forward(x).tobytes(), first[0].outputs(x).tobytes(), data.synthetic_digits(100, rng=1)[0].tobytes()
    os.write(writing, bytes([again[0] == want]) + train(*new())[:1000])
    os._exit(0)
os.close(writing)
answer = os.fdopen(reading, "rb").read()
assert os.waitpid(child, 0)[1] == 0
assert answer[0] == 1
assert answer[1:] == train(*new())[:1000]  # and the parent still uses its threads
assert first[0].forward(x).tobytes() == want
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_forked_child_computes_the_same(layer):
    if layer == "omp" and sys.platform != "linux":
        pytest.skip("Numba has GNU OpenMP on Linux only")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT], capture_output=True, text=True, check=False,
        env=os.environ | {"NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": layer}, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
