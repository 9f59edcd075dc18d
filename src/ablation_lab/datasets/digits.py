"""1,797 handwritten digits of 8×8 pixels that scikit-learn brings along: no network, no given test part.

Source: E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ablation_lab import files, params
from ablation_lab.datasets.source import Source, Spec

SPEC = Spec(classes=tuple("0123456789"), image_shape=(8, 8, 1), counts={"all": 1797})


def download(data: params.Data, destination: Path) -> None:
    """Write scikit-learn's copy as `images.npy` (its 0 to 16 stretched to 0 to 255) and `labels.npy`."""
    from sklearn.datasets import load_digits  # takes a second, which `plan` need not spend

    digits = load_digits()
    with files.whole(destination) as folder:
        np.save(folder / "images.npy", np.rint(digits.images * (255 / 16)).astype(np.uint8), allow_pickle=False)
        np.save(folder / "labels.npy", digits.target.astype(np.int64), allow_pickle=False)


def open_raw(data: params.Data, raw: Path) -> Source:
    images = np.load(raw / "images.npy", allow_pickle=False)
    labels = np.load(raw / "labels.npy", allow_pickle=False)
    return Source(
        classes=list(SPEC.classes),
        labels=labels,
        test=None,
        load=lambda index: Image.fromarray(images[index]),
        name=lambda index: f"digit {index}",
        color="grayscale",
        image_size=[8, 8],
    )
