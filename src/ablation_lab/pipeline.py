"""Arrays on disk → batches of pictures and labels. Which pictures a step sees depends on (seed, step) alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablation_lab.backend import tf


@dataclass(frozen=True)
class Arrays:
    """`data/processed/`, mapped from disk: `labels` (n,), the sorted indices of each part, and in `inputs` what a
    network is fed: the pictures, uint8 (n, height, width, channels), or in their place features (`frozen.py`)."""

    inputs: list[np.ndarray]
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    classes: list[str]


def training_indices(train: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """The part of the training pictures that a study uses: the same fraction of each class, the same in every cell.

    Args:
        train: indices of the training part.
        labels: class of every picture of the data set.
        fraction: in (0, 1]; a smaller fraction is a subset of a larger one.
    """
    if fraction == 1:
        return train
    order = np.random.default_rng(0).permutation(train)
    kept = [members[: max(1, round(fraction * len(members)))] for members in _by_class(order, labels[order])]
    return np.sort(np.concatenate(kept))


def _by_class(indices: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    return [indices[labels == label] for label in np.unique(labels)]


@dataclass
class Shuffled:
    """Batches of indices in an order fixed by the seed.

    Without `steps_per_epoch` an epoch is one pass over a fresh permutation, its last batch smaller. With it, epochs cut
    an endless stream of permutations into equal pieces, as Keras does.
    """

    indices: np.ndarray
    batch_size: int
    steps_per_epoch: int | None
    seed: int

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch or -(-len(self.indices) // self.batch_size)

    def batch(self, step: int) -> np.ndarray:
        """The indices of a step, counted from 0 over all epochs."""
        n = len(self.indices)
        if self.steps_per_epoch is None:
            epoch, step = divmod(step, self.steps)
            return self._permutation(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        pieces = []
        while start < stop:
            number, offset = divmod(start, n)
            pieces.append(self._permutation(number)[offset : offset + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def _permutation(self, number: int) -> np.ndarray:
        if getattr(self, "_number", None) != number:
            self._number = number
            self._order = np.random.default_rng([self.seed, number]).permutation(self.indices)
        return self._order


def training_batches(arrays: Arrays, shuffled: Shuffled, first_epoch: int, epochs: int, labels: str) -> tf.data.Dataset:
    """Shuffled batches for the epochs from `first_epoch` (from 0) up to `epochs`.

    Args:
        labels: `one_hot`, float32 (batch, classes); `number`, int32 (batch,); `second`, float32 (batch, 1), which is 1
            for the second of two classes.

    Returns:
        What the network is fed, for pictures uint8 (batch, height, width, channels), and labels.
    """
    steps = tf.data.Dataset.range(first_epoch * shuffled.steps, epochs * shuffled.steps)
    return _load(arrays, steps, lambda step: shuffled.batch(int(step)), labels)


def shared_batches(
    arrays: Arrays,
    shuffled: Shuffled,
    first_epoch: int,
    epochs: int,
    labels: str,
    replicas: int,
    class_weights: dict[int, float] | None = None,
) -> tf.data.Dataset:
    """As `training_batches`, each batch shared out among devices that train together.

    Returns:
        For each step as many batches as there are `replicas`, in their order, with the weights of their pictures: those
        that make the mean of the devices' mean losses the mean over the whole batch, by `class_weights` too.
    """
    steps = tf.data.Dataset.range(first_epoch * shuffled.steps * replicas, epochs * shuffled.steps * replicas)
    by_class = np.array([(class_weights or {}).get(number, 1.0) for number in range(len(arrays.classes))])

    def share(number: int) -> tuple[np.ndarray, np.ndarray]:
        step, replica = divmod(int(number), replicas)
        batch = shuffled.batch(step)
        places, weights = shares(len(batch), replicas)[replica]
        return batch[places], weights * by_class[arrays.labels[batch[places]]]

    return _load(arrays, steps, share, labels, weighted=True)


def shares(pictures: int, replicas: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """How a batch is shared out: as evenly as possible, in order. No device gets nothing, since there is no mean of
    nothing: where pictures are fewer than devices, several devices have the same one.

    Returns:
        For each device the places of its pictures in the batch, and their weights in the device's mean loss.
    """
    places = np.resize(np.arange(pictures), max(pictures, replicas))
    often = np.bincount(places)
    return [(part, replicas * len(part) / (pictures * often[part])) for part in np.array_split(places, replicas)]


def ordered_batches(arrays: Arrays, indices: np.ndarray, batch_size: int, labels: str) -> tf.data.Dataset:
    """Batches in the order of `indices`, each picture once; shapes as in `training_batches`."""
    steps = tf.data.Dataset.range(-(-len(indices) // batch_size))
    return _load(arrays, steps, lambda step: indices[step * batch_size : (step + 1) * batch_size], labels)


def _load(arrays: Arrays, steps: tf.data.Dataset, batch, form: str, weighted: bool = False) -> tf.data.Dataset:
    types = [tf.as_dtype(array.dtype) for array in arrays.inputs]

    def read(step):
        chosen, weights = batch(step) if weighted else (batch(step), 1.0)
        labels = arrays.labels[chosen].astype(np.int32)
        return *(array[chosen] for array in arrays.inputs), labels, np.float32(weights)

    def load(step):
        *inputs, labels, weights = tf.numpy_function(read, [step], (*types, tf.int32, tf.float32), stateful=False)
        for tensor, array in zip(inputs, arrays.inputs, strict=True):
            tensor.set_shape((None, *array.shape[1:]))
        labels.set_shape((None,))
        if form == "one_hot":
            labels = tf.one_hot(labels, len(arrays.classes))
        elif form == "second":
            labels = tf.cast(labels[:, tf.newaxis], tf.float32)
        given = inputs[0] if len(inputs) == 1 else tuple(inputs)
        if not weighted:
            return given, labels
        weights.set_shape((None,))
        return given, labels, weights

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.deterministic = True
    # There is nothing to tune, and the end of an iterator now and then waits for its tuning thread, some seconds.
    options.autotune.enabled = False
    return steps.map(load).with_options(options).prefetch(2)


def open_arrays(folder: Path, classes: list[str]) -> Arrays:
    """Map the processed data set from disk; nothing is read before it is used."""
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("images", "labels", "train", "validation", "test")
    }
    return Arrays(classes=classes, inputs=[arrays.pop("images")], **arrays)
