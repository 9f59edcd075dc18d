"""What the builders share: applying a layer with a message that names it, and the dense layers of a head."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from keras.src.initializers.random_initializers import RandomInitializer

from ablation_lab.backend import keras, tf
from ablation_lab.errors import LabError

# Names of what every network begins with: the raw picture, and what scales it.
INPUT, RESCALE = "image", "rescale"
LONGEST_REASON = 300


class NetworkError(LabError):
    """A network that can't be built; the message names the layer."""


def apply(layer: keras.layers.Layer, x: Any) -> Any:
    """Apply a layer; a shape that does not fit, or that collapses to nothing, names the layer."""
    try:
        y = layer(x)
    except (ValueError, TypeError) as error:
        raise NetworkError(_does_not_fit(layer, x, reason(error))) from error
    if any(size is not None and size < 1 for size in y.shape[1:]):
        raise NetworkError(_does_not_fit(layer, x, f"its output would have the shape {y.shape[1:]}"))
    return y


def reason(error: BaseException) -> str:
    """The first line of what Keras says, without colours and not too long."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines()]
    told = next((line for line in lines if line and not line.startswith("Exception encountered")), type(error).__name__)
    return told if len(told) <= LONGEST_REASON else told[: LONGEST_REASON - 3] + "..."


def _does_not_fit(layer: keras.layers.Layer, x: Any, why: str) -> str:
    return (
        f"layer {layer.name} ({type(layer).__name__}) does not fit: Expected an input that it can work on. "
        f"Found: shape {'×'.join(map(str, x.shape[1:]))}; {why.rstrip('.')}. "
        "Use smaller kernels, strides or pools, padding: same, fewer blocks, or larger pictures."
    )


def initializer(name: str) -> str:
    """Check a Keras initializer's name."""
    fit = "fills a kernel without arguments"
    return _known(name, _initializer, keras.initializers, ("model", "initializer"), "a Keras initializer", fit)


def activation(name: str, place: tuple[str, ...] = ("model", "activation")) -> str:
    """Check a Keras activation's name; `place` is the setting's in the study."""
    fit = "keeps the shape and needs no arguments"
    return _known(name, _activation, keras.activations, place, "a Keras activation", fit)


def _known(name: str, check: Callable[[str], None], module: Any, place: tuple[str, ...], kind: str, fit: str) -> str:
    try:
        check(name)
    except UNFIT:
        functions = [one for one in dir(module) if one[0].islower() and one not in OTHERS]
        expected = f"{kind} that {fit}" if hasattr(module, name) else kind
        raise NetworkError(f"Expected {expected}. Found: {name}.{nearest(name, functions, check)}", place) from None
    return name


# What Keras raises for a name that it doesn't have, and for one that needs arguments.
UNFIT = (ValueError, TypeError, KeyError, NotImplementedError, tf.errors.InvalidArgumentError)
OTHERS = {"deserialize", "serialize", "get"}


def _initializer(name: str) -> None:
    found = keras.initializers.get(name)
    if not isinstance(found, RandomInitializer):  # those fill any shape, and a draw would change what follows
        found((2, 2))


def _activation(name: str) -> None:
    if keras.activations.get(name)(keras.ops.ones((1, 2))).shape != (1, 2):
        raise ValueError(f"{name} changes the shape")


def nearest(name: str, among: Iterable[str], check: Callable[[str], Any]) -> str:
    """What a message says after a name that isn't valid: the valid name that is most like it, or all of them.

    Args:
        among: names, of which some may be refused as well.
        check: raises for a name that is refused.
    """
    valid = [one for one in among if _passes(one, check)]
    near = difflib.get_close_matches(name.lower(), valid, n=1)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(valid))}."


def _passes(name: str, check: Callable[[str], Any]) -> bool:
    try:
        check(name)
    except UNFIT:
        return False
    return True


def kernel(model: dict[str, Any], prefix: str = "kernel") -> dict[str, Any]:
    """How a layer's kernel is initialised and regularised, as Keras arguments."""
    regularizer = keras.regularizers.L2(model["l2"]) if model["l2"] else None
    return {f"{prefix}_initializer": initializer(model["initializer"]), f"{prefix}_regularizer": regularizer}


def normalize(kind: str, x: Any, name: str) -> Any:
    """Batch or layer normalisation, or nothing."""
    match kind:
        case "batch":
            return apply(keras.layers.BatchNormalization(name=name), x)
        case "layer":
            return apply(keras.layers.LayerNormalization(name=name), x)
    return x


def drop(rate: float, x: Any, name: str) -> Any:
    """Dropout; a rate of 0 adds no layer."""
    return apply(keras.layers.Dropout(rate, name=name), x) if rate else x


FEATURES = {
    "flatten": keras.layers.Flatten,
    "global_average": keras.layers.GlobalAveragePooling2D,
    "global_max": keras.layers.GlobalMaxPooling2D,
}


def features(model: dict[str, Any], x: Any) -> Any:
    """What the convolutions found as one vector, with its dropout."""
    return drop(model["features_dropout"], apply(FEATURES[model["head_from"]](name="features"), x), "features_dropout")


def head(model: dict[str, Any], x: Any) -> Any:
    """The hidden dense layers: dense, normalisation, activation, dropout."""
    for layer in model["head"]:
        name = layer["name"]
        x = apply(keras.layers.Dense(layer["units"], name=name, **kernel(model | {"l2": model["head_l2"]})), x)
        x = normalize(layer["normalization"], x, f"{name}_norm")
        act = activation(layer["activation"], ("model", "head", name, "activation"))
        x = apply(keras.layers.Activation(act, name=f"{name}_activation"), x)
        x = drop(layer["dropout"], x, f"{name}_dropout")
    return x
