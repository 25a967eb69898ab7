"""Gradient statistics of every layer with a weight, for the study of vanishing gradients (Glorot and Bengio 2010)."""

from typing import Any

import numpy as np

from tinycnn.dataset import DeviceDataset
from tinycnn.model import Sequential

IMAGES = 1024
SATURATED = 0.05  # a unit is saturated if its derivative is below this fraction of the activation's maximum
MAX_DERIVATIVE = {"Sigmoid": 0.25, "Tanh": 1.0, "ReLU": 1.0, "ScaledTanh": 1.7159 * 2 / 3}


def statistics(model: Sequential, loss: Any, dataset: DeviceDataset, lr: float) -> list[dict[str, Any]]:
    """One dict per layer with a weight, from input to output, measured on the first images of `dataset`.

    signal      root mean square of dL/da over units and images; L: loss of one image, a: output of the layer
    gradient    Euclidean norm of the gradient of the weight; the loss is averaged over the images
    weight      Euclidean norm of the weight
    update      relative change of the weight in a step of plain gradient descent: lr * gradient / weight
    slope       mean derivative of the following activation; saturated: fraction of units with a derivative near 0.
                Both are None after the last layer
    """
    n = min(IMAGES, len(dataset))
    ops, state = model.ops, model.snapshot()
    with model.lock:
        model.discard_forward()
        plan = model.plan(n, unfused=True)
        target = dataset.gather(plan.x, ops.to_device(np.arange(n)))
        plan.forward()
        loss.ensure_allocated(ops, n, model.shapes[-1][-1], model.dtype)
        loss.forward_backward(plan.dy, plan.y, target)
        plan.backward()
        # The factor between the gradients of one image's loss and of the batch's loss.
        scale = n if loss.reduction == "mean" else 1
        steps = {step.numbers[0]: step for step in plan.steps if step.layers}
        records = []
        layer: Any
        for number, (_, layer) in enumerate(model.leaves):
            if "weight" not in layer.parameter_shapes():
                continue
            signal = plan.to_host(steps[number].dy).astype(np.float64) * scale
            weight, gradient = (np.asarray(ops.to_host(a), np.float64) for a in (layer.weight, layer.weight_grad))
            gradient = gradient * scale / n
            record = {
                "layer": repr(layer),
                "signal": float(np.sqrt(np.mean(signal**2))),
                "gradient": float(np.linalg.norm(gradient)),
                "weight": float(np.linalg.norm(weight)),
                "update": float(lr * np.linalg.norm(gradient) / max(np.linalg.norm(weight), 1e-300)),
                "slope": None,
                "saturated": None,
            }
            activation: Any = steps[number + 1].layers[0] if number + 1 in steps else None
            if type(activation).__name__ in MAX_DERIVATIVE:
                y = ops.to_device(plan.to_host(steps[number + 1].y))
                slope = ops.to_device(np.ones(y.shape, model.dtype))
                activation.backward(slope, slope, y, y)  # in place: it does not read the input
                slope = np.asarray(ops.to_host(slope), np.float64)
                threshold = SATURATED * MAX_DERIVATIVE[type(activation).__name__]
                record |= {"slope": float(slope.mean()), "saturated": float((slope < threshold).mean())}
            records.append(record)
    model.restore(state)
    return records
