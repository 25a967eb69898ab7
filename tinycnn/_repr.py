"""How objects that are made of a few numbers show themselves."""

import inspect

import numpy as np

LONG = 6  # arrays of more numbers are shown by their shape and range


class InitRepr:
    """Base class: `repr` is the call that would make the object, without what is as by default.

    Arguments are attributes of the same name; those that are not, and the model, are left out.
    """

    def repr_overrides(self):
        """Of what is to be shown, what is not an attribute under its name."""
        return {}

    def __repr__(self):
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        given, texts = self.repr_overrides(), []
        for parameter in parameters:
            value = given.get(parameter.name, getattr(self, parameter.name, parameter.default))
            if parameter.name == "model" or _same(value, parameter.default):
                continue
            text = _text(value)
            texts.append(text if parameter.default is parameter.empty else f"{parameter.name}={text}")
        return f"{type(self).__name__}({', '.join(texts)})"


def _same(value, default):
    return type(value) is not np.ndarray and (value is default or bool(value == default))


def _text(value):
    if not isinstance(value, np.ndarray):
        return repr(value)
    if value.size == 1:
        return repr(value.item())
    if value.size <= LONG:
        return repr(value.tolist())
    return f"array of {value.size} from {value.min():g} to {value.max():g}"
