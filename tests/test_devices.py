"""What a cell is computed on, and how: several devices, precision, XLA, data on the device."""

import copy
import json
from pathlib import Path

import h5py
import numpy as np
import one_thread  # noqa: F401
import pytest
from conftest import ROOT, TINY, passed, run
from test_training import STEADY, VARIED, plan_of, train
from test_training import data as pictures  # noqa: F401

from ablation_lab import (
    backend,
    cell,
    checkpoint,
    feeding,
    gpu,
    models,
    optimization,
    params,
    pipeline,
    plan,
    preprocess,
    training,
)
from ablation_lab.backend import keras, tf
from ablation_lab.datasets import digits
from ablation_lab.errors import LabError
from ablation_lab.tracking import ablab_network, served

HALVES = ("mixed_float16", "mixed_bfloat16")


@pytest.fixture(scope="module")
def data(pictures, tmp_path_factory) -> Path:  # noqa: F811
    """The tiny study's pictures, an odd number of them to train with: two devices can't share the last batch evenly."""
    folder = tmp_path_factory.mktemp("odd") / "processed"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    np.save(folder / "train.npy", np.load(folder / "train.npy")[:-1])
    return folder


# Nothing is drawn at random; all that is about a batch is there.
EVEN = {
    "model": {"dropout": 0, "normalization": "batch", "l2": 0.01},
    "train": {
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "global_clipnorm": 0.5},
        "class_weights": {"3": 5.0},
        "batch_size": 32,
    },
}
# Each device draws its own numbers, and all that a training remembers is there.
DRAWN = {
    "input": {"augment": {"RandomFlip": {}}},
    "model": {"dropout": 0.5},
    "train": {"epochs": 2, "reduce_lr": {"patience": 0, "min_delta": 9}, "keep": "last", "batch_size": 40},
}
# A process may have several devices when it starts with them, and no later.
MIRRORED = """
import json, sys
from pathlib import Path
from ablation_lab import backend, checkpoint, distribution, training
from ablation_lab.backend import keras

checkpoint.ALLOWED = float("inf")
data, out = Path(sys.argv[2]), Path(sys.argv[3])
for name, (plan, state, end_after) in json.loads(sys.argv[1]).items():
    def report(row):
        if row["epoch"] == end_after:
            raise KeyboardInterrupt
    (out / name).mkdir()
    try:
        training.train(plan, 0, data, out / name, "test-0", report, state=state and out / state)
    except KeyboardInterrupt:
        pass
network = distribution.mirrored(keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5)]), 2)
backend.set_generator_states(network, 0, 0)
drawn = [state.value for state in network.variables]
print(json.dumps([[int(own[0]) for own in state.values] for state in drawn]))
"""


