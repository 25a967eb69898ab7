"""Random sequences of a user's calls on a model and on a NumPy model: after every call the two agree."""

import copy
import pickle
import threading

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinycnn import (
    SGD,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    MaxPool2d,
    OneHotMSELoss,
    Sequential,
    Tanh,
    evaluate,
    fit,
    train_step,
)
from tinycnn.layers import Layer

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.standard_normal((23, 8, 8)), RNG.integers(0, 4, 23)
X = IMAGES.astype(np.float32).astype(np.float64)[:, None]  # as the data set keeps them
MEAN, STD = 0.1, 1.5
NAMES = "0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"


class OwnTanh(Layer):
    """A user's layer in NumPy; it counts its calls."""

    calls = 0

    def forward(self, y, x):
        self.calls += 1
        y[...] = np.tanh(x)

    def backward(self, dx, dy, x, y):
        dx[...] = dy * (1 - y * y)


class OwnLoss(OneHotMSELoss):
    """Twice the squared error."""

    def forward_backward(self, dx, x, target):
        super().forward_backward(dx, x, target)
        dx *= 2
        self._loss *= 2


class Twin:
    """Conv2d(1, 2, 3), BatchNorm2d(2), tanh, 2 x 2 pooling, Linear(18, 4), with SGD: in NumPy."""

    def __init__(self, state, pool):
        self.p = {name: np.array(state[name]) for name in NAMES}
        self.grad = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.velocity = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.mean, self.var, self.batches = state["1.running_mean"], state["1.running_var"], 0
        self.pool, self.training, self.frozen, self.eps = pool, True, False, 1e-5
        self.steps, self.epochs, self.lr, self.momentum = 0, 0, 0.05, 0.0

    def forward(self, x, training=None):
        p, training = self.p, self.training if training is None else training
        windows = np.lib.stride_tricks.sliding_window_view(x[:, 0], (3, 3), axis=(1, 2))
        a = np.einsum("nijuv,ouv->noij", windows, p["0.weight"][:, 0]) + p["0.bias"][:, None, None]
        by_batch = training and not self.frozen
        mean, var = (a.mean((0, 2, 3)), a.var((0, 2, 3))) if by_batch else (self.mean, self.var)
        if by_batch:
            count = a.size / 2
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.var = 0.9 * self.var + 0.1 * var * count / (count - 1)
            self.batches += 1
        rstd = 1 / np.sqrt(var + self.eps)
        hat = (a - mean[:, None, None]) * rstd[:, None, None]
        t = np.tanh(hat * p["1.weight"][:, None, None] + p["1.bias"][:, None, None])
        blocks = t.reshape(len(x), 2, 3, 2, 3, 2)
        pooled = blocks.mean((3, 5)) if self.pool == "avg" else blocks.max((3, 5))
        flat = pooled.reshape(len(x), 18)
        self.saved_arrays = windows, hat, rstd, by_batch, t, pooled, flat
        return flat @ p["5.weight"].T + p["5.bias"]

    def backward(self, dy):
        windows, hat, rstd, by_batch, t, pooled, flat = self.saved_arrays
        p, g = self.p, self.grad
        g["5.weight"], g["5.bias"] = dy.T @ flat, dy.sum(0)
        dpool = (dy @ p["5.weight"]).reshape(pooled.shape)
        spread = np.repeat(np.repeat(dpool, 2, 2), 2, 3)
        dt = spread / 4 if self.pool == "avg" else spread * (t == np.repeat(np.repeat(pooled, 2, 2), 2, 3))
        dn = dt * (1 - t * t)
        g["1.weight"], g["1.bias"] = (dn * hat).sum((0, 2, 3)), dn.sum((0, 2, 3))
        dhat = dn * p["1.weight"][:, None, None]
        if by_batch:
            along = (dhat * hat).mean((0, 2, 3), keepdims=True)
            dhat = dhat - dhat.mean((0, 2, 3), keepdims=True) - hat * along
        da = dhat * rstd[:, None, None]
        g["0.weight"] = np.einsum("noij,nijuv->ouv", da, windows)[:, None]
        g["0.bias"] = da.sum((0, 2, 3))
        dx = np.zeros((len(dy), 1, 8, 8))
        for u in range(3):
            for v in range(3):
                dx[:, 0, u : u + 6, v : v + 6] += np.einsum("noij,o->nij", da, p["0.weight"][:, 0, u, v])
        return dx

    def loss(self, y, labels, own):
        """(value, gradient)"""
        hot = np.eye(4)[labels]
        if own:
            return 2 * np.mean((y - hot) ** 2), 4 * (y - hot) / y.size
        z = np.exp(y - y.max(1, keepdims=True))
        z /= z.sum(1, keepdims=True)
        return -np.mean(np.log((z * hot).sum(1))), (z - hot) / len(y)

    def step(self, index, own):
        value, dy = self.loss(self.forward((X[index] - MEAN) / STD), LABELS[index], own)
        self.backward(dy)
        for name, p in self.p.items():
            g = self.grad[name]
            if self.momentum:
                v = self.velocity[name] = g if self.steps == 0 else self.momentum * self.velocity[name] + g
                g = v
            self.p[name] = p - self.lr * g
        self.steps += 1
        return value


