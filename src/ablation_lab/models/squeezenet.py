"""SqueezeNet 1.1 without its top, in the form of a `keras.applications` function, which Keras doesn't have.

Source: F. Iandola, S. Han, M. Moskewicz, K. Ashraf, W. Dally, K. Keutzer (2016), SqueezeNet: AlexNet-level accuracy
with 50x fewer parameters and <0.5MB model size, arXiv:1602.07360; version 1.1 is its authors' later one with smaller
convolutions and earlier pooling.
"""

from typing import Any

import numpy as np

from ablation_lab.backend import keras

# Squeeze and expand filters of the fire modules, and after which of them is pooled.
FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192), 8: (64, 256), 9: (64, 256)}
POOLED = {3, 5}
# The ImageNet weights: kernels and biases in a file of Keras 1's form.
FILE = "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
SHA256 = "17154246284f555591549ac2c83e127abfbf4307dc4b0060fdaa2931d0fa38da"
URL = f"https://github.com/rcmalli/keras-squeezenet/releases/download/v1.0/{FILE}"


def preprocess_input(pictures: np.ndarray) -> np.ndarray:
    """As those weights were trained: blue first, the mean of each channel subtracted."""
    return pictures[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32)


def SqueezeNet(*, input_tensor: Any, include_top: bool = False, weights: str | None = None) -> keras.Model:
    """Build the network.

    Args:
        input_tensor: preprocessed pictures (batch, height, width, 3).
        include_top: only False; there for the likeness with `keras.applications`.
        weights: only None; `models.transfer` loads them.
    """
    assert not include_top and weights is None
    x = _convolve(input_tensor, 64, 3, "conv1", strides=2, padding="valid")
    x = keras.layers.MaxPooling2D(3, 2, name="pool1")(x)
    for number, (squeeze, expand) in FIRES.items():
        name = f"fire{number}"
        x = _convolve(x, squeeze, 1, f"{name}_squeeze1x1")
        left, right = (_convolve(x, expand, size, f"{name}_expand{size}x{size}") for size in (1, 3))
        x = keras.layers.Concatenate(name=f"{name}_concat")([left, right])
        if number in POOLED:
            x = keras.layers.MaxPooling2D(3, 2, name=f"pool{number}")(x)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), x, name="squeezenet")


def _convolve(x: Any, filters: int, size: int, name: str, strides: int = 1, padding: str = "same") -> Any:
    x = keras.layers.Conv2D(filters, size, strides, padding, name=name)(x)
    return keras.layers.Activation("relu", name=f"{name}_relu")(x)
