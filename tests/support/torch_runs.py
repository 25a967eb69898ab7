"""Training runs of 20 steps, defined once for tinycnn and for PyTorch (make_torch_runs.py)."""

import dataclasses
import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinycnn as t

FILE = Path(__file__).with_name("torch_runs.json")
IMAGES, BATCH, STEPS = 24, 8, 20


@dataclasses.dataclass(frozen=True)
class Run:
    """layers     makes the chain
    shape      of one image
    target     "class", "values", "labels", "image": what `data` draws
    loss, optimizer   class names, the same in both libraries; options are their arguments
    groups     (pattern of parameter names, lr_scale, weight decay)
    frozen     numbers of the layers that are not trained
    """

    layers: Callable[[], list[Any]]
    shape: tuple[int, ...] = (2, 6, 6)
    target: str = "class"
    loss: str = "CrossEntropyLoss"
    loss_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "SGD"
    optimizer_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"lr": 0.1, "momentum": 0.9})
    groups: tuple[tuple[str, float, float], ...] = ()
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    frozen: tuple[int, ...] = ()

    def model(self, dtype: Any, device: str = "cpu") -> t.Sequential:
        model = t.Sequential(*self.layers(), input_shape=self.shape, rng=11, dtype=dtype, device=device)
        for number in self.frozen:
            model[number].requires_grad = False
        return model

    def data(self) -> tuple[Any, Any]:
        """(x, target), float64 or class numbers."""
        rng = np.random.default_rng(12)
        output = self.model(np.float64).shapes[-1]
        x = rng.standard_normal((IMAGES, *self.shape)).astype(np.float32).astype(np.float64)
        target: Any
        if self.target == "class":
            target = rng.integers(0, output[0], IMAGES)
        elif self.target == "labels":
            target = rng.integers(0, 2, (IMAGES, *output)).astype(np.float64)
        elif self.target == "image":
            target = x
        else:
            target = rng.standard_normal((IMAGES, *output)).astype(np.float32).astype(np.float64)
        return x, target

    def orders(self) -> list[Any]:
        """Numbers of the images of each step."""
        rng = np.random.default_rng(13)
        return [rng.permutation(IMAGES)[:BATCH] for _ in range(STEPS)]

    def dataset(self, device: str) -> t.DeviceDataset:
        """tinycnn's data set."""
        x, target = self.data()
        return t.DeviceDataset(x, None if self.target == "image" else target, mean=0.0, std=1.0, device=device)

    def make_optimizer(self, model: t.Sequential) -> Any:
        """tinycnn's optimizer."""
        options = dict(self.optimizer_options)
        if self.groups:
            options["groups"] = [
                {"params": pattern, "lr_scale": scale, "weight_decay": decay} for pattern, scale, decay in self.groups
            ]
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return getattr(t, self.optimizer)(model, **options)

    def groups_by_name(self) -> list[tuple[list[str], dict[str, float]]]:
        """(names of the parameters, torch's options) of each group."""
        names = [name for name, _ in self.model(np.float64).named_parameters()]
        return [
            (fnmatch.filter(names, pattern), {"lr": self.optimizer_options["lr"] * scale, "weight_decay": decay})
            for pattern, scale, decay in self.groups
        ]


def conv(a: int, b: int, stride: int = 1) -> t.Conv2d:
    return t.Conv2d(a, b, 3, stride, padding=1)


def classifier(*layers: Any) -> list[Any]:
    """`layers` on 4 maps of 6 x 6 between a convolution and a linear layer."""
    return [conv(2, 4), *layers, t.Flatten(), t.Linear(4 * 36, 3)]


def activation(layer: Callable[[], Any]) -> Run:
    return Run(lambda: classifier(layer(), conv(4, 4), layer()))


def optimizer(name: str, **options: Any) -> Run:
    parts = {key: options.pop(key) for key in ("groups", "clip_grad_norm", "clip_grad_value") if key in options}
    return Run(lambda: classifier(t.Tanh()), optimizer=name, optimizer_options=options, **parts)


def regression(loss: str, target: str = "values", **options: Any) -> Run:
    return Run(lambda: classifier(t.Tanh()), target=target, loss=loss, loss_options=options)


