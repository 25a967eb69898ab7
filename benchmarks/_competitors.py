"""LeNet-5 as each competitor's user would write it: the same weights, data and arithmetic, one class a library.

Every class has these methods.

    load(weights, images, labels)     a fresh start: weights (a state_dict of tinycnn's), data set (uint8, int64)
    step(index)                       a training step on the images `index`: gather, normalise, forward, loss,
                                      backward, Adam.  Returns the loss, a float
    logits(x)                         inference: float32 images (N, 1, 28, 28) -> (N, 10), NumPy to NumPy
    start, losses, next_step, train_steps, infer   what `Competitor` makes of them, for timing

Nothing is imported before an object is made: a class whose library is missing raises ModuleNotFoundError then.
"""

import itertools
import timeit
from typing import Any

import numpy as np

IMAGES = 20_480
MEAN, STD = 0.1307, 0.3081
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
CONVS, LINEARS = (("0", 2), ("3", 0)), ("7", "9", "11")  # names in the state_dict; the convolutions' padding
CHECK_STEPS = 20


def dataset():
    """Random images and labels: the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8), rng.integers(0, 10, IMAGES)


def initial_weights(net, seed=0):
    """The weights that all nets start from: torch's initialisation, drawn by tinycnn."""
    from tinycnn import models

    return models.lenet5(*net.split("+"), rng=seed).state_dict()


class Competitor:
    """net: "tanh+avg" or "relu+max"; threads: how many the library may use."""

    load: Any
    step: Any
    logits: Any

    def start(self, batch, weights, use="next_step"):
        """Ready for `losses` and `next_step`, or for `infer`, with batches of this size, the same for everybody."""
        self.load(weights, *dataset())
        rng = np.random.default_rng(batch)
        self.indices = [rng.permutation(IMAGES)[:batch] for _ in range(CHECK_STEPS)]
        self.coming = itertools.cycle(self.indices)
        self.x = rng.standard_normal((batch, 1, 28, 28), dtype=np.float32)

    def losses(self):
        return [self.step(index) for index in self.indices]

    def next_step(self):
        self.step(next(self.coming))

    def train_steps(self, order):
        """A step on each row of `order`; the mean loss."""
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
        self.ready(np.array(self.indices))

    def ready(self, order):
        """Begin an epoch of the batches `order`, a row each, with what `fit` does for one: a recorded step."""
        model, (_, self.batch) = self.model, order.shape
        if self.run is None:
            train, DataLoader = self.tinycnn.train, self.tinycnn.dataset.DataLoader
            model.reserve(max(self.batch, model.max_batch))
            train.warm_up(model, self.criterion, self.optimizer, self.batches, self.batch)
            self.run = train.StepRunner(model, self.criterion, DataLoader(self.batches), self.optimizer)
        self.run.start_epoch(order.ravel())
        self.left = self.steps = len(order)

    def next_step(self):
        if not self.left:
            self.run.loader.seek(0)
            self.left = self.steps
        self.left -= 1
        self.run.replay(self.batch)

    def losses(self):
        sums = [0.0]
        for index in self.indices:
            self.next_step()
            sums.append(self.run.totals[0] / len(index))
        return list(np.diff(sums))

    def train_steps(self, order):
        self.ready(order)
        for _ in order:
            self.run.replay(self.batch)
        return self.run.read_metrics()[0]

    def step(self, index):
        return self.tinycnn.train_step(self.model, self.criterion, self.optimizer, self.batches, index)

    def logits(self, x):
        return self.model(x)


