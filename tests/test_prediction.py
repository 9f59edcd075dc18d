import copy
import re
from pathlib import Path

import numpy as np
import one_thread  # noqa: F401
import pytest
from conftest import TINY, write_params
from PIL import Image

from ablation_lab import cell, files, params, prediction, preprocess, training
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


def test_a_network_for_any_size_sees_a_picture_in_its_own_size(root, tmp_path):
    from ablation_lab import models

    path = picture(tmp_path, 36, 30)
    with Image.open(path) as image:
        own = np.asarray(image)[np.newaxis, ..., np.newaxis]
    expected = models.load(cell.folder("gap", 0, root), "cnn").predict(own, verbose=0)[0]
    (found,) = prediction.predict("gap", 0, [path], root)
    np.testing.assert_allclose(list(found["probabilities"].values()), expected, rtol=1e-5)
