"""One training by `fit` on arrays in memory.

    python benchmarks/plain/fit.py PROCESSED SETTINGS FOUND [jit]

Reads the pictures of a folder `data/processed`; SETTINGS are JSON with `filters`, `units`, `batch`, `epochs` and
`threads`. Writes the seconds of `fit`, and of each epoch, to FOUND.
"""

import json
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from network import cnn

data, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
tf.config.threading.set_intra_op_parallelism_threads(settings["threads"])
tf.config.threading.set_inter_op_parallelism_threads(1)
keras.utils.set_random_seed(0)

images, labels = np.load(data / "images.npy"), np.load(data / "labels.npy")
train, validation = np.load(data / "train.npy"), np.load(data / "validation.npy")
parts = [(images[chosen], labels[chosen]) for chosen in (train, validation)]


class Clock(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.started)


network = cnn(images.shape[1:], settings["filters"], settings["units"])
network.compile(
    keras.optimizers.Adam(0.001),
    "sparse_categorical_crossentropy",
    metrics=["accuracy"],
    jit_compile=True if "jit" in sys.argv else "auto",  # which is False on the CPU
)
network.optimizer.build(network.trainable_variables)  # before the clock starts, as a cell does
clock = Clock()
started = time.perf_counter()
network.fit(
    *parts[0],
    batch_size=settings["batch"],
    epochs=settings["epochs"],
    validation_data=parts[1],
    validation_batch_size=256,  # as large as Ablation Lab's
    callbacks=[clock],
    verbose=0,
)
seconds = time.perf_counter() - started
Path(sys.argv[3]).write_text(json.dumps({"fit": seconds, "epochs": clock.seconds}))
