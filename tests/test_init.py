"""Initial weights and "same" padding against torch's definitions."""

import math

import numpy as np
import pytest
import reference

from tinycnn import AvgPool2d, Conv2d, Flatten, Linear, MaxPool2d, Sequential, Tanh, functional, init, lecun98


def model():
    return Sequential(
        Conv2d(4, 60, (5, 3), groups=2), Tanh(), Flatten(), Linear(60 * 4 * 6, 50, bias=False), rng=0,
        input_shape=(4, 8, 8), dtype=np.float64,
    )  # fmt: skip


# torch.nn.init._calculate_fan_in_and_fan_out: of weights (60, 2, 5, 3) and (50, 1440)
FANS = {"0.weight": (2 * 15, 60 * 15), "3.weight": (1440, 50)}


@pytest.mark.parametrize(
    ("rule", "deviation"),
    [
        (lambda m: init.xavier_uniform(m, 1.5, rng=1), lambda i, o: 1.5 * math.sqrt(2 / (i + o))),
        (lambda m: init.xavier_normal(m, 1.5, rng=1), lambda i, o: 1.5 * math.sqrt(2 / (i + o))),
        (lambda m: init.kaiming_uniform(m, rng=1), lambda i, o: math.sqrt(2 / i)),
        (lambda m: init.kaiming_normal(m, "tanh", rng=1), lambda i, o: 5 / 3 / math.sqrt(i)),
    ],
)
def test_standard_deviation(rule, deviation):
    net = model()
    bias = net.state_dict()["0.bias"]
    rule(net)
    for name, fans in FANS.items():
        weight = net.state_dict()[name]
        assert weight.std() == pytest.approx(deviation(*fans), rel=0.05)
        assert abs(weight.mean()) < 4 * weight.std() / math.sqrt(weight.size)
    np.testing.assert_array_equal(net.state_dict()["0.bias"], bias)


def test_uniform_bounds():
    net = model()
    init.xavier_uniform(net, rng=1)
    for name, (fan_in, fan_out) in FANS.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < abs(net.state_dict()[name]).max() <= bound


def test_bias_and_seed():
    net, twin = model(), model()
    init.constant_bias(net, 0.01)
    np.testing.assert_array_equal(net.state_dict()["0.bias"], 0.01)
    init.kaiming_normal(net, rng=5)
    init.kaiming_normal(twin, rng=5)
    np.testing.assert_array_equal(net.state_dict()["3.weight"], twin.state_dict()["3.weight"])