class Torch(Competitor):
    """Eager, with the fused Adam, in the faster of two memory formats (which one it is, depends on the batch)."""

    formats: tuple[str, ...] = ("contiguous_format", "channels_last")

    def __init__(self, net, threads):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.net, self.format = torch, net, self.formats[0]

    def start(self, batch, weights, use="next_step"):
        seconds = {}
        for form in self.formats:
            self.format = form
            super().start(batch, weights)
            seconds[form] = min(timeit.repeat(getattr(self, use), number=1, repeat=8))
        self.format = min(seconds, key=lambda form: seconds[form])
        super().start(batch, weights)

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
        self.loss, self.forward = self.compiled(self.loss_of), self.compiled(self.model)

    def compiled(self, function):
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
    """torch.compile of all but the optimizer, whose fused step is one call already.  Formats it chooses itself."""

    formats = ("contiguous_format",)

    def start(self, batch, weights, use="next_step"):
        Competitor.start(self, batch, weights)

    def compiled(self, function):
        self.torch._dynamo.reset()
        return self.torch.compile(function, dynamic=False)


class Jax(Competitor):
    """The whole step under one jit, its state donated.  NHWC, which XLA's convolutions are faster in; pooling by
    reshaping, whose gradient is faster than reduce_window's."""

    def __init__(self, net, threads):
        import jax

        jax.config.update("jax_platforms", "cpu")  # its threads: see limit_threads
        self.jax = jax
        activation, pool = net.split("+")
        activate = {"tanh": jax.numpy.tanh, "relu": jax.nn.relu}[activation]

        def halve(x):
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c)
            return x.mean((2, 4)) if pool == "avg" else x.max((2, 4))

        def forward(parameters, x):  # (N, 28, 28, 1)
            convs, linears = parameters
            for (_, padding), (w, b) in zip(CONVS, convs, strict=True):
                x = jax.lax.conv_general_dilated(
                    x, w, (1, 1), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = halve(activate(x + b))
            x = x.reshape(len(x), -1)
            for number, (w, b) in enumerate(linears):
                x = x @ w + b
                x = activate(x) if number < 2 else x
            return x

        def loss_of(parameters, x, labels):
            scores = jax.nn.log_softmax(forward(parameters, x))
            return -jax.numpy.take_along_axis(scores, labels[:, None], 1).mean()

        def step(state, images, labels, index):
            parameters, means, squares, t = state
            x = (images[index].astype(np.float32) * np.float32(1 / (255 * STD)) - np.float32(MEAN / STD))[..., None]
            loss, slopes = jax.value_and_grad(loss_of)(parameters, x, labels[index])
            t, each = t + 1, jax.tree.map
            means = each(lambda m, g: BETA1 * m + (1 - BETA1) * g, means, slopes)
            squares = each(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, squares, slopes)
            size, scale = LR / (1 - BETA1**t), jax.numpy.sqrt(1 - BETA2**t)
            parameters = each(
                lambda p, m, v: p - size * m / (jax.numpy.sqrt(v) / scale + EPS), parameters, means, squares
            )
            return (parameters, means, squares, t), loss

        self.forward, self.train = jax.jit(forward), jax.jit(step, donate_argnums=0)

    def load(self, weights, images, labels):
        put, each = self.jax.device_put, self.jax.tree.map
        convs = [(weights[n + ".weight"].transpose(2, 3, 1, 0), weights[n + ".bias"]) for n, _ in CONVS]
        linears = [(weights[n + ".weight"].T, weights[n + ".bias"]) for n in LINEARS]
        # Flattening (H, W, C) in place of (C, H, W): the first linear layer's inputs come in another order.
        linears[0] = (linears[0][0].reshape(16, 5, 5, 120).transpose(1, 2, 0, 3).reshape(400, 120), linears[0][1])
        parameters = put((convs, linears))
        self.state = put((parameters, each(np.zeros_like, parameters), each(np.zeros_like, parameters), np.float32(0)))
        self.images, self.labels = put(images), put(labels)

    def step(self, index):
        self.state, loss = self.train(self.state, self.images, self.labels, index)
        return float(loss)

    def logits(self, x):
        return np.asarray(self.forward(self.state[0], x.reshape(len(x), 28, 28, 1)))


class OnnxRuntime(Competitor):
    """Inference only; the graph is built here."""

    def __init__(self, net, threads):
        import onnx.helper
        import onnxruntime

        self.onnx, self.runtime, self.net, self.threads = onnx, onnxruntime, net, threads

    def load(self, weights, images, labels):
        make, tensor = self.onnx.helper, self.onnx.numpy_helper.from_array
        activation = {"tanh": "Tanh", "relu": "Relu"}[self.net.split("+")[0]]
        pool = {"avg": "AveragePool", "max": "MaxPool"}[self.net.split("+")[1]]
        nodes: list[Any] = []
        at = "x"

        def add(kind, *parameters, **attributes):
            nonlocal at
            nodes.append(make.make_node(kind, [at, *parameters], [f"y{len(nodes)}"], **attributes))
            at = f"y{len(nodes) - 1}"

        for name, padding in CONVS:
            add("Conv", name + ".weight", name + ".bias", kernel_shape=[5, 5], pads=[padding] * 4)
            add(activation)
            add(pool, kernel_shape=[2, 2], strides=[2, 2])
        add("Flatten")
        for name in LINEARS:
            add("Gemm", name + ".weight", name + ".bias", transB=1)
            if name != LINEARS[-1]:
                add(activation)
        kind = self.onnx.TensorProto.FLOAT
        inputs = [make.make_tensor_value_info("x", kind, ["N", 1, 28, 28])]
        outputs = [make.make_tensor_value_info(at, kind, ["N", 10])]
        graph = make.make_graph(nodes, "lenet5", inputs, outputs, [tensor(v, n) for n, v in weights.items()])
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
        choices = self.runtime.SessionOptions()
        choices.intra_op_num_threads, choices.inter_op_num_threads = self.threads, 1
        self.session = self.runtime.InferenceSession(
            model.SerializeToString(), choices, providers=["CPUExecutionProvider"]
        )

    def logits(self, x):
        return self.session.run(None, {"x": x})[0]


# --- plain NumPy ------------------------------------------------------------------------------------------------------


def columns(x, size, stride, padding):
    """im2col, a window a row: (N, C, H, W) -> (N, OH, OW, C, KH, KW), a copy"""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding))) if padding else x
    windows = np.lib.stride_tricks.sliding_window_view(x, size, (2, 3))[:, :, ::stride, ::stride]
    return np.ascontiguousarray(windows.transpose(0, 2, 3, 1, 4, 5))


