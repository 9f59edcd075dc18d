import copy
import re
from pathlib import Path

import numpy as np
import one_thread  # noqa: F401
import pytest
from conftest import TINY, write_params
from PIL import Image

from ablation_lab import backend, cell, cli, files, models, params, prediction, preprocess, training
from ablation_lab.datasets import digits
from ablation_lab.errors import LabError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project with one trained cell of a fixed size and one for pictures of any size."""
    root = tmp_path_factory.mktemp("project")
    raw = copy.deepcopy(TINY)
    raw["variants"] = {"baseline": {}, "gap": {"model": {"any_size": True, "head_from": "global_average"}}}
    write_params(root, raw)
    study = params.load(root / "params.yaml")
    digits.download(study.data, root / "data/raw")
    preprocess.preprocess(study.data, root / "data/raw", root / "data/processed")
    for name, variant in study.variants.items():
        folder = cell.folder(name, 0, root)
        folder.mkdir(parents=True)
        result = training.train(variant.resolved(), 0, root / "data/processed", folder, name, lambda row: None)
        files.write_json(folder / cell.RESULT, result)
    return root


def picture(folder, height, width):
    """A picture whose right half is white."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    path = folder / f"{height}x{width}.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("variant", ["baseline", "gap"])
def test_pictures_that_are_not_square(root, tmp_path, variant):
    paths = [picture(tmp_path, 28, 32), picture(tmp_path, 36, 30)]
    found = prediction.predict(variant, None, paths, root)
    assert [one["image"] for one in found] == [str(path) for path in paths]
    for one in found:
        assert set(one) == {"image", "variant", "seed", "label", "probabilities"}
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["label"] == max(one["probabilities"], key=lambda name: one["probabilities"][name])


@pytest.mark.parametrize(
    ("variant", "seed", "path", "message"),
    [
        ("basline", None, "any.png", "--variant: Expected one of baseline, gap. Found: basline."),
        ("baseline", 9, "any.png", "--seed: Expected one of 0, 1. Found: 9."),
        ("baseline", None, __file__, "Expected a picture that Pillow can read."),
        ("baseline", None, "nowhere.png", "nowhere.png: Expected a picture"),
    ],
)
def test_mistakes_are_told(root, variant, seed, path, message):
    with pytest.raises(LabError, match=re.escape(message)):
        prediction.predict(variant, seed, [Path(path)], root)


def test_an_image_too_small_for_the_network_is_refused_with_the_least_size(root, tmp_path, monkeypatch, capsys):
    """A kernel of 3, then pools of 2 pixels: 4 × 4 are the least."""
    monkeypatch.chdir(root)
    (root / "dvc.yaml").touch()
    for height, width in ((4, 4), (4, 30)):
        prediction.predict("gap", 0, [picture(tmp_path, height, width)], root)
    for height, width in ((1, 1), (3, 30), (30, 3)):
        small, other = picture(tmp_path, height, width), picture(tmp_path, 9, 9)
        with pytest.raises(SystemExit) as ended:
            monkeypatch.setattr("sys.argv", ["ablab", "predict", "--variant", "gap", str(other), str(small)])
            cli.main()
        told = capsys.readouterr()
        assert ended.value.code == 1 and told.out == ""
        expected = f"{small}: Expected an image of 4 × 4 pixels (height × width) at least, so that something is left"
        assert expected in told.err and f"Found: {height} × {width}." in told.err
    assert prediction.predict("baseline", 0, [picture(tmp_path, 1, 1)], root)  # is resized


def test_an_image_too_large_for_the_memory_is_refused_before_it_is_used(root, tmp_path):
    network = models.load(cell.folder("gap", 0, root), "cnn")
    with pytest.raises(LabError, match=r"Expected an image that gap has memory for: .* Found: 900000 × 900000 pixels"):
        prediction._check_size(tmp_path / "x.png", (900_000, 900_000, 1), (8, 8, 1), network, "gap")


def test_a_network_of_the_users_for_any_size(tmp_path):
    """It lies inside the network that is trained, and its layers count for the memory."""
    raw = copy.deepcopy(TINY)
    raw["model"] = {"builder": "networks.example:build", "filters": 4, "any_size": True}
    raw["variants"] = {"baseline": {}}
    write_params(tmp_path, raw)
    card = {"image_shape": [8, 8, 1], "classes": [str(digit) for digit in range(10)]}
    files.write_json(tmp_path / "data/processed/card.json", card)
    model, folder = (
        params.load(tmp_path / "params.yaml").variants["baseline"].model,
        cell.folder("baseline", 0, tmp_path),
    )
    network = models.build(model.resolved(), "unit", (8, 8, 1), 10)
    folder.mkdir(parents=True)
    network.save_weights(folder / cell.WEIGHTS)
    files.write_json(folder / cell.ARCHITECTURE, backend.keras.saving.serialize_keras_object(network))
    files.write_json(folder / cell.RESULT, {})
    (found,) = prediction.predict("baseline", 0, [picture(tmp_path, 20, 24)], tmp_path)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert prediction._largest(network, (20, 24, 1)) == 20 * 24 * 8  # of the branches' concatenation
    with pytest.raises(LabError, match="Expected an image of 2 × 2 pixels"):  # it has a pool
        prediction.predict("baseline", 0, [picture(tmp_path, 1, 24)], tmp_path)


def test_a_network_for_even_sizes_names_no_least_size(tmp_path):
    layers = backend.keras.layers
    inputs = layers.Input((None, None, 1))
    up = layers.UpSampling2D(2)(layers.MaxPooling2D(2)(inputs))
    network = backend.keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Add()([inputs, up])))
    prediction._check_size(tmp_path / "x.png", (6, 24, 1), (8, 8, 1), network, "own")
    message = "Expected an image of a size that own can work on, such as 8 × 8. Found: 7 × 24."
    with pytest.raises(LabError, match=message):
        prediction._check_size(tmp_path / "x.png", (7, 24, 1), (8, 8, 1), network, "own")


def test_an_empty_file_is_no_image(root, tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(LabError, match=r"empty.png: Expected a picture .* Found: a file in no format"):
        prediction.predict("gap", 0, [tmp_path / "empty.png"], root)


def test_a_network_for_any_size_sees_a_picture_in_its_own_size(root, tmp_path):
    path = picture(tmp_path, 36, 30)
    with Image.open(path) as image:
        own = np.asarray(image)[np.newaxis, ..., np.newaxis]
    expected = models.load(cell.folder("gap", 0, root), "cnn").predict(own, verbose=0)[0]
    (found,) = prediction.predict("gap", 0, [path], root)
    np.testing.assert_allclose(list(found["probabilities"].values()), expected, rtol=1e-5)
