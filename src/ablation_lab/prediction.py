"""Class probabilities of a user's own pictures, by the network of a trained cell."""

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from ablation_lab import backend, cell, files, models, params, preprocess, selection
from ablation_lab.errors import LabError

NEEDED = 3 * 4  # bytes a number of the largest layer: what it is given, what it gives, and what works on it
LOGGED = ("models:/", "runs:/")  # what a model in MLflow's store begins with


def predict(variant: str, seed: int | None, images: list[Path], root: Path) -> list[dict[str, Any]]:
    """Predict pictures of any size; they are decoded and resized as the study's own were.

    A network that takes any size sees a picture in its own size and aspect ratio.

    Args:
        variant: a variant of the current study, or a model in MLflow such as `models:/<study>@champion`.
        seed: one of the study's seeds; None takes the first. A model in MLflow has its own.

    Returns:
        For each picture `image`, `variant`, `seed`, `label` (the most probable class) and `probabilities` by class.

    Raises:
        LabError: for an unknown variant or seed, a cell that is not trained, a picture that can't be read.
    """
    if variant.startswith(LOGGED):
        return _logged(variant, seed, images)
    study = params.load(root / "params.yaml")
    if variant in study.second_names:
        study = selection.both_phases(study, root)
    seed = study.seeds[0] if seed is None else seed
    if variant not in study.variants:
        raise LabError(
            f"--variant: Expected one of {', '.join([*study.variants, *study.second_names])}. Found: {variant}."
        )
    if seed not in study.seeds:
        raise LabError(f"--seed: Expected one of {', '.join(map(str, study.seeds))}. Found: {seed}.")
    card = files.read_json(root / "data" / "processed" / "card.json")
    any_size = getattr(study.variants[variant].model, "any_size", False)
    size = card["image_shape"]
    pictures = [_read(path, study.data.resize, size, any_size) for path in images]
    folder = cell.folder(variant, seed, root)
    trained = files.read_json(folder / cell.RESULT)
    if "plan_hash" in trained and trained["plan_hash"] != _plan_hash(cell.plan_file(variant, root), study, variant):
        print(f"warning: {variant} was trained with other settings than those of params.yaml", file=sys.stderr)
    backend.set_up(study.variants[variant].train.threads)
    network = models.load(folder, study.variants[variant].model.builder)
    for path, picture in zip(images, pictures, strict=True):
        _check_size(path, picture.shape, size, network, variant)
    probabilities = [network.predict(picture[np.newaxis], verbose=0)[0] for picture in pictures]
    return _told(images, variant, seed, card["classes"], probabilities)


def _logged(uri: str, seed: int | None, images: list[Path]) -> list[dict[str, Any]]:
    """What a model in MLflow makes of pictures; it knows by itself how they are resized."""
    from ablation_lab.tracking import served  # MLflow takes seconds

    model, about = served.load(uri)
    if seed not in (None, about["seed"]):
        raise LabError(f"--seed: Expected {about['seed']}, that of {uri}. Found: {seed}.")
    pictures = [_read(path, about["data"]["resize"], about["image_shape"], about["any_size"]) for path in images]
    for path, picture in zip(images, pictures, strict=True):
        _check_size(path, picture.shape, about["image_shape"], model.get_raw_model(), uri)
    probabilities = [model.predict(picture[np.newaxis])[0] for picture in pictures]
    return _told(images, about["variant"], about["seed"], about["classes"], probabilities)


