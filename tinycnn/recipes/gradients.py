"""How far gradients reach: statistics of every layer with a weight, for the study of vanishing gradients.

Glorot and Bengio 2010 is where such figures were first drawn.
"""

from typing import Any

import numpy as np

IMAGES = 1024
SATURATED = 0.05  # a unit is, where its slope is below this share of the largest slope that its activation has
STEEPEST = {"Sigmoid": 0.25, "Tanh": 1.0, "ReLU": 1.0, "ScaledTanh": 1.7159 * 2 / 3}


def statistics(model, criterion, batches, rate):
    """One dict for each layer with a weight, from the input to the output, measured on the first images of `batches`.

    signal      root mean square of dL/da over units and images, L one image's loss and a the layer's output
    gradient    Euclidean norm of the gradient of the weight, of the mean loss
    weight      that of the weight
    update      what a step of plain gradient descent with `rate` changes, as a share of the weight: rate times gradient
                over weight
    slope       mean derivative of the activation that follows; saturated: share of units where it is (nearly) flat.
                None after the last layer
    """
    n = min(IMAGES, len(batches))
    k, before = model.ops, model.snapshot()
    with model.lock:
        model.discard_forward()
        plan = model.plan(n, unfused=True)
        target = batches.gather(plan.x, k.to_device(np.arange(n)))
        plan.forward()
        criterion.ensure_allocated(k, n, model.shapes[-1][-1], model.dtype)
        criterion.forward_backward(plan.dy, plan.y, target)
        plan.backward()
        scale = n if criterion.reduction == "mean" else 1  # the loss of one image
        steps = {step.numbers[0]: step for step in plan.steps if step.layers}
        found = []
        for number, layer in enumerate(model.layers):
            if "weight" not in layer.parameter_shapes():
                continue
            signal = plan.to_host(steps[number].dy).astype(np.float64) * scale
            weight, gradient = (np.asarray(k.to_host(a), np.float64) for a in (layer.weight, layer.weight_grad))
            gradient = gradient * scale / n
            record = {
                "layer": repr(layer),
                "signal": float(np.sqrt(np.mean(signal**2))),
                "gradient": float(np.linalg.norm(gradient)),
                "weight": float(np.linalg.norm(weight)),
                "update": float(rate * np.linalg.norm(gradient) / max(np.linalg.norm(weight), 1e-300)),
                "slope": None,
                "saturated": None,
            }
            follows: Any = steps[number + 1].layers[0] if number + 1 in steps else None
            if type(follows).__name__ in STEEPEST:
                y = k.to_device(plan.to_host(steps[number + 1].y))
                slope = k.to_device(np.ones(y.shape, model.dtype))
                follows.backward(slope, slope, y, y)  # in place: it does not read the input
                slope = np.asarray(k.to_host(slope), np.float64)
                flat = SATURATED * STEEPEST[type(follows).__name__]
                record |= {"slope": float(slope.mean()), "saturated": float((slope < flat).mean())}
            found.append(record)
    model.restore(before)
    return found