def conv_forward(x, w, b, stride=1, padding=0):
    """(y, what conv_backward needs)"""
    cols = columns(x, w.shape[2:], stride, padding)
    y = cols.reshape(-1, w[0].size) @ w.reshape(len(w), -1).T + b
    return np.ascontiguousarray(y.reshape(*cols.shape[:3], len(w)).transpose(0, 3, 1, 2)), cols


def conv_backward(dy, cols, x, w, stride=1, padding=0, input_gradient=True):
    """(dx, dw, db)"""
    N, OH, OW, C, KH, KW = cols.shape
    rows = dy.transpose(0, 2, 3, 1).reshape(-1, len(w))
    dw, db = (rows.T @ cols.reshape(len(rows), -1)).reshape(w.shape), rows.sum(axis=0)
    if not input_gradient:
        return None, dw, db
    dcols = (rows @ w.reshape(len(w), -1)).reshape(cols.shape).transpose(0, 3, 4, 5, 1, 2)
    H, W = x.shape[2] + 2 * padding, x.shape[3] + 2 * padding
    dx = np.zeros((N, C, H, W), x.dtype)
    for u in range(KH):
        for v in range(KW):
            dx[:, :, u : u + stride * OH : stride, v : v + stride * OW : stride] += dcols[:, :, u, v]
    return dx[:, :, padding : H - padding, padding : W - padding], dw, db


