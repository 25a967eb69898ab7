"""EMA and ReduceLROnPlateau.

The other optimizers and the schedules are compared with PyTorch's in test_functional.py, their kernels in
test_linear_losses_optim.py.
"""

import copy
import itertools
import json

import numpy as np
import pytest
import reference

from tinycnn import (
    EMA,
    SGD,
    Adam,
    AdamW,
    BatchNorm2d,
    CrossEntropyLoss,
    DeviceDataset,
    DivergedError,
    Flatten,
    Linear,
    ReduceLROnPlateau,
    RMSprop,
    Sequential,
    data,
    evaluate,
    fit,
    kernels,
    schedules,
    train_step,
)
from tinycnn.train import warm_up


@pytest.fixture(scope="module")
def digits():
    images, labels = data.synthetic_digits(300, rng=0)
    return DeviceDataset(images[:256], labels[:256]), DeviceDataset(images[256:], labels[256:])


def make(optimizer=SGD, rng=0, **options):
    model = Sequential(BatchNorm2d(1), Flatten(), Linear(784, 10), input_shape=(1, 28, 28), rng=rng)
    return model, optimizer(model, **options)


def train(model, optimizer, batches, **options):
    options = {"epochs": 2, "batch_size": 64, "rng": 0, "progress": False} | options
    return fit(model, CrossEntropyLoss(), optimizer, batches, **options)


def trajectory(model, optimizer, count):
    """theta after each of `count` steps on random gradients: (count, P)"""
    rng, thetas = np.random.default_rng(1), []
    for _ in range(count):
        model.grad[...] = rng.standard_normal(model.grad.shape)
        optimizer.step()
        thetas.append(model.theta.astype(np.float64))
    return np.array(thetas)


