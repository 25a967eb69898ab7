"""Models as torch modules and back, and state_dicts of torch, of files and of other layouts."""

import pickle
import sys

import numpy as np
import pytest
from random_nets import random_input, random_net, randomize

import tinycnn
from tinycnn import Residual, Sequential, checkpoint, layers, lecun98, models
from tinycnn.dataset import Normalization


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # small nets; a second pool of threads beside Numba's costs more than it gives
    return torch


@pytest.fixture
def model():
    return Sequential(
        layers.Conv2d(1, 3, (3, 2)), layers.ConvTranspose2d(3, 4, (2, 3)), layers.Flatten(), layers.Linear(224, 5),
        input_shape=(1, 8, 7), rng=0,
    )  # fmt: skip


def same_outputs(torch, model, module, batches=(1, 3)):
    for n in batches:
        x = random_input(model, n).astype(model.dtype)
        want = model.outputs(x)
        with torch.no_grad():
            got = module(torch.from_numpy(x)).numpy()
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def round_trip(torch, model):
    module = tinycnn.torch.to_module(model)
    assert list(module.state_dict()) == [name for name in model.state_dict() if "normalization" not in name]
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
    same_outputs(torch, model, module)
    back = tinycnn.torch.from_module(module, model.input_shape)
    assert str(back) == str(model)
    assert (back.dtype, back.training) == (model.dtype, False)
    for name, value in back.state_dict().items():
        np.testing.assert_array_equal(value, model.state_dict()[name])
    same_outputs(torch, back, module)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # by torch, of speed
@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_nets(torch, first):
    for seed in range(first, first + 20):
        round_trip(torch, random_net(seed))


@pytest.mark.parametrize("net", [models.lenet5, models.resnet20, lecun98.lenet5])
def test_models(torch, net):
    round_trip(torch, randomize(net(rng=0), np.random.default_rng(1)))


def test_mode_dtype_and_frozen_layers(torch):
    model = Sequential(layers.Linear(3, 4), Residual(layers.Linear(4, 4), layers.BatchNorm1d(4)), dtype=np.float64)
    model.normalization = Normalization(np.ones(1), np.ones(1), 255)
    model[1].layers[0].requires_grad = False
    module = tinycnn.torch.to_module(model)
    assert module.training
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == ["1.layers.0.weight", "1.layers.0.bias"]
    back = tinycnn.torch.from_module(pickle.loads(pickle.dumps(module)))
    assert (back.training, back.dtype, back.input_shape, back.normalization) == (True, np.float64, None, None)
    assert [name for name, layer in back.leaves if not layer.requires_grad] == ["1.layers.0"]


def test_a_foreign_module(torch):
    """Nested sequences, names, arguments given as numbers, modules without effect or parameters used twice."""
    nn = torch.nn
    relu = nn.ReLU(inplace=True)
    features = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4), relu, nn.MaxPool2d(2), nn.Identity(),
        nn.UpsamplingNearest2d(scale_factor=2), nn.Upsample((9, 11)), nn.AdaptiveAvgPool2d((None, 3)), relu,
    )  # fmt: skip
    head = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.LayerNorm(5, bias=False), nn.LogSoftmax(dim=1))
    module = nn.Sequential()
    module.add_module("features", features)
    module.add_module("head", head)
    module(torch.randn(9, 1, 6, 7))  # running statistics
    model = tinycnn.torch.from_module(module.eval(), (1, 6, 7))
    assert len(model) == 12
    same_outputs(torch, model, module)
    linear = nn.Linear(3, 2)
    np.testing.assert_array_equal(tinycnn.torch.from_module(linear)[0].weight, linear.weight.detach())


