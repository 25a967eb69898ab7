"""An interrupted training continues as if nothing had happened: with the same bits, or an error that says why not."""

import numpy as np
import pytest

from tinycnn import (
    EMA,
    SGD,
    Adam,
    Batches,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    DeviceDataset,
    Dropout,
    Dropout2d,
    EarlyStopping,
    ElasticTransform,
    Flatten,
    Linear,
    MaxPool2d,
    RandomAffine,
    ReduceLROnPlateau,
    ReLU,
    RMSprop,
    Sequential,
    Tanh,
    TrainingCheckpoint,
    checkpoint,
    fit,
    lecun98,
    schedules,
)
from tinycnn.errors import DamagedCheckpointError, ResumeError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (70, 9, 9), np.uint8), RNG.integers(0, 3, 70)


def layers(*extra):
    return [
        Conv2d(1, 4, 3), BatchNorm2d(4), ReLU(), MaxPool2d(2), Dropout2d(0.3), Flatten(), *extra, Linear(36, 3),
    ]  # fmt: skip


def lecun_layers():
    return [Conv2d(1, 4, 3), Tanh(), lecun98.Subsample(4), Tanh(), Flatten(), Linear(36, 3)]


class Case:
    """A training: what makes its optimizer and callbacks, and the options of `fit`."""

    def __init__(
        self, optimizer, layers=layers, data=None, callbacks=lambda optimizer: [], bits=np.random.PCG64, **options
    ):
        self.optimizer, self.layers, self.data, self.bits = optimizer, layers, data or {}, bits
        self.callbacks, self.options = callbacks, {"batch_size": 16} | options

    def train(self, epochs, device="cpu", seed=0, **options):
        """Make everything anew, as another process does, and train.  Returns what can be compared."""
        model = Sequential(*self.layers(), input_shape=(1, 9, 9), rng=seed, device=device)
        optimizer, generator = self.optimizer(model), np.random.Generator(self.bits(seed))
        train = self.source(device)
        validation = DeviceDataset(IMAGES[:30], LABELS[:30], device=device)
        history = fit(
            model, CrossEntropyLoss(), optimizer, train, epochs=epochs, validation=validation, rng=generator,
            callbacks=self.callbacks(optimizer), progress=False, **self.options | options,
        )  # fmt: skip
        bits = [array.tobytes() for array in [*model.snapshot(), *optimizer.state_dict().values()]]
        times = ("seconds", "images_per_second")
        history = [{key: value for key, value in record.items() if key not in times} for record in history]
        return bits, history, generator.random()

    def source(self, device):
        if "batches" in self.data:
            return Batches(
                [(IMAGES[i : i + 16], LABELS[i : i + 16]) for i in range(0, 70, 16)], augment=RandomAffine(9)
            )
        return DeviceDataset(IMAGES, LABELS, device=device, **self.data)


def rates(epochs, steps=5):
    return schedules.one_cycle(0.05, epochs * steps)


TRAININGS = {
    "dropout": Case(lambda m: SGD(m, 0.05, momentum=0.9), lambda: layers(Dropout(0.4))),
    "augmentation": Case(lambda m: Adam(m, 1e-2), data={"augment": (RandomAffine(10, (1, 1)), ElasticTransform(3, 2))}),
    "EMA": Case(lambda m: EMA(Adam(m, 1e-2), 0.9)),
    "SDLM": Case(lambda m: lecun98.SDLM(m, 1e-3, patterns=20), lecun_layers),
    "schedule": Case(lambda m: SGD(m, rates(4), momentum=0.9)),
    "RMSprop": Case(lambda m: RMSprop(m, 1e-3, momentum=0.5, centered=True)),
    "plateau": Case(
        lambda m: SGD(m, 0.5), callbacks=lambda o: [ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.5)]
    ),
    "early stopping": Case(
        lambda m: Adam(m, 0.03), callbacks=lambda o: [EarlyStopping(patience=3, restore_best=True, min_delta=0.001)]
    ),
    "steps per epoch": Case(lambda m: Adam(m, 1e-2), steps_per_epoch=3),  # an epoch ends within a permutation
    "one order": Case(lambda m: Adam(m, 1e-2), reshuffle=False),
    "accumulation": Case(lambda m: Adam(m, 1e-2), accumulation_steps=2),
    "clipping and groups": Case(
        lambda m: Adam(m, 1e-2, clip_grad_norm=0.5, groups=[{"params": "*.bias", "lr_scale": 2.0}])
    ),
    "batches": Case(lambda m: Adam(m, 1e-2), data={"batches": True}),
    "MT19937": Case(lambda m: Adam(m, 1e-2), bits=np.random.MT19937),
}  # fmt: skip


