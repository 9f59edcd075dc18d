"""CIFAR-10: 50,000 + 10,000 colour pictures of ten classes, 32×32 pixels, from the official binary release (no pickle).

Source: A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images.
"""

import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ablation_lab import params
from ablation_lab.datasets import fetch
from ablation_lab.datasets.source import Source, Spec
from ablation_lab.errors import LabError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPEC = Spec(CLASSES, image_shape=(32, 32, 3), counts={"train": 50_000, "test": 10_000})

ARCHIVE = "cifar-10-binary.tar.gz"
FILES = {ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
SOURCES = {"the official host": "https://www.cs.toronto.edu/~kriz"}
FOLDER = "cifar-10-batches-bin"
BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane, row by row


def download(data: params.Data, destination: Path) -> None:
    fetch.fetch(FILES, "cifar-10", SOURCES, destination, f"get {ARCHIVE} by hand")


def open_raw(data: params.Data, raw: Path) -> Source:
    batches = read_batches(raw / ARCHIVE)
    records = np.concatenate(list(batches.values()))
    labels = records[:, 0].astype(np.int64)
    if labels.max(initial=0) >= len(CLASSES):
        raise LabError(f"{raw / ARCHIVE}: Expected labels 0 to {len(CLASSES) - 1}. Found: {labels.max()}. {_REPAIR}")
    pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Source(
        classes=list(CLASSES),
        labels=labels,
        test=np.arange(len(labels)) >= len(labels) - len(batches["test_batch.bin"]),
        load=lambda index: Image.fromarray(np.ascontiguousarray(pictures[index])),
        name=lambda index: f"picture {index} of CIFAR-10",
        color="rgb",
        image_size=[32, 32],
    )


def read_batches(archive: Path) -> dict[str, np.ndarray]:
    """The records of each batch file, uint8 (pictures, 3073); nothing is written to disk.

    Raises:
        LabError: when the archive is anything but the official one's layout.
    """
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if folder == FOLDER and name in BATCHES and member.isfile():
                    opened = tar.extractfile(member)
                    assert opened is not None
                    found[name] = np.frombuffer(opened.read(), np.uint8)
    except FileNotFoundError:
        raise LabError(f"{archive}: Expected the official archive. Found: no such file. {_REPAIR}") from None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise LabError(f"{archive}: Expected the official archive. Found: {error}. {_REPAIR}") from None
    for name in BATCHES:
        size = found[name].size if name in found else 0
        if not size or size % RECORD:
            raise LabError(
                f"{archive}: Expected {FOLDER}/{name} of records of {RECORD} bytes. Found: {size} bytes. {_REPAIR}"
            )
    return {name: found[name].reshape(-1, RECORD) for name in BATCHES}


_REPAIR = "Get it again with `dvc repro --force --single-item download`."
