"""Raw pictures → uint8 arrays, the indices of the parts and a data card."""

import hashlib
import json
import os
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from ablation_lab import datasets, duplicates, files, params
from ablation_lab.datasets import image_folder
from ablation_lab.errors import LabError

PARTS = ("train", "validation", "test")
BLOCK_BYTES = 8 << 20  # what is decoded at once, so that memory does not grow with the data set
Resize = Literal["stretch", "pad", "crop"]
NAMED = 10  # of the pictures that are left out


def preprocess(data: params.Data, raw: Path, out: Path) -> None:
    """Decode, convert, resize and split the pictures in `raw`; the same bytes every time.

    Writes into `out`: `images.npy` uint8 (n, height, width, channels), `labels.npy` int32 (n,), `train.npy`,
    `validation.npy` and `test.npy` (sorted, disjoint int64 indices into them), `card.json` and `duplicates.json` (equal
    pictures in two parts or classes, which are told on standard error too).

    Raises:
        LabError: when a picture can't be read or the split is impossible; `out` is left as it was.
    """
    source = datasets.open_raw(data, raw)
    reasons = _unreadable(data, source) if data.unreadable == "skip" else {}
    readable = np.setdiff1d(np.arange(len(source.labels)), list(reasons))
    given_test = None if source.test is None else source.test[readable]
    if given_test is not None and data.split.test != "given":
        told = "the given test part is split anew with all other pictures; `test: given` keeps it"
        print(f"warning: data.split.test is {data.split.test}: {told}", file=sys.stderr)
    parts = split(source.labels[readable], given_test, source.classes, data)
    parts = {part: readable[chosen] for part, chosen in parts.items()}
    kept = np.sort(np.concatenate(list(parts.values())))
    indices = {part: np.searchsorted(kept, chosen) for part, chosen in parts.items()}
    labels = source.labels[kept].astype(np.int32)

    with files.whole(out) as folder:
        digest = hashlib.sha256(json.dumps(source.classes).encode())
        shape, digests = _write_images(data, source, kept, folder / "images.npy", digest)
        for name, array in {"labels": labels, **indices}.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        counts = {part: np.bincount(labels[chosen], minlength=len(source.classes)) for part, chosen in indices.items()}
        card = {
            "name": image_folder.name(data) if data.dataset == "image_folder" else data.dataset,
            "classes": source.classes,
            "image_shape": shape,
            "counts": {part: len(chosen) for part, chosen in indices.items()},
            "class_counts": {part: dict(zip(source.classes, n.tolist(), strict=True)) for part, n in counts.items()},
            "split": data.split.model_dump(),
            "digest": digest.hexdigest(),
        }
        if reasons:  # else the card stays what it is without this setting
            card["skipped"] = _skipped(data, source, list(reasons))
        (folder / "card.json").write_text(params.canonical_json(card), encoding="utf-8")
        # These stand in files of their own, since training depends on the card.
        (folder / "settings.json").write_text(params.canonical_json(data.model_dump()), encoding="utf-8")
        equal = duplicates.find(
            digests, labels, indices, source.classes, lambda index: _name(data, source, int(kept[index]))
        )
        (folder / "duplicates.json").write_text(params.canonical_json(equal), encoding="utf-8")
    found = duplicates.told(equal, {part: len(chosen) for part, chosen in indices.items()})
    if found:
        advice = f"Remove the copies, if the pictures are your own; {out / 'duplicates.json'} names some."
        print(f"warning: {'; '.join(found.values())}. {advice}", file=sys.stderr)


def prepare(
    image: Image.Image,
    image_size: list[int] | None,
    color: Literal["rgb", "grayscale"],
    resize: Resize,
) -> np.ndarray:
    """An opened picture as the uint8 array (height, width, channels) that networks are fed.

    It is turned as its EXIF orientation says, what is transparent becomes white, 16 bits of grey become 8.

    Args:
        image_size: [height, width]; None keeps the picture's own.
        resize: what becomes of another aspect ratio: `stretch` changes it, `pad` keeps it between black bars, `crop`
            keeps it and cuts off what is too much on both sides.
    Raises:
        OSError, ValueError, …: whatever Pillow raises for a broken picture.
    """
    if image_size:
        # JPEGs come out of the decoder at a half, a quarter or an eighth, twice too large at least: much faster.
        image.draft(None, (2 * max(image_size), 2 * max(image_size)))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels, of which nobody says what is white")
    if image.mode.startswith("I"):  # 16 bits, or 16 bits in 32
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if color == "grayscale" else "RGB")
    if image_size and image.size != (image_size[1], image_size[0]):
        image = _resize(image, image_size, resize)
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], -1)


