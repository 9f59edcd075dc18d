import io
import json
import os
import re
import struct
import weakref
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ablation_lab import datasets, params, preprocess
from ablation_lab.datasets.source import Source
from ablation_lab.errors import LabError
from ablation_lab.params import Data, Split


@pytest.fixture(autouse=True)
def no_project_around(monkeypatch, tmp_path):
    for name in ("ABLAB_DATA_MIRROR", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def digits(**changes):
    return Data(dataset="digits", path=None, **{"split": Split(test=0.2), **changes})


@pytest.fixture(scope="module")
def raw_digits(tmp_path_factory):
    raw = tmp_path_factory.mktemp("digits") / "raw"
    datasets.download(digits(), raw)
    return raw


def arrays(out):
    return {file.stem: np.load(file, allow_pickle=False) for file in out.glob("*.npy")}


def card(out):
    return json.loads((out / "card.json").read_text(encoding="utf-8"))


def contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


def image_folder(tmp_path, pictures, **settings):
    """Write {path: picture or bytes} and download it; returns the parameters."""
    for name, picture in pictures.items():
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            file.write_bytes(picture)
        else:
            picture.save(file)
    data = Data(dataset="image_folder", path="pictures", **{"split": Split(validation=0.25, test=0.25), **settings})
    datasets.download(data, tmp_path / "raw")
    return data


def plain(size=(6, 4), color=(200, 100, 50)):
    return Image.new("RGB", size, color)


def two_classes(count=4, **pictures):
    return {f"{label}/{index}.png": plain() for label in ("cat", "dog") for index in range(count)} | pictures


GREY = Image.new("L", (6, 4), 100)


@pytest.mark.parametrize(
    ("pictures", "color", "channels"),
    [
        ([GREY] * 4, None, 1),
        ([GREY, Image.new("1", (6, 4)), Image.new("LA", (6, 4)), Image.new("I;16", (6, 4))], None, 1),
        ([GREY, GREY, GREY, plain()], None, 3),
        ([plain()] * 4, None, 3),
        ([GREY] * 4, "rgb", 3),
        ([plain()] * 4, "grayscale", 1),
    ],
)
def test_a_folder_of_grey_pictures_stays_grey_where_nothing_is_said(pictures, color, channels, tmp_path):
    files = {f"{label}/{number}.png": one for label in ("cat", "dog") for number, one in enumerate(pictures)}
    preprocess.preprocess(image_folder(tmp_path, files, color=color), tmp_path / "raw", tmp_path / "out")
    assert card(tmp_path / "out")["image_shape"] == [4, 6, channels]


def test_files_are_as_promised(raw_digits, tmp_path):
    preprocess.preprocess(digits(), raw_digits, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        *("card.json", "duplicates.json", "images.npy", "labels.npy", "settings.json"),
        *("test.npy", "train.npy", "validation.npy"),
    ]
    files = arrays(tmp_path / "out")
    assert (files["images"].dtype, files["images"].shape) == (np.uint8, (1797, 8, 8, 1))
    assert (files["labels"].dtype, files["labels"].shape) == (np.int32, (1797,))
    parts = [files[part] for part in preprocess.PARTS]
    assert [len(part) for part in parts] == [1258, 180, 359]
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    source = datasets.open_raw(digits(), raw_digits)
    assert (files["images"][7, :, :, 0] == np.asarray(source.load(7))).all()
    assert np.load(tmp_path / "out" / "images.npy", mmap_mode="r").flags.c_contiguous

    found = card(tmp_path / "out")
    assert {key: found[key] for key in ("name", "classes", "image_shape", "counts", "split")} == {
        "name": "digits",
        "classes": list("0123456789"),
        "image_shape": [8, 8, 1],
        "counts": {"train": 1258, "validation": 180, "test": 359},
        "split": {"validation": 0.1, "test": 0.2, "seed": 0},
    }
    assert list(found) == sorted(found)
    assert re.fullmatch("[0-9a-f]{64}", found["digest"])
    for part in preprocess.PARTS:
        counts = np.bincount(files["labels"][files[part]], minlength=10)
        assert list(found["class_counts"][part].values()) == counts.tolist()
        assert np.abs(counts / counts.sum() - np.bincount(files["labels"]) / 1797).max() < 0.005  # stratified


def test_bytes_do_not_depend_on_the_run(raw_digits, tmp_path, monkeypatch):
    preprocess.preprocess(digits(), raw_digits, tmp_path / "one")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(preprocess, "BLOCK_BYTES", 640)
    preprocess.preprocess(digits(), raw_digits, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    "changes",
    [
        {"split": Split(test=0.2, seed=1)},
        {"split": Split(test=0.2, validation=0.2)},
        {"image_size": [9, 8]},
        {"color": "rgb"},
        {"limit": 3},
    ],
)
def test_digest_covers_what_the_networks_see(changes, raw_digits, tmp_path):
    preprocess.preprocess(digits(), raw_digits, tmp_path / "out")
    before = card(tmp_path / "out")["digest"]
    preprocess.preprocess(digits(**changes), raw_digits, tmp_path / "out")
    assert card(tmp_path / "out")["digest"] != before


def test_limit_keeps_so_many_of_each_class_in_each_part(raw_digits, tmp_path):
    pictures = {}
    for limit in (2, 3):
        preprocess.preprocess(digits(limit=limit), raw_digits, tmp_path / "out")
        files = arrays(tmp_path / "out")
        assert len(files["images"]) == len(files["labels"]) == limit * 10 * 3
        for part in preprocess.PARTS:
            assert np.bincount(files["labels"][files[part]]).tolist() == [limit] * 10
        pictures[limit] = {files["images"][index].tobytes() for index in files["train"]}
    assert pictures[2] < pictures[3]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            Split(),
            'data.split.test: Expected a fraction like 0.2, as digits has no given test part. Found: "given".',
        ),
        (
            Split(validation=0.001, test=0.2),
            "data.split: Expected a part with a picture of each of 10 classes, and as many left. "
            "Found: 2 of 1438 pictures for validation.",
        ),
    ],
)
def test_impossible_split(split, message, raw_digits, tmp_path):
    with pytest.raises(LabError) as error:
        preprocess.preprocess(digits(split=split), raw_digits, tmp_path / "out")
    assert str(error.value) == message
    assert not list(tmp_path.glob("out*"))