# --- EMA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_average_of_every_step(decay):
    model, inner = make(lr=0.1, momentum=0.9)
    optimizer, rng, thetas = EMA(inner, decay), np.random.default_rng(1), []
    for _ in range(7):
        model.grad[...] = rng.standard_normal(model.grad.shape)
        optimizer.step()
        thetas.append(model.theta.astype(np.float64))
        np.testing.assert_allclose(optimizer.average, reference.ema(thetas, decay)[-1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(thetas, trajectory(*make(lr=0.1, momentum=0.9), 7))  # the inner optimizer's steps


def test_the_average_is_torchs():
    torch = pytest.importorskip("torch")
    swa = torch.optim.swa_utils
    linear = torch.nn.Linear(5, 3).double()
    averaged = swa.AveragedModel(linear, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    model = Sequential(Linear(5, 3), input_shape=(5,), rng=0, dtype=np.float64)
    optimizer = EMA(SGD(model, 0.1), 0.9)
    for theta in trajectory(model, optimizer, 6):
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(theta[:15].reshape(3, 5)))
            linear.bias.copy_(torch.tensor(theta[15:]))
        averaged.update_parameters(linear)
    want = np.concatenate([p.detach().numpy().ravel() for p in averaged.module.parameters()])
    np.testing.assert_allclose(optimizer.average, want, rtol=1e-12, atol=1e-12)


def test_average_parameters_is_a_context_manager():
    model, inner = make(lr=0.1)
    optimizer, before = EMA(inner, 0.5), model.theta.copy()
    with optimizer.average_parameters():
        assert np.array_equal(model.theta, before)  # no step, no average
    trained = trajectory(model, optimizer, 3)[-1]
    with optimizer.average_parameters():
        assert np.array_equal(model.theta, optimizer.average)
        assert not np.array_equal(model.theta, trained)
    assert np.array_equal(model.theta, trained)
    with pytest.raises(KeyError), optimizer.average_parameters():
        raise KeyError
    assert np.array_equal(model.theta, trained)
    with inner.average_parameters():
        assert np.array_equal(model.theta, trained)
    inner.use_average()
    assert np.array_equal(model.theta, trained)
    optimizer.use_average()
    assert np.array_equal(model.theta, optimizer.average)


def test_ema_exposes_its_optimizer():
    model, inner = make(Adam, lr=schedules.cosine(0.1, 5))
    optimizer = EMA(inner)
    trajectory(model, optimizer, 2)
    assert optimizer.steps == 2
    assert optimizer.lr == inner.lr_schedule[2]
    assert optimizer.lr_schedule is inner.lr_schedule
    assert optimizer.device_lr_schedule is inner.device_lr_schedule


def test_ema_resumes_from_its_state_dict(digits):
    index = np.arange(64)

    def steps(model, optimizer, count):
        for _ in range(count):
            train_step(model, CrossEntropyLoss(), optimizer, digits[0], index)

    whole, inner = make(Adam, lr=0.01)
    uninterrupted = EMA(inner, 0.8)
    steps(whole, uninterrupted, 6)
    first, inner = make(Adam, lr=0.01)
    optimizer = EMA(inner, 0.8)
    steps(first, optimizer, 3)
    second, inner = make(Adam, rng=9, lr=0.5)
    resumed = EMA(inner, 0.8)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 3)
    assert np.array_equal(second.theta, whole.theta)
    assert np.array_equal(resumed.average, uninterrupted.average)


def test_ema_refuses_a_wrong_state():
    model, inner = make(lr=0.1)
    optimizer = EMA(inner)
    trajectory(model, optimizer, 2)
    state = optimizer.state_dict()
    for wrong, words in [
        (inner.state_dict(), "must have 'average' of shape .* got none"),
        (state | {"average": np.zeros(3)}, r"must have 'average' of shape .* got \(3,\)"),
        ({name: value for name, value in state.items() if name != "velocity"}, "must have the keys"),
    ]:
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(wrong)
    for name, value in optimizer.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


# --- EMA in a training ------------------------------------------------------------------------------------------------


def test_fit_validates_and_returns_the_average(digits, monkeypatch):
    plain, optimizer = make(lr=0.05)
    monkeypatch.setattr(kernels, "capture", lambda step: step)  # Python runs every step
    monkeypatch.setattr(kernels, "precompile", lambda step, _: None)
    thetas = []
    step = optimizer.step
    optimizer.step = lambda: (step(), thetas.append(plain.theta.astype(np.float64)))
    train(plain, optimizer, digits[0])
    model, inner = make(lr=0.05)
    seen, optimizer = [], EMA(inner, 0.9)
    history = train(
        model, optimizer, digits[0], validation=digits[1],
        on_epoch=lambda record: seen.append((model.theta.copy(), evaluate(model, digits[1])[0])),
    )  # fmt: skip
    want = reference.ema(thetas, 0.9)
    for at, (theta, loss), record in zip((3, 7), seen, history, strict=True):
        np.testing.assert_allclose(theta, want[at], rtol=0, atol=1e-6)
        assert loss == record["val_loss"]
    assert np.array_equal(model.theta, seen[-1][0])
    assert not np.allclose(model.theta, plain.theta, rtol=0, atol=1e-4)
    for name, values in model.named_buffers():  # not averaged
        np.testing.assert_array_equal(values, dict(plain.named_buffers())[name])


def test_an_interrupt_leaves_the_average_of_the_last_epoch(digits):
    model, inner = make(lr=0.05)
    seen = []

    def interrupt_second_epoch(record):
        seen.append(model.theta.copy())
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, EMA(inner, 0.9), digits[0], epochs=5, on_epoch=interrupt_second_epoch)
    assert np.array_equal(model.theta, seen[-1])


def test_a_diverged_run_leaves_the_average_of_the_last_good_epoch(digits):
    rates = np.concatenate([np.full(4, 0.05), np.full(100, 1e38)])
    model, inner = make(lr=rates)
    seen = []
    with np.errstate(all="ignore"), pytest.raises(DivergedError) as caught:
        train(model, EMA(inner, 0.9), digits[0], on_epoch=lambda record: seen.append(model.theta.copy()), epochs=3)
    assert caught.value.epoch == 2
    assert len(seen) == 1
    assert np.array_equal(model.theta, seen[0])
    model, inner = make(lr=1e38)
    before = model.theta.copy()
    with np.errstate(all="ignore"), pytest.raises(DivergedError):
        train(model, EMA(inner, 0.9), digits[0])
    assert np.array_equal(model.theta, before)  # no epoch, no average


def test_warm_up_leaves_no_trace_in_the_average(digits):
    model, inner = make(lr=0.1)
    optimizer, before = EMA(inner), model.theta.copy()
    warm_up(model, CrossEntropyLoss(), optimizer, digits[0], 32)
    optimizer.use_average()
    assert np.array_equal(model.theta, before)


# --- ReduceLROnPlateau ------------------------------------------------------------------------------------------------


