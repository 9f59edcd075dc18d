"""The user's own pictures: a folder or an archive with one folder a class, or `train/<class>` and `test/<class>`.

The raw data is one uncompressed zip file of the pictures as they are: tens of thousands of small files would cost DVC
minutes to hash, cache and check out.
"""

import difflib
import functools
import io
import math
import os
import shutil
import sys
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from PIL import Image

from ablation_lab import files, params
from ablation_lab.datasets.source import Source, Spec
from ablation_lab.errors import LabError

SPEC: Spec | None = None
PICTURES = "pictures.zip"
# fmt: off
SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm",
    ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
# An archive can claim anything; these are far beyond any study, and the disk's free space is a bound of its own.
MOST_PICTURES = 5_000_000
MOST_BYTES = 500_000_000  # of one picture
MOST_UNPACKED = 200  # times an archive's own size: pictures are packed already, a blank one packs a thousandfold
HARMLESS = 100_000_000  # bytes that any archive may unpack to
MOST_HEADER = 1_000_000  # bytes of a tar file's note about a member
LAYOUT = "one folder a class, or train/<class> and test/<class>"

_DAMAGED = (
    *(OSError, EOFError, KeyError, RuntimeError, NotImplementedError, UnicodeError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
)

# Headers whose content is read into memory: a long name, or what else is to be known of the next member.
_NOTES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)

# A file or folder on the way in: its path, its size in bytes, and how to read so many of them (None for a folder).
Member = tuple[str, int, Callable[[int], bytes] | None]


def locate(data: params.Data) -> Path:
    """Where `data.path` is: a relative one is looked up under the root, then under `ABLAB_DATA_MIRROR`.

    Raises:
        LabError: when there is nothing, with the places that were tried.
    """
    what = f"a folder or an archive (.zip, .tar, .tar.gz) of pictures, with {LAYOUT}"
    if not data.path:
        raise LabError(f"data.path: Expected {what}. Found: nothing.")
    mirror = files.mirror()
    folders = [files.root()] + ([Path(mirror)] if mirror and not files.is_url(mirror) else [])
    places = list(dict.fromkeys(folder / Path(data.path).expanduser() for folder in folders))
    for place in places:
        if place.exists():
            return place
    raise LabError(
        f"data.path: Expected {what}. Found: nothing at {' or '.join(map(str, places))}. "
        f"Put {Path(data.path).name} there, or set ABLAB_DATA_MIRROR to the folder that holds {data.path}."
    )


def download(data: params.Data, destination: Path) -> None:
    """Pack the pictures into one file, without unpacking anything to the disk.

    Raises:
        LabError: when there is no such folder or archive, when it is damaged, when it unpacks to what no study has, or
            when its layout is not one of those above.
    """
    found = locate(data)
    folders: list[str] = []
    names: set[str] = set()
    ignored = Counter[str]()
    with files.whole(destination) as part, zipfile.ZipFile(part / PICTURES, "w") as packed:
        for path, content in _pictures(found, shutil.disk_usage(part).free, folders, ignored):
            # A fixed date and mode, so that equal pictures give equal files.
            info = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            packed.writestr(info, content)
            names.add(path)
        if ignored:  # said first, since it may be why there are no pictures
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items()))
            print(f"{found}: ignored what is no picture by its suffix: {kinds}", file=sys.stderr)
        _layout(sorted(names), folders, str(found))


