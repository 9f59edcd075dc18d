"""One compiled training step of each kind of network, so that the plan refuses what Keras refuses only in training.

How wide a layer is and how often a block is repeated decide nothing about that. So a step takes a network with narrow
layers, and a network whose kinds of layers have all been trained in earlier steps takes none.
"""

import hashlib
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ablation_lab import backend, models, optimization, params
from ablation_lab.backend import keras, tf
from ablation_lab.errors import LabError
from ablation_lab.models import custom, transfer, weights
from ablation_lab.models.layers import INPUT, reason

# Filters and units of each layer in a step, and most repetitions of a block. oneDNN of TensorFlow 2.21 writes beside
# its arrays in some convolutions of four channels, which ends the process.
WIDTH, REPEATS = 16, 2
REPEATED = ("convolutions", "blocks")
IMAGES = 2  # of a step's batch
# A step of more than that takes seconds or a gigabyte of memory. Weights of a file are loaded once, without a gradient.
MOST_WEIGHTS, MOST_VALUES, MOST_LAYERS = 10**7, 10**7, 300
MOST_LOADED = 2 * 10**8
# What decides beside the settings whether a step passes.
CODE = ("backend.py", "models/*.py", "optimization.py", "trial.py")


def parts(resolved: dict[str, Any], network: keras.Model, image_shape: tuple[int, ...], classes: int) -> set[str]:
    """What decides whether a network can be trained: the kinds of its layers, its loss, optimizer and precision.

    Args:
        resolved: a variant's `resolved()`, with `code` of a network of the user's and `weights` of a backbone.
        network: as planned; a ready-made backbone's own layers are known to be trainable, and left out.
    """
    model, train = resolved["model"], resolved["train"]
    rate = train["optimizer"]["learning_rate"]
    found = [
        ["loss", train["loss"], bool(train["label_smoothing"]), models.output(model)],
        ["optimizer", sorted(train["optimizer"]), train["optimizer"]["name"], isinstance(rate, dict) and rate["name"]],
    ]
    if ":" in model["builder"]:
        found.append(["own", model, resolved.get("code"), resolved["input"]["rescale"], list(image_shape), classes])
    else:
        ready = {one.name for one in transfer.own_layers(network)} if model["builder"] == "transfer" else set()
        layers = [one for one in network.layers if one.name not in ready]
        found += [[type(one).__name__, _kind(one.get_config()), len(one.output.shape)] for one in layers]
    if (ready_weights := resolved.get("weights")) and ready_weights["url"] is None:
        found.append(["weights", model["backbone"].lower(), ready_weights])
    return {params.canonical_json([train["xla"], train["precision"], one]) for one in found}


def _kind(value: Any) -> Any:
    """A layer's configuration without its name and its numbers."""
    if isinstance(value, dict):
        return {key: _kind(inside) for key, inside in value.items() if key != "name"}
    if isinstance(value, list | tuple):
        return [_kind(inside) for inside in value]
    return value if isinstance(value, str | bool) else None


def digest(parts: set[str]) -> str:
    """The sha256 of a network's `parts` and of what a step runs on."""
    return params.digest(params.canonical_json([sorted(parts), _code(), tf.__version__, keras.__version__]))


