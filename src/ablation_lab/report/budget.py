"""What a study trains with less of than it could, or than its source did: what its figures must not be taken for."""

from pathlib import Path
from typing import Any

from ablation_lab import params
from ablation_lab.errors import LabError
from ablation_lab.params import Params, Variant
from ablation_lab.words import counted

NO_FAILURE = "A difference from a reported figure is therefore no sign that the figure can't be reproduced."


def source(study: Params, root: Path) -> Params | None:
    """The ready-made study of the same name, which has its source's settings; None where there is none, or no valid
    one."""
    path = root / "studies" / f"{study.study.name}.yaml"
    try:
        return params.load(path) if path.exists() else None
    except LabError:
        return None


def told(study: Params, source: Params | None, card: dict[str, Any]) -> list[str]:
    """The sentence of the headline about what was cut from all variants; none where nothing was."""
    found = cuts(study, source, card, study.study.baseline)
    if not found:
        return []
    reported = any(variant.reported for variant in study.variants.values())
    return [f"This study is cut: {'; '.join(found)}." + (f" {NO_FAILURE}" if reported else "")]


def cuts(study: Params, source: Params | None, card: dict[str, Any], name: str) -> list[str]:
    """In what a variant was trained with less than the ready-made study's variant of its name.

    Where there is none, the baseline is judged in its place, against the ready-made study's or, where there is no such
    study, against all images: what a variant changes by itself is its subject and no cut.
    """
    name = name if source and name in source.variants else study.study.baseline
    variant, theirs = study.variants[name], source.variants.get(name) if source else None
    full, found = card["counts"]["train"], []
    limit, their_limit = study.data.limit, source.data.limit if source else None
    # A limit above the number of images that there are has cut nothing.
    reached = any(n == limit for part in card["class_counts"].values() for n in part.values())
    if limit and reached and not (their_limit and their_limit <= limit):
        found.append(f"at most {counted(limit, 'image')} of each class in each set (data.limit)")
    if variant.input.fraction < (theirs.input.fraction if theirs else 1):
        found.append(f"{100 * variant.input.fraction:g} % of the training set (input.fraction)")
    usual = _an_epoch(theirs, full) if theirs else round(full * variant.input.fraction)
    if variant.train.steps_per_epoch and _an_epoch(variant, full) < usual:
        found.append(f"{_an_epoch(variant, full):,} of {usual:,} images an epoch (train.steps_per_epoch)")
    if theirs and variant.train.epochs < theirs.train.epochs:
        found.append(f"{variant.train.epochs:,} of {counted(theirs.train.epochs, 'epoch')} (train.epochs)")
    return found


def _an_epoch(variant: Variant, full: int) -> int:
    """Images of an epoch, of so many in the training set."""
    train = variant.train
    return train.steps_per_epoch * train.batch_size if train.steps_per_epoch else round(full * variant.input.fraction)