def test_given_test_part_stays_as_it_is():
    labels = np.arange(200) % 10
    given = np.arange(200) >= 150
    parts = preprocess.split(labels, given, list("abcdefghij"), Data(dataset="fashion_mnist", path=None))
    assert parts["test"].tolist() == list(range(150, 200))
    assert (len(parts["train"]), len(parts["validation"])) == (135, 15)  # a tenth of the rest
    pooled = Data(dataset="fashion_mnist", path=None, split=Split(validation=0.1, test=0.25))
    parts = preprocess.split(labels, given, list("abcdefghij"), pooled)
    assert [len(part) for part in parts.values()] == [130, 20, 50]  # fractions of all pictures
    assert 0 < given[parts["test"]].sum() < 50


def test_classes_with_too_few_pictures():
    classes, labels = ["cat", "dog"], np.array([0] * 20 + [1] * 2)
    with pytest.raises(LabError, match=re.escape("one each for train, validation, test. Found: dog, 2.")):
        preprocess.split(labels, None, classes, digits())
    labels = np.array([0] * 200 + [1] * 3)
    with pytest.raises(LabError, match=r"Found: none of dog \(3 pictures in all\) in (validation|test) \(\d+ pict"):
        preprocess.split(labels, None, classes, digits(split=Split(validation=0.1, test=0.1)))


def test_image_folder_end_to_end(tmp_path):
    data = image_folder(tmp_path, two_classes(count=8), image_size=[3, 5])
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    found = card(tmp_path / "out")
    assert (found["name"], found["classes"], found["image_shape"]) == ("pictures", ["cat", "dog"], [3, 5, 3])
    assert found["class_counts"] == {
        "train": {"cat": 4, "dog": 4},
        "validation": {"cat": 2, "dog": 2},
        "test": {"cat": 2, "dog": 2},
    }
    assert (arrays(tmp_path / "out")["images"] == [200, 100, 50]).all()


def test_own_size_when_all_pictures_share_it(tmp_path):
    data = image_folder(tmp_path, two_classes())
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    assert card(tmp_path / "out")["image_shape"] == [4, 6, 3]

    data = image_folder(tmp_path, {"dog/2.png": plain((4, 6))})
    before = contents(tmp_path / "out")
    with pytest.raises(LabError) as error:
        preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    assert str(error.value) == (
        "data.image_size: Expected [height, width], as the pictures differ in size. "
        "Found: null, with pictures: cat/0.png, 4×6 and pictures: dog/2.png, 6×4 pixels."
    )
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.part").exists()