def in_parts(case, file, *epochs, **options):
    """The last of several trainings with a checkpoint.  Only the first one's seed may matter."""
    for seed, count in enumerate(epochs):
        result = case.train(count, seed=seed, checkpoint=file, **options)
        assert [record["epoch"] for record in result[1]] == list(range(1, len(result[1]) + 1))
    return result


@pytest.mark.parametrize("name", TRAININGS)
def test_an_interrupted_training_gives_the_same_bits(tmp_path, name):
    assert in_parts(TRAININGS[name], tmp_path / "a.safetensors", 2, 3, 4) == TRAININGS[name].train(4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dropout", "augmentation", "EMA", "SDLM", "plateau", "steps per epoch"])
def test_an_interrupted_training_on_a_gpu(tmp_path, name):
    case = TRAININGS[name]
    assert in_parts(case, tmp_path / "a.safetensors", 1, 2, device="cuda") == case.train(2, device="cuda")


@pytest.fixture
def file(tmp_path):
    """The checkpoint of two epochs of the case "dropout"."""
    path = tmp_path / "a.safetensors"
    TRAININGS["dropout"].train(2, checkpoint=path)
    return path


def test_a_finished_training_is_not_repeated(file):
    before = TRAININGS["dropout"].train(2)
    assert in_parts(TRAININGS["dropout"], file, 2, 1) == before  # fewer epochs than there are: nothing to do


def test_a_training_that_a_callback_ended_is_not_continued(tmp_path):
    case = Case(lambda m: SGD(m, 0.0), callbacks=lambda o: [EarlyStopping("train_loss", 1, 10.0, restore_best=True)])
    result = case.train(9)
    assert len(result[1]) == 2
    assert in_parts(case, tmp_path / "a.safetensors", 9, 9, 12) == result


def test_the_checkpoint_of_an_interrupted_epoch_is_that_of_the_epoch_before(tmp_path):
    case, path = TRAININGS["augmentation"], tmp_path / "a.safetensors"

    class Stop:
        def __init__(self, batches):
            self.batches = batches

        def on_batch_end(self, record):
            self.batches -= 1
            if not self.batches:
                raise KeyboardInterrupt

    for batches in (3, 1, 7, 6, 10):  # 5 batches an epoch: in the first, its first, the second, the third, the fourth
        interrupted = Case(case.optimizer, data=case.data, callbacks=lambda o, n=batches: [Stop(n)])
        with pytest.raises(KeyboardInterrupt):
            interrupted.train(4, checkpoint=path)
    assert len(TrainingCheckpoint(path).read()["history"]) == 3
    assert case.train(4, checkpoint=path) == case.train(4)


def other(**changes):
    """The case "dropout" with changes."""
    case = TRAININGS["dropout"]
    options = {"optimizer": case.optimizer, "layers": case.layers} | changes
    return Case(options.pop("optimizer"), options.pop("layers"), **options)


DIFFERENCES = {
    "layer": (other(layers=lambda: layers(Dropout(0.5))), r"layer 6: .*0\.4.* in the checkpoint, .*0\.5.* now"),
    "no layer": (other(layers=layers), r"layer 7: .*Linear.* in the checkpoint, none now"),
    "optimizer": (other(optimizer=lambda m: Adam(m, 0.05)), r"optimizer: SGD\(momentum=0\.9\) .*, Adam\(\) now"),
    "momentum": (other(optimizer=lambda m: SGD(m, 0.05)), "momentum"),
    "learning rate": (other(optimizer=lambda m: SGD(m, 0.1, momentum=0.9)), r"step 1: 0\.05 in the .*, 0\.1 now"),
    "batch size": (other(batch_size=8), "batch_size: 16 in the checkpoint, 8 now"),
    "images": (other(data={"mean": 0.25}), r"training data: mean: .* in the checkpoint, \[0\.25\] now"),
    "augmentation": (other(data={"augment": RandomAffine(5)}), "training data: augment: none in the checkpoint"),
    "two": (other(batch_size=8, reshuffle=False), "batch_size: .*; reshuffle: true in the checkpoint, false now"),
    "callbacks": (other(callbacks=lambda o: [EarlyStopping()]), "callbacks: "),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_training_is_refused_with_every_difference(file, name):
    case, words = DIFFERENCES[name]
    before = file.read_bytes()
    with pytest.raises(ResumeError, match=words):
        case.train(4, checkpoint=file)
    assert file.read_bytes() == before


def test_force_continues_and_says_what_it_ignores(file):
    forced = TrainingCheckpoint(file, force=True)
    _, history, _ = other(batch_size=8, optimizer=lambda m: SGD(m, 0.1, momentum=0.9)).train(3, checkpoint=forced)
    assert [record["lr"] for record in history] == [0.05, 0.05, 0.1]
    first, second = forced.ignored
    assert "batch_size: 16 in the checkpoint, 8 now" in first
    assert "learning rate" in second
    wider = other(layers=lambda: layers(Linear(36, 36)))
    with pytest.raises(ResumeError, match="does not fit"):  # other shapes cannot be forced
        wider.train(3, checkpoint=TrainingCheckpoint(file, force=True))


def test_more_epochs_with_a_schedule_that_extends_the_first(tmp_path):
    def steps(epochs):
        return Case(lambda m: SGD(m, schedules.step_decay(0.1, 5 * epochs, step_size=8, gamma=0.5)))

    path = tmp_path / "a.safetensors"
    in_parts(steps(2), path, 1, 2)
    assert steps(4).train(4, checkpoint=path) == steps(4).train(4)
    path.unlink()
    Case(lambda m: SGD(m, rates(2))).train(2, checkpoint=path)
    with pytest.raises(ValueError, match="is used up"):
        Case(lambda m: SGD(m, rates(2))).train(3, checkpoint=path)
    with pytest.raises(ResumeError, match="learning rate: 10 steps were taken with another schedule"):
        Case(lambda m: SGD(m, rates(4))).train(4, checkpoint=path)


def test_other_files_are_refused(tmp_path, file):
    case = TRAININGS["dropout"]
    model = Sequential(*layers(), input_shape=(1, 9, 9))
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors must be the checkpoint of a training"):
        case.train(3, checkpoint=tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got 'a\.npz'"):
        case.train(3, checkpoint="a.npz")
    arrays, metadata = checkpoint.load(file)
    checkpoint.save(file, arrays, metadata | {"version": 2})
    with pytest.raises(ResumeError, match="expected format 1, got 2: it was written by a newer version"):
        case.train(3, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"a\.safetensors: not a usable checkpoint"):
        case.train(3, checkpoint=file)
    with pytest.raises(TypeError, match="cannot be continued within a pass"):
        Case(lambda m: SGD(m), data={"batches": True}).train(
            1, checkpoint=tmp_path / "b.safetensors", steps_per_epoch=2
        )


def test_a_version_is_a_difference(file):
    arrays, metadata = checkpoint.load(file)
    metadata["state"]["items"]["settings"]["items"]["tinycnn"] = "0.0.1"
    checkpoint.save(file, arrays, metadata)
    with pytest.raises(ResumeError, match=r"tinycnn: 0\.0\.1 in the checkpoint, \d.* now"):
        TRAININGS["dropout"].train(3, checkpoint=file)
