"""Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28×28 pixels, in four gzipped idx files.

Source: H. Xiao, K. Rasul, R. Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ablation_lab import params
from ablation_lab.datasets import fetch
from ablation_lab.datasets.source import Source, Spec
from ablation_lab.errors import LabError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPEC = Spec(CLASSES, image_shape=(28, 28, 1), counts={"train": 60_000, "test": 10_000})

FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
SOURCES = {
    "the official host": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "Debian's package dataset-fashion-mnist": "/usr/share/datasets/fashion-mnist",
}


def download(data: params.Data, destination: Path) -> None:
    advice = "install Debian's package (apt install dataset-fashion-mnist)"
    fetch.fetch(FILES, "fashion-mnist", SOURCES, destination, advice)


def open_raw(data: params.Data, raw: Path) -> Source:
    parts = [
        (read_idx(raw / f"{part}-images-idx3-ubyte.gz", 3), read_idx(raw / f"{part}-labels-idx1-ubyte.gz", 1))
        for part in ("train", "t10k")
    ]
    for part, (pictures, labels) in zip(("train", "t10k"), parts, strict=True):
        if len(pictures) != len(labels):
            raise LabError(f"{raw}: Expected a label a picture. Found: {part}, {len(pictures)} and {len(labels)}.")
        if labels.max(initial=0) >= len(CLASSES):
            raise LabError(f"{raw}: Expected labels 0 to {len(CLASSES) - 1}. Found: {part}, {labels.max()}.")
    (train_images, train_labels), (test_images, test_labels) = parts
    images = np.concatenate([train_images, test_images])
    test = np.arange(len(images)) >= len(train_images)
    return Source(
        classes=list(CLASSES),
        labels=np.concatenate([train_labels, test_labels]).astype(np.int64),
        test=test,
        load=lambda index: Image.fromarray(images[index]),
        name=lambda index: f"picture {index} of Fashion-MNIST",
        color="grayscale",
        image_size=list(images.shape[1:]),
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of a gzipped idx file, uint8 in so many dimensions (format: yann.lecun.com/exdb/mnist).

    Raises:
        LabError: when it is anything else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise LabError(f"{path}: Expected a gzipped idx file. Found: no such file. {_REPAIR}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise LabError(f"{path}: Expected a gzipped idx file. Found: {error}. {_REPAIR}") from None
    magic = bytes([0, 0, 8, dimensions])  # 8 stands for unsigned bytes
    if content[:4] != magic:
        found = content[:4].hex(" ") or "nothing"
        raise LabError(f"{path}: Expected an idx file that starts with {magic.hex(' ')}. Found: {found}. {_REPAIR}")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    size = math.prod(shape)
    if len(content) - start != size:
        shown = "×".join(map(str, shape))
        raise LabError(f"{path}: Expected {shown} = {size} bytes. Found: {len(content) - start} bytes. {_REPAIR}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


_REPAIR = "Get it again with `dvc repro --force --single-item download`."
