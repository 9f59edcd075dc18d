"""What stands before a network while it is trained: its pictures on the device that computes, and augmentation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ablation_lab import backend, gpu, optimization
from ablation_lab.backend import keras, tf

SHARE = 4  # pictures or features take a quarter of a GPU's free memory at most: the training needs the rest


class Stored(keras.layers.Layer):
    """Arrays on the device that computes. Takes indices, gives their pictures or features as float32.

    A step is then fed with some numbers rather than with pictures, which on a GPU take longer to come than to be
    computed. The arrays are no weights of the layer: a network behind it has the weights that it has.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        super().__init__(dtype="float32")
        # Variables, since TensorFlow takes single rows of uint8 from them on a GPU, and from tensors doesn't.
        self._arrays = tuple(tf.Variable(array, trainable=False) for array in arrays)

    def call(self, indices: Any) -> Any:
        rows = [tf.cast(tf.gather(array, indices), tf.float32) for array in self._arrays]
        return rows[0] if len(rows) == 1 else rows


def stored(arrays: Sequence[np.ndarray], wanted: str) -> Stored | None:
    """Arrays on the device where `train.data_on` wants them there: `auto` does on a GPU that has room for them."""
    if wanted == "auto":
        fit = backend.has_gpu() and SHARE * sum(array.nbytes for array in arrays) <= gpu.free_memory()
        wanted = "device" if fit else "host"
    return Stored(arrays) if wanted == "device" else None


def before(network: keras.Model, augment: dict[str, dict[str, Any]], stored: Stored | None = None) -> keras.Model:
    """The network behind its augmentation layers and, where they are stored, its pictures or features: same weights,
    and the network itself stays free of all that."""
    layers = optimization.augmentation(augment)
    if stored is None:
        return keras.Sequential([keras.Input(network.input_shape[1:]), *layers, network]) if layers else network
    indices = keras.Input((), dtype="int64", name="indices")
    x = stored(indices)
    for layer in layers:
        x = layer(x)
    return keras.Model(indices, network(x))
