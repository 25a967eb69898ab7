"""Write torch_answers.npz: PyTorch's results, the expected values of test_functional.py.

Run by hand with PyTorch installed (`python tests/support/make_torch_answers.py`); the tests only read the file.
Inputs are float32 numbers, so that they are the same in both precisions; results are in float64.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FILE = Path(__file__).with_name("torch_answers.npz")
rng = np.random.default_rng(20)
arrays, cases = {}, []


def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def whole(*shape):
    """Small integers, for ties."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def add(function, inputs, options=None, fixed=()):
    """One case: `inputs` are differentiated, `fixed` are other arguments by name."""
    options, name = options or {}, f"{function}.{len(cases)}"
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    extra = {key: torch.tensor(a) for key, a in dict(fixed).items()}
    extra = {key: a.double() if a.is_floating_point() else a for key, a in extra.items()}
    y = getattr(F, function)(*leaves, **extra, **options)
    if isinstance(y, tuple):  # max_pool2d with its indices
        y, arrays[f"{name}.indices"] = y[0], y[1].numpy().astype(np.int16)
    dy = draw(*y.shape)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    for number, leaf in enumerate(leaves):
        arrays[f"{name}.input{number}"] = inputs[number]
        arrays[f"{name}.gradient{number}"] = leaf.grad.numpy()
    for key, a in dict(fixed).items():
        arrays[f"{name}.fixed.{key}"] = a
    arrays[f"{name}.y"], arrays[f"{name}.dy"] = y.detach().numpy(), dy
    cases.append(
        {"name": name, "function": function, "inputs": len(inputs), "fixed": list(dict(fixed)), "options": options}
    )


def convolutions():
    for x, w, options in [
        ((1, 2, 5, 6), (3, 2, 3, 2), {}),
        ((2, 2, 5, 6), (3, 2, 3, 2), {"stride": 2, "padding": 1}),
        ((1, 4, 5, 6), (4, 2, 2, 3), {"stride": [1, 2], "padding": [2, 0], "dilation": [2, 1], "groups": 2}),
        ((1, 3, 4, 3), (3, 1, 3, 3), {"padding": [0, 3], "groups": 3}),
        ((1, 1, 4, 5), (2, 1, 3, 3), {"padding": 4, "dilation": 2}),
        ((9, 1, 3, 4), (1, 1, 2, 3), {"padding": 1}),
    ]:
        add("conv2d", [draw(*x), draw(*w), draw(w[0])], options)
    add("conv2d", [draw(2, 2, 3, 4), draw(3, 2, 3, 4)])