def broken(kind):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(whole, kind)
    content = whole.getvalue()
    return content[: len(content) // 2]


@pytest.mark.parametrize("content", [b"", b"<html>", broken("PNG"), broken("JPEG"), broken("GIF"), broken("TIFF")])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_unreadable_picture_is_named(content, tmp_path):
    data = image_folder(tmp_path, two_classes() | {"dog/2.png": content}, image_size=[4, 4])
    with pytest.raises(LabError, match=r"^pictures: dog/2\.png: Expected a picture\. Found: ."):
        preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("unreadable", ["error", "skip"])  # it is the raw data that is damaged, no picture
def test_altered_raw_file_is_noticed(unreadable, tmp_path):
    data = image_folder(tmp_path, two_classes(), unreadable=unreadable)
    raw = tmp_path / "raw" / "pictures.zip"
    with zipfile.ZipFile(raw) as packed:
        start = packed.getinfo("dog/2.png").header_offset + 30 + len("dog/2.png")
    content = bytearray(raw.read_bytes())
    content[start + 60] ^= 1
    raw.write_bytes(bytes(content))
    with pytest.raises(LabError, match=r"dog/2\.png: Expected a picture\. Found: Bad CRC-32"):
        preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")


def reopened(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def png_with_transparent_grey():
    """A grey PNG whose value 7 is transparent."""
    file = io.BytesIO()
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(file, "PNG", transparency=7)
    return Image.open(file)


GREY16 = (np.array([[0, 1, 2], [128, 254, 255]], np.uint16) << 8) | 0x7F


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (reopened(plain((1, 1))), [200, 100, 50]),
        (reopened(plain((1, 1)).quantize(4)), [200, 100, 50]),
        (reopened(plain((1, 1)).convert("CMYK"), "TIFF"), [200, 100, 50]),
        (reopened(Image.new("1", (1, 1), 1)), [255, 255, 255]),
        (reopened(Image.new("L", (1, 1), 77)), [77, 77, 77]),
        (reopened(Image.new("LA", (1, 1), (77, 255))), [77, 77, 77]),
        (reopened(Image.new("RGBA", (1, 1), (200, 100, 50, 255))), [200, 100, 50]),
        (reopened(Image.new("RGBA", (1, 1), (200, 100, 50, 0))), [255, 255, 255]),
        (reopened(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), [255, 127, 127]),
        (png_with_transparent_grey().crop((0, 0, 1, 1)), [255, 255, 255]),
        (png_with_transparent_grey().crop((1, 0, 2, 1)), [9, 9, 9]),
        (reopened(Image.fromarray(np.array([[0x4DFF]], np.uint16))), [0x4D] * 3),
        (Image.fromarray(np.array([[0x4DFF]], np.int32)), [0x4D] * 3),
    ],
)
def test_every_kind_of_pixel_comes_out_right(image, rgb):
    found = preprocess.prepare(image.copy(), None, "rgb", "stretch")
    assert (found.shape, found.dtype) == ((1, 1, 3), np.uint8)
    assert np.abs(found[0, 0].astype(int) - rgb).max() <= 1
    grey = preprocess.prepare(image.copy(), [1, 1], "grayscale", "stretch")
    assert grey.shape == (1, 1, 1)
    assert abs(int(grey[0, 0, 0]) - np.dot(rgb, [0.299, 0.587, 0.114])) <= 1.5


@pytest.mark.parametrize(("format", "suffix"), [("PNG", "png"), ("TIFF", "tif"), ("PPM", "pgm")])
def test_sixteen_bits_of_grey_become_eight(format, suffix, tmp_path):
    file = tmp_path / f"grey.{suffix}"
    Image.fromarray(GREY16).save(file, format)
    with Image.open(file) as image:
        found = preprocess.prepare(image, None, "grayscale", "stretch")
    assert found[:, :, 0].tolist() == [[0, 1, 2], [128, 254, 255]]


