import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from PIL import Image

from ablation_lab import datasets, params
from ablation_lab.datasets import cifar10, digits, fashion_mnist, fetch, image_folder
from ablation_lab.errors import LabError

REPOSITORY = Path(__file__).resolve().parents[1]
FASHION = params.Data(dataset="fashion_mnist", path=None)
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No mirror, no cache, no network, no project around."""
    for name in ("ABLAB_DATA_MIRROR", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ABLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"the official host": "http://127.0.0.1:9", "Debian": "/nowhere"})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def official(monkeypatch):
    """Four small files in place of the official ones: 40 + 20 pictures."""
    generator = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 40), ("t10k", 20)):
        files[f"{part}-images-idx3-ubyte.gz"] = idx(generator.integers(0, 256, (count, 28, 28), np.uint8))
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8) % 10)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(fashion_mnist, "FILES", sums)
    return files


@pytest.fixture
def mirror(official, tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name, content in official.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("ABLAB_DATA_MIRROR", str(folder.parent))
    return folder


@pytest.fixture
def host(official):
    """A web server; `host.answer(name)` gives (status, headers, body) and can be replaced."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            status, headers, body = server.answer(self.path.rpartition("/")[2])
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(body)
                if server.stall:
                    self.wfile.flush()
                    server.released.wait(10)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.stall, server.released = [], False, threading.Event()
    server.answer = lambda name: (200, {"Content-Length": str(len(official[name]))}, official[name])
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(data, destination):
    """The message of a download that fails, and that nothing lies under its name."""
    with pytest.raises(LabError) as error:
        datasets.download(data, destination)
    assert not destination.exists()
    assert not destination.with_name(destination.name + ".part").exists()
    return str(error.value)


def test_digits_are_the_same_bytes_twice(tmp_path):
    data = params.Data(dataset="digits", path=None)
    datasets.download(data, tmp_path / "one")
    datasets.download(data, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    source = datasets.open_raw(data, tmp_path / "one")
    assert source.classes == list(digits.SPEC.classes)
    assert len(source.labels) == digits.SPEC.counts["all"]
    assert source.labels[:3].tolist() == [0, 1, 2]
    pictures = np.stack([np.asarray(source.load(index)) for index in range(100)])
    assert (pictures.min(), pictures.max()) == (0, 255)
    assert source.test is None


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_spec_agrees_with_params(name):
    spec = datasets.spec(params.Data(dataset=name, path=None, image_size=[10, 12], color="rgb"))
    assert spec is None if name == "image_folder" else spec.image_shape == (10, 12, 3)


def test_fashion_mnist_opens_in_official_order(mirror, tmp_path):
    datasets.download(FASHION, tmp_path / "raw")
    source = datasets.open_raw(FASHION, tmp_path / "raw")
    assert source.test.tolist() == [False] * 40 + [True] * 20
    assert source.labels[38:42].tolist() == [8, 9, 0, 1]
    assert source.load(59).size == (28, 28)
    assert (source.color, source.image_size) == ("grayscale", [28, 28])


def test_raw_files_are_the_same_from_every_source(official, mirror, host, monkeypatch, tmp_path):
    datasets.download(FASHION, tmp_path / "folder")
    monkeypatch.setenv("ABLAB_DATA_MIRROR", host.url + "/")
    datasets.download(FASHION, tmp_path / "url")
    assert host.asked[0] == "/fashion-mnist/train-images-idx3-ubyte.gz"
    monkeypatch.delenv("ABLAB_DATA_MIRROR")
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"the official host": host.url})
    datasets.download(FASHION, tmp_path / "official")
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"the official host": "http://127.0.0.1:9", "Debian": str(mirror)})
    monkeypatch.setenv("ABLAB_CACHE", str(tmp_path / "empty"))
    datasets.download(FASHION, tmp_path / "debian")
    for place in ("folder", "url", "official", "debian"):
        assert contents(tmp_path / place) == official


