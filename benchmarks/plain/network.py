"""The network of the plain scripts, as a notebook has it."""

from collections.abc import Sequence

import keras
from keras import layers


def cnn(
    shape: Sequence[int],
    filters: Sequence[int],
    units: int,
    scale: float = 1 / 255,
    activation: str = "relu",
    pool: type = layers.MaxPooling2D,
    pools: Sequence[int] = (2, 2, 2),
    dropout: float = 0.25,
    head_dropout: float = 0.5,
) -> keras.Model:
    """Blocks of a convolution and a pooling, and a dense layer, for ten classes."""
    network = keras.Sequential([keras.Input(shape), layers.Rescaling(scale)])
    for width, size in zip(filters, pools, strict=False):
        network.add(layers.Conv2D(width, 3, padding="same", activation=activation))
        network.add(pool(size))
        network.add(layers.Dropout(dropout))
    network.add(layers.Flatten())
    network.add(layers.Dense(units, activation=activation))
    network.add(layers.Dropout(head_dropout))
    network.add(layers.Dense(10, activation="softmax"))
    return network