def pools():
    for options in [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "ceil_mode": True},
        {"kernel_size": 2, "ceil_mode": True},
        {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True},
    ]:
        for count_include_pad in (True, False):
            add("avg_pool2d", [draw(1, 2, 5, 7)], {**options, "count_include_pad": count_include_pad})
        add("max_pool2d", [whole(1, 2, 5, 7)], {**options, "return_indices": True})
    add("avg_pool2d", [draw(1, 2, 5, 7)], {"kernel_size": 3, "stride": 2, "padding": 1, "divisor_override": 5})
    add("max_pool2d", [whole(1, 1, 9, 8)], {"kernel_size": 3, "stride": 1, "dilation": 2, "return_indices": True})
    add(
        "max_pool2d",
        [whole(1, 1, 9, 8)],
        {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": [3, 2], "return_indices": True},
    )


def transposed_and_resized():
    for x, w, options in [
        ((1, 3, 5, 6), (3, 2, 3, 2), {}),
        ((2, 3, 4, 3), (3, 2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        ((2, 4, 3, 4), (4, 3, 2, 3), {"stride": [1, 2], "padding": [1, 0], "dilation": [2, 1], "groups": 2}),
        ((1, 2, 1, 1), (2, 3, 4, 4), {}),
        ((9, 1, 3, 2), (1, 2, 2, 2), {"stride": 2}),
    ]:
        channels = w[1] * options.get("groups", 1)
        add("conv_transpose2d", [draw(*x), draw(*w), draw(channels)], options)
    add("conv_transpose2d", [draw(2, 2, 3, 4), draw(2, 3, 3, 2)])
    x = draw(2, 3, 5, 4)
    for options in ({"size": [7, 9]}, {"scale_factor": 2}, {"scale_factor": [1, 3]}, {"size": [2, 3]}):
        add("interpolate", [x], options)
    for sides in ([1, 2, 3, 0], [-1, 2, 0, -3], [0, 0, 0, 0]):
        add("pad", [x], {"pad": sides})
    for size in (1, 3, [2, 7], [None, 2], [5, 4]):
        add("adaptive_avg_pool2d", [x], {"output_size": size})


def normalisations():
    for shape in ((6, 5), (3, 4, 5, 3)):
        x, channels = draw(*shape) * 3 + 1, shape[1]
        running = {"running_mean": draw(channels), "running_var": abs(draw(channels)) + 1}
        for training in (True, False):
            add("batch_norm", [x], {"training": training, "eps": 1e-3}, running)
    maps = draw(2, 4, 3, 5) + 2
    add("group_norm", [maps], {"num_groups": 2})
    add("group_norm", [maps], {"num_groups": 4, "eps": 0.1})
    for sizes in ([5], [3, 5], [4, 3, 5]):
        add("layer_norm", [maps], {"normalized_shape": sizes})
    add("layer_norm", [draw(4, 7)], {"normalized_shape": [7], "eps": 0.1})


def rest():
    add("linear", [draw(5, 7), draw(3, 7), draw(3)])
    add("linear", [draw(2, 3, 4), draw(6, 4)])
    x = np.concatenate([draw(40) * 3, np.float32([0, -20, 20, 1e-6])]).reshape(2, 2, 11)
    for function in ("tanh", "sigmoid", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "hardtanh", "relu6"):
        add(function, [x])
    add("leaky_relu", [x], {"negative_slope": 0.3})
    add("elu", [x], {"alpha": 0.4})
    add("gelu", [x], {"approximate": "tanh"})
    add("softplus", [x], {"beta": 3.0, "threshold": 2.0})
    add("hardtanh", [np.float32([-2, -1, -0.5, 0, 0.25, 1, 3])], {"min_val": -0.5, "max_val": 1.0})
    add("relu6", [np.float32([-1, 0, 1, 6, 7])])
    for function in ("softmax", "log_softmax"):
        for dim in (0, 1, -1):
            add(function, [draw(2, 3, 4) * 4], {"dim": dim})
        add(function, [np.float32([[1e4, -1e4, 0, 9999], [1, 2, 3, 4]])], {"dim": 1})


def losses():
    target = np.array([0, 3, 2, -100, 1, 3])
    weight = np.float32([0.5, 1, 2, 0.25])
    for reduction in ("mean", "sum", "none"):
        for label_smoothing in (0.0, 0.2):
            options = {"reduction": reduction, "label_smoothing": label_smoothing}
            add("cross_entropy", [draw(6, 4) * 3], options, {"target": target})
            add("cross_entropy", [draw(6, 4) * 3], options, {"target": target, "weight": weight})
        add("mse_loss", [draw(4, 3), draw(4, 3)], {"reduction": reduction})
        for function in ("l1_loss", "huber_loss"):
            add(function, [draw(4, 3), draw(4, 3)], {"reduction": reduction})
        add("huber_loss", [draw(2, 5) * 2, draw(2, 5)], {"reduction": reduction, "delta": 0.5})
        options = {"reduction": reduction}
        probabilities = abs(draw(6, 4))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        add("cross_entropy", [draw(6, 4)], options, {"target": probabilities, "weight": weight})
        add("cross_entropy", [draw(6, 4)], options | {"label_smoothing": 0.1}, {"target": probabilities})
        dense = rng.integers(0, 4, (2, 3, 5))
        dense[0, 1, 2] = -100
        add("cross_entropy", [draw(2, 4, 3, 5)], options, {"target": dense, "weight": weight})
        add("cross_entropy", [draw(2, 4, 3)], options, {"target": abs(draw(2, 4, 3))})
        add("cross_entropy", [draw(4)], options, {"target": np.array(2)})
        add("nll_loss", [draw(6, 4)], options, {"target": target})
        add("nll_loss", [draw(6, 4)], options, {"target": target, "weight": weight})
        add("nll_loss", [draw(2, 4, 3, 5)], options, {"target": dense})
        labels = {"target": rng.integers(0, 2, (5, 4)).astype(np.float32)}
        name = "binary_cross_entropy_with_logits"
        add(name, [draw(5, 4) * 5], options, labels)
        add(name, [draw(5, 4)], options, labels | {"weight": weight, "pos_weight": weight + 1})
    add("cross_entropy", [draw(6, 4)], {"ignore_index": 3}, {"target": np.array([0, 3, 2, 3, 1, 3])})


def optimizers():
    """Ten steps of a tiny net in float64: theta (weight, bias of each layer) after each step."""
    x, target = draw(6, 3), rng.integers(0, 3, 6)
    start = [draw(2, 3), draw(2), draw(3, 2), draw(3)]
    arrays["steps.x"], arrays["steps.target"] = x, target
    arrays["steps.start"] = np.concatenate([p.ravel() for p in start])
    runs = []
    for number, (kind, options) in enumerate([
        ("SGD", {"lr": 0.5}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}),
        ("Adam", {"lr": 0.1}),
        ("Adam", {"lr": 0.05, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.3}),
        ("AdamW", {"lr": 0.1}),
        ("AdamW", {"lr": 0.05, "weight_decay": 0.5}),
    ]):  # fmt: skip
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 3)).double()
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), start, strict=True):
                parameter.copy_(torch.tensor(value))
        optimizer, path = getattr(torch.optim, kind)(net.parameters(), **options), []
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(net(torch.tensor(x).double()), torch.tensor(target)).backward()
            optimizer.step()
            path.append(np.concatenate([p.detach().numpy().ravel() for p in net.parameters()]))
        arrays[f"steps.{number}"] = np.array(path)
        runs.append({"kind": kind, "options": options})
    return runs