def test_downloads_are_cached_and_what_is_there_is_kept(official, host, monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"the official host": host.url})
    datasets.download(FASHION, tmp_path / "raw")
    assert len(host.asked) == 4
    datasets.download(FASHION, tmp_path / "raw")
    datasets.download(FASHION, tmp_path / "again")
    assert len(host.asked) == 4
    (tmp_path / "cache" / "fashion-mnist" / TRAIN_LABELS).write_bytes(b"broken")
    datasets.download(FASHION, tmp_path / "repaired")
    assert len(host.asked) == 5
    assert contents(tmp_path / "repaired") == contents(tmp_path / "cache" / "fashion-mnist") == official


def truncated(content):
    return 200, {"Content-Length": str(len(content))}, content[: len(content) // 2]


def cut_without_length(content):
    return 200, {}, content[: len(content) // 2]


def altered(content):
    return 200, {}, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def error_page(content):
    return 200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><title>Sorry</title>"


def redirected(content):
    return 302, {"Location": "/sorry", "Content-Length": "0"}, b""


def not_found(content):
    return 404, {}, b"no"


def unavailable(content):
    return 503, {}, b"later"


@pytest.mark.parametrize(
    ("fault", "message", "attempts"),
    [
        (truncated, "Connection broken: IncompleteRead", 3),
        (cut_without_length, "refused. Expected sha256 ", 3),
        (altered, "refused. Expected sha256 ", 3),
        (error_page, "(35 bytes, an HTML page). Put the official train-labels-idx1-ubyte.gz there", 3),
        (redirected, "(35 bytes, an HTML page). Put the official train-labels-idx1-ubyte.gz there", 3),
        (not_found, "HTTP 404 Client Error: Not Found", 1),
        (unavailable, "HTTP 503 Server Error: Service Unavailable", 3),
    ],
)
def test_faulty_mirror_is_named_and_passed_over(fault, message, attempts, official, mirror, host, monkeypatch, capsys):
    good = host.answer
    bad = {TRAIN_LABELS: fault(official[TRAIN_LABELS]), "sorry": error_page(b"")}
    host.answer = lambda name: bad[name] if name in bad else good(name)
    monkeypatch.setenv("ABLAB_DATA_MIRROR", host.url)
    text = refused(FASHION, mirror.parent / "raw")
    assert f"Found no good {TRAIN_LABELS}:" in text
    assert f"ABLAB_DATA_MIRROR: {host.url}/fashion-mnist/{TRAIN_LABELS}: " in text
    assert message in text
    if "sha256" in message:
        found = hashlib.sha256(fault(official[TRAIN_LABELS])[2]).hexdigest()
        assert f"Expected sha256 {fashion_mnist.FILES[TRAIN_LABELS]}. Found: sha256 {found} (" in text
    assert "the official host: http://127.0.0.1:9/" in text
    assert "Connection refused" in text
    assert "Debian: /nowhere: no such folder" in text
    assert "Put the official files into a folder as fashion-mnist/<file> and set ABLAB_DATA_MIRROR" in text
    assert "apt install dataset-fashion-mnist" in text
    assert sum(TRAIN_LABELS in path for path in host.asked) == attempts

    monkeypatch.setattr(fashion_mnist, "SOURCES", {"Debian": str(mirror)})
    datasets.download(FASHION, mirror.parent / "raw")
    assert contents(mirror.parent / "raw") == official
    error = capsys.readouterr().err
    assert message in error
    assert f"{TRAIN_LABELS}: from Debian, {mirror}" in error


def test_altered_file_in_mirror_folder(mirror, tmp_path):
    (mirror / TRAIN_LABELS).write_bytes(b"<html>")
    (mirror / "t10k-labels-idx1-ubyte.gz").unlink()
    text = refused(FASHION, tmp_path / "raw")
    assert "Found no good train-labels-idx1-ubyte.gz, t10k-labels-idx1-ubyte.gz:" in text
    assert f"{mirror}/{TRAIN_LABELS}: refused. Expected sha256 {fashion_mnist.FILES[TRAIN_LABELS]}. Found: sha" in text
    assert f"{mirror}/t10k-labels-idx1-ubyte.gz: no such file" in text


def test_stalled_and_dead_hosts_are_given_up_soon(official, host, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "TIMEOUT", (1, 0.2))
    host.stall = True
    host.answer = lambda name: (200, {"Content-Length": "9999999"}, b"x" * 100)
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"the official host": host.url, "another": "http://host.invalid"})
    before = time.monotonic()
    text = refused(FASHION, tmp_path / "raw")
    assert time.monotonic() - before < 5
    assert "Read timed out" in text
    assert "another: http://host.invalid/train-images-idx3-ubyte.gz: Failed to resolve" in text
    assert "ABLAB_DATA_MIRROR: not set" in text
    assert len(host.asked) == 3  # one file, not four: the host is given up


