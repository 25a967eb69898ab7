"""Error messages name the argument, the expected and the given value.  And `repr`."""

import re

import numpy as np
import pytest

from tinycnn import (
    EMA,
    SGD,
    Adam,
    AdamW,
    Batches,
    BatchNorm2d,
    ColorJitter,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Dropout,
    EarlyStopping,
    ElasticTransform,
    Flatten,
    LeakyReLU,
    Linear,
    MaxPool2d,
    MSELoss,
    OneHotMSELoss,
    RandomAffine,
    ReduceLROnPlateau,
    ReLU,
    Sequential,
    checkpoint,
    data,
    evaluate,
    fit,
    init,
    lecun98,
    plot,
    train_step,
)

X = np.random.default_rng(0).standard_normal((12, 1, 4, 4)).astype(np.float32)
Y = np.arange(12) % 3
RNG = "rng must be a seed (an integer that is not negative, or several), a NumPy generator or None, got "
A_LOSS = "criterion must be a loss such as CrossEntropyLoss(), got "
DATA = "must be a DeviceDataset, got "
SOURCE = "must be a DeviceDataset, a tuple of arrays (images, labels), or an iterable of batches (images, labels), got "
STATE = "state must be a dictionary, as state_dict() gives it, got "


def net(**options):
    return Sequential(Flatten(), Linear(16, 3), **{"input_shape": (1, 4, 4), "rng": 0} | options)


BATCHES, MODEL, LOSS = DeviceDataset(X, Y), net(), CrossEntropyLoss()
RULE = SGD(MODEL, 0.1)