def test_floating_point_is_refused():
    with pytest.raises(ValueError, match="nobody says what is white"):
        preprocess.prepare(Image.new("F", (2, 2)), None, "rgb", "stretch")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_size", [None, [40, 30]])
def test_exif_orientation(orientation, image_size):
    upright = np.zeros((40, 30), np.uint8)
    upright[:20, :15] = 255  # a white corner, top left
    turn = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(Image.fromarray(np.ascontiguousarray(turn[orientation])), "JPEG", exif=exif, quality=95)
    found = preprocess.prepare(image, image_size, "grayscale", "stretch")
    assert np.abs(found[:, :, 0].astype(int) - upright).mean() < 5


def test_stretch_pad_and_crop():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :10] = [255, 0, 0]
    image[:, 10:30] = [0, 255, 0]
    image[:, 30:] = [0, 0, 255]

    def resized(resize, size):
        return preprocess.prepare(Image.fromarray(image), size, "rgb", resize)

    stretched = resized("stretch", [8, 8])
    assert stretched[4, [0, 4, 7]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    padded = resized("pad", [8, 8])
    assert not padded[:2].any() and not padded[6:].any()
    assert padded[4, [0, 4, 7]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    cropped = resized("crop", [8, 8])
    assert (cropped[:, 1:-1] == [0, 255, 0]).all()
    assert resized("pad", [3, 5]).shape == resized("crop", [3, 5]).shape == (3, 5, 3)
    assert preprocess.prepare(Image.new("RGB", (900, 1)), [8, 8], "rgb", "pad").shape == (8, 8, 3)


def test_shrinking_is_antialiased():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = preprocess.prepare(Image.fromarray(board), [8, 8], "grayscale", "stretch")
    assert np.abs(found.astype(int) - 127).max() <= 8


def test_large_jpegs_are_shrunk_while_decoding():
    gradient = np.linspace(0, 255, 800).astype(np.uint8)[None].repeat(600, 0)
    image = reopened(Image.fromarray(gradient), "JPEG", quality=95)
    found = preprocess.prepare(image, [30, 40], "grayscale", "stretch")
    assert image.size == (100, 75) or image.size == (200, 150)
    exact = np.asarray(Image.fromarray(gradient).resize((40, 30), Image.Resampling.BILINEAR))
    assert np.abs(found[:, :, 0].astype(int) - exact).max() <= 3


def test_memory_does_not_grow_with_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "BLOCK_BYTES", 64 * 64 * 4)
    alive, most = [], []

    def load(index):
        alive.append(index)
        most.append(len(alive) - written())
        return Image.new("L", (64, 64), index % 256)

    def written():
        file = tmp_path / "out.part" / "images.npy"
        return file.stat().st_size // (64 * 64) if file.exists() else 0

    labels = np.arange(400) % 2
    source = Source(["a", "b"], labels, None, load, str, "grayscale", [64, 64])
    monkeypatch.setattr(datasets, "open_raw", lambda data, raw: source)
    preprocess.preprocess(digits(), tmp_path, tmp_path / "out")
    assert max(most) <= 64  # of 400: a block and what the file's buffer holds
    assert arrays(tmp_path / "out")["images"][:, 0, 0, 0].tolist() == [index % 256 for index in range(400)]


def test_memory_does_not_grow_with_the_pictures_that_are_checked(tmp_path, monkeypatch):
    dead, most, labels = [], [], np.arange(3000) % 2

    def load(index):
        picture = Image.new("L", (8, 8), index % 256)
        weakref.finalize(picture, dead.append, index)
        most.append(len(most) + 1 - len(dead))
        return picture

    source = Source(["a", "b"], labels, None, load, str, "grayscale", [8, 8])
    monkeypatch.setattr(datasets, "open_raw", lambda data, raw: source)
    preprocess.preprocess(digits(unreadable="skip"), tmp_path, tmp_path / "out")
    assert len(most) == 6001  # twice each, and the first once more for its shape
    assert max(most) <= 2 * (os.cpu_count() or 1)


def bomb():
    """A PNG of a few bytes that claims to be 30,000 × 30,000 pixels."""
    file = io.BytesIO()
    plain((1, 1)).save(file, "PNG")
    content = file.getvalue()
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def test_decompression_bomb_is_named(tmp_path):
    data = image_folder(tmp_path, two_classes() | {"dog/2.png": bomb()}, image_size=[4, 4])
    with pytest.raises(LabError, match=r"dog/2\.png: Expected a picture\. Found: Image size \(900000000 pixels\)"):
        preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")


def test_card_is_canonical(raw_digits, tmp_path):
    preprocess.preprocess(digits(), raw_digits, tmp_path / "out")
    assert (tmp_path / "out" / "card.json").read_text(encoding="utf-8") == params.canonical_json(card(tmp_path / "out"))


def colourful(count, blue=0):
    """Two classes of pictures of which no two are alike."""
    labels = {"cat": 0, "dog": 100}
    return {f"{label}/{i:02}.png": plain(color=(i, n, blue)) for label, n in labels.items() for i in range(count)}


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("given", [False, True])
def test_unreadable_pictures_are_left_out_as_if_they_were_not_there(given, tmp_path, capsys):
    split, parts = (Split(validation=0.25), ("train/", "test/")) if given else (Split(validation=0.2, test=0.2), ("",))
    pictures = {part + name: picture for i, part in enumerate(parts) for name, picture in colourful(10, i).items()}
    first = parts[0]
    unreadable = {
        f"{first}cat/00a.jpg": b"",
        f"{first}cat/05a.jpg": broken("JPEG"),
        f"{first}dog/00.gif": b"not a picture",
        f"{parts[-1]}dog/99.png": bomb(),
        f"{parts[-1]}dog/99.tif": broken("TIFF"),
    }
    settings = {"split": split, "image_size": [4, 4], "limit": 6, "unreadable": "skip"}
    data = image_folder(tmp_path, pictures, **settings)
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "clean")
    assert capsys.readouterr().err == ""
    assert "skipped" not in card(tmp_path / "clean")

    data = image_folder(tmp_path, unreadable, **settings)
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:3] for line in told] == [["left out", "pictures", name] for name in sorted(unreadable)]
    clean, found = contents(tmp_path / "clean"), contents(tmp_path / "out")
    skipped = {"count": 5, "class_counts": {"cat": 2, "dog": 3}, "first": sorted(unreadable)}
    assert json.loads(found.pop("card.json")) == json.loads(clean.pop("card.json")) | {"skipped": skipped}
    assert found == clean

    with pytest.raises(LabError, match=r": Expected a picture\. Found: "):
        stops = data.model_copy(update={"unreadable": "error", "limit": None})
        preprocess.preprocess(stops, tmp_path / "raw", tmp_path / "out")


