"""Full and read-only disks while data are downloaded or prepared: nothing earlier is lost, nothing half is left."""

import hashlib
import json
import re
import shutil
import sys
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, run, write_params
from namespaces import read_only, small_disk
from test_datasets import idx, picture

from ablation_lab.datasets import fashion_mnist
from stages import download, preprocess

STAGES = {"download": download, "preprocess": preprocess}
# A stage in a process of its own, with the hashes of this process.
STAGE = """
import json, sys
from importlib import import_module
import stages
from ablation_lab import errors
from ablation_lab.datasets import fashion_mnist
fashion_mnist.FILES = json.loads(sys.argv[2])
with errors.explained():
    import_module(f"stages.{sys.argv[1]}").main()
"""
# What the system says, and what NumPy makes of it.
FULL = r"No space left on device|\d+ requested and \d+ written"


@pytest.fixture(autouse=True)
def project(monkeypatch, tmp_path) -> Path:
    """A folder with results of an earlier study."""
    for name in ("ABLAB_DATA_MIRROR", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ABLAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    for name in ("raw", "processed"):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "earlier").write_text(name)
    monkeypatch.chdir(folder)
    return folder


def study(project: Path, dataset: str, path: Path | None = None) -> None:
    split = {"validation": 0.25, "test": "given" if dataset == "fashion_mnist" else 0.25}
    data = {"dataset": dataset, "path": None if path is None else str(path), "split": split}
    write_params(project, TINY | {"data": data})


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def survives(project: Path, stage: str, place, says: str, never: str | None = None, **environment: str) -> None:
    """A stage fails without a trace on that disk, and completes when it is run again on a good one."""
    before = files(project / "data")
    command = (sys.executable, "-c", STAGE, stage, json.dumps(fashion_mnist.FILES))
    done = place(project, *command, PYTHONPATH=str(ROOT), **environment)
    assert done.returncode != 0
    assert re.search(says, done.stderr, re.MULTILINE), done.stderr
    assert never is None or never not in done.stderr
    assert files(project / "data") == before
    STAGES[stage].main()
    made = {path.name for path in (project / "data" / ("raw" if stage == "download" else "processed")).iterdir()}
    assert made and "earlier" not in made
    assert not list(project.rglob("*.part"))


def full(project: Path, kilobytes: int):
    data = project / "data"

    def place(cwd: Path, *command: str, **environment: str):
        done = run(cwd, *small_disk(data, kilobytes, *command), **environment)
        shutil.rmtree(data)
        data.with_name("data.left").rename(data)
        return done

    return place


def locked(project: Path):
    return lambda cwd, *command, **environment: run(cwd, *read_only(project / "data", *command), **environment)


def test_digits_find_no_room(project):
    study(project, "digits")
    survives(project, "download", full(project, 64), FULL)


@contextmanager
def served(folder: Path):
    """The address of a server of a folder's files."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("source", ["folder", "address"])
def test_downloads_find_no_room(source, project, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror/fashion-mnist"
    mirror.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        pictures = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        (mirror / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pictures))
        (mirror / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in mirror.iterdir()}
    monkeypatch.setattr(fashion_mnist, "FILES", sums)
    study(project, "fashion_mnist")
    with served(mirror.parent) as address:
        place = address if source == "address" else str(mirror.parent)
        monkeypatch.setenv("ABLAB_DATA_MIRROR", place)
        blamed = "Found no good"  # no source is to blame
        survives(project, "download", full(project, 16), FULL, blamed, ABLAB_DATA_MIRROR=place)


@pytest.mark.parametrize(
    ("suffix", "size", "kilobytes", "says"),
    [
        # Known before it is written; the earlier results take 8 kB.
        ("bmp", 32, 12, r"^error: .* pictures of 500,000,000 bytes that fit on the disk\. Found: 3,126 bytes"),
        ("png", 1, 24, FULL),  # room for the pictures, but not for their names
    ],
)
def test_packed_pictures_find_no_room(suffix, size, kilobytes, says, project, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as packed:
        for number in range(200):
            content = picture((number, 0, 0), (size, size), suffix.upper())
            packed.writestr(f"{'cat' if number % 2 else 'dog'}/{number}.{suffix}", content)
    study(project, "image_folder", tmp_path / "pictures.zip")
    blamed = "a whole .zip"  # the archive is not to blame
    survives(project, "download", full(project, kilobytes), says, blamed)


def test_prepared_pictures_find_no_room(project):
    study(project, "digits")
    download.main()
    survives(project, "preprocess", full(project, 200), FULL)


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_nobody_can_write_to(stage, project):
    study(project, "digits")
    download.main()
    (project / "data/raw/earlier").write_text("raw")
    survives(project, stage, locked(project), "Read-only file system")
