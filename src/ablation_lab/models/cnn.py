"""Convolutional network: blocks, one vector of features, dense layers."""

from typing import Any

from ablation_lab.backend import keras
from ablation_lab.models.layers import activation, apply, drop, features, head, kernel, normalize

POOLS = {"max": keras.layers.MaxPooling2D, "average": keras.layers.AveragePooling2D}


def hidden(model: dict[str, Any], x: Any) -> Any:
    """All layers between the rescaled picture and the output layer."""
    for block in model["blocks"]:
        x = _block(model, block, x)
    return head(model, features(model, x))


def _block(model: dict[str, Any], block: dict[str, Any], x: Any) -> Any:
    name = block["name"]
    for number in range(1, block["convolutions"] + 1):
        x = apply(_convolution(model, block, f"{name}_conv{number}"), x)
        x = normalize(block["normalization"], x, f"{name}_norm{number}")
        act = activation(block["activation"], ("model", "blocks", name, "activation"))
        x = apply(keras.layers.Activation(act, name=f"{name}_activation{number}"), x)
    if block["pool"] > 1:
        x = apply(POOLS[block["pool_type"]](block["pool"], name=f"{name}_pool"), x)
    return drop(block["dropout"], x, f"{name}_dropout")


def _convolution(model: dict[str, Any], block: dict[str, Any], name: str) -> keras.layers.Layer:
    shape = {"kernel_size": block["kernel"], "strides": block["stride"], "padding": block["padding"], "name": name}
    match block["convolution"]:
        case "separable":
            weights = kernel(model, "depthwise") | kernel(model, "pointwise")
            return keras.layers.SeparableConv2D(block["filters"], **shape, **weights)
        case "depthwise":
            return keras.layers.DepthwiseConv2D(**shape, **kernel(model, "depthwise"))
        case "transpose":
            return keras.layers.Conv2DTranspose(block["filters"], **shape, **kernel(model))
    return keras.layers.Conv2D(block["filters"], **shape, **kernel(model))
