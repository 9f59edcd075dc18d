"""Networks: one file a builder, found by its name in `model.builder`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_lab import cell
from ablation_lab.backend import keras
from ablation_lab.models import cnn, custom, mlp, resnet
from ablation_lab.models.layers import NetworkError, apply, kernel

__all__ = ["BUILDERS", "NetworkError", "build", "load"]

BUILDERS = {"cnn": cnn.hidden, "mlp": mlp.hidden, "resnet": resnet.hidden}

RESCALE = {"unit": (1 / 255, 0.0), "symmetric": (1 / 127.5, -1.0)}


def build(model: dict[str, Any], rescale: str, image_shape: Sequence[int | None], classes: int) -> keras.Model:
    """Build a network that takes raw pictures and gives class probabilities.

    Args:
        model: the resolved `model` section of a plan (`params.Network.resolved`).
        rescale: `unit`, `symmetric` or `none`; done by the network's first layer, so that whoever serves the model
            can't forget it.
        image_shape: height, width, channels of the pictures, values 0 to 255. With `any_size` in `model`, height and
            width are left open.
        classes: number of classes, the width of the softmax at the end.

    Raises:
        NetworkError: where a layer does not fit what it is given; the message names the layer.
    """
    if model.get("any_size"):
        image_shape = (None, None, image_shape[2])
    inputs = keras.Input(image_shape, name="image")
    x = inputs
    if rescale in RESCALE:
        scale, offset = RESCALE[rescale]
        x = apply(keras.layers.Rescaling(scale, offset, name="rescale"), x)
    if ":" in model["builder"]:
        outputs = apply(custom.network(model, image_shape, classes), x)
        return keras.Model(inputs, outputs, name="custom")
    x = BUILDERS[model["builder"]](model, x)
    weights = kernel(model | {"l2": model["head_l2"]})
    outputs = apply(keras.layers.Dense(classes, activation="softmax", name="probabilities", **weights), x)
    try:
        return keras.Model(inputs, outputs, name=model["builder"])
    except ValueError as error:  # two layers of one name
        raise NetworkError(f"Expected a name of its own for each block and head layer. Found: {error}") from None


def load(folder: Path, builder: str) -> keras.Model:
    """The network of a finished cell, with its weights; `builder` is the one that its plan names."""
    if ":" in builder:
        custom.find(builder)  # its module makes layers of the user's known to Keras
    network = keras.models.model_from_json((folder / cell.ARCHITECTURE).read_text(encoding="utf-8"))
    network.load_weights(folder / cell.WEIGHTS)
    return network