def test_refused_modules(torch):
    nn, shared = torch.nn, torch.nn.Linear(3, 3)

    class Net(nn.Linear):
        pass

    for module, error, message in (
        (Net(2, 2), TypeError, "^Net has no equal in tinycnn; these have: AdaptiveAvgPool2d, AvgPool2d, "),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.PReLU())), TypeError, "module 1.0, PReLU, has no equal in tinycnn"),
        (
            nn.Sequential(shared, shared),
            TypeError,
            "module 1, Linear, is also module 0: layers of tinycnn do not share",
        ),
        (
            nn.Conv2d(1, 1, 3, padding_mode="reflect"),
            TypeError,
            "Conv2d has padding_mode='reflect', tinycnn only 'zero",
        ),
        (nn.Flatten(2), TypeError, "Flatten has start_dim=2, tinycnn only 1"),
        (nn.MaxPool2d(2, return_indices=True), TypeError, "MaxPool2d has return_indices=True, tinycnn only False"),
        (
            nn.Upsample(scale_factor=1.5),
            TypeError,
            "Upsample cannot be a layer of tinycnn: scale_factor must be an int",
        ),
        (
            nn.Upsample(2, mode="bilinear"),
            ValueError,
            "Upsample cannot be a layer of tinycnn: mode must be one of 'nea",
        ),
        (nn.LogSoftmax(), ValueError, "LogSoftmax cannot be a layer of tinycnn: dim must be one of"),
        (nn.Sequential(nn.Identity()), ValueError, "module must have at least one module that becomes a layer"),
        (3, TypeError, "module must be a torch module, got 3"),
    ):
        with pytest.raises(error, match=message):
            tinycnn.torch.from_module(module)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ParametrizedLinear has no equal"):
        tinycnn.torch.from_module(normed)
    with pytest.raises(ValueError, match=r"layer 1: Linear\(4, 4\) takes \(4,\), got \(3,\)"):
        tinycnn.torch.from_module(nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 4)), (2,))

    class Mine(layers.Tanh):
        pass

    with pytest.raises(TypeError, match=r"layer 0.projection.0, Mine\(\), must be a layer of tinycnn, unchanged"):
        tinycnn.torch.to_module(Sequential(Residual(layers.ReLU(), projection=Mine())))


def test_without_torch(monkeypatch, model):
    monkeypatch.delitem(sys.modules, "tinycnn._torch_modules", raising=False)
    monkeypatch.delattr(tinycnn, "_torch_modules", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r'tinycnn.torch needs torch: pip install "tinycnn\[torch\]"'):
        tinycnn.torch.to_module(model)


# --- state_dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_any_dtype(torch, model, dtype):
    state = {
        name: torch.nn.Parameter(torch.from_numpy(value).to(getattr(torch, dtype)))
        for name, value in model.state_dict().items()
    }
    model.theta[...] = 0
    model.load_state_dict(state)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, state[name].detach().float().numpy())


def test_tensors_on_another_device(model):
    """A tensor that is on a GPU is copied to the host; here an object that has a tensor's methods."""

    class Tensor:
        def __init__(self, values):
            self.values = values

        def element_size(self):
            return 4

        def is_floating_point(self):
            return True

        def detach(self):
            return self

        def cpu(self):
            self.on_host = True
            return self

        def __array__(self, dtype=None, copy=None):
            assert self.on_host
            return self.values

    state = model.state_dict()
    model.theta[...] = 0
    model.load_state_dict({name: Tensor(value) for name, value in state.items()})
    assert all((value == state[name]).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_file_of_a_state_dict(model, tmp_path, suffix):
    state, path = model.state_dict(), tmp_path / f"w.{suffix}"
    if suffix == "npz":
        np.savez(path, **state)
    else:
        checkpoint.save(path, state)
    for given in (path, str(path)):
        model.theta[...] = 0
        assert model.load_state_dict(given) == ([], [])
        assert all((value == state[name]).all() for name, value in model.state_dict().items())
    with pytest.raises(KeyError, match=rf"w.{suffix} does not fit the model: missing keys"):
        models.lenet5().load_state_dict(path)


def test_swapped_layouts(model):
    state = model.state_dict()
    hint = r"this looks like TensorFlow's layout {}; transpose it with numpy.transpose\(weight, {}\)"
    for name, axes, back, expected in (
        ("0.weight", (2, 3, 1, 0), (3, 2, 0, 1), r"expected \(3, 1, 3, 2\), got \(3, 2, 1, 3\): " + hint.format(
            r"\(height, width, in, out\)", r"\(3, 2, 0, 1\)")),
        ("1.weight", (2, 3, 1, 0), (3, 2, 0, 1), hint.format(r"\(height, width, out, in\)", r"\(3, 2, 0, 1\)")),
        ("3.weight", (1, 0), (1, 0), hint.format(r"\(in, out\)", r"\(1, 0\)")),
    ):  # fmt: skip
        swapped = state[name].transpose(axes)
        with pytest.raises(ValueError, match=f"{name}: .*{expected}$"):
            model.load_state_dict(state | {name: swapped})
        model.load_state_dict(state | {name: np.transpose(swapped, back)})
    with pytest.raises(ValueError, match=r"got \(7, 7\)$"):
        model.load_state_dict(state | {"3.weight": np.zeros((7, 7))})
