"""LeNet-5 as a user of each library would write it: the same weights, data and arithmetic, one class per library.

Every class has these methods.

    load(weights, images, labels)     reset to weights (a tinycnn state_dict) and data set (uint8, int64)
    step(index)                       a training step on the images `index`: gather, normalise, forward, loss,
                                      backward, Adam.  Returns the loss, a float
    logits(x)                         inference: float32 images (N, 1, 28, 28) -> (N, 10), NumPy to NumPy
    start, losses, next_step, train_steps, infer   the methods that are timed, by default those of `Competitor`

Constructors import the libraries; ModuleNotFoundError if one is missing.
"""

import itertools
import time
import timeit
from typing import Any

import numpy as np

IMAGES = 20_480
MEAN, STD = 0.1307, 0.3081
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
CONVS, LINEARS = (("0", 2), ("3", 0)), ("7", "9", "11")  # names in the state_dict; the convolutions' padding
CHECK_STEPS = 20


def dataset():
    """Random images and labels: the time of a step does not depend on them."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8), rng.integers(0, 10, IMAGES)


def initial_weights(net, seed=0):
    """Initial weights of all competitors: torch's distribution, drawn by tinycnn."""
    from tinycnn import models

    return models.lenet5(*net.split("+"), rng=seed).state_dict()


class Competitor:
    """net: "tanh+avg" or "relu+max"; threads: the most that the library may use."""

    load: Any
    step: Any
    logits: Any
    shape: tuple[int, ...] = (1, 28, 28)  # of an image
    check_steps = CHECK_STEPS

    def dataset(self):
        return dataset()

    def start(self, batch, weights, use="next_step"):
        """Prepare `losses` and `next_step`, or `infer`. All competitors get the same batches of this size."""
        images, labels = self.dataset()
        self.load(weights, images, labels)
        rng = np.random.default_rng(batch)
        self.indices = [rng.permutation(len(images))[:batch] for _ in range(self.check_steps)]
        self.index_cycle = itertools.cycle(self.indices)
        self.x = rng.standard_normal((batch, *self.shape), dtype=np.float32)

    def losses(self):
        return [self.step(index) for index in self.indices]

    def next_step(self):
        self.step(next(self.index_cycle))

    def train_steps(self, order):
        """A step on each row of `order`; returns the mean loss."""
        return float(np.mean([self.step(index) for index in order]))

    def infer(self):
        return self.logits(self.x)


class TinyCNN(Competitor):
    def __init__(self, net, threads):
        import tinycnn
        import tinycnn.dataset
        import tinycnn.train

        tinycnn.set_num_threads(threads)
        self.tinycnn, self.net = tinycnn, net

    def load(self, weights, images, labels):
        t = self.tinycnn
        self.model = t.models.lenet5(*self.net.split("+"))
        self.model.load_state_dict(weights)
        self.batches = t.DeviceDataset(images, labels, mean=MEAN, std=STD)
        self.optimizer, self.criterion = t.Adam(self.model, LR), t.CrossEntropyLoss()
        self.run: Any = None

    def start(self, batch, weights, use="next_step"):
        super().start(batch, weights, use)
        if use == "next_step":
            self.start_epoch(np.array(self.indices))

    def start_epoch(self, order):
        """Start an epoch of the batches in the rows of `order`. Steps are captured and replayed, as in `fit`."""
        model, (_, self.batch) = self.model, order.shape
        if self.run is None:
            train, DataLoader = self.tinycnn.train, self.tinycnn.dataset.DataLoader
            model.reserve(max(self.batch, model.max_batch))
            train.warm_up(model, self.criterion, self.optimizer, self.batches, self.batch)
            self.run = train.StepRunner(model, self.criterion, DataLoader(self.batches), self.optimizer)
        self.run.start_epoch(order.ravel())
        self.remaining = self.steps = len(order)

    def next_step(self):
        if not self.remaining:
            self.run.loader.seek(0)
            self.remaining = self.steps
        self.remaining -= 1
        self.run.replay(self.batch)

    def losses(self):
        sums = [0.0]
        for index in self.indices:
            self.next_step()
            sums.append(self.run.totals[0] / len(index))
        return list(np.diff(sums))

    def train_steps(self, order):
        self.start_epoch(order)
        for _ in order:
            self.run.replay(self.batch)
        return self.run.read_metrics()[0]

    def step(self, index):
        return self.tinycnn.train_step(self.model, self.criterion, self.optimizer, self.batches, index)

    def logits(self, x):
        return self.model(x)