def _pictures(found: Path, free: int, folders: list[str], ignored: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of every picture; folders and the suffixes of other files are noted on the way.

    Args:
        free: bytes that may be written.
    """
    names: set[str] = set()
    at, unpacked = "the start", 0
    most = math.inf if found.is_dir() else max(HARMLESS, MOST_UNPACKED * found.stat().st_size)
    try:
        for at, size, read in _members(found):
            path = PurePosixPath(at)
            if path.is_absolute() or ".." in path.parts:
                raise LabError(f"{found}: Expected paths inside the archive. Found: {at}.")
            unpacked += size  # of any file: a tar file is unpacked up to the next member
            if unpacked > most:
                expected = f"an archive that unpacks to at most {MOST_UNPACKED} times its own size"
                advice = "If it is what it should be, unpack it and set data.path to the folder."
                raise LabError(f"{found}: Expected {expected}. Found: {unpacked:,} bytes up to {at}. {advice}")
            if any(one.startswith(".") or one == "__MACOSX" for one in path.parts):
                continue
            if read is None:
                folders.append(str(path))
            elif path.suffix.lower() not in SUFFIXES:
                ignored[path.suffix.lower() or path.name] += 1
            elif str(path) not in names:
                free -= size
                if size > MOST_BYTES or len(names) >= MOST_PICTURES or free < 0:
                    expected = f"at most {MOST_PICTURES:,} pictures of {MOST_BYTES:,} bytes that fit on the disk"
                    raise LabError(f"{found}: Expected {expected}. Found: {size:,} bytes, {at}.")
                str(path).encode()  # else no archive could hold it
                content = read(size + 1)
                if len(content) != size:
                    raise LabError(f"{found}: Expected {size:,} bytes of {at}, as announced. Found: another number.")
                names.add(str(path))
                yield str(path), content
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0].rstrip(":.")
        expected = "a folder that can be read or a whole .zip, .tar or .tar.gz file without a password"
        raise LabError(f"{found}: Expected {expected}. Found: {reason} (at {at}).") from None


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def open_raw(data: params.Data, raw: Path) -> Source:
    try:
        packed = zipfile.ZipFile(raw / PICTURES)  # stays open as long as the source is used
    except (OSError, zipfile.BadZipFile) as error:
        again = "Get it again with `dvc repro --force --single-item download`."
        raise LabError(f"{raw / PICTURES}: Expected the packed pictures. Found: {error}. {again}") from None
    members = {info.filename: info for info in packed.infolist()}
    layout = _layout(sorted(members), [], str(data.path))
    infos = [members[name] for name, _, _ in layout]
    counts = Counter(label for _, label, _ in layout)
    if data.pictures and counts != data.pictures:
        raise LabError(
            f"{data.path}: Expected as many pictures of each class as data.pictures says: {_counted(data.pictures)}. "
            f"Found: {_counted(counts)}. Drop data.pictures if these are the right ones."
        )
    classes = sorted(counts)
    index_of = {label: index for index, label in enumerate(classes)}
    given = any(part == "test" for _, _, part in layout)
    lock = threading.Lock()

    def load(index: int) -> Image.Image:
        with lock:
            content = packed.read(infos[index])
        return Image.open(io.BytesIO(content))

    return Source(
        classes=classes,
        labels=np.array([index_of[label] for _, label, _ in layout], np.int64),
        test=np.array([part == "test" for _, _, part in layout]) if given else None,
        load=load,
        name=lambda index: f"{data.path}: {infos[index].filename}",
        color="grayscale" if data.color is None and all(_is_grey(load, i) for i in range(len(infos))) else "rgb",
        image_size=None,
    )


def _is_grey(load: Callable[[int], Image.Image], index: int) -> bool:
    """Whether a picture is stored without colours, with transparency or not; only its header is decoded."""
    try:
        mode = load(index).mode
    except Exception:  # the stage that decodes it says what is wrong
        return True
    return mode in ("1", "L", "LA", "La") or mode.startswith("I")


def name(data: params.Data) -> str:
    """The folder's or archive's name without the suffixes of an archive."""
    stem = Path(str(data.path)).name
    for suffix in (".zip", ".tgz", ".gz", ".bz2", ".xz", ".tar"):
        stem = stem.removesuffix(suffix)
    return stem


def _layout(names: list[str], folders: list[str], where: str) -> list[tuple[str, str, str]]:
    """Picture, class and part (`train`, `test` or none) of every sorted path; `folders` may be empty ones."""
    if not names:
        raise LabError(f"{where}: Expected pictures ({', '.join(sorted(SUFFIXES))}), {LAYOUT}. Found: none.")
    paths = [PurePosixPath(name).parts for name in names]
    inner = [PurePosixPath(folder).parts for folder in folders]
    tops = {path[0] for path in paths}
    if len(tops) == 1 and min(map(len, paths)) > 2:  # one folder around everything
        paths, inner = [path[1:] for path in paths], [folder[1:] for folder in inner if folder[0] in tops]
        tops = {path[0] for path in paths}
    tops |= {folder[0] for folder in inner if folder}
    depth = 3 if {"train", "test"} <= tops else 2
    for name, path in zip(names, paths, strict=True):
        if len(path) != depth or (depth == 3 and path[0] not in ("train", "test")):
            hint = ""
            if "train" in tops and (other := tops & {"val", "valid", "validation"}):
                hint = f" The validation part comes out of train/: move {min(other)}/ there, or call it test/."
            raise LabError(
                f"{where}: Expected {LAYOUT}, and all pictures in the folders of classes. Found: {name}.{hint}"
            )
    empty = {folder for folder in inner if len(folder) == depth - 1} - {path[:-1] for path in paths}
    if depth == 3:
        _same_classes({(one[0], one[1]) for one in [*paths, *inner] if len(one) > 1}, where)
    if empty:
        raise LabError(f"{where}: Expected pictures in every class folder. Found: none in {'/'.join(min(empty))}/.")
    classes = sorted({path[-2] for path in paths})
    if len(classes) < 2:
        raise LabError(f"{where}: Expected at least two classes, {LAYOUT}. Found: one, {classes[0]}.")
    return [(name, path[-2], path[0] if depth == 3 else "") for name, path in zip(names, paths, strict=True)]


def _same_classes(folders: set[tuple[str, str]], where: str) -> None:
    classes = {part: {label for other, label in folders if other == part} for part in ("train", "test")}
    for part, other in (("test", "train"), ("train", "test")):
        for label in sorted(classes[part] - classes[other]):
            known = sorted(classes[other])
            near = difflib.get_close_matches(label, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise LabError(
                f"{where}: Expected the same classes in train/ and test/; {other}/ has {', '.join(known) or 'none'}. "
                f"Found: {part}/{label}/.{hint}"
            )


def _members(path: Path) -> Iterator[Member]:
    if path.is_dir():
        return _folder_members(path)
    return _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path)


def _folder_members(top: Path) -> Iterator[Member]:
    for folder, folders, found in os.walk(top, followlinks=True):  # class folders are often links
        inside = Path(folder).relative_to(top)
        folders[:] = [] if len(inside.parts) > 3 else sorted(one for one in folders if not one.startswith("."))
        yield from ((str(PurePosixPath(inside, one)), 0, None) for one in folders)
        for one in sorted(found):
            file = Path(folder, one)
            if file.is_file():
                yield str(PurePosixPath(inside, one)), file.stat().st_size, functools.partial(_read, file)
            elif file.suffix.lower() in SUFFIXES and not one.startswith("."):
                raise LabError(f"{top}: Expected plain files. Found: {inside / one}, a link to nothing or a device.")


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.replace("\\", "/")  # written so by some programs on Windows
            # Of the other methods Python unpacks as much as there is, whatever was announced.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"compression method {info.compress_type}, where only deflate is read")
            yield name, info.file_size, None if info.is_dir() else functools.partial(_zip_read, archive, info)


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, tarinfo=_Header) as archive:
        for info in archive:
            if info.isdir():
                yield info.name, 0, None
            elif info.isreg() or info.islnk():  # a hard link is another name of a file in the archive
                size = archive.getmember(info.linkname).size if info.islnk() else info.size
                yield info.name, size, functools.partial(_tar_read, archive, info)
            elif Path(info.name).suffix.lower() in SUFFIXES:
                raise LabError(f"{path}: Expected plain files. Found: {info.name}, a link or a device.")


def _read(file: Path, most: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(most)


def _zip_read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    with archive.open(info) as opened:
        return opened.read(most)


def _tar_read(archive: tarfile.TarFile, info: tarfile.TarInfo, most: int) -> bytes:
    opened = archive.extractfile(info)
    assert opened is not None  # it is for folders and devices only
    return opened.read(most)


class _Header(tarfile.TarInfo):
    """A member's header; tarfile takes a damaged or a missing one for the end of the archive, and any size for true."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):
                raise  # an empty block is the end
            raise tarfile.ReadError(f"{error}, before the end of the archive") from None
        if info.size < 0 or (info.size > MOST_HEADER and info.type in _NOTES):
            raise tarfile.ReadError(f"a header that announces {info.size:,} bytes")
        return info
