"""Files from elsewhere: every source in turn, each file checked against its sha256, all of them or none."""

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import h5py
import pooch
import requests

from ablation_lab import errors, files
from ablation_lab.errors import LabError

TIMEOUT = (4, 10)  # seconds until connected, seconds without a byte
ATTEMPTS = 3
NO_ROOM = (*errors.FULL, errno.EFBIG)
PAUSE = 0.5  # seconds before the second attempt, twice as many before the third


class _Fault(Exception):
    """Why a source has not given a file; `lost` when it makes no sense to ask this source for others."""

    def __init__(self, text: str, lost: bool = False):
        super().__init__(text)
        self.lost = lost


def fetch(
    sums: Mapping[str, str | None],
    folder: str,
    sources: Mapping[str, str],
    destination: Path,
    advice: str,
    named: Mapping[str, str] | None = None,
) -> None:
    """Fill `destination` with files, the same bytes from whatever source.

    What is there already and right is kept. Then come `ABLAB_DATA_MIRROR`, the cache of earlier downloads
    (`ABLAB_CACHE`, else the platform's cache folder) and the sources in their order.

    Args:
        sums: file name to sha256, or to `md5:…` or `sha256:…`; None where it isn't known.
        folder: where the files lie below a mirror and in the cache.
        sources: what a source is called, to its base URL or folder.
        destination: replaced as a whole.
        advice: what else the user can do when all sources fail.
        named: what a file is called at the sources, where that differs.
    Raises:
        LabError: with what happened at each source.
    """
    cache = files.cache() / folder
    near = files.mirror()
    places = {
        "": str(destination),
        **({"ABLAB_DATA_MIRROR": f"{near}/{folder}"} if near else {}),
        "the cache": str(cache),
        **sources,
    }
    faults = []
    with files.whole(destination) as part:
        for label, place in places.items():
            for name, wanted in sums.items():
                if (part / name).exists():
                    continue
                try:
                    there = (named or {}).get(name, name) if label in sources else name
                    _get(f"{place}/{there}", part / name, wanted)
                except _Fault as fault:
                    (part / name).unlink(missing_ok=True)
                    if label not in ("", "the cache"):
                        faults.append(f"{label}: {fault}")
                    if fault.lost:
                        break
                else:
                    if label:
                        print(f"{name}: from {label}, {place}", file=sys.stderr)
                    if label in sources and files.is_url(place):
                        with suppress(OSError):  # a full or read-only cache is no reason to fail
                            _store(part / name, cache / name)
        missing = [name for name in sums if not (part / name).exists()]
        if missing:
            tried = faults if near else ["ABLAB_DATA_MIRROR: not set", *faults]
            listed = "".join(f"\n         {fault}" for fault in tried)
            raise LabError(
                f"Expected {', '.join(sums)} with the right hash from one of the sources. "
                f"Found no good {', '.join(missing)}:{listed}\n"
                f"       Put the official files into a folder as {folder}/<file> and set ABLAB_DATA_MIRROR to that "
                f"folder (or to a base URL that serves them), or {advice}."
            )
    for passed_over in faults:
        print(f"warning: {passed_over}", file=sys.stderr)


def keep(name: str, wanted: str | None, url: str, folder: str, also: Path) -> None:
    """Fetch a file into the cache, `ABLAB_CACHE` or the platform's, where it is looked for under the same name.

    Args:
        name: the file's.
        wanted: its hash, as in `fetch`.
        url: its official address.
        folder: where it lies below a mirror and in the cache.
        also: another folder where it may be.
    Raises:
        LabError: as `fetch`.
    """
    host, _, there = url.rpartition("/")
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / folder
        fetch({name: wanted}, folder, {host: host}, found, f"into {also}", {name: there})
        _store(found / name, files.cache() / folder / name)


def _get(place: str, target: Path, wanted: str | None) -> None:
    """Copy or download one file and check it; a broken download is tried again."""
    if not files.is_url(place):
        try:
            shutil.copyfile(place, target)
        except FileNotFoundError:
            folder = Path(place).parent
            if not folder.is_dir():
                raise _Fault(f"{folder}: no such folder", lost=True) from None
            raise _Fault(f"{place}: no such file") from None
        except OSError as error:
            if error.errno in NO_ROOM:
                raise OSError(error.errno, error.strerror, str(target)) from None  # no fault of the source's
            raise _Fault(f"{place}: {error.strerror}") from None
        return _check(place, target, wanted)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download(place, target)
            return _check(place, target, wanted)
        except requests.ConnectTimeout:
            raise _Fault(f"{place}: no connection within {TIMEOUT[0]} s", lost=True) from None
        except requests.HTTPError as error:
            fault = _Fault(f"{place}: HTTP {str(error).partition(' for url')[0]}")
            if error.response is None or error.response.status_code < 500:
                raise fault from None
        except requests.RequestException as error:
            lost = isinstance(error, (requests.ConnectionError, requests.Timeout))
            fault = _Fault(f"{place}: {_reason(error)}", lost)
        except _Fault as refused:
            fault = refused
        if attempt < ATTEMPTS:
            time.sleep(PAUSE * attempt)
    raise fault


def _download(url: str, target: Path) -> None:
    opened: list[requests.Response] = []
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=1 << 16,
        timeout=TIMEOUT,
        # A server that packs what it sends would change the bytes of a .gz file on their way.
        headers={"Accept-Encoding": "identity"},
        # pooch leaves the connection open when the server's answer is an error.
        hooks={"response": lambda response, **_: opened.append(response)},
    )
    try:
        downloader(url, str(target), None)
    finally:
        for response in opened:
            response.close()


def _check(place: str, file: Path, wanted: str | None) -> None:
    if wanted is None:
        return _check_hdf5(place, file)
    algorithm, _, expected = wanted.rpartition(":")
    algorithm = algorithm or "sha256"
    found = pooch.file_hash(str(file), alg=algorithm)
    if found != expected:
        with file.open("rb") as opened:
            start = opened.read(256).lstrip().lower()
        kind = ", an HTML page" if start.startswith((b"<!doctype html", b"<html")) else ""
        raise _Fault(
            f"{place}: refused. Expected {algorithm} {expected}. Found: {algorithm} {found} "
            f"({file.stat().st_size:,} bytes{kind}). Put the official {file.name} there, or use another source."
        )


def _check_hdf5(place: str, file: Path) -> None:
    """Whether a file of weights without a known hash is whole, at least."""
    try:
        h5py.File(file, "r").close()
    except OSError as error:
        raise _Fault(f"{place}: refused. Expected an HDF5 file. Found: {error}") from None


def _store(file: Path, cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_name(f"{cached.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(file, part)
        part.replace(cached)
    finally:
        part.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What requests wraps in its pools and tuples, in a few words."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    error = getattr(error, "reason", error)
    text = str(error.args[0] if error.args else error)
    return text.partition("): ")[2] or text