def test_the_rate_is_reduced_after_patience():
    optimizer = make(lr=1.0)[1]
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=2, cooldown=1, min_lr=0.2)
    for metric, rate in [
        (3, 1), (2, 1), (2, 1), (2, 1), (2, 0.5),  # three epochs without an improvement
        (2, 0.5), (2, 0.5), (2, 0.5), (2, 0.25),  # one of cooldown, then three
        (1, 0.25), (1, 0.25), (1, 0.25), (1, 0.2),  # an improvement, then three: not below min_lr
        (1, 0.2), (np.nan, 0.2), (0.9, 0.2),
    ]:  # fmt: skip
        plateau.step(metric)
        assert optimizer.lr == rate
        assert optimizer.device_lr_schedule == np.float32(rate)
    assert plateau.best == 0.9


def test_the_remaining_rates_are_reduced():
    model, optimizer = make(lr=[0.8, 0.4, 0.2, 0.1, 1e-9])
    trajectory(model, optimizer, 2)
    before = optimizer.device_lr_schedule
    ReduceLROnPlateau(optimizer, factor=0.25, patience=0, min_lr=0.04).step(np.nan)
    np.testing.assert_allclose(optimizer.lr_schedule, [0.8, 0.4, 0.05, 0.04, 1e-9], rtol=1e-12)  # not raised to min_lr
    assert optimizer.device_lr_schedule is before  # a captured step reads it
    np.testing.assert_array_equal(optimizer.device_lr_schedule, optimizer.lr_schedule.astype(np.float32))


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_the_rates_are_torchs(mode, threshold_mode):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    for patience, cooldown, threshold, min_lr, eps in itertools.product(
        [0, 1, 3], [0, 2], [0, 1e-4, 0.1], [0, 1e-3], [1e-8, 1e-3]
    ):
        options = {
            "mode": mode, "threshold_mode": threshold_mode, "factor": 0.3, "patience": patience, "cooldown": cooldown,
            "threshold": threshold, "min_lr": min_lr, "eps": eps,
        }  # fmt: skip
        optimizer, torch_optimizer = make(lr=0.5)[1], torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        plateau = ReduceLROnPlateau(optimizer, **options)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(torch_optimizer, **options)
        for metric in np.round(rng.standard_normal(40), 1) * rng.choice([1, -1, 1e-3]):
            plateau.step(metric)
            scheduler.step(metric)
            assert optimizer.lr == torch_optimizer.param_groups[0]["lr"], options
            assert plateau.best == scheduler.best, options
            assert plateau.num_bad_epochs == scheduler.num_bad_epochs, options


def test_a_plateau_resumes_from_its_state_dict():
    metrics = [3, 2, 2, 2, 2, 2, 1, 1, 1, 1]

    def make_plateau(optimizer):
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=1)

    whole, first, second = (make_plateau(make(lr=1.0)[1]) for _ in range(3))
    rates = []
    for metric in metrics:
        whole.step(metric)
        rates.append(whole.optimizer.lr)
    for metric in metrics[:5]:
        first.step(metric)
    state = json.loads(json.dumps(first.state_dict()))  # plain numbers
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(state)
    for metric, rate in zip(metrics[5:], rates[5:], strict=True):
        second.step(metric)
        assert second.optimizer.lr == rate
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "keys"),
        (None, "state must be a dictionary"),
        ({"best": "low", "num_bad_epochs": 0, "cooldown_counter": 0}, "best must be a number"),
        ({"best": 1.0, "num_bad_epochs": -1, "cooldown_counter": 0}, "num_bad_epochs must be at least 0"),
        ({"best": 1.0, "num_bad_epochs": 1, "cooldown_counter": 0.5}, "cooldown_counter must be an integer"),
    ],
)
def test_a_plateau_refuses_a_wrong_state(state, words):
    plateau = ReduceLROnPlateau(make(lr=1.0)[1])
    before = plateau.state_dict()
    with pytest.raises((TypeError, ValueError), match=words):
        plateau.load_state_dict(state)
    assert plateau.state_dict() == before


def test_one_cycle_with_warmup_only():
    """torch.optim.lr_scheduler.OneCycleLR with pct_start=1.0"""
    np.testing.assert_allclose(schedules.one_cycle(1.0, 3, warmup=1.0, div_factor=5.0), [0.2, 0.6, 1.0], rtol=1e-12)
    with pytest.raises(ValueError, match="warmup must"):
        schedules.one_cycle(1.0, 3, warmup=1.1)