@cache
def _code() -> str:
    here = Path(__file__).parent
    paths = sorted(path for pattern in CODE for path in here.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def run(resolved: dict[str, Any], network: keras.Model, image_shape: tuple[int, ...], classes: int) -> bool:
    """Train one step on random images: forward, loss, gradients, the optimizer's update, compiled as `train` says.

    Args:
        resolved, network, image_shape, classes: as of `parts`; a network of the user's has its weights.

    Returns:
        False where a step would take long, or much memory: then nothing has been tried.

    Raises:
        LabError: for what can't be trained, and for a file of weights that isn't the backbone's.
    """
    model, train = resolved["model"], resolved["train"]
    own = ":" in model["builder"]
    tf.config.experimental.enable_op_determinism()  # as `train` does: some operations then refuse
    keras.utils.set_random_seed(0)
    with backend.precision(train["precision"]):
        if (ready := resolved.get("weights")) and ready["url"] is None:
            if network.count_params() > MOST_LOADED:
                return False
            _load(resolved, ready, image_shape, classes)
        if not own:
            build = _narrow(resolved, network, image_shape, classes)
            with keras.StatelessScope(initialize_variables=False):
                network = build()  # without memory for its weights, to see how large it is
            keras.utils.clear_session(free_memory=False)
        values = sum(math.prod(size or 1 for size in tensor.shape[1:]) for tensor in _outputs(network))
        if network.count_params() > MOST_WEIGHTS or values > MOST_VALUES or len(network.layers) > MOST_LAYERS:
            return False
        network = network if own else build()
        try:
            with backend.xla_explained(train["xla"]):
                _step(models.trained(network, model), train, models.output(model), image_shape, classes)
        except (LabError, MemoryError, tf.errors.ResourceExhaustedError):
            raise
        except Exception as error:
            if own:
                raise custom.untrainable(model["builder"], error) from error
            found = f"{type(error).__name__}: {reason(error)}"
            raise LabError(f"Expected a network that can be trained. Found: {found}", ("model",)) from error
    return True


def _outputs(network: keras.Model) -> list[Any]:
    return [tensor for layer in network.layers for tensor in keras.tree.flatten(getattr(layer, "output", []))]


def _narrow(
    resolved: dict[str, Any], network: keras.Model, image_shape: tuple[int, ...], classes: int
) -> Callable[[], keras.Model]:
    """What builds a network with narrow layers; on a ready-made backbone's features, in place of the backbone."""
    model = _narrowed(resolved["model"]) | {"any_size": False}
    if model["builder"] != "transfer":
        return partial(models.build, model, resolved["input"]["rescale"], image_shape, classes)
    features = network.get_layer("features").input

    def build() -> keras.Model:
        inputs = keras.Input(features.shape[1:], name=INPUT)
        given = keras.Model(inputs, inputs)
        return models.build(model | {"trainable": "none"}, "none", image_shape, classes, given)

    return build


def _narrowed(value: Any) -> Any:
    """A resolved `model` with few filters and units, and few repetitions."""
    if isinstance(value, list):
        return [_narrowed(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: _narrowed(inside) for key, inside in value.items()}
    found |= {key: WIDTH for key in ("filters", "units") if isinstance(value.get(key), int)}
    return found | {key: min(value[key], REPEATS) for key in REPEATED if isinstance(value.get(key), int)}


def _load(resolved: dict[str, Any], ready: weights.Wanted, image_shape: tuple[int, ...], classes: int) -> None:
    """Fill a backbone from a file of the user's."""
    model = resolved["model"] | {"head": [], "head_from": "global_average", "trainable": "none", "any_size": False}
    network = models.build(model, resolved["input"]["rescale"], image_shape, classes)
    weights.load(network, model, weights.locate(model, ready))


def _step(network: keras.Model, train: dict[str, Any], output: str, image_shape: tuple[int, ...], classes: int) -> None:
    """Keras' own `train_on_batch` does the same and takes three times as long to be compiled, for its metrics."""
    variables = network.trainable_variables
    if not variables:
        return  # Keras trains such a network without a word
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, *(network.input_shape[1:] or image_shape)), dtype=np.uint8)
    numbers = np.arange(IMAGES, dtype=np.int32) % classes
    given = {"number": numbers, "one_hot": np.eye(classes, dtype=np.float32)[numbers], "second": numbers[:, None]}
    labels = given[optimization.label_form(train, output)]
    optimizer = optimization.optimizer(train["optimizer"], train["precision"])
    loss = optimization.loss(train, output)
    optimizer.build(variables)

    @tf.function(autograph=False, jit_compile=train["xla"] is True)
    def step(images: Any, labels: Any) -> None:
        with tf.GradientTape() as tape:
            value = optimizer.scale_loss(loss(labels, network(images, training=True)) + sum(network.losses, 0.0))
        optimizer.apply(tape.gradient(value, variables), variables)

    step(images, labels)
