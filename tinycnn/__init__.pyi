"""The public names: `__init__.py` loads them from here when they are used."""

__version__: str

from . import (
    augment as augment,
    calibration as calibration,
    callbacks as callbacks,
    checkpoint as checkpoint,
    data as data,
    demo as demo,
    digits as digits,
    errors as errors,
    functional as functional,
    init as init,
    kernels as kernels,
    layers as layers,
    lecun98 as lecun98,
    losses as losses,
    metrics as metrics,
    models as models,
    onnx as onnx,
    optim as optim,
    plot as plot,
    resume as resume,
    runs as runs,
    schedules as schedules,
    sklearn as sklearn,
    torch as torch,
    train as train,
)
from ._gradcheck import gradcheck as gradcheck, gradcheck_model as gradcheck_model
from .augment import (
    ColorJitter as ColorJitter,
    ElasticTransform as ElasticTransform,
    RandomAffine as RandomAffine,
)
from .batches import Batches as Batches
from .callbacks import (
    CSVLogger as CSVLogger,
    EarlyStopping as EarlyStopping,
    ModelCheckpoint as ModelCheckpoint,
    ReduceLROnPlateau as ReduceLROnPlateau,
    TensorBoard as TensorBoard,
    WandB as WandB,
)
from .containers import Residual as Residual
from .dataset import DeviceDataset as DeviceDataset
from .devices import set_num_threads as set_num_threads
from .errors import DivergedError as DivergedError
from .layers import (
    ELU as ELU,
    GELU as GELU,
    AdaptiveAvgPool2d as AdaptiveAvgPool2d,
    AvgPool2d as AvgPool2d,
    BatchNorm1d as BatchNorm1d,
    BatchNorm2d as BatchNorm2d,
    Conv2d as Conv2d,
    ConvTranspose2d as ConvTranspose2d,
    Dropout as Dropout,
    Dropout2d as Dropout2d,
    Flatten as Flatten,
    GaussianRBF as GaussianRBF,
    GroupNorm as GroupNorm,
    Hardtanh as Hardtanh,
    Layer as Layer,
    LayerNorm as LayerNorm,
    LeakyReLU as LeakyReLU,
    Linear as Linear,
    LogSoftmax as LogSoftmax,
    MaxPool2d as MaxPool2d,
    ReLU as ReLU,
    ReLU6 as ReLU6,
    ScaledTanh as ScaledTanh,
    Sigmoid as Sigmoid,
    SiLU as SiLU,
    Softmax as Softmax,
    Softplus as Softplus,
    Tanh as Tanh,
    Unflatten as Unflatten,
    Upsample as Upsample,
    ZeroPad2d as ZeroPad2d,
)
from .losses import (
    BCEWithLogitsLoss as BCEWithLogitsLoss,
    CrossEntropyLoss as CrossEntropyLoss,
    HuberLoss as HuberLoss,
    L1Loss as L1Loss,
    MSELoss as MSELoss,
    NLLLoss as NLLLoss,
    OneHotMSELoss as OneHotMSELoss,
)
from .model import Sequential as Sequential
from .optim import EMA as EMA, SGD as SGD, Adam as Adam, AdamW as AdamW, RMSprop as RMSprop
from .resume import TrainingCheckpoint as TrainingCheckpoint
from .saving import load as load
from .train import evaluate as evaluate, fit as fit, train_step as train_step