sizes, seeds = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 17, 23]), st.integers(0, 99)


class Users(RuleBasedStateMachine):
    @initialize(own=st.booleans(), pool=st.sampled_from(["avg", "max"]), seed=seeds)
    def build(self, own, pool, seed):
        between = OwnTanh() if own else Tanh(), AvgPool2d(2) if pool == "avg" else MaxPool2d(2), Flatten()
        chain = Conv2d(1, 2, 3), BatchNorm2d(2), *between, Linear(18, 4)
        self.model = Sequential(*chain, input_shape=(1, 8, 8), rng=seed, dtype=np.float64)
        self.data = DeviceDataset(IMAGES, LABELS, mean=MEAN, std=STD)
        self.optimizer = SGD(self.model, 0.05)
        self.losses = {False: CrossEntropyLoss(), True: OwnLoss()}
        self.twin, self.pending, self.saved = Twin(self.model.state_dict(), pool), None, None

    def assert_close(self, got, want):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)

    def draw(self, seed, n):
        return np.random.default_rng(seed).standard_normal((n, 1, 8, 8))

    @rule(n=sizes, seed=seeds)
    def forward(self, n, seed):
        x = self.draw(seed, n)
        self.assert_close(self.model(x), self.twin.forward(x))
        self.pending = n

    @rule(seed=seeds, n=sizes)
    def backward(self, seed, n):
        n = self.pending or n
        dy = np.random.default_rng(seed).standard_normal((n, 4))
        if self.pending is None:
            with pytest.raises(RuntimeError, match="backward needs its own forward"):
                self.model.backward(dy)
            return
        self.assert_close(self.model.backward(dy), self.twin.backward(dy))
        self.assert_close(self.model.grad, np.concatenate([self.twin.grad[name].ravel() for name in NAMES]))
        if self.model.plan(n).fused:
            self.pending = None

    @rule(index=st.lists(st.integers(0, 22), min_size=1, max_size=30), own=st.booleans())
    def one_step(self, index, own):
        got = train_step(self.model, self.losses[own], self.optimizer, self.data, index)
        self.assert_close(got, self.twin.step(index, own))
        self.pending = None

    @rule(batch_size=sizes, own=st.booleans(), seed=seeds, epochs=st.integers(1, 2), validate=st.booleans())
    def training(self, batch_size, own, seed, epochs, validate):
        history = fit(
            self.model, self.losses[own], self.optimizer, self.data, epochs=epochs, batch_size=batch_size, rng=seed,
            progress=False, validation=self.data if validate else None,
        )  # fmt: skip
        rng, twin = np.random.default_rng(seed), self.twin
        twin.training, twin.frozen, self.pending = True, False, None
        for record in history:
            order = rng.permutation(23)
            parts = [order[at : at + batch_size] for at in range(0, 23, batch_size)]
            total = sum(twin.step(part, own) * len(part) for part in parts)
            twin.epochs += 1
            assert record["epoch"] == twin.epochs
            self.assert_close(record["train_loss"], total / 23)
            if validate:
                y = twin.forward((X - MEAN) / STD, training=False)
                self.assert_close(record["val_loss"], twin.loss(y, LABELS, own)[0])

    @rule(batch_size=sizes, own=st.booleans())
    def evaluation(self, batch_size, own):
        loss, accuracy, y = evaluate(self.model, self.data, self.losses[own], batch_size)
        want = self.twin.forward((X - MEAN) / STD, training=False)
        self.assert_close(y, want)
        self.assert_close(loss, self.twin.loss(want, LABELS, own)[0])
        assert accuracy == np.mean(y.argmax(1) == LABELS)
        self.pending = None

    @rule(n=sizes, batch_size=sizes, seed=seeds, threads=st.integers(1, 3))
    def prediction(self, n, batch_size, seed, threads):
        found = {}

        def ask(number):
            found[number] = self.model.outputs(self.draw(seed + number, n), batch_size)

        workers = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for number in range(threads):
            self.assert_close(found[number], self.twin.forward(self.draw(seed + number, n), training=False))
        self.pending = None

    @rule(n=sizes, seed=seeds)
    def activations(self, n, seed):
        x = self.draw(seed, n)
        y = self.twin.forward(x)
        layers = self.model.activations(x, dy=np.cos)
        self.assert_close(layers[-1].output, y)
        self.assert_close(layers[0].input_grad, self.twin.backward(np.cos(y)))
        self.pending = None  # it has changed the running statistics

    @rule(mode=st.booleans())
    def mode(self, mode):
        self.model.train(mode)
        self.twin.training, self.twin.frozen = mode, False

    @precondition(lambda self: self.twin.training)
    @rule()
    def freeze(self):
        self.model.layers[1].training = False
        self.twin.frozen = True

    @rule()
    def save(self):
        self.saved = self.model.state_dict(), copy.deepcopy(self.twin)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        state, twin = self.saved
        self.model.load_state_dict(state)
        self.twin.p = {name: np.array(value) for name, value in twin.p.items()}
        self.twin.mean, self.twin.var, self.twin.batches = twin.mean, twin.var, twin.batches

    @rule(by_pickle=st.booleans())
    def duplicate(self, by_pickle):
        parts = self.model, self.optimizer, self.data, self.losses
        parts = pickle.loads(pickle.dumps(parts)) if by_pickle else copy.deepcopy(parts)
        self.model.theta[...] = np.nan  # the copies must not depend on the original
        self.model, self.optimizer, self.data, self.losses = parts
        self.pending = None

    @rule(seed=seeds, whole=st.booleans())
    def assign(self, seed, whole):
        values = 0.3 * np.random.default_rng(seed).standard_normal(len(self.model.theta))
        if whole:
            self.model.theta = values
            at = 0
            for name in NAMES:
                size = self.twin.p[name].size
                self.twin.p[name] = values[at : at + size].reshape(self.twin.p[name].shape)
                at += size
        else:
            self.model.layers[-1].weight = values[:72].reshape(4, 18)
            self.twin.p["5.weight"] = values[:72].reshape(4, 18)

    @rule(lr=st.sampled_from([0.01, 0.05]), momentum=st.sampled_from([0.0, 0.5]), eps=st.sampled_from([1e-5, 1e-2]))
    def set_numbers(self, lr, momentum, eps):
        self.optimizer.lr, self.optimizer.momentum, self.model.layers[1].eps = lr, momentum, eps
        self.twin.lr, self.twin.momentum, self.twin.eps = lr, momentum, eps

    @invariant()
    def the_same(self):
        state, twin = self.model.state_dict(), self.twin
        for name in NAMES:
            self.assert_close(state[name], twin.p[name])
        self.assert_close(state["1.running_mean"], twin.mean)
        self.assert_close(state["1.running_var"], twin.var)
        assert state["1.num_batches_tracked"] == twin.batches
        assert self.optimizer.steps == twin.steps
        assert self.model.training is twin.training


TestUsers = Users.TestCase
TestUsers.settings = settings(stateful_step_count=25)
