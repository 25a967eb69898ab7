"""Arrays of other libraries: `__array__`, DLPack, torch tensors, tables of pixels."""

import numpy as np
import pytest

from tinycnn import (
    SGD,
    CrossEntropyLoss,
    DeviceDataset,
    Flatten,
    Linear,
    Sequential,
    devices,
    evaluate,
    fit,
    functional,
    train_step,
)

RNG = np.random.default_rng(0)
IMAGES, LABELS, WEIGHTS = RNG.integers(0, 256, (40, 8, 8), np.uint8), RNG.integers(0, 4, 40), RNG.random(40)
X = RNG.random((40, 1, 8, 8), np.float32)


class WithArray:
    """An array of a library that has `__array__` and nothing else."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


class WithDLPack:
    """An array of a library that has DLPack and nothing else."""

    def __init__(self, array):
        self.array = np.array(array)

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def tensor(array):
    return pytest.importorskip("torch").tensor(array)


def tensor_with_graph(array):
    made = tensor(array)
    return made.requires_grad_() if made.is_floating_point() else made


def net():
    return Sequential(Flatten(), Linear(64, 4), input_shape=(1, 8, 8), rng=0)


def everything(kind):
    """What every function that takes arrays makes of arrays of a kind."""
    model = net()
    optimizer = SGD(model, kind(np.array([0.1, 0.2, 0.3])))
    criterion = CrossEntropyLoss(kind(np.array([1.0, 2.0, 1.0, 1.0])))
    dataset = DeviceDataset(
        kind(IMAGES), kind(LABELS), sample_weight=kind(WEIGHTS), mean=kind(np.array([0.1])), std=kind(np.array([0.3]))
    )
    results = [train_step(model, criterion, optimizer, dataset, kind(np.arange(5)))]
    data = kind(IMAGES), kind(LABELS), kind(WEIGHTS)
    history = fit(model, criterion, optimizer, data, epochs=2, validation=data, rng=0, progress=False)
    results += [history[-1]["val_loss"], *evaluate(model, data), *evaluate(model, dataset, criterion)]
    results += [model(kind(X)), model.backward(kind(np.ones((40, 4), np.float32)))]
    results += [model.outputs(kind(X)), model.predict(kind(IMAGES[:, None])), model.predict_proba(kind(X))]
    results += [model.activations(kind(X))[-1].output, functional.relu(kind(X))]
    results.append(criterion(kind(X[:, 0, 0, :4]), kind(LABELS))[0])
    other = net()
    assert other.load_state_dict({name: kind(value) for name, value in model.state_dict().items()}) == ([], [])
    np.testing.assert_array_equal(other.normalization.mean, model.normalization.mean)
    results.append(other.predict(IMAGES[:, None]))
    other.theta = kind(np.arange(260, dtype=np.float32))
    other[1].bias = kind(np.zeros(4, np.float32))
    return [*results, np.array(other.theta)]


@pytest.mark.parametrize("kind", [WithArray, WithDLPack, tensor, tensor_with_graph])
def test_arrays_of_any_library_are_taken(kind):
    for got, want in zip(everything(kind), everything(np.array), strict=True):
        np.testing.assert_array_equal(got, want)


def test_bfloat16():
    torch = pytest.importorskip("torch")
    half = {name: torch.tensor(value).bfloat16() for name, value in net().state_dict().items()}
    model = net()
    model.load_state_dict(half)
    np.testing.assert_array_equal(model[1].weight, half["1.weight"].float().numpy())
    np.testing.assert_array_equal(model(torch.tensor(X).bfloat16()), model(torch.tensor(X).bfloat16().float()))
    dtypes = pytest.importorskip("ml_dtypes")  # JAX's
    np.testing.assert_array_equal(model(X.astype(dtypes.bfloat16)), model(torch.tensor(X).bfloat16()))


def test_arrays_without_data_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"x must be an array that NumPy reads, got Tensor of shape \(40, 1, 8, 8\)"):
        net()(torch.tensor(X).to_sparse())
    with pytest.raises(ValueError, match="x must be an array on cpu"):
        net()(torch.empty(2, 1, 8, 8, device="meta"))


def test_arrays_go_out():
    model = net()
    for array in (model.theta, model[1].weight, model(X)):
        assert np.asarray(array) is array
        assert np.shares_memory(np.from_dlpack(devices.as_dlpack(array)), array)


def test_torch_shares_the_parameters():
    torch = pytest.importorskip("torch")
    model = net()
    torch.from_dlpack(devices.as_dlpack(model[1].bias)).fill_(7)
    np.testing.assert_array_equal(model.theta[-4:], np.full(4, 7))


def test_tables_of_pixels_are_refused_with_advice():
    pandas = pytest.importorskip("pandas")
    model, table, labels = net(), pandas.DataFrame(IMAGES.reshape(40, 64)), pandas.Series(LABELS)
    with pytest.raises(
        ValueError, match=r"got \(40, 64\); for rows of pixels, np\.asarray\(images\)\.reshape\(-1, 8, 8\)"
    ):
        fit(model, CrossEntropyLoss(), SGD(model, 0.1), (table, labels), epochs=1)
    with pytest.raises(ValueError, match=r"reshape\(-1, H, W\)$"):
        DeviceDataset(table.iloc[:, :63], labels)
    with pytest.raises(ValueError, match=r"got \(40, 64\); np\.asarray\(x\)\.reshape\(-1, 1, 8, 8\) makes images"):
        model.predict(table)
    with pytest.raises(ValueError, match=r"got \(40, 63\)$"):
        model.predict(table.iloc[:, :63])
    images = np.asarray(table).reshape(-1, 8, 8)
    dataset = DeviceDataset(images, labels, sample_weight=pandas.Series(WEIGHTS))
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_a_tuple_is_evaluated_with_the_pixels_of_training():
    model = net()
    with pytest.raises(TypeError, match="dataset must be a DeviceDataset, got tuple"):
        evaluate(model, (IMAGES, LABELS))
    fit(model, CrossEntropyLoss(), SGD(model, 0.1), (IMAGES, LABELS), epochs=1, progress=False)
    known = DeviceDataset(IMAGES[:9], LABELS[:9], mean=model.normalization.mean, std=model.normalization.std)
    loss, accuracy, outputs = evaluate(model, (IMAGES[:9], LABELS[:9]))
    want = evaluate(model, known)
    assert (loss, accuracy) == want[:2]
    np.testing.assert_array_equal(outputs, want[2])