def reason(error: Exception) -> str:
    """What Pillow says of a broken picture, in words that a user knows."""
    if isinstance(error, UnidentifiedImageError):
        return "a file in no format that Pillow knows"
    return str(error) or type(error).__name__


def split(
    labels: np.ndarray, given_test: np.ndarray | None, classes: list[str], data: params.Data
) -> dict[str, np.ndarray]:
    """Sorted indices of train, validation and test: stratified by class, from `data.split.seed` alone.

    Args:
        labels: int (n,).
        given_test: bool (n,), the given test part, which `test: given` keeps as it is; None where there is none.
    Raises:
        LabError: when a class has too few pictures to be in every part.
    """
    everything, settings = np.arange(len(labels)), data.split
    if settings.test == "given":
        if given_test is None:
            raise LabError(
                f"data.split.test: Expected a fraction like 0.2, as {data.dataset} has no given test part. "
                'Found: "given".'
            )
        test, rest = everything[given_test], everything[~given_test]
        names, size = ["train", "validation"], settings.validation * len(rest)
    else:
        test, rest, names, size = None, everything, list(PARTS), settings.validation * len(labels)
    needed = len(names)
    for label, count in enumerate(np.bincount(labels[rest], minlength=len(classes))):
        if count < needed:
            raise LabError(
                f"data.split: Expected at least {needed} pictures of each class, one each for {', '.join(names)}. "
                f"Found: {classes[label]}, {count}."
            )
    if test is None:
        rest, test = _stratified(rest, labels, float(settings.test) * len(labels), "test", data)
    train, validation = _stratified(rest, labels, size, "validation", data)
    parts = {"train": train, "validation": validation, "test": test}
    for part, chosen in parts.items():
        counts = np.bincount(labels[chosen], minlength=len(classes))
        if not counts.all():
            label = int(counts.argmin())
            raise LabError(
                f"data.split: Expected at least one picture of each class in each part. Found: none of "
                f"{classes[label]} ({(labels == label).sum()} pictures in all) in {part} ({len(chosen)} pictures). "
                "Add pictures of this class or make that part larger."
            )
        if data.limit:
            parts[part] = _limited(chosen, labels, data.limit, [settings.seed, PARTS.index(part)])
    return parts