def test_failing_download_leaves_the_earlier_one(mirror, tmp_path):
    datasets.download(FASHION, tmp_path / "raw")
    before = contents(tmp_path / "raw")
    (tmp_path / "raw" / TRAIN_LABELS).write_bytes(b"altered")
    (mirror / TRAIN_LABELS).unlink()
    with pytest.raises(LabError):
        datasets.download(FASHION, tmp_path / "raw")
    assert contents(tmp_path / "raw") == before | {TRAIN_LABELS: b"altered"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "Expected a gzipped idx file. Found: Not a gzipped file"),
        (idx(np.zeros(5, np.uint8))[:-9], "Expected a gzipped idx file. Found: "),
        (gzip.compress(b"<html>", mtime=0), "Expected an idx file that starts with 00 00 08 01. Found: 3c 68 74 6d."),
        (gzip.compress(b"", mtime=0), "Expected an idx file that starts with 00 00 08 01. Found: nothing."),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc", mtime=0), "Expected 5 = 5 bytes. Found: 3 bytes."),
    ],
)
def test_broken_idx_file(content, message, tmp_path):
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(LabError, match=re.escape(f"{tmp_path / 'file.gz'}: {message}")):
        fashion_mnist.read_idx(tmp_path / "file.gz", 1)
    with pytest.raises(LabError, match="no such file"):
        fashion_mnist.read_idx(tmp_path / "missing.gz", 1)


def picture(color=(200, 100, 50), size=(6, 4), format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def write_folder(top, names):
    for number, name in enumerate(names):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(picture((number, 0, 0)) if name.endswith("g") else b"text")
    return top


def pack(top, archive, names=None, prefix=""):
    names = names or sorted(str(file.relative_to(top)) for file in top.rglob("*"))
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in names:
                packed.write(top / name, prefix + name)
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as packed:
            for name in names:
                packed.add(top / name, prefix + name, recursive=False)
    return archive


def folder_data(path):
    return params.Data(dataset="image_folder", path=str(path))


POOLED = ["cat/b.png", "cat/a10.png", "cat/a9.png", "dog/x.png", "dog/.hidden.png", "dog/notes.txt", ".git/x.png"]
GIVEN = ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"]


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("prefix", ["", "./", "around/"])
def test_image_folder_is_the_same_however_it_is_packed(kind, prefix, tmp_path, capsys):
    top = write_folder(tmp_path / "pictures", POOLED)
    path = top if kind == "folder" else pack(top, tmp_path / kind, prefix=prefix)
    data = folder_data(path)
    datasets.download(data, tmp_path / "raw")
    first = contents(tmp_path / "raw")
    assert "ignored what is no picture by its suffix: 1 .txt" in capsys.readouterr().err
    if kind == "folder":
        for file in top.rglob("*.png"):
            os.utime(file, (1, 1))  # dates are no content
    datasets.download(data, tmp_path / "raw")
    assert contents(tmp_path / "raw") == first
    source = datasets.open_raw(data, tmp_path / "raw")
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 0, 1]
    assert source.test is None
    assert [source.load(index).getpixel((0, 0))[0] for index in range(4)] == [1, 2, 0, 3]
    assert source.name(0).startswith(f"{path}: ")
    assert source.name(0).endswith("cat/a10.png")