def train(model=MODEL, loss=LOSS, rule=RULE, batches=BATCHES, **options):
    return fit(model, loss, rule, batches, **{"epochs": 1, "progress": False} | options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: train(batches=X), TypeError, f"train {SOURCE}ndarray of shape (12, 1, 4, 4)"),
        (lambda: train(validation=X), TypeError, f"validation {SOURCE}ndarray"),
        (lambda: train(batches=[X, Y]), TypeError, "batch 1 of train must be a pair (images, labels), got ndarray of "
         "shape (12, 1, 4, 4); arrays go into a tuple (images, labels)"),
        (lambda: Batches("files"), TypeError, "source must be an iterable of batches (images, labels), got 'files'"),
        (lambda: train(callbacks=print), TypeError, "callbacks must be a list, got <built-in function print>"),
        (lambda: train(callbacks=[EarlyStopping]), TypeError, "got the class EarlyStopping: call it, EarlyStopping("),
        (lambda: evaluate(MODEL, (X, Y)), TypeError, f"dataset {DATA}tuple; make one of images and labels: Device"),
        (lambda: train_step(MODEL, LOSS, RULE, (X, Y), Y), TypeError, f"dataset {DATA}tuple"),
        (lambda: train(loss=CrossEntropyLoss), TypeError, f"{A_LOSS}the class CrossEntropyLoss: call it, Cross"),
        (lambda: evaluate(MODEL, BATCHES, MSELoss), TypeError, f"{A_LOSS}the class MSELoss"),
        (lambda: train(rule=SGD), TypeError, "be an optimizer such as Adam(model), got the class SGD: call it, SGD("),
        (lambda: train(loss=RULE, rule=LOSS), TypeError, f"{A_LOSS}SGD(lr=0.1); criterion comes before optimizer"),
        (lambda: train_step(MODEL, RULE, LOSS, BATCHES, Y), TypeError, "criterion comes before optimizer"),
        (lambda: train(model=LOSS), TypeError, "model must be a Sequential, got CrossEntropyLoss()"),
        (lambda: train(on_epoch=3), TypeError, "on_epoch must be a function or None, got 3"),
        (lambda: train(rng=1.5), TypeError, RNG + "1.5"),
        (lambda: Adam(MODEL.parameters()), TypeError, "model must be a Sequential, got list; an optimizer takes "
         "the whole model, not its parameters"),
        (lambda: Adam(MODEL, betas=0.9), ValueError, "betas must be two numbers such as (0.9, 0.999), got 0.9"),
        (lambda: Adam(MODEL, betas=(0.9, 0.9, 0.9)), ValueError, "betas must be two numbers"),
        (lambda: SGD(MODEL, -1), ValueError, "lr must be finite and not negative, got -1"),
        (lambda: SGD(MODEL, [0.1, np.nan]), ValueError, "lr must be finite and not negative, got nan"),
        (lambda: SGD(MODEL, 10**400), ValueError, "lr must be finite"),
        (lambda: SGD(MODEL, ["1"]), TypeError, "lr must be a number or a one-dimensional array of numbers, got ['1']"),
        (lambda: RULE.set_lr_schedule(-1), ValueError, "rates must be finite and not negative, got -1"),
        (lambda: RULE.set_lr_schedule([np.nan]), ValueError, "rates must be finite and not negative, got nan"),
        (lambda: RULE.set_lr_schedule([1, 2]), ValueError, "rates must be a number or have shape (1,), got (2,)"),
        (lambda: RULE.load_state_dict(RULE.state_dict() | {"rates": [-1]}), ValueError, "rates must be finite and not"),
        (lambda: RULE.load_state_dict("w.npz"), TypeError, STATE + "'w.npz'"),
        (lambda: EMA(RULE).load_state_dict(None), TypeError, STATE + "None"),
        (lambda: ReduceLROnPlateau(RULE).step("low"), TypeError, "metric must be a number, got 'low'"),
        (lambda: net(input_shape=3), TypeError, "input_shape must be a tuple of integers such as (1, 28, 28), got 3"),
        (lambda: net(input_shape=()), ValueError, "input_shape must be a tuple of integers such as (1, 28, 28), got"),
        (lambda: Sequential(Flatten()).summary(3), TypeError, "input_shape must be a tuple of integers"),
        (lambda: net(rng="x"), TypeError, RNG + "'x'"),
        (lambda: Sequential(Flatten(), rng=-1), ValueError, RNG + "-1"),
        (lambda: init.xavier_uniform(MODEL, rng="x"), TypeError, RNG + "'x'"),
        (lambda: data.synthetic_digits(3, rng="x"), TypeError, RNG + "'x'"),
        (lambda: data.train_val_split(10, 2, "x"), TypeError, RNG + "'x'"),
        (lambda: net(dtype="x"), ValueError, "dtype must be float32 or float64, got 'x'"),
        (lambda: Sequential([Flatten(), ReLU()]), TypeError, "layers must be tinycnn layers, got [Flatten(), ReLU()]; "
         "give them one by one, Sequential(*layers)"),
        (lambda: Sequential(Flatten), TypeError, "layers must be tinycnn layers, got the class Flatten: call it, Flat"),
        (lambda: DeviceDataset(X, Y, mean=(0.1, 0.2)), ValueError, "mean must be a number or 1, one a channel, got"),
        (lambda: DeviceDataset(X, Y, std="x"), TypeError, "std must be an array of real numbers"),
        (lambda: DeviceDataset([[[1, 2], [3]]], [0]), ValueError, "images must be an array, got lists of different"),
        (lambda: DeviceDataset(X, Y - 1), ValueError, "labels must not be negative, got -1 at index 0"),
        (lambda: DeviceDataset(X, Y, augment=RandomAffine), TypeError, "got the class RandomAffine: call it, Random"),
        (lambda: LOSS([[1, 2], [3]], [0, 1]), ValueError, "logits must be an array, got lists of different lengths"),
        (lambda: LOSS(np.zeros((2, 3)), [[0], [1, 2]]), ValueError, "target must be an array, got lists of different"),
        (lambda: CrossEntropyLoss([1, -1]), ValueError, "weight must not be negative, got -1"),
        (lambda: MODEL.load_state_dict("w.pt"), ValueError, "a file name ending in .safetensors or .npz, got 'w.pt'"),
        (lambda: MODEL.load_state_dict([1]), TypeError, STATE + "[1]; or the path of a file of them"),
        (lambda: MODEL.load_state_dict(None), TypeError, STATE + "None"),
        (lambda: MaxPool2d(2, padding=5), ValueError, "padding must be at most half of kernel_size 2, got 5"),
        (lambda: ReLU(inplace=True), TypeError, "ReLU has no inplace: a model chooses in-place steps by itself"),
        (lambda: Dropout(0.5, inplace=True), TypeError, "Dropout has no inplace: "),
        (lambda: LeakyReLU(0.1, inplace=True), TypeError, "LeakyReLU has no inplace: "),
        (lambda: ReLU(True), TypeError, "ReLU takes no arguments, got 1"),
        (lambda: ReLU(slope=0.1), TypeError, "ReLU takes no arguments, got 1"),
        (lambda: Flatten(start_dim=1), TypeError, "Flatten has no start_dim: all axes but the batch's become one"),
        (lambda: Conv2d(1, 1, 3, padding_mode="reflect"), TypeError, "Conv2d has no padding_mode: padding is always"),
        (lambda: Linear(3, 4, device="cuda"), TypeError, "Linear has no device: set it on the Sequential"),
        (lambda: BatchNorm2d(3, dtype=np.float32), TypeError, "BatchNorm2d has no dtype: set it on the Sequential"),
        (lambda: MaxPool2d(2, return_indices=True), TypeError, "MaxPool2d has no return_indices: functional.max"),
    ],
)  # fmt: skip
def test_error_messages(call, error, words):
    before = MODEL.theta.copy()
    with pytest.raises(error, match="^.*" + re.escape(words)):
        call()
    np.testing.assert_array_equal(MODEL.theta, before)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: checkpoint.save(path / "a.safetensors", {}),
        lambda path: data.write_idx(path / "a", np.zeros(3, np.uint8)),
        lambda path: plot.save(plot.confusion(np.eye(3, dtype=int)), path / "a.png"),
    ],
)
def test_a_missing_folder_is_named(tmp_path, save):
    with pytest.raises(FileNotFoundError, match=r"the folder does not exist: '.*/missing/a[^/]*'$"):
        save(tmp_path / "missing")


