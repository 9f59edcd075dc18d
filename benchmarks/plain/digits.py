"""One training of the digits.

    python benchmarks/plain/digits.py VARIANT SEED EPOCHS

Leaves VARIANT-SEED.weights.h5, its history in .csv and what it scores on the test part in .json.
"""

import sys

import keras
import numpy as np
import tensorflow as tf
from network import cnn, train
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

VARIANTS = {
    "baseline": {},
    "no_dropout": {"dropout": 0, "head_dropout": 0},
    "no_second_block": {"filters": (16,)},
    "big_pool": {"pools": (4, 2)},
    "average_pool": {"pool": keras.layers.AveragePooling2D},
    "tanh": {"activation": "tanh"},
}

variant, seed, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
keras.utils.set_random_seed(seed)

digits = load_digits()
pictures, labels = digits.images[..., np.newaxis].astype("float32"), digits.target
rest, test, rest_labels, test_labels = train_test_split(
    pictures, labels, test_size=0.25, stratify=labels, random_state=0
)
fitted, validation, fitted_labels, validation_labels = train_test_split(
    rest, rest_labels, test_size=0.2, stratify=rest_labels, random_state=0
)
parts = {
    "train": (fitted, fitted_labels),
    "validation": (validation, validation_labels),
    "test": (test, test_labels),
}
settings = {"shape": (8, 8, 1), "filters": (16, 32), "units": 64, "scale": 1 / 16}
train(f"{variant}-{seed}", cnn(**settings | VARIANTS[variant]), 0.003, epochs, parts)
