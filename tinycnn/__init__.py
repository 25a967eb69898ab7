"""tinycnn: a convolutional network engine whose every kernel can be read.

    from tinycnn import Adam, CrossEntropyLoss, data, fit, models

`__init__.pyi` lists the public names.  They load when first used, and Numba and matplotlib with the first that needs
them (SPEC 1 of Scientific Python).
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__.remove("sklearn")  # `from tinycnn import *` must not need scikit-learn
