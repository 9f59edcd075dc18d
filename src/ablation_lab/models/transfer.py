"""Transfer learning: a ready-made backbone without its top, one vector of features, dense layers.

The backbone is any network of `keras.applications` by its name, or SqueezeNet. Its layers stand in the network's own
graph, not in a model inside the model, so that a network can be cut anywhere in it (`frozen.py`).
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from ablation_lab.backend import keras
from ablation_lab.models import squeezenet
from ablation_lab.models.layers import INPUT, RESCALE, NetworkError, features, head, reason


def hidden(model: dict[str, Any], x: Any) -> Any:
    """All layers between the preprocessed picture and the output layer."""
    function, _ = find(model["backbone"])
    if x.shape[-1] != 3:
        raise NetworkError(
            f"Expected pictures in colour: set data.color: rgb. Found: shape {_times(x)}.", ("model", "backbone")
        )
    try:
        backbone = function(include_top=False, weights=None, input_tensor=x)
    except (ValueError, TypeError) as error:
        raise NetworkError(
            f"model.backbone {model['backbone']}: Expected pictures that it can work on. "
            f"Found: shape {_times(x)}; {reason(error)}"
        ) from error
    return top(model, backbone.output)


def top(model: dict[str, Any], x: Any) -> Any:
    """The vector of features and the dense layers, on what a backbone gives."""
    return head(model, features(model, x))


def backbone_of(network: keras.Model) -> keras.Model:
    """The part of a network that comes before its features, preprocessing included."""
    return keras.Model(network.inputs, network.get_layer("features").input)


def own_layers(network: keras.Model) -> list[keras.layers.Layer]:
    """The backbone's own layers in a network, those before them left out."""
    return [layer for layer in backbone_of(network).layers if layer.name not in (INPUT, RESCALE)]


def find(name: str) -> tuple[Callable[..., keras.Model], Callable[..., np.ndarray]]:
    """The function that builds a backbone, and the one that prepares its pictures.

    Raises:
        NetworkError: for a name that is none of them; upper and lower case don't matter.
    """
    known = {
        one.lower(): function
        for one, function in [*vars(keras.applications).items(), ("SqueezeNet", squeezenet.SqueezeNet)]
        if inspect.isfunction(function)
    }
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        names = ", ".join(sorted(function.__name__ for function in known.values()))
        hint = f"Did you mean {known[near[0]].__name__}?" if near else f"Known: {names}."
        raise NetworkError(f"Expected the name of a network. Found: {name}. {hint}", ("model", "backbone"))
    function = known[name.lower()]
    return function, inspect.getmodule(function).preprocess_input  # type: ignore[union-attr]


def preprocess(name: str, x: Any) -> Any:
    """Raw pictures as a backbone's weights were trained: each channel scaled and shifted, for some in reverse order.

    What Keras' own function does to black and to each full channel tells the scale, the shift and the order.
    """
    _, function = find(name)
    if x.shape[-1] != 3:
        return x  # `hidden` says what is wrong
    probes = np.zeros((4, 1, 1, 3))
    probes[[1, 2, 3], :, :, [0, 1, 2]] = 255
    shown = np.asarray(function(probes.copy()), np.float64)[:, 0, 0]
    matrix = np.round((shown[1:] - shown[0]) / 255, 12)  # input channel × output channel
    if np.count_nonzero(np.diag(matrix)) < 3:
        x = keras.ops.flip(x, axis=-1)
        matrix = matrix[::-1]
    scale, offset = np.diag(matrix), np.round(shown[0], 12)
    if (scale == 1).all() and not offset.any():
        return x  # the backbone's first layers do it
    return keras.layers.Rescaling(scale.tolist(), offset.tolist(), name=RESCALE, dtype="float32")(x)


def _times(x: Any) -> str:
    return "×".join(map(str, x.shape[1:]))


def set_trainable(network: keras.Model, model: dict[str, Any]) -> None:
    """Freeze the layers of a network's backbone, all but those that `model.trainable` names.

    A frozen layer is in inference mode: batch normalisation sees to that itself, dropout (EfficientNet has some between
    its blocks) gets a rate of 0.
    """
    layers = own_layers(network)
    total = len(layers) + 1  # Keras counts the input layer, as number 0
    wanted = model["trainable"]
    if wanted in ("none", "all"):
        first = total if wanted == "none" else 0
    else:
        key, value = next((key, value) for key, value in wanted.items() if value is not None)
        most = total if key == "last" else total - 1
        if value > most:
            raise NetworkError(
                f"Expected at most {most}, as {model['backbone']} has {total} layers. Found: {value}.",
                ("model", "trainable", key),
            )
        first = total - value if key == "last" else value
    for number, layer in enumerate(layers, start=1):
        layer.trainable = number >= first
        for one in layer._flatten_layers():
            _regularize(one, model["l2"] if layer.trainable else 0)
        if isinstance(layer, keras.layers.Dropout):
            # Networks of several variants may share the layer, so its own rate is remembered.
            layer.own_rate = getattr(layer, "own_rate", layer.rate)
            layer.rate = layer.own_rate if layer.trainable else 0.0


def _regularize(layer: keras.layers.Layer, l2: float) -> None:
    """Give the kernels of a layer, which Keras' applications build without, an L2 penalty, or take it away again.

    A layer's own setting is what is saved and copied, that of its weights what is trained.
    """
    regularizer = keras.regularizers.L2(l2) if l2 else None
    for prefix in ("kernel", "depthwise", "pointwise"):
        if hasattr(layer, f"{prefix}_regularizer"):
            setattr(layer, f"{prefix}_regularizer", regularizer)
            # The only kernel of a depthwise convolution is called `kernel`.
            weight = getattr(layer, f"{prefix}_kernel", None)
            (layer.kernel if weight is None else weight).regularizer = regularizer
