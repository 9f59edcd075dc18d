"""Equal pictures where none should be: in two parts, which flatters what is scored there, or under two classes.

They are compared as they were prepared, every byte of them. Copies that differ in one pixel are not looked for.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NAMED = 10  # examples of each finding
DIGEST = np.dtype("S16")  # as good as the picture itself, and so small that those of all pictures fit into memory
PAIRS = (("test", "train"), ("test", "validation"), ("validation", "train"))
NAMES = {"train": "training", "validation": "validation", "test": "test"}


def digest(picture: np.ndarray) -> bytes:
    """What is equal for equal pictures of one shape."""
    return hashlib.blake2b(picture.data, digest_size=DIGEST.itemsize).digest()


def find(
    digests: np.ndarray,
    labels: np.ndarray,
    parts: Mapping[str, np.ndarray],
    classes: list[str],
    name: Callable[[int], str],
) -> dict[str, Any]:
    """Count equal pictures across parts and classes, with a few examples.

    Args:
        digests: of each picture, of dtype `DIGEST` (n,).
        labels: int (n,).
        parts: part to its sorted indices.
        name: what to call picture i.

    Returns:
        `{"test_in_train": …, "test_in_validation": …, "validation_in_train": …, "in_classes": …}`. The first three have
        `count`, pictures of the one part that the other one has too, and `same_class`, those that it has under the same
        class; `in_classes` has `count`, the different pictures that more than one class has. `first` are examples.
    """
    _, picture = np.unique(digests, return_inverse=True)
    # One number for a picture of a class, so that equal ones of one class have the same.
    sample = picture * len(classes) + labels

    def named(*indices: int) -> list[dict[str, str]]:
        return [{"name": name(int(index)), "class": classes[labels[index]]} for index in indices]

    found: dict[str, Any] = {}
    for part, other in PAIRS:
        here, there = parts[part], parts[other]
        common = here[np.isin(picture[here], picture[there])]
        same = np.isin(sample[common], sample[there])
        first = []
        for index, alike in zip(common[:NAMED], same, strict=False):
            key = sample if alike else picture  # of several, one of the same class
            first.append(named(index, there[np.argmax(key[there] == key[index])]))
        found[f"{part}_in_{other}"] = {"count": len(common), "same_class": int(same.sum()), "first": first}

    _, once = np.unique(sample, return_index=True)  # the first of each picture in each class
    groups: dict[int, list[int]] = {}
    for index in np.sort(once[np.bincount(picture[once])[picture[once]] > 1]):
        groups.setdefault(int(picture[index]), []).append(int(index))
    found["in_classes"] = {"count": len(groups), "first": [named(*group) for group in list(groups.values())[:NAMED]]}
    return found


def told(found: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, str]:
    """Each finding in words, but for those that found nothing.

    Args:
        found: as `find` returns it.
        counts: pictures of each part.
    """
    words = {}
    for part, other in PAIRS:
        one = found[f"{part}_in_{other}"]
        if number := one["count"]:
            said = f"{number:,} of {counts[part]:,} {part} pictures {'is' if number == 1 else 'are'} also in the "
            said += f"{NAMES[other]} part"
            contradicting = number - one["same_class"]
            words[f"{part}_in_{other}"] = said + (f" ({contradicting:,} under another class)" if contradicting else "")
    if number := found["in_classes"]["count"]:
        words["in_classes"] = f"{number:,} {'picture is' if number == 1 else 'pictures are'} in more than one class"
    return words