def _check_size(path: Path, shape: Sequence[int], trained: Sequence[int], network: Any, name: str) -> None:
    """Whether a network for any size can work on an image of this one: not where a layer would have nothing left, nor
    where what it computes has no room in memory.

    Args:
        shape, trained: height, width, channels of the image, and of those that the network was trained on.
    """
    if tuple(shape) == tuple(trained):
        return
    values = _largest(network, shape)
    if values is None and _largest(network, trained):
        height, width, channels = trained
        least = [
            bisect_left(range(1, height), True, key=lambda size: bool(_largest(network, (size, width, channels)))) + 1,
            bisect_left(range(1, width), True, key=lambda size: bool(_largest(network, (height, size, channels)))) + 1,
        ]
        if shape[0] >= least[0] and shape[1] >= least[1]:  # it isn't the size as such: a network that needs even ones
            raise LabError(
                f"{path}: Expected an image of a size that {name} can work on, such as {height} × {width}. "
                f"Found: {shape[0]} × {shape[1]}."
            )
        raise LabError(
            f"{path}: Expected an image of {least[0]} × {least[1]} pixels (height × width) at least, so that something "
            f"is left after the convolutions and pools of {name}. Found: {shape[0]} × {shape[1]}."
        )
    needed, free = NEEDED * (values or 0), psutil.virtual_memory().available
    if needed > free:
        raise LabError(
            f"{path}: Expected an image that {name} has memory for: {free / 1e9:.1f} GB are free. "
            f"Found: {shape[0]} × {shape[1]} pixels, which take about {needed / 1e9:.1f} GB. Make it smaller."
        )


def _largest(network: Any, shape: Sequence[int]) -> int | None:
    """How many numbers the largest output of a layer has for an image of this shape, by their shapes alone; None where
    a layer can't work on what it is given."""
    from ablation_lab.backend import keras

    try:
        sizes = _sizes(network, keras.KerasTensor((1, *shape), "float32"))
    except Exception:  # a layer of the user's may raise anything; predicting then says why
        return None
    return max(sizes) if min(sizes) > 0 else None


def _sizes(network: Any, given: Any) -> list[int]:
    """How many numbers each layer gives, with those of the networks inside this one.

    Args:
        given: what the network is given, by shape.
    """
    from ablation_lab.backend import keras

    graph = getattr(network, "_functional", None) or network  # a Sequential has its graph inside
    nodes = [node for level in getattr(graph, "_nodes_by_depth", {}).values() for node in level]
    if not nodes:  # a model that is no graph shows its output alone
        return [math.prod(one.shape) for one in keras.tree.flatten(network.compute_output_spec(given))]
    # A nested network's `output` is a tensor of its own graph, hence the tensors of the nodes of this one.
    tensors = list({id(one): one for node in nodes for one in node.output_tensors}.values())
    specs = keras.tree.flatten(keras.Model(graph.inputs, tensors).compute_output_spec(given))
    known = {id(tensor): spec for tensor, spec in zip(tensors, specs, strict=True)}
    sizes = [math.prod(spec.shape) for spec in specs]
    for node in nodes:
        if isinstance(node.operation, keras.Model):
            inside = [known[id(tensor)] for tensor in node.input_tensors]
            sizes += _sizes(node.operation, inside if len(inside) > 1 else inside[0])
    return sizes


def _told(
    images: list[Path], variant: str, seed: int, classes: list[str], probabilities: list[np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {
            "image": str(path),
            "variant": variant,
            "seed": seed,
            "label": classes[int(one.argmax())],
            "probabilities": dict(zip(classes, one.astype(float).tolist(), strict=True)),
        }
        for path, one in zip(images, probabilities, strict=True)
    ]


def _plan_hash(path: Path, study: params.Params, variant: str) -> str:
    """The hash of the plan that params.yaml asks for; what the plan holds beside the settings as it was planned."""
    return params.digest(params.canonical_json(files.read_json(path) | study.variants[variant].resolved()))


def _read(path: Path, resize: preprocess.Resize, shape: Sequence[int], any_size: bool) -> np.ndarray:
    height, width, channels = shape
    size = None if any_size else [height, width]
    try:
        with Image.open(path) as image:
            return preprocess.prepare(image, size, "grayscale" if channels == 1 else "rgb", resize)
    except preprocess.UNREADABLE as error:
        raise LabError(f"{path}: Expected a picture that Pillow can read. Found: {preprocess.reason(error)}") from None