def schedules():
    """Every rate of a schedule."""
    scheduler = torch.optim.lr_scheduler
    table = [
        ("step_decay", {"lr": 0.3, "steps": 40, "step_size": 7, "gamma": 0.5},
         lambda o: scheduler.StepLR(o, 7, 0.5)),
        ("cosine", {"lr": 0.3, "steps": 40, "final_lr": 0.01},
         lambda o: scheduler.CosineAnnealingLR(o, 40, 0.01)),
        ("one_cycle", {"max_lr": 0.3, "steps": 40},
         lambda o: scheduler.OneCycleLR(o, 0.3, total_steps=40)),
        ("one_cycle", {"max_lr": 0.1, "steps": 37, "warmup": 0.45, "div_factor": 10.0, "final_div_factor": 100.0},
         lambda o: scheduler.OneCycleLR(o, 0.1, total_steps=37, pct_start=0.45, div_factor=10, final_div_factor=100)),
    ]  # fmt: skip
    runs = []
    for number, (function, options, make) in enumerate(table):
        lr = options.get("lr", options.get("max_lr"))
        optimizer, rates = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr), []
        schedule = make(optimizer)
        for step in range(options["steps"]):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if step < options["steps"] - 1:
                schedule.step()
        arrays[f"schedule.{number}"] = np.array(rates)
        runs.append({"function": function, "options": options})
    return runs


def main():
    convolutions()
    pools()
    transposed_and_resized()
    normalisations()
    rest()
    losses()
    about = {"torch": torch.__version__, "cases": cases, "optimizers": optimizers(), "schedules": schedules()}
    # One array per type, with offsets: an archive of hundreds of small arrays would be mostly headers.
    about["arrays"], flat = {}, {"float32": [], "float64": [], "int64": []}
    for name, a in arrays.items():
        kind = a.dtype.name if a.dtype.kind == "f" else "int64"
        about["arrays"][name] = kind, sum(map(len, flat[kind])), a.shape
        flat[kind].append(a.ravel())
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FILE, about=np.array(json.dumps(about)), **{k: np.concatenate(v).astype(k) for k, v in flat.items()}
    )
    print(f"{FILE}: {len(cases)} cases, {FILE.stat().st_size:,} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