def test_compressed_array_file(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"a\.npz: .* compressed \(as np\.savez_compressed does\): save them with np\.savez"
    ):
        checkpoint.load(tmp_path / "a.npz")


class Tensor:
    """A stand-in for torch's: NumPy takes it only after `detach` if it requires grad."""

    def __init__(self, array, requires_grad=True):
        self.array, self.requires_grad = array, requires_grad

    def detach(self):
        return Tensor(self.array, False)

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return np.asarray(self.array, dtype)


def test_tensors_that_require_grad_are_accepted():
    other = Sequential(Flatten(), Linear(16, 3), input_shape=(1, 4, 4), rng=5)
    other.load_state_dict({name: Tensor(value) for name, value in MODEL.state_dict().items()})
    np.testing.assert_array_equal(other.forward(Tensor(X)), MODEL.forward(X))
    assert len(DeviceDataset(Tensor(X), Tensor(Y))) == 12
    assert LOSS(Tensor(MODEL.forward(X)), Y)[0] == LOSS(MODEL.forward(X), Y)[0]


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (CrossEntropyLoss(), "CrossEntropyLoss()"),
        (CrossEntropyLoss([1, 2], label_smoothing=0.1), "CrossEntropyLoss(weight=[1, 2], label_smoothing=0.1)"),
        (MSELoss("sum"), "MSELoss(reduction='sum')"),
        (OneHotMSELoss(), "OneHotMSELoss()"),
        (lecun98.RBFLoss(1.0), "RBFLoss(rubbish=1.0)"),
        (SGD(MODEL, 0.1, momentum=0.9), "SGD(lr=0.1, momentum=0.9)"),
        (AdamW(MODEL, np.linspace(0.1, 0.2, 20)), "AdamW(lr=array of 20 from 0.1 to 0.2)"),
        (EMA(Adam(MODEL), 0.9), "EMA(Adam(lr=0.001), decay=0.9)"),
        (ReduceLROnPlateau(SGD(MODEL, 0.1), patience=3), "ReduceLROnPlateau(SGD(lr=0.1), patience=3)"),
        (EarlyStopping(patience=3), "EarlyStopping(patience=3)"),
        (RandomAffine(degrees=3), "RandomAffine(degrees=3.0)"),
        (ElasticTransform(alpha=8), "ElasticTransform(alpha=8.0)"),
        (ColorJitter(), "ColorJitter()"),
        (BATCHES, "DeviceDataset(12 images of 1 x 4 x 4, 3 classes)"),
        (data.synthetic_dataset(30, 20, rng=0), "Dataset('synthetic', 30 training and 20 test images, 10 classes)"),
        (MaxPool2d(2, ceil_mode=True), "MaxPool2d(kernel_size=(2, 2), stride=(2, 2), ceil_mode=True)"),
    ],
)  # fmt: skip
def test_repr(thing, text):
    assert repr(thing) == text