def test_the_setting_alone_changes_no_picture(tmp_path):
    data = image_folder(tmp_path, two_classes(), unreadable="skip")
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "skip")
    preprocess.preprocess(data.model_copy(update={"unreadable": "error"}), tmp_path / "raw", tmp_path / "error")
    skip, error = contents(tmp_path / "skip"), contents(tmp_path / "error")
    assert json.loads(skip.pop("settings.json")) == json.loads(error.pop("settings.json")) | {"unreadable": "skip"}
    assert skip == error


def test_ten_unreadable_pictures_are_named_and_the_rest_counted(tmp_path, capsys):
    unreadable = {f"dog/x{index:02}.jpg": b"" for index in range(13)}
    data = image_folder(tmp_path, two_classes() | unreadable, unreadable="skip")
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 11
    assert told[0] == "left out: pictures: dog/x00.jpg: a file in no format that Pillow knows"
    assert told[-1] == "left out: 3 more unreadable pictures, 13 in all"
    assert card(tmp_path / "out")["skipped"] == {
        "count": 13,
        "class_counts": {"dog": 13},
        "first": sorted(unreadable)[:10],
    }


def test_the_card_does_not_say_where_the_pictures_lie(tmp_path):
    data = image_folder(tmp_path, two_classes() | {"dog/x.jpg": b""}, unreadable="skip")
    data = data.model_copy(update={"path": str(tmp_path / "pictures")})
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    assert card(tmp_path / "out")["skipped"]["first"] == ["dog/x.jpg"]


@pytest.mark.parametrize("readable", [0, 2])
def test_a_class_with_too_few_readable_pictures(readable, tmp_path):
    data = image_folder(tmp_path, two_classes() | {f"dog/{i}.png": b"" for i in range(readable, 4)}, unreadable="skip")
    with pytest.raises(LabError, match=rf"one each for train, validation, test\. Found: dog, {readable}\."):
        preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
