"""Files of ready-made weights: which one a network wants, where it lies, and into the network with it."""

import hashlib
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any, TypedDict
from zipfile import BadZipFile

import numpy as np
from keras.src.utils import file_utils

from ablation_lab import files
from ablation_lab.backend import keras
from ablation_lab.models import squeezenet, transfer
from ablation_lab.models.layers import NetworkError, reason

# The project's folder that dvc.yaml's `plan` depends on.
FOLDER = "weights"


EFFICIENT_NET = re.compile("efficientnetb[0-7]")  # not its second version
DEVIATIONS = (0.229, 0.224, 0.225)  # of ImageNet's pictures, red, green, blue, between 0 and 1


class Wanted(TypedDict):
    """A file of weights: its name, its hash as `md5:…` or `sha256:…` (None where Keras knows none and the file isn't
    there), and where Keras gets it (None for a file of the user's)."""

    file: str
    hash: str | None
    url: str | None


def wanted(model: dict[str, Any]) -> Wanted | None:
    """The weights of a resolved `model`, by name and content; they belong to what fixes a result. A relative path is
    looked up under the root, which in DVC's temporary experiments is the main repository.

    Returns:
        None for random weights, and for builders that know no others.

    Raises:
        NetworkError: when a file of the user's isn't there.
    """
    if model["builder"] != "transfer" or model["weights"] is None:
        return None
    if model["weights"] == "imagenet":
        known = _imagenet(model["backbone"].lower())
        if known["hash"] is None:  # then the file itself says what it is, once it is there
            path = next((place for place in _known_places(known["file"]) if place.is_file()), None)
            known = {**known, "hash": digest(path, "sha256") if path else None}
        return known
    places = [files.root() / model["weights"], *_known_places(Path(model["weights"]).name)]
    path = next((place for place in places if _is_file(place)), None)
    if path is None:
        raise NetworkError(
            f"Expected imagenet, or a file in one of {', '.join(map(str, places))}. "
            f"Found: no such file as {model['weights']}.",
            ("model", "weights"),
        )
    return {"file": path.name, "hash": digest(path, "sha256"), "url": None}


def locate(model: dict[str, Any], weights: Wanted) -> Path:
    """The file with these weights.

    Raises:
        NetworkError: naming the file, its hash and where to put it, and what is wrong with the ones that are there.
    """
    name = weights["file"]
    places = ([files.root() / model["weights"]] if weights["url"] is None else []) + _known_places(name)
    refused = []
    for place in places:
        if not place.is_file():
            continue
        found = digest(place, (weights["hash"] or "md5:").partition(":")[0])
        if weights["hash"] in (None, found):
            return place
        refused.append(f"{place} with {found} ({place.stat().st_size:,} bytes)")
    what = name + (f" with {weights['hash']}" if weights["hash"] else "")
    source = f" Get it from {weights['url']}; `dvc repro --force --single-item plan` does." if weights["url"] else ""
    raise NetworkError(
        f"model.weights of {model['backbone']}: Expected {what} as one of {', '.join(map(str, places))}. "
        f"Found: {'; '.join(refused) or 'none of them'}.{source}"
    )


def load(network: keras.Model, model: dict[str, Any], path: Path) -> None:
    """Fill the backbone of a network from a file in any of Keras' formats, also the old HDF5 ones.

    Raises:
        NetworkError: when the file holds the weights of another network.
    """
    backbone = transfer.backbone_of(network)
    kernels = [weight for weight in backbone.weights if len(weight.shape) > 1]
    for weight in kernels:
        weight.assign(np.zeros(weight.shape, np.float32))
    try:
        with warnings.catch_warnings(action="ignore"):  # Keras warns of a layer that it finds no weights of
            backbone.load_weights(path)
        if left := next((weight for weight in kernels if not weight.numpy().any()), None):
            raise ValueError(f"it has no weights of {left.path}")
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, BadZipFile) as error:
        raise NetworkError(
            f"model.weights: Expected the weights of {model['backbone']} without its top. "
            f"Found: {path}; {reason(error)}"
        ) from error
    _as_in_training(backbone, model)


def _as_in_training(backbone: keras.Model, model: dict[str, Any]) -> None:
    """EfficientNet's ImageNet weights want their pictures divided by the square root of ImageNet's deviations, too.

    Keras builds a layer for it, after the normalisation, when it loads these weights itself. Here the normalisation
    does both: a variance that is larger by the deviations is the same.
    """
    if model["weights"] == "imagenet" and EFFICIENT_NET.fullmatch(model["backbone"].lower()):
        (layer,) = (one for one in backbone.layers if isinstance(one, keras.layers.Normalization))
        layer.adapt_variance.assign(layer.adapt_variance * np.array(DEVIATIONS, np.float32))
        layer.finalize_state()


def lints(model: dict[str, Any]) -> list[str]:
    """Warnings for weights that are not what most people want, or that DVC doesn't watch."""
    name = model["weights"]
    if name is None:
        kept = "" if model["trainable"] == "all" else ", and its frozen layers keep them"
        return [f"its backbone starts from random weights{kept}: `weights: imagenet` takes trained ones"]
    if name != "imagenet" and not Path(name).as_posix().startswith(f"{FOLDER}/"):
        return [f"its weights come from {name}: DVC notices changes of files in {FOLDER}/ only"]
    return []


def digest(path: Path, algorithm: str) -> str:
    """A file's hash as `algorithm:hexadecimal`; of one that hasn't changed since it was asked for, the same."""
    known = path.stat()
    return _digest(path, algorithm, known.st_mtime_ns, known.st_size)


@cache
def _digest(path: Path, algorithm: str, _changed: int, _bytes: int) -> str:
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except OSError:  # a name that is too long for one
        return False


def keras_folder() -> Path:
    """Where Keras keeps the weights that it has downloaded."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"


def _known_places(name: str) -> list[Path]:
    near = files.mirror()
    mirrored = [Path(near) / FOLDER / name] if near and not files.is_url(near) else []
    return [keras_folder() / name, *mirrored, files.cache() / FOLDER / name, files.root() / FOLDER / name]


@cache
def _imagenet(backbone: str) -> Wanted:
    if backbone == "squeezenet":
        return {"file": squeezenet.FILE, "hash": f"sha256:{squeezenet.SHA256}", "url": squeezenet.URL}
    build, _ = transfer.find(backbone)

    def asked(fname: str, origin: str, file_hash: str | None = None, **_: Any) -> None:
        raise _Asked({"file": fname, "hash": file_hash and f"md5:{file_hash}", "url": origin})

    # Keras has no list of its files: it names one when it is about to get it.
    get_file, file_utils.get_file = file_utils.get_file, asked
    try:
        with warnings.catch_warnings(action="ignore"):  # of a picture size that isn't ours
            build(include_top=False, weights="imagenet")
    except _Asked as named:
        return named.args[0]
    finally:
        file_utils.get_file = get_file
    raise AssertionError(f"Keras has built {backbone} without asking for its weights")


class _Asked(Exception):
    """Ends the building of a network where its weights' file is named."""
