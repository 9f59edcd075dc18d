"""What the plain scripts share: the network and its training, as a notebook has them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def train(
    name: str, network: keras.Model, learning_rate: float, epochs: int, parts: dict[str, tuple[Any, Any]]
) -> None:
    """Fit a network to the pictures and labels of the part `train`; leave weights, history and scores by its name."""
    network.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    network.fit(
        *parts["train"],
        batch_size=64,
        epochs=epochs,
        validation_data=parts["validation"],
        validation_batch_size=256,  # as large as Ablation Lab's
        callbacks=[keras.callbacks.CSVLogger(f"{name}.csv")],
        verbose=0,
    )
    network.save_weights(f"{name}.weights.h5")
    loss, accuracy = network.evaluate(*parts["test"], batch_size=256, verbose=0)
    scores = {"parameters": network.count_params(), "test_loss": loss, "test_accuracy": accuracy}
    Path(f"{name}.json").write_text(json.dumps(scores))
