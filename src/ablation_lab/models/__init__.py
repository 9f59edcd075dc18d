"""Networks: one file a builder, found by its name in `model.builder`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_lab import cell, files
from ablation_lab.backend import keras
from ablation_lab.models import cnn, custom, mlp, resnet, transfer
from ablation_lab.models.layers import INPUT, RESCALE, NetworkError, apply, kernel, reason

__all__ = ["BUILDERS", "NetworkError", "build", "load", "output", "trained"]

BUILDERS = {"cnn": cnn.hidden, "mlp": mlp.hidden, "resnet": resnet.hidden, "transfer": transfer.hidden}

# The layer whose output is trained, by `model.output`.
TRAINED = {"softmax": "probabilities", "sigmoid": "probability", "logits": "logits"}

# Scale and offset of 0 to 255, by `input.rescale`.
SCALES = {"unit": (1 / 255, 0.0), "symmetric": (1 / 127.5, -1.0)}


def build(
    model: dict[str, Any],
    rescale: str,
    image_shape: Sequence[int | None],
    classes: int,
    backbone: keras.Model | None = None,
) -> keras.Model:
    """Build a network that takes raw pictures and gives class probabilities.

    Args:
        model: the resolved `model` section of a plan (`params.Network.resolved`).
        rescale: `unit`, `symmetric`, `backbone` or `none`; done by the network's first layers, so that whoever serves
            the model can't forget it.
        image_shape: height, width, channels of the pictures, values 0 to 255. With `any_size` in `model`, height and
            width are left open.
        classes: number of classes, the width of what the network gives. With a sigmoid as output, which two classes
            can have, the second one's probability is trained and the first one's is the rest.
        backbone: of another network that begins with the same (`transfer.backbone_of`), whose layers are shared.

    Raises:
        NetworkError: where a layer does not fit what it is given; the message names the layer.
    """
    if backbone is not None:
        inputs = backbone.inputs[0]
        return _network(inputs, transfer.top(model, backbone.output), model, classes)
    if model.get("any_size"):
        image_shape = (None, None, image_shape[2])
    inputs = keras.Input(image_shape, name=INPUT)
    x = inputs
    if rescale in SCALES:
        scale, offset = SCALES[rescale]
        x = apply(keras.layers.Rescaling(scale, offset, name=RESCALE, dtype="float32"), x)
    elif rescale == "backbone":
        x = transfer.preprocess(model["backbone"], x)
    if ":" in model["builder"]:
        outputs = apply(custom.network(model, image_shape, classes), x)
        if outputs.dtype != "float32":  # of a model whose last layer isn't to be seen from here
            outputs = keras.ops.cast(outputs, "float32")
        return keras.Model(inputs, outputs, name="custom")
    return _network(inputs, BUILDERS[model["builder"]](model, x), model, classes)


def _network(inputs: Any, x: Any, model: dict[str, Any], classes: int) -> keras.Model:
    # What is given, as what was put in, is float32 in any precision: a loss or a mean of halves loses digits.
    weights = kernel(model | {"l2": model["head_l2"]}) | {"dtype": "float32"}
    match model["output"]:
        case "sigmoid":
            if classes != 2:
                raise NetworkError(
                    f"Expected softmax or logits for {classes} classes, with categorical_crossentropy as train.loss. "
                    "Found: sigmoid.",
                    ("model", "output"),
                )
            x = apply(keras.layers.Dense(1, activation="sigmoid", name=TRAINED["sigmoid"], **weights), x)
            outputs = keras.ops.concatenate([1 - x, x], axis=-1)
        case "logits":
            x = apply(keras.layers.Dense(classes, name=TRAINED["logits"], **weights), x)
            outputs = keras.layers.Softmax(name="probabilities", dtype="float32")(x)
        case _:
            outputs = apply(keras.layers.Dense(classes, activation="softmax", name=TRAINED["softmax"], **weights), x)
    try:
        network = keras.Model(inputs, outputs, name=model["builder"])
    except ValueError as error:  # two layers of one name
        raise NetworkError(f"Expected a name of its own for each block and head layer. Found: {error}") from None
    if model["builder"] == "transfer":
        transfer.set_trainable(network, model)
    return network


def output(model: dict[str, Any]) -> str:
    """What a network's loss is given: `softmax`, `sigmoid` or `logits`. A network of the user's gives probabilities."""
    return "softmax" if ":" in model["builder"] else model["output"]


def trained(network: keras.Model, model: dict[str, Any]) -> keras.Model:
    """The network up to what the loss is given, where that isn't the probabilities; the layers are shared."""
    kind = output(model)
    return network if kind == "softmax" else keras.Model(network.inputs, network.get_layer(TRAINED[kind]).output)


def load(folder: Path, builder: str) -> keras.Model:
    """The network of a finished cell, with its weights; `builder` is the one that its plan names.

    Raises:
        NetworkError: when Keras can't read them, or would have to run code that they hold.
    """
    if ":" in builder:
        custom.find(builder)  # its module makes layers of the user's known to Keras
    path = folder / cell.ARCHITECTURE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        network = keras.saving.deserialize_keras_object(described, safe_mode=True)
        path = folder / cell.WEIGHTS
        network.load_weights(path)
    except FileNotFoundError:
        raise files.missing(path) from None
    except Exception as error:  # Keras tells in many ways that a file isn't what it has written
        raise NetworkError(
            f"{path}: Expected what Keras has written, without code in it. Found: {reason(error)} "
            "Delete its folder; `dvc repro` brings it back, from DVC's cache or trained anew."
        ) from error
    return network