def mirrored(data: Path, out: Path, cells: dict, **more) -> list:
    """Train cells on two devices in one process: name → settings, and where to keep and end them."""
    plans = {}
    for name, (sections, *how) in cells.items():
        plan = plan_of(**sections | {"train": sections["train"] | {"strategy": "mirrored"}})
        plans[name] = [plan | more, *how]
    return json.loads(passed(run(ROOT, "python", "-c", MIRRORED, json.dumps(plans), str(data), str(out))))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Cells trained on two devices, and the states of a generator on each."""
    out = tmp_path_factory.mktemp("two")
    cells = {"even": (EVEN, None, 0), "whole": (DRAWN, None, 0)}
    cells |= {"killed": (DRAWN, "state", 1), "resumed": (DRAWN, "state", 0)}
    return out, mirrored(data, out, cells)


def test_one_device_and_two_compute_the_same(data, two, tmp_path):
    train(data, tmp_path, **EVEN)
    found = [np.load(folder / cell.PREDICTIONS)["test_probabilities"] for folder in (tmp_path, two[0] / "even")]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
    kept = [weights(folder) for folder in (tmp_path, two[0] / "even")]
    for name, values in kept[0].items():
        np.testing.assert_allclose(kept[1][name], values, rtol=1e-3, atol=1e-5, err_msg=name)


def weights(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(folder / cell.WEIGHTS) as file:
        file["layers"].visititems(lambda name, one: found.update({name: one[()]} if hasattr(one, "shape") else {}))
    return found


def test_a_training_on_two_devices_that_was_killed_ends_with_the_same_bytes(two):
    folder, _ = two
    assert not (folder / "killed" / cell.WEIGHTS).exists()
    for file in STEADY:
        assert (folder / "resumed" / file).read_bytes() == (folder / "whole" / file).read_bytes(), file


def test_what_two_devices_have_trained_is_a_network_like_any_other(data, two):
    folder, _ = two
    chosen = np.load(data / "images.npy")[np.load(data / "test.npy")]
    found = models.load(folder / "whole", "cnn").predict(chosen, verbose=0)
    np.testing.assert_allclose(found, np.load(folder / "whole" / cell.PREDICTIONS)["test_probabilities"], rtol=1e-5)
    assert json.loads((folder / "whole" / cell.TIMING).read_text())["device"] == "2 × CPU"


def test_each_device_draws_its_own_numbers(two):
    _, states = two
    assert states and all(len(set(own)) == 2 for own in states)


@pytest.mark.slow  # half a minute: what two devices do with most of the settings at once
def test_everything_on_two_devices_resumes_to_the_same_bytes(data, tmp_path):
    everything = {
        "input": VARIED["augmented"]["input"],
        "model": VARIED["normalised"]["model"],
        "train": {
            "epochs": 3,
            "precision": "mixed_float16",
            "class_weights": "balanced",
            "early_stopping": {"patience": 2},
            "reduce_lr": {"patience": 0},
            "optimizer": {"name": "adam", "use_ema": True, "clipnorm": 1.0},
        },
    }
    mirrored(data, tmp_path, {"whole": (everything, None, 0), "killed": (everything, "state", 1)})
    mirrored(data, tmp_path, {"resumed": (everything, "state", 0)})
    for file in STEADY:
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.parametrize(("number", "replicas"), [(8, 2), (7, 2), (1, 2), (2, 3), (5, 4), (4, 8)])
def test_the_mean_over_devices_is_the_mean_over_the_batch(number, replicas):
    losses = np.random.default_rng(0).random(number)
    shares = pipeline.shares(number, replicas)
    assert len(shares) == replicas and all(len(places) for places, _ in shares)
    assert {place for places, _ in shares for place in places} == set(range(number))
    mean = sum((weights * losses[places]).mean() for places, weights in shares) / replicas
    assert mean == pytest.approx(losses.mean())


def test_fewer_gpus_than_replicas_are_told(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"] if kind == "GPU" else ["CPU:0"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(LabError) as caught:
        backend.set_up(1, 2)
    told = "train.replicas: Expected at most 1, a GPU for each (CUDA_VISIBLE_DEVICES is 3). Found: 2."
    assert str(caught.value) == told


def test_a_process_that_runs_already_gets_no_more_devices():
    with pytest.raises(LabError, match=r"as many devices as this process has begun with\. Found: 64\."):
        backend.set_up(1, 64)


@pytest.mark.parametrize("precision", HALVES)
def test_mixed_precision_computes_in_halves_and_gives_float32(data, tmp_path, precision):
    network, result, rows = train(data, tmp_path, train={"precision": precision}, **VARIED["augmented"])
    assert keras.config.dtype_policy().name == "float32"
    policies = {layer.name: layer.dtype_policy.name for layer in network.layers}
    assert policies["block1_conv1"] == policies["dense1"] == precision
    assert policies["probabilities"] == policies["rescale"] == "float32"
    assert all(variable.dtype == "float32" for variable in network.weights)
    assert result["status"] == "ok" and all(np.isfinite(row["loss"]) for row in rows)

    chosen = np.load(data / "images.npy")[np.load(data / "test.npy")]
    kept = np.load(tmp_path / cell.PREDICTIONS)["test_probabilities"]
    assert kept.dtype == np.float32
    # In batches of the same size: on processors without units for bfloat16 the last bits depend on it.
    np.testing.assert_array_equal(kept, network.predict(chosen, training.PREDICTION_BATCH, verbose=0))
    # As MLflow serves it, where nobody knows of any precision.
    served.pack(tmp_path, tmp_path / "model.keras")
    answered = ablab_network._load_pyfunc(tmp_path / "model.keras").predict(chosen)
    assert answered.dtype == np.float32
    np.testing.assert_array_equal(network.predict(chosen, verbose=0), answered)
    assert keras.config.dtype_policy().name == "float32"


def test_a_scaled_loss_goes_on_where_it_was(data, tmp_path, monkeypatch):
    class Growing(keras.optimizers.LossScaleOptimizer):  # every three steps, not every 2,000
        def __init__(self, optimizer):
            super().__init__(optimizer, initial_scale=8.0, dynamic_growth_steps=3)

    def end(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(keras.optimizers, "LossScaleOptimizer", Growing)
    monkeypatch.setattr(checkpoint, "ALLOWED", float("inf"))
    plan = plan_of(train={"precision": "mixed_float16", "epochs": 3, "keep": "last"})
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    training.train(plan, 0, data, tmp_path / "whole", "test-0", lambda row: None)
    for report in (end, lambda row: None):
        try:
            training.train(plan, 0, data, tmp_path / "out", "test-0", report, state=tmp_path / "state")
        except KeyboardInterrupt:
            (state,) = list((tmp_path / "state").glob("000002-*.npz"))
            with np.load(state) as content:  # after 8 steps
                assert content["optimizer2"] == 2 and content["optimizer3"] == 8 * 2**2
    for file in STEADY:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "logits"])
def test_outputs_are_float32_in_any_precision(output):
    for precision in HALVES:
        model = params.Mlp(builder="mlp", head={"dense1": {"units": 4}}, output=output).resolved()
        with backend.precision(precision):
            network = models.build(model, "unit", (4, 4, 1), 2)
        assert network.get_layer("dense1").compute_dtype == precision.removeprefix("mixed_")
        assert network.output.dtype == models.trained(network, model).output.dtype == "float32"


def test_a_network_of_ones_own_ends_in_float32(tmp_path, monkeypatch):
    (tmp_path / "unseen.py").write_text("""
