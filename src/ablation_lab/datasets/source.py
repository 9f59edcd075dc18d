"""What a data set is to the rest: a `Spec` before there is any data, a `Source` of pictures afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Spec:
    """What is known of a data set without its data.

    Args:
        classes: names, in the order of the labels.
        image_shape: height, width, channels.
        counts: pictures in the given parts, `{"train": …, "test": …}`, or `{"all": …}` where none are given.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    counts: dict[str, int]


@dataclass(frozen=True)
class Source:
    """Raw pictures, each read when it is asked for.

    Args:
        classes: names, in the order of the labels.
        labels: int64 (n,).
        test: bool (n,), which pictures are the given test part; None where there is none.
        load: opens picture i; called from several threads at once.
        name: what to call picture i in a message.
        color: the data set's own.
        image_size: the data set's own [height, width]; None where each picture has its own.
    """

    classes: list[str]
    labels: np.ndarray
    test: np.ndarray | None
    load: Callable[[int], Image.Image]
    name: Callable[[int], str]
    color: Literal["rgb", "grayscale"]
    image_size: list[int] | None