class NumPy(Competitor):
    """im2col and matrix products; the matrix products have threads, nothing else has."""

    def __init__(self, net, threads):
        self.activation, self.pool = net.split("+")

    def load(self, weights, images, labels):
        self.parameters = {name: value.copy() for name, value in weights.items()}
        self.moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in weights.items()}
        self.images, self.labels, self.steps = images, labels, 0

    def activate(self, x):
        return np.tanh(x) if self.activation == "tanh" else np.maximum(x, 0)

    def slope(self, y):
        return 1 - y * y if self.activation == "tanh" else y > 0

    def windows(self, x):
        N, C, H, W = x.shape
        return x.reshape(N, C, H // 2, 2, W // 2, 2)

    def forward(self, x):
        """The logits, and what the backward pass needs of each layer."""
        p, kept = self.parameters, []
        for name, padding in CONVS:
            y, cols = conv_forward(x, p[name + ".weight"], p[name + ".bias"], 1, padding)
            y = self.activate(y)
            kept.append((x, cols, y))
            x = self.windows(y).mean(axis=(3, 5)) if self.pool == "avg" else self.windows(y).max(axis=(3, 5))
        x = x.reshape(len(x), -1)
        for name in LINEARS:
            y = x @ p[name + ".weight"].T + p[name + ".bias"]
            y = y if name == LINEARS[-1] else self.activate(y)
            kept.append((x, None, y))
            x = y
        return x, kept

    def logits(self, x):
        return self.forward(x)[0]

    def step(self, index):
        x = (self.images[index].astype(np.float32) * np.float32(1 / (255 * STD)) - np.float32(MEAN / STD))[:, None]
        labels, rows = self.labels[index], np.arange(len(index))
        y, kept = self.forward(x)
        y = y - y.max(axis=1, keepdims=True)
        scores = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
        dy = np.exp(scores)
        dy[rows, labels] -= 1
        self.descend(self.gradients(dy / np.float32(len(x)), kept))
        return float(-scores[rows, labels].mean())

    def gradients(self, dy, kept):
        p, found = self.parameters, {}
        for name in reversed(LINEARS):
            x, _, y = kept.pop()
            dy = dy if name == LINEARS[-1] else dy * self.slope(y)
            found[name + ".weight"], found[name + ".bias"] = dy.T @ x, dy.sum(axis=0)
            dy = dy @ p[name + ".weight"]
        dy = dy.reshape(-1, 16, 5, 5)
        for name, padding in reversed(CONVS):
            x, cols, y = kept.pop()
            if self.pool == "avg":
                dy = np.broadcast_to(dy[:, :, :, None, :, None] / 4, self.windows(y).shape)
            else:  # all of several largest: they are zeros, and ReLU lets nothing through
                windows = self.windows(y)
                dy = dy[:, :, :, None, :, None] * (windows == windows.max(axis=(3, 5), keepdims=True))
            dy = dy.reshape(y.shape) * self.slope(y)
            dy, dw, db = conv_backward(dy, cols, x, p[name + ".weight"], 1, padding, name != "0")
            found[name + ".weight"], found[name + ".bias"] = dw, db
        return found

    def descend(self, gradients):
        """Adam."""
        self.steps += 1
        size, scale = LR / (1 - BETA1**self.steps), (1 - BETA2**self.steps) ** 0.5
        for name, gradient in gradients.items():
            mean, square = self.moments[name]
            mean += (1 - BETA1) * (gradient - mean)
            square += (1 - BETA2) * (gradient * gradient - square)
            self.parameters[name] -= size * mean / (np.sqrt(square) / scale + EPS)


ALL = {
    "tinycnn": TinyCNN,
    "torch": Torch,
    "torch.compile": TorchCompiled,
    "jax": Jax,
    "onnxruntime": OnnxRuntime,
    "numpy": NumPy,
}
TRAINING = {name: kind for name, kind in ALL.items() if kind is not OnnxRuntime}