def _stratified(
    indices: np.ndarray, labels: np.ndarray, size: float, part: str, data: params.Data
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split  # takes a second, which `ablab predict` need not spend

    count, classes = round(size), len(np.unique(labels))
    if not classes <= count <= len(indices) - classes:
        raise LabError(
            f"data.split: Expected a part with a picture of each of {classes} classes, and as many left. "
            f"Found: {count} of {len(indices)} pictures for {part}."
        )
    rest, taken = train_test_split(indices, test_size=count, stratify=labels[indices], random_state=data.split.seed)
    return np.sort(rest), np.sort(taken)


def _limited(indices: np.ndarray, labels: np.ndarray, limit: int, seed: list[int]) -> np.ndarray:
    kept = [
        np.random.default_rng([*seed, int(label)]).permutation(indices[labels[indices] == label])[:limit]
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(kept))


def _decoded(data: params.Data, source: datasets.Source, index: int) -> np.ndarray:
    image_size = data.image_size or source.image_size
    return prepare(source.load(index), image_size, data.color or source.color, data.resize)


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


def _unreadable(data: params.Data, source: datasets.Source) -> dict[int, str]:
    """The pictures that can't be decoded, in order, and why; told on standard error.

    The split needs them before the first picture is written, and keeping what is decoded here would take memory or disk
    for all pictures. So with `unreadable: skip` each picture is decoded twice.
    """

    def check(index: int) -> str | None:
        try:
            _decoded(data, source, index)
        except UNREADABLE as error:
            if isinstance(error, zipfile.BadZipFile) or getattr(error, "errno", None):
                # The packed pictures or the disk are damaged, not the user's picture.
                raise LabError(f"{source.name(index)}: Expected a picture. Found: {reason(error)}") from None
            return reason(error)
        return None

    found: dict[int, str] = {}
    total, block = len(source.labels), 1024
    progress = tqdm(total=total, unit=" pictures", desc="check", disable=None)
    with ThreadPoolExecutor(_threads()) as pool, progress:
        for start in range(0, total, block):
            indices = range(start, min(start + block, total))
            found |= {index: why for index, why in zip(indices, pool.map(check, indices), strict=True) if why}
            progress.update(len(indices))
    for index, why in list(found.items())[:NAMED]:
        print(f"left out: {source.name(index)}: {why}", file=sys.stderr)
    if len(found) > NAMED:
        print(f"left out: {len(found) - NAMED} more unreadable pictures, {len(found)} in all", file=sys.stderr)
    return found


def _skipped(data: params.Data, source: datasets.Source, indices: list[int]) -> dict[str, Any]:
    """What the data card says of the pictures that were left out."""
    counts = np.bincount(source.labels[indices], minlength=len(source.classes)).tolist()
    return {
        "count": len(indices),
        "class_counts": {label: count for label, count in zip(source.classes, counts, strict=True) if count},
        "first": [_name(data, source, index) for index in indices[:NAMED]],
    }


def _name(data: params.Data, source: datasets.Source, index: int) -> str:
    """What a file calls a picture: where the pictures lie may differ between machines, and the file must not."""
    return source.name(index).removeprefix(f"{data.path}: ")


def _write_images(
    data: params.Data, source: datasets.Source, kept: np.ndarray, file: Path, digest
) -> tuple[list[int], np.ndarray]:
    """Decode the kept pictures into a .npy file, a block at a time; returns their shape and a digest of each."""

    def decoded(index: int) -> np.ndarray:
        try:
            return _decoded(data, source, index)
        except UNREADABLE as error:
            raise LabError(
                f"{source.name(index)}: Expected a picture. Found: {reason(error)}. "
                "Replace it, or leave out all such pictures with `unreadable: skip` under `data`."
            ) from None

    first = decoded(int(kept[0]))

    def checked(index: int) -> np.ndarray:
        array = decoded(index)
        if array.shape != first.shape:
            sizes = [f"{source.name(i)}, {a.shape[0]}×{a.shape[1]}" for i, a in ((int(kept[0]), first), (index, array))]
            raise LabError(
                "data.image_size: Expected [height, width], as the pictures differ in size. "
                f"Found: null, with {' and '.join(sizes)} pixels."
            )
        return array

    shape = (len(kept), *first.shape)
    digest.update(json.dumps(shape).encode())
    block, threads = max(1, BLOCK_BYTES // first.nbytes), _threads()
    digests = np.empty(len(kept), duplicates.DIGEST)

    def fill(pictures: np.ndarray, start: int, offset: int) -> None:
        for place in range(offset, len(pictures), threads):
            pictures[place] = checked(int(kept[start + place]))
            digests[start + place] = duplicates.digest(pictures[place])

    progress = tqdm(total=len(kept), unit=" pictures", desc="preprocess", disable=None)
    with file.open("wb") as opened, ThreadPoolExecutor(threads) as pool, progress:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(opened, header)
        for start in range(0, len(kept), block):
            pictures = np.empty((min(block, len(kept) - start), *first.shape), np.uint8)
            list(pool.map(fill, repeat(pictures), repeat(start), range(threads)))
            digest.update(pictures)
            opened.write(pictures.data)
            progress.update(len(pictures))
    return list(first.shape), digests


def _resize(image: Image.Image, image_size: list[int], resize: str) -> Image.Image:
    # Pillow's bilinear filter widens when it shrinks a picture: that is the antialiasing.
    (height, width), filter_ = image_size, Image.Resampling.BILINEAR
    if resize == "stretch":
        return image.resize((width, height), filter_)
    if resize == "crop":
        return ImageOps.fit(image, (width, height), filter_)
    scale = min(width / image.width, height / image.height)
    inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), filter_)
    padded = Image.new(image.mode, (width, height))
    padded.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return padded


# What Pillow's decoders raise for files that are not what they claim to be.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError),
)
