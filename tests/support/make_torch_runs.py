"""Write torch_runs.json: the losses of 20 training steps in PyTorch, the expected values of test_torch_runs.py.

Run by hand with PyTorch installed (`python tests/support/make_torch_runs.py`); the tests only read the file.
Both sides start from the weights that tinycnn draws, and train in float64.

Ten digits are written: the last ones of a float64, up to 7e-14 of the loss, depend on torch's version, on its number of
threads and on the processor's vector instructions.
"""

import json

import numpy as np
import torch
import torch_runs

from tinycnn.torch import to_module


def losses(run):
    """The loss before each of the steps."""
    model, x, target, orders = run.model(np.float64), *run.data(), run.orders()
    module = to_module(model)
    criterion = getattr(torch.nn, run.loss)(**{name: as_tensor(value) for name, value in run.loss_options.items()})
    optimizer = make_optimizer(module, run)
    inputs, targets, found = torch.from_numpy(x), torch.from_numpy(target), []
    for order in orders:
        optimizer.zero_grad()
        loss = criterion(module(inputs[order]), targets[order])
        loss.backward()
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        if run.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, run.clip_grad_norm)
        if run.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, run.clip_grad_value)
        optimizer.step()
        found.append(float(f"{loss.item():.10g}"))
    return found


def as_tensor(value):
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value


def make_optimizer(module, run):
    parameters = dict(module.named_parameters())
    groups = [
        {"params": [parameters.pop(name) for name in names], **options} for names, options in run.groups_by_name()
    ]
    groups.append({"params": list(parameters.values())})
    return getattr(torch.optim, run.optimizer)(groups, **run.optimizer_options)


if __name__ == "__main__":
    answers = {name: losses(run) for name, run in torch_runs.RUNS.items()}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in answers.items())
    torch_runs.FILE.write_text("{\n" + text + "\n}\n")
    print(f"{len(answers)} runs, torch {torch.__version__}")
