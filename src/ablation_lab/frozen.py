"""Frozen work is done once: the prefix of a network that no training changes is computed once for all pictures.

What it gives, the features, is kept in `features/` below the project's root, by content: the same prefix, weights,
pictures and way of computing are the same entry, whichever variant, seed or process asks. The folder may be deleted at
any time. It is bounded by `ABLAB_FEATURES_GB` (20): what hasn't been used for longest goes first.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from ablation_lab import files
from ablation_lab.backend import keras, surroundings
from ablation_lab.errors import LabError

FOLDER = "features"
BATCH = 64  # fixed: the last bits of a feature may depend on it
ENTRY = "entry.json"
ATTEMPTS = 3
PATIENCE = 2  # seconds to wait without a word


def limit() -> int:
    """The most bytes that the cache may hold.

    Raises:
        LabError: when `ABLAB_FEATURES_GB` is no number.
    """
    given = os.environ.get("ABLAB_FEATURES_GB") or "20"
    try:
        return int(float(given) * 1e9)
    except (ValueError, OverflowError):
        raise LabError(f"ABLAB_FEATURES_GB: Expected a number, such as 20. Found: {given}.") from None


def cut(network: keras.Model) -> list[Any]:
    """The tensors that go from the frozen prefix of a network to the rest.

    A layer belongs to the prefix when everything that feeds it does, no training changes it, and it draws nothing at
    random. Inside a residual or densely connected backbone several tensors are cut.

    Returns:
        Keras tensors in the order of the graph; none where the prefix has no weights, so that it isn't worth it.
    """
    if not hasattr(network, "_nodes_by_depth"):
        return []
    frozen: dict[int, Any] = {id(tensor): tensor for tensor in network.inputs}
    worth, needed = False, []
    for depth in sorted(network._nodes_by_depth, reverse=True):
        for node in network._nodes_by_depth[depth]:
            given = node.arguments.keras_tensors
            if node.is_input:
                continue
            if all(id(tensor) in frozen for tensor in given) and _is_fixed(node.operation):
                frozen |= {id(tensor): tensor for tensor in node.outputs}
                worth = worth or bool(getattr(node.operation, "weights", ()))
            else:
                needed += [id(tensor) for tensor in given if id(tensor) in frozen]
    needed += [id(tensor) for tensor in network.outputs if id(tensor) in frozen]
    return [frozen[key] for key in dict.fromkeys(needed)] if worth else []


def _is_fixed(operation: Any) -> bool:
    """Whether an operation gives the same whatever has been trained, in training and afterwards."""
    if not isinstance(operation, keras.layers.Layer):
        return True
    # Batch normalisation changes what it knows of the data even where it trains no weights.
    still = not operation.trainable or not operation.variables
    at_random = any(variable.path.endswith("seed_generator_state") for variable in operation.variables)
    off = isinstance(operation, keras.layers.Dropout) and not operation.rate
    return still and (off or not at_random)


def split(network: keras.Model, trained: keras.Model) -> tuple[keras.Model, keras.Model, keras.Model]:
    """Cut a network in two that share its layers.

    Args:
        network: what is cut.
        trained: the same network up to what the loss is given.

    Returns:
        The frozen prefix, and the rest of `network` and of `trained`, which take the prefix's outputs.
    """
    tensors = cut(network)
    prefix = keras.Model(network.inputs, tensors, name="prefix")
    if trained is network:
        rest = keras.Model(tensors, network.output, name="rest")
        return prefix, rest, rest
    # Keras makes inputs in place of the cut tensors and applies the layers to them: once, for both.
    both = keras.Model(tensors, [network.output, trained.output])
    rest, fitted = (keras.Model(both.inputs, output, name="rest") for output in both.outputs)
    return prefix, rest, fitted


def features(
    prefix: keras.Model, images: np.ndarray, data_digest: str, threads: int, name: str, folder: Path | None = None
) -> list[np.ndarray]:
    """What the prefix makes of all pictures, from the cache or computed now.

    Args:
        prefix: the first of `split`.
        images: uint8 (n, height, width, channels).
        data_digest: of the processed data, in place of the pictures themselves.
        threads: CPU threads; results depend on them, and on the device and on TensorFlow's version.
        name: what the progress bar is called.
        folder: of the cache; `features/` below the root by default.

    Returns:
        One float32 array (n, …) for each output of the prefix, mapped from disk.
    """
    folder = folder or files.root() / FOLDER
    entry = folder / _key(prefix, data_digest, threads)
    for _ in range(ATTEMPTS):
        folder.mkdir(exist_ok=True)
        try:
            return _read_or_compute(prefix, images, entry, name)
        except FileNotFoundError:  # somebody has deleted the folder meanwhile
            print(f"{name}: {folder} was deleted, its features are computed anew", file=sys.stderr, flush=True)
    raise LabError(f"{folder}: Expected to keep features there. Found: deleted {ATTEMPTS} times while computing them.")


def _read_or_compute(prefix: keras.Model, images: np.ndarray, entry: Path, name: str) -> list[np.ndarray]:
    with _alone(entry, name):
        found = _read(entry)
        if found is None:
            for left in entry.parent.glob(f"{entry.name}*.part"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            # A lock goes with the folder that is deleted, so another process may be computing the same ones now.
            with files.whole(entry, f".{os.getpid()}") as part:
                _compute(prefix, images, part, name)
            found = _read(entry)
            if found is None:
                raise FileNotFoundError(entry)
        os.utime(entry / ENTRY)
    _bound(entry.parent, entry)
    return found


@contextmanager
def _alone(entry: Path, name: str) -> Iterator[None]:
    """Let no other cell compute the same features."""
    lock = FileLock(_lock(entry))
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"{name}: waits for frozen layers that another cell computes", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _key(prefix: keras.Model, data_digest: str, threads: int) -> str:
    identity = {
        "prefix": json.loads(prefix.to_json()),
        "data": data_digest,
        "batch": BATCH,
        "threads": threads,
        "surroundings": surroundings(),
    }
    found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for weight in prefix.get_weights():
        found.update(np.ascontiguousarray(weight).tobytes())
    return found.hexdigest()


def _compute(prefix: keras.Model, images: np.ndarray, part: Path, name: str) -> None:
    prefix.compile(jit_compile=False)  # never with XLA, so that cells with and without it share what is computed
    paths = [part / f"{number}.npy" for number in range(len(prefix.outputs))]
    arrays: list[np.ndarray] = []
    with tqdm(total=len(images), desc=f"{name}: frozen layers", unit="picture") as bar:
        for start in range(0, len(images), BATCH):
            given = np.asarray(images[start : start + BATCH])
            short = BATCH - len(given)
            # A batch of another size would be compiled once more, and perhaps be computed in another way.
            padded = np.concatenate([given, np.repeat(given[-1:], short, axis=0)]) if short else given
            outputs = keras.tree.flatten(prefix.predict_on_batch(padded))
            if not arrays:
                needed = sum(output[0].size for output in outputs) * len(images) * np.float32().nbytes
                _bound(part.parent, part, needed)
                _make_room(part, needed)
                arrays = [
                    np.lib.format.open_memmap(path, "w+", np.float32, (len(images), *output.shape[1:]))
                    for path, output in zip(paths, outputs, strict=True)
                ]
                for path in paths:
                    _reserve(path)
            for array, output in zip(arrays, outputs, strict=True):
                array[start : start + len(given)] = output[: len(given)]
            bar.update(len(given))
    del array, arrays  # what is mapped is written
    files.write_json(part / ENTRY, {path.name: files.sha256(path) for path in paths})


def _reserve(path: Path) -> None:
    # A file that is mapped has no blocks yet, and ends the process without a word where the disk is full by then.
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _make_room(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part).free
    if needed > free:
        raise LabError(
            f"{part.parent}: Expected {needed / 1e9:.1f} GB of free disk for features. Found: {free / 1e9:.1f} GB. "
            "Remove files, for example the folder itself, or set ABLAB_FEATURES_GB lower and run "
            "`dvc repro --force --single-item plan`: what doesn't fit is then trained without them."
        )


def _read(entry: Path) -> list[np.ndarray] | None:
    """An entry whose files are what was written, None where there is none or it is broken."""
    try:
        sums = json.loads((entry / ENTRY).read_text(encoding="utf-8"))
        if any(files.sha256(entry / name) != sha256 for name, sha256 in sums.items()):
            return None
        return [np.load(entry / name, mmap_mode="r", allow_pickle=False) for name in sums]
    except (OSError, ValueError, AttributeError):
        return None


def _bound(folder: Path, used: Path, more: int = 0) -> None:
    """Remove what hasn't been used for longest, until the rest fits; what another process uses just now stays.

    Args:
        used: this stays, too.
        more: bytes that are about to be added.
    """
    entries = sorted((path for path in folder.glob("*") if path.is_dir()), key=_last_use)
    total = sum(_bytes(entry) for entry in entries) + more
    for entry in entries:
        if total <= limit() and more <= shutil.disk_usage(folder).free:
            return
        if entry == used:
            continue
        try:
            with FileLock(_lock(entry), timeout=0):
                total -= _bytes(entry)
                shutil.rmtree(entry, ignore_errors=True)
        except Timeout:
            continue


def _last_use(entry: Path) -> float:
    try:
        return (entry / ENTRY).stat().st_mtime
    except OSError:
        return 0  # broken


def _bytes(entry: Path) -> int:
    try:
        return sum(path.stat().st_size for path in entry.glob("*") if path.is_file())
    except OSError:
        return 0  # another process renames or removes it


def _lock(entry: Path) -> Path:
    return entry.with_name(f"{entry.name.partition('.')[0]}.lock")