import keras

@keras.saving.register_keras_serializable("unseen")
class Unseen(keras.Model):
    def __init__(self, classes, **settings):
        super().__init__(**settings)
        self.flatten, self.last = keras.layers.Flatten(), keras.layers.Dense(classes, activation="softmax")

    def call(self, pictures):
        return self.last(self.flatten(pictures))

def build(image_shape, classes):
    return Unseen(classes)
""")
    monkeypatch.syspath_prepend(tmp_path)
    for builder in ("networks.example:build", "unseen:build"):
        with backend.precision("mixed_float16"):
            network = models.build({"builder": builder}, "unit", (8, 8, 1), 3)
        assert network.predict(np.zeros((2, 8, 8, 1)), verbose=0).dtype == np.float32
    with backend.precision("mixed_float16"):
        example = models.build({"builder": "networks.example:build"}, "unit", (8, 8, 1), 3)
    inner = example.layers[-1]
    computed = {layer.name: layer.compute_dtype for layer in inner.layers}
    assert computed["probabilities"] == "float32" and computed["branch3"] == "float16"


def study_of(**variants) -> params.Params:
    study = copy.deepcopy(TINY)
    study["variants"] |= variants
    return params.validate(study)


def test_a_plan_builds_networks_in_their_precision():
    study = copy.deepcopy(TINY) | {"model": {"builder": "transfer", "backbone": "SqueezeNet"}}
    study["variants"] = {"baseline": {}, "half": {"train": {"precision": "mixed_float16"}}}
    facts = plan.describe(params.validate(study), (32, 32, 3), 10)
    assert facts["baseline"]["frozen"]["id"] != facts["half"]["frozen"]["id"]
    assert facts["baseline"]["parameters"] == facts["half"]["parameters"]
    own = study_of(own={"model": VARIED["own"]["model"], "train": {"precision": "mixed_bfloat16"}})
    assert plan.describe(own, (8, 8, 1), 10)["own"]["parameters"]
    assert keras.config.dtype_policy().name == "float32"


def test_what_xla_cannot_do_stops_the_plan():
    with pytest.raises(LabError) as caught:
        plan.describe(study_of(fast={"train": {"xla": True}}), (8, 8, 1), 10)
    told = "variants.fast: train.xla: Expected auto or false, as XLA has no deterministic gradient of block1_pool"
    assert told in str(caught.value)
    average = study_of(fast={"train": {"xla": True}, "model": {"blocks": {"block1": {"pool_type": "average"}}}})
    assert plan.describe(average, (8, 8, 1), 10)


def test_what_xla_cannot_do_is_told_by_its_setting():
    @tf.function(jit_compile=True)
    def pooled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.max_pool2d(x, 2, 2, "VALID")
        return tape.gradient(y, x)

    told = r"train.xla: Expected auto or false.*deterministic XLA implementation"
    with pytest.raises(LabError, match=told), backend.xla_explained(True):
        pooled(tf.zeros((1, 2, 2, 1)))
    with pytest.raises(tf.errors.UnimplementedError), backend.xla_explained("auto"):
        pooled(tf.zeros((1, 2, 2, 1)))


@pytest.mark.slow  # half a minute: XLA compiles
def test_a_training_with_xla_is_the_same_bytes_twice(data, tmp_path):
    settings = {"train": {"xla": True}, "model": {"blocks": {"block1": {"pool_type": "average"}}}}
    for name, where in (("first", "host"), ("again", "host"), ("device", "device")):
        train(data, tmp_path / name, **settings | {"train": {"xla": True, "data_on": where}})
        for file in STEADY:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["plain", "augmented", pytest.param("sparse", marks=pytest.mark.slow)])
def test_data_on_the_device_are_the_same_bytes(data, tmp_path, name):
    for where in ("host", "device"):
        settings = VARIED[name] | {"train": VARIED[name].get("train", {}) | {"data_on": where}}
        train(data, tmp_path / where, **settings)
    for file in STEADY:
        assert (tmp_path / "device" / file).read_bytes() == (tmp_path / "host" / file).read_bytes(), file


@pytest.mark.slow  # a minute: six trainings of a backbone's last layers
def test_the_rest_of_a_frozen_prefix_trains_in_all_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # where features are kept
    study = copy.deepcopy(TINY)
    study["data"] |= {"color": "rgb", "image_size": [32, 32]}
    settings = params.validate(study).data
    digits.download(settings, tmp_path / "raw")
    preprocess.preprocess(settings, tmp_path / "raw", tmp_path / "data")
    model = {"builder": "transfer", "backbone": "SqueezeNet", "trainable": {"from_layer": 58}}  # two tensors are cut
    gone = dict.fromkeys(("dropout", "blocks", "head"))
    steady = {"optimizer": {"name": "sgd", "learning_rate": 0.001}}
    found = {}
    for name, how in {
        "host": {},
        "device": {"data_on": "device"},
        "half": {"precision": "mixed_float16"},
        "half again": {"precision": "mixed_float16", "data_on": "device"},
    }.items():
        (tmp_path / name).mkdir()
        plan = plan_of(model=model | gone, train=steady | how) | {"frozen_once": True}
        training.train(plan, 0, tmp_path / "data", tmp_path / name, "test-0", lambda row: None)
        found[name] = [(tmp_path / name / file).read_bytes() for file in STEADY]
    assert found["host"] == found["device"] and found["half"] == found["half again"]
    whole = {"model": model | gone, "train": steady}
    mirrored(tmp_path / "data", tmp_path, {"two": (whole, None, 0)}, frozen_once=True)
    predicted = [np.load(tmp_path / name / cell.PREDICTIONS)["test_probabilities"] for name in ("two", "host")]
    np.testing.assert_allclose(*predicted, rtol=1e-4)


def test_several_features_on_the_device():
    first, second = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(8, dtype=np.uint8).reshape(4, 2)
    inputs = [keras.Input((3,)), keras.Input((2,))]
    network = keras.Model(inputs, keras.layers.Concatenate()(inputs))
    fed = feeding.before(network, {}, feeding.Stored([first, second]))
    assert fed.weights == []
    np.testing.assert_array_equal(fed.predict(np.array([2, 0]), verbose=0), [[6, 7, 8, 4, 5], [0, 1, 2, 0, 1]])


def test_data_go_to_a_gpu_with_room_for_them(monkeypatch):
    arrays = [np.zeros((10, 10), np.uint8)]
    assert feeding.stored(arrays, "auto") is None
    assert feeding.stored(arrays, "host") is None
    assert feeding.stored(arrays, "device")
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    for free, there in ((100 * feeding.SHARE, True), (100 * feeding.SHARE - 1, False)):
        monkeypatch.setattr(gpu, "free_memory", lambda free=free: free)
        assert (feeding.stored(arrays, "auto") is not None) == there


def test_what_nvidia_smi_tells(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 80000\necho 512\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.free_memory() == 512 * 2**20
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu.free_memory() == 0


def test_the_optimizer_of_several_devices_is_keras_own():
    for precision, kind in (("float32", optimization.Adam), ("mixed_float16", keras.optimizers.LossScaleOptimizer)):
        found = optimization.optimizer({"name": "adam", "learning_rate": 0.5}, precision, distributed=True)
        assert isinstance(found, kind) and isinstance(found, optimization.Summing)
        assert float(found.learning_rate) == 0.5