class Torch(Competitor):
    """Eager, with the fused Adam, in the faster of two memory formats (it depends on the batch)."""

    formats: tuple[str, ...] = ("contiguous_format", "channels_last")
    tries = 8  # calls in each

    def __init__(self, net, threads):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.net, self.format = torch, net, self.formats[0]

    def start(self, batch, weights, use="next_step"):
        seconds, timer = {}, time.perf_counter if self.torch.get_num_threads() > 1 else time.process_time
        for name in self.formats:
            self.format = name
            super().start(batch, weights, use)
            seconds[name] = min(timeit.repeat(getattr(self, use), timer=timer, number=1, repeat=self.tries))
        self.format = min(seconds, key=lambda name: seconds[name])
        super().start(batch, weights, use)

    def load(self, weights, images, labels):
        torch, nn = self.torch, self.torch.nn
        act = {"tanh": nn.Tanh, "relu": nn.ReLU}[self.net.split("+")[0]]
        pool = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[self.net.split("+")[1]]
        self.model = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), act(), pool(2), nn.Conv2d(6, 16, 5), act(), pool(2), nn.Flatten(),
            nn.Linear(400, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10),
        )  # fmt: skip
        self.model.to(memory_format=getattr(torch, self.format))
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        self.images, self.labels = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LR, fused=True)
        self.loss, self.forward = self.compile(self.loss_of), self.compile(self.model)

    def compile(self, function):
        return function

    def loss_of(self, index):
        x = self.images[index].float().mul(1 / (255 * STD)).sub(MEAN / STD)
        return self.torch.nn.functional.cross_entropy(self.model(x), self.labels[index])

    def step(self, index):
        loss = self.loss(self.torch.from_numpy(index))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def logits(self, x):
        with self.torch.inference_mode():
            return self.forward(self.torch.from_numpy(x)).numpy()


class TorchCompiled(Torch):
    """torch.compile of all but the optimizer, whose fused step is one call. The compiler chooses the memory format."""

    formats = ("contiguous_format",)

    def start(self, batch, weights, use="next_step"):
        Competitor.start(self, batch, weights)

    def compile(self, function):
        self.torch._dynamo.reset()
        return self.torch.compile(function, dynamic=False)


class Jax(Competitor):
    """The whole step under one jit with donated state. XLA's convolutions are faster in NHWC, and the gradient of a
    pooling by reshape is faster than that of reduce_window."""

    def __init__(self, net, threads):
        import jax

        jax.config.update("jax_platforms", "cpu")  # limit_threads sets its threads
        self.jax = jax
        activation, pooling = net.split("+")
        activate = {"tanh": jax.numpy.tanh, "relu": jax.nn.relu}[activation]

        def pool_2x2(x):
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c)
            return x.mean((2, 4)) if pooling == "avg" else x.max((2, 4))

        def forward(parameters, x):  # (N, 28, 28, 1)
            convs, linears = parameters
            for (_, padding), (w, b) in zip(CONVS, convs, strict=True):
                x = jax.lax.conv_general_dilated(
                    x, w, (1, 1), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = pool_2x2(activate(x + b))
            x = x.reshape(len(x), -1)
            for i, (w, b) in enumerate(linears):
                x = x @ w + b
                x = activate(x) if i < 2 else x
            return x

        def loss_of(parameters, x, labels):
            log_probabilities = jax.nn.log_softmax(forward(parameters, x))
            return -jax.numpy.take_along_axis(log_probabilities, labels[:, None], 1).mean()

        def step(state, images, labels, index):
            parameters, means, squares, t = state
            x = (images[index].astype(np.float32) * np.float32(1 / (255 * STD)) - np.float32(MEAN / STD))[..., None]
            loss, grads = jax.value_and_grad(loss_of)(parameters, x, labels[index])
            t, tree_map = t + 1, jax.tree.map
            means = tree_map(lambda m, g: BETA1 * m + (1 - BETA1) * g, means, grads)
            squares = tree_map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, squares, grads)
            step_size, scale = LR / (1 - BETA1**t), jax.numpy.sqrt(1 - BETA2**t)
            parameters = tree_map(
                lambda p, m, v: p - step_size * m / (jax.numpy.sqrt(v) / scale + EPS), parameters, means, squares
            )
            return (parameters, means, squares, t), loss

        self.forward, self.train = jax.jit(forward), jax.jit(step, donate_argnums=0)

    def load(self, weights, images, labels):
        put, zeros = self.jax.device_put, lambda tree: self.jax.tree.map(np.zeros_like, tree)
        convs = [(weights[n + ".weight"].transpose(2, 3, 1, 0), weights[n + ".bias"]) for n, _ in CONVS]
        linears = [(weights[n + ".weight"].T, weights[n + ".bias"]) for n in LINEARS]
        # The flattened order is (H, W, C), not (C, H, W): permute the inputs of the first linear layer.
        linears[0] = (linears[0][0].reshape(16, 5, 5, 120).transpose(1, 2, 0, 3).reshape(400, 120), linears[0][1])
        parameters = put((convs, linears))
        self.state = put((parameters, zeros(parameters), zeros(parameters), np.float32(0)))
        self.images, self.labels = put(images), put(labels)

    def step(self, index):
        self.state, loss = self.train(self.state, self.images, self.labels, index)
        return float(loss)

    def logits(self, x):
        return np.asarray(self.forward(self.state[0], x.reshape(len(x), 28, 28, 1)))