def test_a_plateau_in_fit(digits):
    model, inner = make(lr=1e-12)  # no improvement
    plateau = ReduceLROnPlateau(EMA(inner), patience=0, factor=0.5, eps=0.0)
    history = train(
        model, plateau.optimizer, digits[0], epochs=4, validation=digits[1],
        on_epoch=lambda record: plateau.step(record["val_loss"]),
    )  # fmt: skip
    assert [record["lr"] for record in history] == [1e-12, 1e-12, 5e-13, 2.5e-13]


def test_a_diverged_epoch_is_repeated_with_the_rates_that_on_epoch_has_set(digits):
    model, optimizer = make(lr=0.05)
    with np.errstate(all="ignore"), pytest.raises(DivergedError) as caught:  # thetas when the epoch is repeated
        train(model, optimizer, digits[0], on_epoch=lambda record: optimizer.set_lr_schedule(1e38))
    assert caught.value.epoch == 2
    assert optimizer.lr == 1e38


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda o: EMA(o.model), "optimizer"),
        (lambda o: EMA(EMA(o)), "optimizer"),
        (lambda o: EMA(o, 1.0), "decay"),
        (lambda o: EMA(o, -0.1), "decay"),
        (lambda o: EMA(o, "slow"), "decay"),
        (lambda o: ReduceLROnPlateau(o.model), "optimizer"),
        (lambda o: ReduceLROnPlateau(o, "least"), "mode"),
        (lambda o: ReduceLROnPlateau(o, factor=1.0), "factor"),
        (lambda o: ReduceLROnPlateau(o, factor=-0.1), "factor"),
        (lambda o: ReduceLROnPlateau(o, patience=-1), "patience"),
        (lambda o: ReduceLROnPlateau(o, patience=1.5), "patience"),
        (lambda o: ReduceLROnPlateau(o, threshold=-1), "threshold"),
        (lambda o: ReduceLROnPlateau(o, threshold_mode="share"), "threshold_mode"),
        (lambda o: ReduceLROnPlateau(o, cooldown=-1), "cooldown"),
        (lambda o: ReduceLROnPlateau(o, min_lr=-1), "min_lr"),
        (lambda o: ReduceLROnPlateau(o, eps=np.nan), "eps"),
    ],
)
def test_bad_arguments_are_refused_by_name(build, words):
    with pytest.raises((ValueError, TypeError), match=f"^{words} must"):
        build(make(lr=0.1)[1])


# --- denormal numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [Adam, lambda model, lr: SGD(model, lr, momentum=0.9)])
def test_averages_of_zero_gradients_decay_to_zero(optimizer):
    """They skip denormal numbers, which are a hundred times slower."""
    model = Sequential(Flatten(), Linear(4, 5), input_shape=(1, 2, 2), rng=0)
    rule = optimizer(model, 1e-3)
    model.grad[:] = np.random.default_rng(0).standard_normal(len(model.grad))
    rule.step()
    model.grad[:] = 0
    for _ in range(1500):
        rule.step()
        for name in rule.vectors:
            size = np.abs(getattr(rule, name))
            assert not ((size > 0) & (size < np.finfo(np.float32).tiny)).any(), name
    assert not getattr(rule, rule.vectors[0]).any()
    model.grad[:] = 1e-36  # small but normal, like its average
    rule.step()
    assert (getattr(rule, rule.vectors[0]) > 9e-38).all()
    model.grad[0] = np.nan
    rule.step()
    assert np.isnan(model.theta[0])
    assert np.isfinite(model.theta[1:]).all()


def test_averages_in_float64_may_be_smaller():
    """A number that is denormal in float32 may be normal in float64."""
    model = Sequential(Flatten(), Linear(4, 5), input_shape=(1, 2, 2), rng=0, dtype=np.float64)
    before, rule = model.theta.copy(), Adam(model, 0.1, eps=0)
    model.grad[:] = 1e-18
    rule.step()
    np.testing.assert_allclose(model.theta, before - 0.1, rtol=0, atol=1e-12)
    model.grad[:] = 1e-160  # its square is denormal in float64 too
    rule.m[:] = rule.v[:] = 0
    rule.step()
    assert not rule.v.any()


# --- groups, frozen layers, clipping: against PyTorch in test_torch_runs.py -------------------------------------------

