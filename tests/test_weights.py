import h5py
import numpy as np
import pytest

import one_thread  # noqa: F401  isort: skip
from ablation_lab import models, params
from ablation_lab.backend import keras
from ablation_lab.datasets import fetch
from ablation_lab.errors import LabError
from ablation_lab.models import transfer, weights

# No-top files that Keras names, by md5.
KERAS = {
    "VGG16": "6d6bbae143d832006294945121d1f1fc",
    "DenseNet201": "c13680b51ded0fb44dff2d8f86ac8bb1",
    "ResNet152": "ee4c566cf9a93f14d82f913c2dc6dd0c",
}


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    """No weights of this machine's; the project's root is a folder of its own."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("ABLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ABLAB_DATA_MIRROR", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def model(backbone: str = "SqueezeNet", **settings) -> dict:
    return params.Transfer(builder="transfer", backbone=backbone, **settings).resolved()


def network(backbone: str = "SqueezeNet") -> keras.Model:
    keras.utils.clear_session()
    return models.build(model(backbone), "backbone", (32, 32, 3), 2)


@pytest.mark.parametrize("backbone", KERAS)
def test_the_weights_are_known_without_their_file(backbone, tmp_path):
    wanted = weights.wanted(model(backbone, weights="imagenet"))
    assert wanted["hash"] == f"md5:{KERAS[backbone]}"
    assert wanted["file"].endswith("_weights_tf_dim_ordering_tf_kernels_notop.h5")
    assert wanted["url"].startswith("https://storage.googleapis.com/")


def test_random_weights_want_nothing(tmp_path):
    assert weights.wanted(model()) is None
    assert "its frozen layers keep them" in weights.lints(model())[0]
    assert weights.lints(model(weights="imagenet")) == []


def test_missing_weights_are_told_with_file_hash_and_place(tmp_path):
    wanted = weights.wanted(model(weights="imagenet"))
    with pytest.raises(LabError) as caught:
        weights.locate(model(weights="imagenet"), wanted)
    assert "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5 with sha256:1715424628" in str(caught.value)
    assert str(tmp_path / "keras/models") in str(caught.value)


@pytest.mark.parametrize("place", ["keras/models", "mirror/weights"])
def test_a_truncated_file_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("ABLAB_DATA_MIRROR", str(tmp_path / "mirror"))
    wanted = weights.wanted(model(weights="imagenet"))
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / wanted["file"]).write_bytes(b"half of it")
    with pytest.raises(LabError, match=r"with sha256:[0-9a-f]{64} \(10 bytes\)"):
        weights.locate(model(weights="imagenet"), wanted)


def save(source: keras.Model, path) -> None:
    """A file in Keras' old HDF5 form: a group a layer, its weights by name."""
    with h5py.File(path, "w") as file:
        layers = [layer for layer in source.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        for layer in layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{number}" for number in range(len(layer.weights))]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.get_weights(), strict=True):
                group[name] = weight


@pytest.mark.parametrize(
    ("backbone", "file"), [("SqueezeNet", "old.h5"), ("DenseNet121", "old.h5"), ("MobileNetV2", "new.weights.h5")]
)
def test_a_file_of_the_users_in_any_of_keras_formats(backbone, file, tmp_path):
    build, _ = transfer.find(backbone)
    source = build(include_top=False, weights=None, input_tensor=keras.Input((32, 32, 3)))
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / file
    save(source, path) if file == "old.h5" else source.save_weights(path)
    chosen = model(backbone, weights=f"weights/{file}")
    wanted = weights.wanted(chosen)
    assert wanted["url"] is None and wanted["hash"].startswith("sha256:")
    built = network(backbone)
    weights.load(built, chosen, weights.locate(chosen, wanted))
    for left, right in zip(transfer.backbone_of(built).get_weights(), source.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert weights.lints(chosen) == []
    assert "DVC notices changes of files in weights/ only" in weights.lints(chosen | {"weights": "elsewhere.h5"})[0]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LabError, match=r"Expected .* with sha256"):
        weights.locate(chosen, wanted)


@pytest.mark.parametrize("file", ["mine.keras", "mine.weights.h5", "mine.h5"])
def test_a_truncated_file_of_the_users_is_refused(file, tmp_path):
    build, _ = transfer.find("SqueezeNet")
    source = build(include_top=False, weights=None, input_tensor=keras.Input((32, 32, 3)))
    path = tmp_path / file
    save(source, path) if file == "mine.h5" else (source.save if file == "mine.keras" else source.save_weights)(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LabError, match=r"Expected the weights of SqueezeNet without its top. Found: .*mine"):
        weights.load(network(), model(weights=str(path)), path)


def test_weights_of_another_network_are_refused(tmp_path):
    save(network("MobileNetV2"), tmp_path / "other.h5")
    with pytest.raises(LabError, match=r"Expected the weights of SqueezeNet without its top. Found: .*other.h5"):
        weights.load(network(), model(), tmp_path / "other.h5")


def test_a_file_that_isnt_there_is_told(tmp_path):
    with pytest.raises(
        LabError, match=r"model.weights: Expected imagenet, or a file in one of .*no such file as mine.h5"
    ):
        weights.wanted(model(weights="mine.h5"))


@pytest.mark.slow
def test_efficientnet_with_imagenet_weights_is_keras_own(tmp_path, monkeypatch):
    build, _ = transfer.find("EfficientNetB0")
    save(build(include_top=False, weights=None, input_shape=(32, 32, 3)), tmp_path / "random.h5")
    monkeypatch.setattr(weights.file_utils, "get_file", lambda *given, **named: str(tmp_path / "random.h5"))
    theirs = build(include_top=False, weights="imagenet", input_shape=(32, 32, 3), pooling="avg")
    built = network("EfficientNetB0")
    weights.load(built, model("EfficientNetB0", weights="imagenet"), tmp_path / "random.h5")
    again = keras.models.model_from_json(built.to_json())
    built.save_weights(tmp_path / "kept.weights.h5")
    again.load_weights(tmp_path / "kept.weights.h5")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    for one in (built, again):
        ours = keras.Model(one.inputs, one.get_layer("features").output).predict(pictures, verbose=0)
        np.testing.assert_allclose(ours, theirs.predict(pictures, verbose=0), rtol=1e-3, atol=1e-5)


def test_a_file_without_a_known_hash_is_known_by_its_content(tmp_path):
    chosen = model("MobileNetV2", weights="imagenet")
    assert weights.wanted(chosen)["hash"] is None
    file = tmp_path / "cache/weights" / weights.wanted(chosen)["file"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    assert weights.wanted(chosen)["hash"].startswith("sha256:")
    planned = weights.wanted(chosen)
    file.write_bytes(b"another")
    with pytest.raises(LabError, match=r"with sha256:.* Get it from https://"):
        weights.locate(chosen, planned)


@pytest.mark.parametrize("content", [b"<html>", b"\x89HDF\r\n\x1a\n and then no more"])
def test_a_download_without_a_known_hash_is_a_whole_file_at_least(content, tmp_path, monkeypatch):
    monkeypatch.setenv("ABLAB_DATA_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "mirror/weights").mkdir(parents=True)
    (tmp_path / "mirror/weights/net.h5").write_bytes(content)
    with pytest.raises(LabError, match=r"refused. Expected an HDF5 file"):
        fetch.keep("net.h5", None, f"{tmp_path}/nowhere/net.h5", "weights", tmp_path)


def test_weights_are_kept_under_keras_name_whatever_they_are_called_at_their_host(tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "host/NASNet-mobile.h5").write_bytes(b"weights")
    fetch.keep(
        "nasnet.h5",
        weights.digest(tmp_path / "host/NASNet-mobile.h5", "md5"),
        f"{tmp_path}/host/NASNet-mobile.h5",
        "weights",
        tmp_path,
    )
    assert (tmp_path / "cache/weights/nasnet.h5").read_bytes() == b"weights"