class OnnxRuntime(Competitor):
    """Inference only."""

    def __init__(self, net, threads):
        import onnx.helper
        import onnxruntime

        self.onnx, self.runtime, self.net, self.threads = onnx, onnxruntime, net, threads

    def load(self, weights, images, labels):
        make, tensor = self.onnx.helper, self.onnx.numpy_helper.from_array
        activation = {"tanh": "Tanh", "relu": "Relu"}[self.net.split("+")[0]]
        pool = {"avg": "AveragePool", "max": "MaxPool"}[self.net.split("+")[1]]
        nodes: list[Any] = []

        def add(op, *parameters, **attributes):
            source = nodes[-1].output[0] if nodes else "x"
            nodes.append(make.make_node(op, [source, *parameters], [f"y{len(nodes)}"], **attributes))

        for name, padding in CONVS:
            add("Conv", name + ".weight", name + ".bias", kernel_shape=[5, 5], pads=[padding] * 4)
            add(activation)
            add(pool, kernel_shape=[2, 2], strides=[2, 2])
        add("Flatten")
        for name in LINEARS:
            add("Gemm", name + ".weight", name + ".bias", transB=1)
            if name != LINEARS[-1]:
                add(activation)
        dtype = self.onnx.TensorProto.FLOAT
        inputs = [make.make_tensor_value_info("x", dtype, ["N", 1, 28, 28])]
        outputs = [make.make_tensor_value_info(nodes[-1].output[0], dtype, ["N", 10])]
        graph = make.make_graph(nodes, "lenet5", inputs, outputs, [tensor(v, n) for n, v in weights.items()])
        self.open(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8))

    def open(self, model):
        """Make a session of an `onnx.ModelProto`."""
        settings = self.runtime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = self.threads, 1
        self.session = self.runtime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )

    def logits(self, x):
        return self.session.run(None, {self.session.get_inputs()[0].name: x})[0]


# --- plain NumPy ------------------------------------------------------------------------------------------------------


def im2col(x, size, stride, padding):
    """One window per row: (N, C, H, W) -> (N, OH, OW, C, KH, KW), a copy"""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding))) if padding else x
    windows = np.lib.stride_tricks.sliding_window_view(x, size, (2, 3))[:, :, ::stride, ::stride]
    return np.ascontiguousarray(windows.transpose(0, 2, 3, 1, 4, 5))


def conv_forward(x, w, b, stride=1, padding=0):
    """Returns y and the columns, which conv_backward needs."""
    cols = im2col(x, w.shape[2:], stride, padding)
    y = cols.reshape(-1, w[0].size) @ w.reshape(len(w), -1).T + b
    return np.ascontiguousarray(y.reshape(*cols.shape[:3], len(w)).transpose(0, 3, 1, 2)), cols


def conv_backward(dy, cols, x, w, stride=1, padding=0, needs_dx=True):
    """Returns dx (or None), dw, db."""
    N, OH, OW, C, KH, KW = cols.shape
    rows = dy.transpose(0, 2, 3, 1).reshape(-1, len(w))
    dw, db = (rows.T @ cols.reshape(len(rows), -1)).reshape(w.shape), rows.sum(axis=0)
    if not needs_dx:
        return None, dw, db
    dcols = (rows @ w.reshape(len(w), -1)).reshape(cols.shape).transpose(0, 3, 4, 5, 1, 2)
    H, W = x.shape[2] + 2 * padding, x.shape[3] + 2 * padding
    dx = np.zeros((N, C, H, W), x.dtype)
    for u in range(KH):
        for v in range(KW):
            dx[:, :, u : u + stride * OH : stride, v : v + stride * OW : stride] += dcols[:, :, u, v]
    return dx[:, :, padding : H - padding, padding : W - padding], dw, db


