"""Residual network: a stem, stages of residual blocks, one vector of features, dense layers.

Source: K. He, X. Zhang, S. Ren, J. Sun (2015), Deep Residual Learning for Image Recognition, arXiv:1512.03385. The
activation comes after the addition, as there.
"""

from typing import Any

from ablation_lab.backend import keras
from ablation_lab.models.layers import activation, apply, features, head, kernel, normalize


def hidden(model: dict[str, Any], x: Any) -> Any:
    """All layers between the rescaled picture and the output layer."""
    stem = model["stem"]
    x = _activate(model, _convolve(model, x, stem["filters"], stem["kernel"], stem["stride"], "stem"), "stem")
    if stem["pool"] > 1:
        pool = keras.layers.MaxPooling2D(stem["pool"], stem["pool_stride"], "same", name="stem_pool")
        x = apply(pool, x)
    for stage in model["stages"]:
        for number in range(1, stage["blocks"] + 1):
            stride = stage["stride"] if number == 1 else 1
            x = _block(model, x, stage["filters"], stride, f"{stage['name']}_block{number}")
    if model["features_pool"] > 1:
        x = apply(keras.layers.AveragePooling2D(model["features_pool"], name="features_pool"), x)
    return head(model, features(model, x))


def _block(model: dict[str, Any], x: Any, filters: int, stride: int, name: str) -> Any:
    y = _activate(model, _convolve(model, x, filters, 3, stride, f"{name}_1"), f"{name}_1")
    y = _convolve(model, y, filters, 3, 1, f"{name}_2")
    if stride > 1 or x.shape[-1] != filters:
        projection = keras.layers.Conv2D(filters, 1, stride, "same", name=f"{name}_projection", **kernel(model))
        x = apply(projection, x)
    return _activate(model, keras.layers.Add(name=f"{name}_add")([x, y]), name)


def _convolve(model: dict[str, Any], x: Any, filters: int, size: int, stride: int, name: str) -> Any:
    x = apply(keras.layers.Conv2D(filters, size, stride, "same", name=f"{name}_conv", **kernel(model)), x)
    return normalize("batch", x, f"{name}_norm")


def _activate(model: dict[str, Any], x: Any, name: str) -> Any:
    return apply(keras.layers.Activation(activation(model["activation"]), name=f"{name}_activation"), x)