def test_invalid_arguments():
    with pytest.raises(ValueError, match="no convolution or fully connected layer with a weight"):
        init.xavier_uniform(Sequential(AvgPool2d(2), input_shape=(1, 4, 4)))
    with pytest.raises(ValueError, match="nonlinearity must be one of"):
        init.kaiming_uniform(model(), "swish")


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 2), ((1, 7), 1), ((3, 5), (3, 1))])
def test_same_padding_keeps_the_size(kernel, dilation):
    net = Sequential(Conv2d(2, 3, kernel, padding="same", dilation=dilation), input_shape=(2, 9, 11), rng=0)
    assert net.shapes[-1] == (3, 9, 11)
    state, x = net.state_dict(), np.random.default_rng(0).standard_normal((2, 2, 9, 11)).astype(np.float32)
    same = functional.conv2d(x, state["0.weight"], state["0.bias"], padding="same", dilation=dilation)
    np.testing.assert_array_equal(net.forward(x), same)
    assert Conv2d(1, 1, 3, padding="valid").padding == (0, 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("images", [1, 20])
@pytest.mark.parametrize(
    ("kernel", "dilation", "size"),
    [(2, 1, (5, 6)), ((2, 3), 1, (4, 5)), ((3, 4), 1, (7, 3)), (4, (3, 1), (9, 8)), (6, 1, (4, 9)), (2, 1, (2, 2))],
)
def test_same_padding_of_even_windows(kernel, dilation, size, images, device):
    """As in torch, an odd padding has one more row below, or column on the right."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((images, 4, *size)), rng.standard_normal((images, 6, *size))
    layer = Conv2d(4, 6, kernel, padding="same", dilation=dilation, groups=2)
    net = Sequential(layer, input_shape=(4, *size), rng=0, dtype=np.float64, device=device)
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    around = [(n // 2, n - n // 2) for n in total]
    padded = np.pad(x, ((0, 0), (0, 0), *around))
    w, b = net.state_dict().values()
    where = (1, 1), (0, 0), layer.dilation, 2
    np.testing.assert_allclose(net.forward(x), reference.conv2d(padded, w, b, *where), rtol=0, atol=1e-13)
    dx, dw, db = reference.conv2d_backward(dy, padded, w, *where)
    (top, _), (left, _) = around
    got = net.backward(dy)
    np.testing.assert_allclose(got, dx[:, :, top : top + size[0], left : left + size[1]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.array(net.ops.to_host(net.grad)), np.r_[dw.ravel(), db], rtol=0, atol=1e-12)
    assert "padding='same'" in repr(layer)


def test_same_padding_of_a_window_as_large_as_the_image():
    x = np.arange(4.0).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(functional.conv2d(x, np.ones((1, 1, 2, 2)), padding="same"), [[[[6, 4], [5, 3]]]])


def test_invalid_padding():
    with pytest.raises(ValueError, match="padding='same' needs a stride of 1"):
        Conv2d(1, 1, 3, stride=2, padding="same")
    with pytest.raises(ValueError, match="padding must be one of 'same', 'valid', got 'full'"):
        Conv2d(1, 1, 3, padding="full")
    with pytest.raises(ValueError, match="padding must be at most half of kernel_size 2, got 5"):
        MaxPool2d(2, padding=5)
    with pytest.raises(ValueError, match="padding must be at most half of kernel_size 2, got 2"):
        AvgPool2d(2, padding=(1, 2))


def test_truncated_normal():
    net = model()
    init.truncated_normal(net, 0.1, rng=1)
    weight = net.state_dict()["3.weight"]
    assert 0.195 < abs(weight).max() <= 0.2
    # Variance of the standard normal between -2 and 2: 1 - 4 phi(2) / (2 Phi(2) - 1)
    assert weight.std() == pytest.approx(0.1 * math.sqrt(1 - 4 * 0.05399096651 / 0.95449973610), rel=0.01)


def test_only():
    net = model()
    before = net.state_dict()
    init.xavier_uniform(net, only=Linear, rng=1)
    init.constant_bias(net, 0.5, only=Conv2d)
    after = net.state_dict()
    np.testing.assert_array_equal(after["0.weight"], before["0.weight"])
    assert (after["3.weight"] != before["3.weight"]).any()
    np.testing.assert_array_equal(after["0.bias"], 0.5)
    with pytest.raises(ValueError, match="no Linear with a bias"):
        init.constant_bias(net, 0.5, only=Linear)


@pytest.mark.parametrize("root", [False, True])
def test_lecun1998(root):
    """The bound depends on the unit: C3's maps have 75, 100 or 150 inputs."""
    net = lecun98.lenet5(rng=0)
    init.lecun1998(net, root, rng=0)
    state = net.state_dict()
    fans = {"0": 25, "2": 4, "6": 4, "8": 400, "11": 120}
    for number, fan_in in fans.items():
        bound = 2.4 / (math.sqrt(fan_in) if root else fan_in)
        weight = abs(state[f"{number}.weight"])
        assert weight.max() <= bound * (1 + 1e-6)
        assert weight.size < 100 or weight.max() > 0.98 * bound
        assert not state[f"{number}.bias"].any()
    pairs = np.split(state["4.weight"], np.cumsum([3] * 6 + [4] * 9))
    for per_map in pairs:
        fan_in = 25 * len(per_map)
        bound = 2.4 / (math.sqrt(fan_in) if root else fan_in)
        assert 0.9 * bound < abs(per_map).max() <= bound * (1 + 1e-6)


def test_lecun1998_with_coefficients_and_biases():
    net = lecun98.lenet5(rng=0)
    init.lecun1998(net, root=True, gain=math.sqrt(3), coefficient=0.5, biases=True, rng=0)
    state = net.state_dict()
    for number in ("2", "6"):
        np.testing.assert_array_equal(state[f"{number}.weight"], 0.5)
        assert not state[f"{number}.bias"].any()
    assert state["8.weight"].std() == pytest.approx(1 / math.sqrt(400), rel=0.01)
    for number, fan_in in {"0": 25, "8": 400, "11": 120}.items():
        bias = abs(state[f"{number}.bias"])
        assert 0.5 * math.sqrt(3 / fan_in) < bias.max() <= math.sqrt(3 / fan_in)
    init.lecun1998(net, biases=True, rng=0)
    assert abs(net.state_dict()["2.weight"]).max() > 0  # drawn, and so are their biases
    assert len(set(net.state_dict()["2.bias"])) == 6
    for option, words in ({"gain": 0}, "gain must be"), ({"coefficient": math.nan}, "coefficient must be"):
        with pytest.raises(ValueError, match=words):
            init.lecun1998(net, **option)
