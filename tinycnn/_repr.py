"""`repr` as the constructor call."""

import inspect
from typing import Any

import numpy as np

MAX_SHOWN = 6  # longer arrays are shown by their size and range


class InitRepr:
    """Base class: `repr` is the call that would make the object, without arguments that have their default.

    An argument's value is the attribute of the same name; arguments without one, and `model`, are left out.
    """

    def repr_overrides(self) -> dict[str, Any]:
        """Values of arguments that are not attributes of the same name."""
        return {}

    def repr_options(self) -> dict[str, Any]:
        """Values of further keyword arguments that are not at their default."""
        return {}

    def __repr__(self) -> str:
        return self.describe()

    def describe(self, omit: tuple[str, ...] = ()) -> str:
        """`repr` without the arguments `omit`, also in arguments that are such objects."""
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        overrides, texts = self.repr_overrides(), []
        for parameter in parameters:
            value = overrides.get(parameter.name, getattr(self, parameter.name, parameter.default))
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            if parameter.name in ("model", *omit) or _is_default(value, parameter.default):
                continue
            text = value.describe(omit) if isinstance(value, InitRepr) else _format(value)
            texts.append(text if parameter.default is parameter.empty else f"{parameter.name}={text}")
        texts += [f"{name}={_format(value)}" for name, value in self.repr_options().items()]
        return f"{type(self).__name__}({', '.join(texts)})"


def _is_default(value: Any, default: Any) -> bool:
    return type(value) is not np.ndarray and (value is default or bool(value == default))


def _format(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return repr(value)
    if value.size == 1:
        return repr(value.item())
    if value.size <= MAX_SHOWN:
        return repr(value.tolist())
    return f"array of {value.size} from {value.min():g} to {value.max():g}"
