"""Trainings of four variants on an archive of small colour pictures, one after the other, with all cores.

    python benchmarks/plain/cifar.py ARCHIVE EPOCHS

Leaves <variant>.weights.h5, its history in .csv and what it scores on the test part in .json.
"""

import io
import sys
import tarfile

import keras
import numpy as np
from network import cnn, train
from PIL import Image
from sklearn.model_selection import train_test_split

VARIANTS = {
    "baseline": {},
    "no_dropout": {"dropout": 0, "head_dropout": 0},
    "average_pool": {"pool": keras.layers.AveragePooling2D},
    "tanh": {"activation": "tanh"},
}

archive, epochs = sys.argv[1], int(sys.argv[2])
found = {"train": ([], []), "test": ([], [])}
with tarfile.open(archive) as opened:
    for member in opened:
        if member.isfile():
            part, label, _ = member.name.split("/")
            found[part][0].append(np.asarray(Image.open(io.BytesIO(opened.extractfile(member).read()))))
            found[part][1].append(label)
names = sorted(set(found["train"][1]))
pictures = {part: np.stack(images) for part, (images, _) in found.items()}
labels = {part: np.array([names.index(label) for label in them]) for part, (_, them) in found.items()}
fitted, validation, fitted_labels, validation_labels = train_test_split(
    pictures["train"], labels["train"], test_size=1 / 11, stratify=labels["train"], random_state=0
)
parts = {
    "train": (fitted, fitted_labels),
    "validation": (validation, validation_labels),
    "test": (pictures["test"], labels["test"]),
}
settings = {"shape": (32, 32, 3), "filters": (48, 96, 192), "units": 128}
for variant, changes in VARIANTS.items():
    keras.utils.set_random_seed(0)
    train(variant, cnn(**settings | changes), 0.001, epochs, parts)