RUNS: dict[str, Run] = {
    "residual": Run(lambda: classifier(t.Residual(conv(4, 4), t.Tanh(), conv(4, 4)), t.Tanh())),
    "residual with projection": Run(
        lambda: [
            conv(2, 4), t.BatchNorm2d(4), t.ReLU(),
            t.Residual(
                conv(4, 6, 2), t.BatchNorm2d(6), t.ReLU(), conv(6, 6), t.BatchNorm2d(6),
                projection=[t.Conv2d(4, 6, 1, 2), t.BatchNorm2d(6)],
            ),
            t.ReLU(), t.Flatten(), t.Linear(54, 3),
        ]
    ),
    "ELU": activation(t.ELU),
    "GELU": activation(t.GELU),
    "GELU, tanh": activation(lambda: t.GELU("tanh")),
    "SiLU": activation(t.SiLU),
    "Softplus": activation(t.Softplus),
    "Hardtanh": activation(t.Hardtanh),
    "ReLU6": activation(t.ReLU6),
    "ConvTranspose2d": Run(
        lambda: [
            conv(2, 3, 2), t.Tanh(), t.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), t.Tanh(),
            t.Flatten(), t.Linear(72, 3),
        ]
    ),
    "ConvTranspose2d with groups": Run(
        lambda: [
            t.Flatten(), t.Linear(72, 24), t.Unflatten(1, (6, 2, 2)), t.Tanh(),
            t.ConvTranspose2d(6, 4, (2, 3), stride=(2, 1), groups=2, dilation=2, bias=False), t.Tanh(),
            t.AdaptiveAvgPool2d(1), t.Flatten(), t.Linear(4, 3),
        ]
    ),
    "Upsample": Run(lambda: [conv(2, 3, 2), t.Upsample(scale_factor=2), conv(3, 2), t.Flatten(), t.Linear(72, 3)]),
    "AdaptiveAvgPool2d": Run(lambda: [conv(2, 4), t.AdaptiveAvgPool2d((4, 1)), t.Flatten(), t.Linear(16, 3)]),
    "ZeroPad2d": Run(
        lambda: [t.ZeroPad2d((2, 1, 0, -1)), t.Conv2d(2, 4, 3), t.Flatten(), t.Linear(84, 3)]
    ),
    "BatchNorm1d": Run(
        lambda: [
            t.Flatten(), t.Linear(72, 9), t.BatchNorm1d(9), t.Tanh(), t.Linear(9, 3), t.BatchNorm1d(3, affine=False),
        ]
    ),
    "LayerNorm": Run(
        lambda: [
            conv(2, 3), t.LayerNorm((6, 6)), t.Tanh(), t.LayerNorm((3, 6, 6), bias=False), t.LayerNorm(6), t.Flatten(),
            t.Linear(108, 9), t.LayerNorm(9), t.Linear(9, 3), t.LayerNorm(3, elementwise_affine=False),
        ]
    ),
    "GroupNorm": Run(lambda: classifier(t.GroupNorm(2, 4), t.Tanh())),
    "MSELoss": regression("MSELoss"),
    "L1Loss": regression("L1Loss"),
    "HuberLoss": regression("HuberLoss", delta=0.5),
    "BCEWithLogitsLoss": regression("BCEWithLogitsLoss", "labels", pos_weight=[0.5, 2.0, 1.0]),
    "NLLLoss": Run(lambda: [*classifier(t.Tanh()), t.LogSoftmax(1)], loss="NLLLoss"),
    "autoencoder": Run(
        lambda: [
            conv(2, 4, 2), t.Tanh(), t.Flatten(), t.Linear(36, 5), t.Tanh(), t.Linear(5, 36), t.Tanh(),
            t.Unflatten(1, (4, 3, 3)), t.ConvTranspose2d(4, 2, 2, stride=2),
        ],
        target="image", loss="MSELoss",
    ),
    "SGD with groups": optimizer(
        "SGD", lr=0.1, momentum=0.9, weight_decay=0.05, groups=(("*.bias", 2.0, 0.0), ("0.weight", 0.1, 0.3))
    ),
    "Adam with groups": optimizer("Adam", lr=0.01, weight_decay=0.1, groups=(("3.*", 0.5, 0.0),)),
    "AdamW with groups": optimizer("AdamW", lr=0.01, weight_decay=0.1, groups=(("*.bias", 1.0, 0.0),)),
    "RMSprop": optimizer("RMSprop", lr=0.01),
    "RMSprop with all options": optimizer(
        "RMSprop", lr=0.003, alpha=0.9, eps=1e-3, weight_decay=0.1, momentum=0.9, centered=True,
        groups=(("*.bias", 2.0, 0.0),),
    ),
    "clipped by norm": optimizer("SGD", lr=0.5, momentum=0.9, clip_grad_norm=0.3),
    "clipped by value": optimizer("SGD", lr=0.5, clip_grad_value=0.02),
    "clipped by both": optimizer("Adam", lr=0.01, clip_grad_norm=0.5, clip_grad_value=0.1),
    "frozen and clipped": Run(
        lambda: classifier(t.Tanh(), conv(4, 4), t.Tanh()), frozen=(0,), optimizer="AdamW",
        optimizer_options={"lr": 0.01, "weight_decay": 0.5}, clip_grad_norm=0.1,
    ),
    "frozen below": Run(lambda: classifier(t.Tanh(), conv(4, 4), t.Tanh()), frozen=(0, 2)),
    "frozen between": Run(lambda: classifier(t.Tanh(), conv(4, 4), t.Tanh()), frozen=(2,)),
}  # fmt: skip