class NumPy(Competitor):
    """im2col and matrix products; only the products use threads."""

    def __init__(self, net, threads):
        self.activation, self.pool = net.split("+")

    def load(self, weights, images, labels):
        self.parameters = {name: value.copy() for name, value in weights.items()}
        self.moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in weights.items()}
        self.images, self.labels, self.steps = images, labels, 0

    def activate(self, x):
        return np.tanh(x) if self.activation == "tanh" else np.maximum(x, 0)

    def derivative(self, y):
        return 1 - y * y if self.activation == "tanh" else y > 0

    def windows(self, x):
        N, C, H, W = x.shape
        return x.reshape(N, C, H // 2, 2, W // 2, 2)

    def forward(self, x):
        """The logits, and for each layer (x, columns, y) for the backward pass."""
        p, saved = self.parameters, []
        for name, padding in CONVS:
            y, cols = conv_forward(x, p[name + ".weight"], p[name + ".bias"], 1, padding)
            y = self.activate(y)
            saved.append((x, cols, y))
            x = self.windows(y).mean(axis=(3, 5)) if self.pool == "avg" else self.windows(y).max(axis=(3, 5))
        x = x.reshape(len(x), -1)
        for name in LINEARS:
            y = x @ p[name + ".weight"].T + p[name + ".bias"]
            y = y if name == LINEARS[-1] else self.activate(y)
            saved.append((x, None, y))
            x = y
        return x, saved

    def logits(self, x):
        return self.forward(x)[0]

    def step(self, index):
        x = (self.images[index].astype(np.float32) * np.float32(1 / (255 * STD)) - np.float32(MEAN / STD))[:, None]
        labels, rows = self.labels[index], np.arange(len(index))
        y, saved = self.forward(x)
        y = y - y.max(axis=1, keepdims=True)
        log_probabilities = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
        dy = np.exp(log_probabilities)
        dy[rows, labels] -= 1
        self.adam(self.backward(dy / np.float32(len(x)), saved))
        return float(-log_probabilities[rows, labels].mean())

    def backward(self, dy, saved):
        p, grads = self.parameters, {}
        for name in reversed(LINEARS):
            x, _, y = saved.pop()
            dy = dy if name == LINEARS[-1] else dy * self.derivative(y)
            grads[name + ".weight"], grads[name + ".bias"] = dy.T @ x, dy.sum(axis=0)
            dy = dy @ p[name + ".weight"]
        dy = dy.reshape(-1, 16, 5, 5)
        for name, padding in reversed(CONVS):
            x, cols, y = saved.pop()
            if self.pool == "avg":
                dy = np.broadcast_to(dy[:, :, :, None, :, None] / 4, self.windows(y).shape)
            else:  # ties are zeros, where ReLU's gradient is zero
                windows = self.windows(y)
                dy = dy[:, :, :, None, :, None] * (windows == windows.max(axis=(3, 5), keepdims=True))
            dy = dy.reshape(y.shape) * self.derivative(y)
            dy, dw, db = conv_backward(dy, cols, x, p[name + ".weight"], 1, padding, name != "0")
            grads[name + ".weight"], grads[name + ".bias"] = dw, db
        return grads

    def adam(self, grads):
        self.steps += 1
        step_size, scale = LR / (1 - BETA1**self.steps), (1 - BETA2**self.steps) ** 0.5
        for name, grad in grads.items():
            mean, square = self.moments[name]
            mean += (1 - BETA1) * (grad - mean)
            square += (1 - BETA2) * (grad * grad - square)
            self.parameters[name] -= step_size * mean / (np.sqrt(square) / scale + EPS)


ALL = {
    "tinycnn": TinyCNN,
    "torch": Torch,
    "torch.compile": TorchCompiled,
    "jax": Jax,
    "onnxruntime": OnnxRuntime,
    "numpy": NumPy,
}
TRAINING = {name: make for name, make in ALL.items() if make is not OnnxRuntime}
