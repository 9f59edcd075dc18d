"""Class probabilities of a user's own pictures, by the network of a trained cell."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ablation_lab import backend, cell, files, models, params, preprocess, selection
from ablation_lab.errors import LabError


def predict(variant: str, seed: int | None, images: list[Path], root: Path) -> list[dict[str, Any]]:
    """Predict pictures of any size; they are decoded and resized as the study's own were.

    A network that takes any size sees a picture in its own size and aspect ratio.

    Args:
        variant: a variant of the current study.
        seed: one of the study's seeds; None takes the first.

    Returns:
        For each picture `image`, `variant`, `seed`, `label` (the most probable class) and `probabilities` by class.

    Raises:
        LabError: for an unknown variant or seed, a cell that is not trained, a picture that can't be read.
    """
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
    pictures = [_read(path, study.data, card, any_size) for path in images]
    folder = cell.folder(variant, seed, root)
    trained = files.read_json(folder / cell.RESULT)
    if "plan_hash" in trained and trained["plan_hash"] != _plan_hash(cell.plan_file(variant, root), study, variant):
        print(f"warning: {variant} was trained with other settings than those of params.yaml", file=sys.stderr)
    backend.set_up(study.variants[variant].train.threads)
    network = models.load(folder, study.variants[variant].model.builder)
    found = []
    for path, picture in zip(images, pictures, strict=True):
        probabilities = network.predict(picture[np.newaxis], verbose=0)[0].astype(float)
        by_class = dict(zip(card["classes"], probabilities.tolist(), strict=True))
        label = card["classes"][int(probabilities.argmax())]
        found.append({"image": str(path), "variant": variant, "seed": seed, "label": label, "probabilities": by_class})
    return found


def _plan_hash(path: Path, study: params.Params, variant: str) -> str:
    """The hash of the plan that params.yaml asks for; what the plan holds beside the settings as it was planned."""
    return params.digest(params.canonical_json(files.read_json(path) | study.variants[variant].resolved()))


def _read(path: Path, data: params.Data, card: dict[str, Any], any_size: bool) -> np.ndarray:
    try:
        with Image.open(path) as image:
            height, width, channels = card["image_shape"]
            return preprocess.prepare(
                image, None if any_size else [height, width], "grayscale" if channels == 1 else "rgb", data.resize
            )
    except preprocess.UNREADABLE as error:
        raise LabError(f"{path}: Expected a picture that Pillow can read. Found: {preprocess.reason(error)}") from None