OPTIMIZERS = [SGD, Adam, AdamW, RMSprop]


def small(rng=0):
    return Sequential(Flatten(), Linear(4, 3), Linear(3, 2), input_shape=(1, 2, 2), rng=rng)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"groups": [{"params": "*.bogus"}]},
            ValueError,
            r"no parameter matches '\*\.bogus'; there are 1\.weight, 1\.b",
        ),
        (
            {"groups": [{"params": "1.*"}, {"params": "*.bias"}]},
            ValueError,
            r"groups\[1\] and groups\[0\] both .* 1\.bias",
        ),
        ({"groups": [{"params": Linear(4, 3)}]}, ValueError, r"Linear\(4, 3\) is not in the model"),
        ({"groups": [{"params": "*", "lr": 0.1}]}, ValueError, "got params, lr; lr_scale is a factor"),
        ({"groups": [{"lr_scale": 1.0}]}, ValueError, "must have the keys params"),
        ({"groups": [{"params": 3}]}, TypeError, "a pattern of names, a layer, or a list of these, got 3"),
        (
            {"groups": [{"params": "*", "weight_decay": -1}]},
            ValueError,
            r"groups\[0\]\['weight_decay'\] must be at least 0",
        ),
        ({"groups": "*.bias"}, TypeError, "groups must be a list of dictionaries"),
        ({"groups": ["*.bias"]}, TypeError, r"groups\[0\] must be a dictionary"),
        ({"clip_grad_norm": 0}, ValueError, "clip_grad_norm must be positive, got 0"),
        ({"clip_grad_value": "a"}, TypeError, "clip_grad_value must be a number"),
        ({"clip": 1}, TypeError, "unexpected keyword argument 'clip'"),
    ],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_options_are_refused_by_name(optimizer, options, error, message):
    with pytest.raises(error, match=message):
        optimizer(small(), **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_decay_of_biases_and_norms(optimizer):
    model = make(optimizer, weight_decay=0.1)[0]  # batch norm and a linear layer
    found = optimizer(model, lr=0.1, weight_decay=0.1, decay_bias_and_norm=False)
    model.grad[...] = 0
    before = {name: view.copy() for name, view in model.named_parameters()}
    found.step()
    changed = {name for name, view in model.named_parameters() if not np.array_equal(view, before[name])}
    assert changed == {"2.weight"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_layers_stay_and_may_change_between_steps(optimizer):
    model = small()
    found = optimizer(model, lr=0.1, weight_decay=0.1)
    for frozen in (1, 2):
        model[1].requires_grad, model[2].requires_grad = frozen != 1, frozen != 2
        before = [layer.weight.copy() for layer in (model[1], model[2])]
        for _ in range(3):
            model.grad[...] = 1
            found.step()
        same = [np.array_equal(b, layer.weight) for b, layer in zip(before, (model[1], model[2]), strict=True)]
        assert same == [frozen == 1, frozen == 2]
    model[1].requires_grad = False
    model[2].requires_grad = False
    with pytest.raises(ValueError, match="every layer with parameters is frozen"):
        found.step()


def test_the_norm_is_of_the_trained_parameters_before_clipping():
    model = small()
    optimizer = SGD(model, lr=1.0, clip_grad_norm=0.5)
    model[1].requires_grad = False
    model.grad[...] = 1
    before = model.theta.copy()
    optimizer.step()
    trained = model.parameter_table[2].start
    assert optimizer.grad_norm == pytest.approx(np.sqrt(len(model.theta) - trained))
    assert np.linalg.norm(model.theta - before) == pytest.approx(0.5, rel=1e-4)
    np.testing.assert_array_equal(model.theta[:trained], before[:trained])


def test_copies_keep_groups_and_limits():
    model = small()
    groups = [{"params": [model[1], "2.bias"], "lr_scale": 0.5}, {"params": "2.weight", "weight_decay": 0.0}]
    optimizer = AdamW(model, lr=0.1, groups=groups, clip_grad_norm=1.0, clip_grad_value=0.1)
    assert "'params': '1.weight', 'lr_scale': 0.5" in repr(optimizer)
    assert "clip_grad_norm=1.0, clip_grad_value=0.1" in repr(optimizer)
    trajectory(model, optimizer, 2)
    again = copy.deepcopy(optimizer)
    np.testing.assert_array_equal(trajectory(model, optimizer, 3), trajectory(again.model, again, 3))