def test_image_folder_with_given_parts_in_any_order(tmp_path):
    top = write_folder(tmp_path / "pictures", GIVEN)
    one = pack(top, tmp_path / "one.tar", sorted(GIVEN))
    other = pack(top, tmp_path / "other.tar", sorted(GIVEN, reverse=True))
    sources = []
    for path in (one, other):
        datasets.download(folder_data(path), tmp_path / "raw")
        sources.append(datasets.open_raw(folder_data(path), tmp_path / "raw"))
    for source in sources:
        assert source.test.tolist() == [True, True, False, False, False]
        assert source.labels.tolist() == [0, 1, 0, 0, 1]
        assert [source.load(index).getpixel((0, 0))[0] for index in range(5)] == [3, 4, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["readme.txt"], "Found: none."),
        (["cat/1.png"], "Expected at least two classes, one folder a class, or train/<class> and test/<class>. Found"),
        (["cat/1.png", "dog/1.png", "loose.png"], "all pictures in the folders of classes. Found: loose.png."),
        (["cat/1.png", "dog/young/1.png"], "all pictures in the folders of classes. Found: dog/young/1.png."),
        (["cat/1.png", "dog/notes.txt"], "Expected pictures in every class folder. Found: none in dog/."),
        ([*GIVEN, "test/birds/x.txt"], "train/ has cat, dog. Found: test/birds/."),
        ([*GIVEN[:-1], "test/dogs/1.png"], "train/ has cat, dog. Found: test/dogs/. Did you mean dog?"),
        ([*GIVEN, "train/bird/1.png"], "test/ has cat, dog. Found: train/bird/."),
        ([*GIVEN, "train/bird/1.txt", "test/bird/1.png"], "Found: none in train/bird/."),
        ([*GIVEN, "validation/cat/1.png"], "Found: validation/cat/1.png."),
        (["train/1.png", "test/1.png"], "Found: test/1.png."),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar.gz"])
def test_image_folder_with_another_layout_is_refused(names, message, kind, tmp_path):
    top = write_folder(tmp_path / "pictures", names)
    path = top if kind == "folder" else pack(top, tmp_path / kind)
    text = refused(folder_data(path), tmp_path / "raw")
    assert text.startswith(f"{path}: Expected ")
    assert message in text


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar.gz"])
def test_a_class_folder_without_anything_in_it_is_refused(kind, tmp_path):
    top = write_folder(tmp_path / "pictures", ["cat/1.png", "dog/1.png"])
    (top / "emu").mkdir()
    path = top if kind == "folder" else pack(top, tmp_path / kind)
    text = refused(folder_data(path), tmp_path / "raw")
    assert text == f"{path}: Expected pictures in every class folder. Found: none in emu/."


def test_image_folder_is_looked_up_under_root_then_mirror(tmp_path, monkeypatch):
    (tmp_path / "project" / "inside").mkdir(parents=True)
    (tmp_path / "project" / "dvc.yaml").touch()
    (tmp_path / "mirror").mkdir()
    monkeypatch.chdir(tmp_path / "project" / "inside")
    monkeypatch.setenv("ABLAB_DATA_MIRROR", str(tmp_path / "mirror"))
    data = folder_data("sets/scenes.tar.gz")
    text = refused(data, tmp_path / "raw")
    places = [tmp_path / folder / "sets/scenes.tar.gz" for folder in ("project", "mirror")]
    assert f"Found: nothing at {places[0]} or {places[1]}. Put scenes.tar.gz there, or set ABLAB_DATA_MIRROR" in text
    assert "one folder a class, or train/<class> and test/<class>" in text
    for place in reversed(places):
        place.parent.mkdir()
        place.touch()
        assert image_folder.locate(data) == place
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "mirror"))
    assert image_folder.locate(data) == places[1]
    assert image_folder.name(data) == "scenes"
    assert "data.path: Expected a folder" in refused(params.Data(dataset="image_folder", path=None), tmp_path / "raw")


