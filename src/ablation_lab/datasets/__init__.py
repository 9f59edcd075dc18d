"""Data sets, one module a source.

Each has `SPEC` (None where only the data tells), `download(data, destination)` and `open_raw(data, raw)`.
"""

import dataclasses
from pathlib import Path
from types import ModuleType

from ablation_lab import params
from ablation_lab.datasets import cifar10, digits, fashion_mnist, image_folder
from ablation_lab.datasets.source import Source, Spec

__all__ = ["DATASETS", "Source", "Spec", "download", "open_raw", "point_to_source", "spec"]

DATASETS: dict[str, ModuleType] = {
    "cifar10": cifar10,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "image_folder": image_folder,
}


def spec(data: params.Data) -> Spec | None:
    """What the network will be fed, as far as it is known without the data; None if it isn't."""
    known: Spec | None = DATASETS[data.dataset].SPEC
    if known is None and data.pictures and data.image_size and data.color:
        channels = {"rgb": 3, "grayscale": 1}[data.color]
        counts = {"all": sum(data.pictures.values())}
        return Spec(tuple(sorted(data.pictures)), (data.image_size[0], data.image_size[1], channels), counts)
    if known is None:
        return None
    height, width = data.image_size or known.image_shape[:2]
    channels = {"rgb": 3, "grayscale": 1, None: known.image_shape[2]}[data.color]
    return dataclasses.replace(known, image_shape=(height, width, channels))


def download(data: params.Data, destination: Path) -> None:
    """Put the raw files into `destination`, all of them or none.

    Raises:
        LabError: when they can't be had; what was in `destination` is left as it was.
    """
    DATASETS[data.dataset].download(data, destination)


def point_to_source(data: params.Data, link: Path) -> None:
    """Make `link` a symbolic link to the user's own pictures, or a note that there are none.

    The link is an output of `download` that DVC hashes through: a picture that changes makes the output differ from
    what it was, and the next `dvc repro` downloads again. A dependency can't do this, since `data.path` may be null.
    """
    link.unlink(missing_ok=True)
    if data.dataset == "image_folder":
        link.symlink_to(image_folder.locate(data).resolve())
    else:
        link.write_text(f"{data.dataset} does not come from data.path\n", encoding="utf-8")


def open_raw(data: params.Data, raw: Path) -> Source:
    """The pictures that `download` has put into `raw`."""
    source: Source = DATASETS[data.dataset].open_raw(data, raw)
    return source