def broken_archives(top):
    whole = pack(write_folder(top / "p", POOLED), top / "whole.tar.gz").read_bytes()
    zipped = bytearray(pack(top / "p", top / "whole.zip").read_bytes())
    start = zipped.index(b"cat/a10.png") + len("cat/a10.png")
    zipped[start : start + 8] = b"\xff" * 8
    plain = b"".join(header(name, 512) + bytes(512) for name in ("cat/1.png", "dog/1.png", "dog/2.png"))
    third = plain.index(b"dog/2.png")
    altered = plain[:third] + b"cat" + plain[third + 3 :]  # its checksum tells
    return {
        "cut.tar.gz": whole[: len(whole) // 2],
        "text.zip": b"hello",
        "altered.zip": bytes(zipped),
        "altered.tar": altered + bytes(1024),
        "cut_between.tar": plain[:third],  # no half file, just fewer of them
        "cut_inside.tar": plain[: third + 512 + 10],
    }


@pytest.mark.parametrize(
    "name", ["cut.tar.gz", "text.zip", "altered.zip", "altered.tar", "cut_between.tar", "cut_inside.tar"]
)
def test_damaged_archive(name, tmp_path):
    (tmp_path / name).write_bytes(broken_archives(tmp_path)[name])
    text = refused(folder_data(tmp_path / name), tmp_path / "raw")
    assert (
        "Expected a folder that can be read or a whole .zip, .tar or .tar.gz file without a password. Found: " in text
    )
    assert name in text


@pytest.mark.parametrize("name", ["../cat/1.png", "/cat/1.png", "cat/../../1.png"])
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_paths_out_of_an_archive_are_refused(name, kind, tmp_path):
    if kind == "a.zip":
        with zipfile.ZipFile(tmp_path / kind, "w") as packed:
            packed.writestr(name, picture())
    else:
        with tarfile.open(tmp_path / kind, "w") as packed:
            info = tarfile.TarInfo(name)
            info.size = len(picture())
            packed.addfile(info, io.BytesIO(picture()))
    assert f"Expected paths inside the archive. Found: {name}." in refused(
        folder_data(tmp_path / kind), tmp_path / "raw"
    )


def test_links_in_archives(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        for name, link, kind in [("a/1.png", "", tarfile.REGTYPE), ("b/1.png", "a/1.png", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 0 if link else len(picture())
            packed.addfile(info, io.BytesIO(picture()))
    datasets.download(folder_data(tmp_path / "a.tar"), tmp_path / "raw")
    assert datasets.open_raw(folder_data("a.tar"), tmp_path / "raw").load(1).size == (6, 4)
    with tarfile.open(tmp_path / "b.tar", "w") as packed:
        info = tarfile.TarInfo("a/1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(info)
    assert "Expected plain files. Found: a/1.png, a link" in refused(folder_data(tmp_path / "b.tar"), tmp_path / "out")


def zeros(archive, names, size):
    """An archive of a few kilobytes whose members are so many zeros."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in names:
                packed.writestr(name, bytes(size))
    else:
        with tarfile.open(archive, "w:gz") as packed:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = size
                packed.addfile(info, io.BytesIO(bytes(size)))
    return archive


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("suffix", ["png", "bin"])  # what is no picture has to be unpacked too, to get past it
def test_a_small_archive_that_unpacks_to_a_large_one_is_refused(kind, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "HARMLESS", 10_000_000)
    names = [f"{label}/{number}.{suffix}" for label in ("cat", "dog") for number in range(2)]
    path = zeros(tmp_path / kind, names, 4_000_000)
    assert path.stat().st_size < 50_000
    text = refused(folder_data(path), tmp_path / "raw")
    assert text == (
        f"{path}: Expected an archive that unpacks to at most 200 times its own size. Found: 12,000,000 bytes up to "
        f"dog/0.{suffix}. If it is what it should be, unpack it and set data.path to the folder."
    )
    monkeypatch.setattr(image_folder, "HARMLESS", 16_000_000)
    if suffix == "png":
        datasets.download(folder_data(path), tmp_path / "raw")


def test_a_zip_file_is_not_unpacked_beyond_what_it_announces(tmp_path):
    content = bytearray(zeros(tmp_path / "a.zip", ["cat/1.png", "dog/1.png"], 30_000_000).read_bytes())
    directory = content.index(b"PK\1\2")
    content[directory + 24 : directory + 28] = (100).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content)
    tracemalloc.start()
    try:
        text = refused(folder_data(tmp_path / "a.zip"), tmp_path / "raw")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert "Found: Bad CRC-32 for file 'cat/1.png' (at cat/1.png)." in text


def test_a_zip_file_that_announces_more_than_there_is(tmp_path):
    content = bytearray(pack(write_folder(tmp_path / "p", POOLED), tmp_path / "a.zip").read_bytes())
    directory = content.rindex(b"PK\1\2", 0, content.rindex(b"cat/a10.png"))
    content[directory + 24 : directory + 28] = (5000).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content)
    text = refused(folder_data(tmp_path / "a.zip"), tmp_path / "raw")
    assert text.endswith("Expected 5,000 bytes of cat/a10.png, as announced. Found: another number.")


def test_methods_that_unpack_without_a_bound_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as packed:
        packed.writestr("cat/1.png", picture())
    text = refused(folder_data(tmp_path / "a.zip"), tmp_path / "raw")
    assert "Found: compression method 12, where only deflate is read (at the start)." in text


def header(name, size, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("cat/1.png", 1 << 40, tarfile.XHDTYPE), "a header that announces 1,099,511,627,776 bytes"),
        (header("cat/1.png", 50_000_000, tarfile.GNUTYPE_LONGNAME), "a header that announces 50,000,000 bytes"),
        (header("cat/1.png", -1024) + bytes(1024), "a header that announces -1,024 bytes"),
        (header("cat/1.png", 900_000) + bytes(512), "unexpected end of data"),
        (header("cat/1.png", 1 << 40), "1,099,511,628,288 bytes up to cat/1.png"),
        (header("cat/1.png", 0, tarfile.LNKTYPE, "cat/1.png") + bytes(1024), "linkname 'cat/1.png' not found"),
        (
            header("cat/2.png", 0, tarfile.LNKTYPE, "cat/0.png")
            + header("cat/3.png", 0, tarfile.LNKTYPE, "cat/2.png")
            + bytes(1024),
            "Expected 0 bytes of cat/3.png, as announced. Found: another number.",
        ),
    ],
)
def test_sizes_that_a_tar_file_announces_are_not_believed(content, message, tmp_path):
    good = header("cat/0.png", 512) + bytes(512)
    (tmp_path / "a.tar").write_bytes(good + content)
    tracemalloc.start()
    try:
        assert message in refused(folder_data(tmp_path / "a.tar"), tmp_path / "raw")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    top = write_folder(tmp_path / "pictures", ["cat/1.png", "dog/1.png"])
    (top / "cat/.#1.png").symlink_to("user@host.1234")  # an editor's lock
    datasets.download(folder_data(top), tmp_path / "earlier")
    if kind == "link":
        (top / "cat/2.png").symlink_to("nowhere.png")
    else:
        os.mkfifo(top / "cat/2.png")
    text = refused(folder_data(top), tmp_path / "raw")
    assert text == f"{top}: Expected plain files. Found: cat/2.png, a link to nothing or a device."


def test_names_that_are_no_text(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as packed:
        info = tarfile.TarInfo("cät/1.png")
        info.size = len(picture())
        packed.addfile(info, io.BytesIO(picture()))
    assert "Found: 'utf-8' codec can't encode" in refused(folder_data(tmp_path / "a.tar"), tmp_path / "raw")


def test_enormous_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "MOST_BYTES", 10)
    write_folder(tmp_path / "p", POOLED)
    text = refused(folder_data(tmp_path / "p"), tmp_path / "raw")
    assert "at most 5,000,000 pictures of 10 bytes that fit on the disk. Found: " in text


def test_damaged_raw_file(tmp_path):
    with pytest.raises(LabError, match=r"pictures\.zip: Expected the packed pictures\. Found: .*No such file"):
        datasets.open_raw(folder_data("x"), tmp_path)
    (tmp_path / "pictures.zip").write_bytes(b"x")
    with pytest.raises(LabError, match=r"Found: File is not a zip file\. Get it again with `dvc repro --force"):
        datasets.open_raw(folder_data("x"), tmp_path)


def test_stages(tmp_path):
    study = tmp_path / "params.yaml"
    study.write_text(
        "study: {name: tiny, baseline: baseline}\ndata: {dataset: digits, path: null, split: {test: 0.2}}\n"
        "input: {}\nmodel: {builder: mlp}\ntrain: {}\nseeds: [0]\nvariants: {baseline: {}}\n"
    )

    def run(stage):
        command = [sys.executable, "-m", f"stages.{stage}"]
        bare = environment(tmp_path) | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)

    assert run("download").stdout == "data/raw: digits, 2 files, 0.1 MB\n"
    done = run("preprocess")
    expected = "data/processed: digits, 10 classes, pictures of 8×8×1; train 1258, validation 180, test 359\n"
    assert (done.stdout, done.returncode) == (expected, 0)
    study.write_text(study.read_text().replace("test: 0.2", "test: given"))
    failed = run("preprocess")
    assert failed.returncode == 1
    assert failed.stderr.startswith(
        "\nerror: data.split.test: Expected a fraction like 0.2, as digits has no given test"
    )
    assert "Traceback" not in failed.stderr


def cifar_archive(
    path: Path, per_batch: int = 4, leave_out: str = "", cut: int = 0, folder: str = "cifar-10-batches-bin"
) -> np.ndarray:
    """A small archive in the layout of CIFAR-10's binary release; returns its pictures."""
    random = np.random.default_rng(0)
    pictures = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for number, name in enumerate(("README.html", *cifar10.BATCHES)):
            planes = random.integers(0, 256, (per_batch, 3, 32, 32), dtype=np.uint8)
            labels = np.full((per_batch, 1), number % 10, np.uint8)
            content = np.concatenate([labels, planes.reshape(per_batch, -1)], axis=1).tobytes()
            if name != "README.html":
                pictures.append(planes.transpose(0, 2, 3, 1))
            if name != leave_out:
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(content) - cut
                tar.addfile(info, io.BytesIO(content[: info.size]))
    return np.concatenate(pictures)


def test_cifar10_is_read_from_the_binary_release(tmp_path, monkeypatch):
    pictures = cifar_archive(tmp_path / "mirror/cifar-10" / cifar10.ARCHIVE)
    sha256 = hashlib.sha256((tmp_path / "mirror/cifar-10" / cifar10.ARCHIVE).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "FILES", {cifar10.ARCHIVE: sha256})
    monkeypatch.setenv("ABLAB_DATA_MIRROR", str(tmp_path / "mirror"))
    data = params.Data(dataset="cifar10", path=None)
    datasets.download(data, tmp_path / "raw")
    source = datasets.open_raw(data, tmp_path / "raw")
    assert source.classes[3] == "cat"
    assert source.labels.tolist() == [label for label in range(1, 7) for _ in range(4)]
    assert source.test is not None and source.test.tolist() == [False] * 20 + [True] * 4
    for index in (0, 23):
        np.testing.assert_array_equal(np.asarray(source.load(index)), pictures[index])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"leave_out": "test_batch.bin"}, r"Expected cifar-10-batches-bin/test_batch\.bin of records of 3073 bytes"),
        ({"cut": 1}, r"Found: 12291 bytes"),
        ({"folder": "cifar-10-batches-py"}, r"Expected cifar-10-batches-bin/data_batch_1\.bin .* Found: 0 bytes"),
        (None, "Expected the official archive. Found: "),
    ],
)
def test_a_broken_cifar10_archive_is_told(tmp_path, spoil, message):
    archive = tmp_path / cifar10.ARCHIVE
    if spoil is None:
        archive.write_bytes(b"no archive")
    else:
        cifar_archive(archive, **spoil)
    with pytest.raises(LabError, match=message):
        datasets.open_raw(params.Data(dataset="cifar10", path=None), tmp_path)
