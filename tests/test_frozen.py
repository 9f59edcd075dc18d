import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, environment, run
from filelock import FileLock
from namespaces import full_disk

import one_thread  # noqa: F401  isort: skip
from ablation_lab import frozen, models, params
from ablation_lab.backend import keras
from ablation_lab.errors import LabError

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("ABLAB_FEATURES_GB", raising=False)
    return tmp_path


def network(backbone: str, output: str = "softmax", **settings) -> keras.Model:
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = params.Transfer(builder="transfer", backbone=backbone, output=output, **settings).resolved()
    built = models.build(model, "backbone", (32, 32, 3), 2)
    return built, models.trained(built, model)


def features(prefix: keras.Model, digest: str = "data") -> list[np.ndarray]:
    return frozen.features(prefix, IMAGES, digest, 1, "test")


# Cuts between blocks, and inside them, where several tensors are cut.
CUTS = [
    ("ResNet50", {"last": 7}, 2),
    ("DenseNet121", {"last": 5}, 2),
    ("SqueezeNet", "none", 1),
    ("SqueezeNet", {"from_layer": 58}, 2),
    pytest.param("EfficientNetB0", {"last": 12}, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backbone", "trainable", "tensors"), CUTS)
def test_the_rest_on_features_is_the_whole_network(backbone, trainable, tensors):
    built, trained = network(backbone, trainable=trainable)
    assert len(frozen.cut(built)) == tensors
    prefix, rest, _ = frozen.split(built, trained)
    assert not prefix.trainable_weights
    whole = built.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(rest.predict(features(prefix), verbose=0), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_prefix_of_a_densely_connected_network_can_be_cut_off():
    built, trained = network("DenseNet121")
    layers = [layer for layer in built.layers if layer.weights]
    for first in (7, 60, 150, 239):
        for number, layer in enumerate(layers):
            layer.trainable = number >= first
        if not frozen.cut(built):
            continue
        prefix, rest, _ = frozen.split(built, trained)
        np.testing.assert_allclose(
            rest.predict(prefix.predict(IMAGES[:4], verbose=0), verbose=0),
            built.predict(IMAGES[:4], verbose=0),
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("output", "backbone", "trainable"),
    [
        ("softmax", "SqueezeNet", {"from_layer": 50}),
        ("sigmoid", "SqueezeNet", {"from_layer": 50}),
        ("logits", "SqueezeNet", {"from_layer": 50}),
        # With batch normalisation, that learns behind the cut, and with several tensors across it.
        pytest.param("softmax", "ResNet50", {"last": 7}, marks=pytest.mark.slow),
        pytest.param("sigmoid", "DenseNet121", {"last": 5}, marks=pytest.mark.slow),
        pytest.param("softmax", "EfficientNetB0", {"last": 12}, marks=pytest.mark.slow),
    ],
)
def test_training_the_rest_trains_the_whole_network_alike(output, backbone, trainable):
    labels = (np.arange(70) % 2).astype(np.float32)
    loss = {
        "softmax": keras.losses.SparseCategoricalCrossentropy(),
        "sigmoid": keras.losses.BinaryCrossentropy(),
        "logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    found = []
    for apart in (False, True):
        built, trained = network(backbone, output, trainable=trainable, head={"d": {"units": 8}})
        before = [weight.copy() for weight in built.get_weights()]
        fed = IMAGES
        if apart:
            prefix, _, trained = frozen.split(built, trained)
            fed = features(prefix)
        trained.compile(keras.optimizers.SGD(0.001), loss[output])
        trained.fit(fed, labels[:, None], batch_size=35, epochs=2, shuffle=False, verbose=0)
        found.append(built.predict(IMAGES, verbose=0))
        assert any((was != now).any() for was, now in zip(before, built.get_weights(), strict=True))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_what_is_drawn_at_random_is_not_frozen():
    keras.utils.clear_session()
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, name="before", trainable=False)(inputs)
    x = keras.layers.Dropout(0.5, name="dropout")(x)
    x = keras.layers.Dense(3, name="after", trainable=False)(x)
    built = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert [tensor.shape for tensor in frozen.cut(built)] == [(None, 3)]
    prefix, _, _ = frozen.split(built, built)
    assert [layer.name for layer in prefix.layers][1:] == ["before"]


def test_batch_normalisation_that_learns_is_not_frozen():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, trainable=False)(inputs)
    x = keras.layers.BatchNormalization(center=False, scale=False)(x)
    built = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert not [one for one in frozen.split(built, built)[0].layers if isinstance(one, keras.layers.BatchNormalization)]


def test_a_prefix_without_weights_is_not_worth_it():
    keras.utils.clear_session()
    inputs = keras.Input((4,))
    built = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Rescaling(2)(inputs)))
    assert frozen.cut(built) == []


@pytest.fixture
def counted(monkeypatch):
    """How often features were computed."""
    computed = []
    compute = frozen._compute

    def counting(*given):
        computed.append(given)
        compute(*given)

    monkeypatch.setattr(frozen, "_compute", counting)
    return computed


def prefix(seed: int = 1) -> keras.Model:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(2, 3, name="convolution", trainable=False)(inputs)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(inputs, [x, keras.layers.Activation("relu", name="relu")(x)], name="prefix")


def test_equal_content_is_computed_once(counted):
    first, again = features(prefix()), features(prefix())
    assert len(counted) == 1 and len(first) == 2
    np.testing.assert_array_equal(first[0], again[0])
    features(prefix(seed=2))  # other weights
    features(prefix(), "other data")
    frozen.features(prefix(), IMAGES, "data", 2, "test")  # sums in another order
    assert len(counted) == 4


def test_a_broken_entry_is_recomputed_and_the_folder_may_be_deleted(counted, root):
    expected = [array.copy() for array in features(prefix())]
    (path,) = (root / frozen.FOLDER).glob("*/0.npy")
    content = path.read_bytes()
    for broken in (content[:-4], content[:-1] + b"?", b""):
        path.write_bytes(broken)
        np.testing.assert_array_equal(features(prefix())[0], expected[0])
    (path.parent / frozen.ENTRY).write_text("{")
    np.testing.assert_array_equal(features(prefix())[1], expected[1])
    (path.parent / "1.npy").unlink()
    np.testing.assert_array_equal(features(prefix())[1], expected[1])
    shutil.rmtree(root / frozen.FOLDER)
    np.testing.assert_array_equal(features(prefix())[0], expected[0])
    assert len(counted) == 7


@pytest.mark.parametrize("again", [False, True])
def test_the_folder_may_be_deleted_while_features_are_computed(counted, root, monkeypatch, capfd, again):
    expected = [array.copy() for array in features(prefix())]
    shutil.rmtree(root / frozen.FOLDER)
    predict, left = keras.Model.predict_on_batch, [True] * (frozen.ATTEMPTS if again else 1)

    def deleting(self, *given):
        if left:
            left.pop()
            shutil.rmtree(root / frozen.FOLDER)
        return predict(self, *given)

    monkeypatch.setattr(keras.Model, "predict_on_batch", deleting)
    if again:
        with pytest.raises(LabError, match=r"Expected to keep features there. Found: deleted 3 times while"):
            features(prefix())
        return
    np.testing.assert_array_equal(features(prefix())[0], expected[0])
    assert "was deleted, its features are computed anew" in capfd.readouterr().err
    assert len(counted) == 3


def test_who_computes_into_a_deleted_folder_leaves_anothers_features_alone(counted, root, monkeypatch):
    expected = [array.copy() for array in features(prefix())]
    shutil.rmtree(root / frozen.FOLDER)
    predict, inner = keras.Model.predict_on_batch, []

    def deleting(self, *given):
        if not inner:
            inner.append(True)
            shutil.rmtree(root / frozen.FOLDER)
            with monkeypatch.context() as other:
                other.setattr(frozen, "os", SimpleNamespace(**vars(os) | {"getpid": lambda: 1}))
                inner.append(features(self))  # another process, which takes the new lock
        return predict(self, *given)

    monkeypatch.setattr(keras.Model, "predict_on_batch", deleting)
    found = features(prefix())
    for made in (found, inner[1]):
        np.testing.assert_array_equal(made[0], expected[0])


TOGETHER = """
import sys, time
from pathlib import Path
import numpy as np
from ablation_lab import frozen
from ablation_lab.backend import keras
keras.utils.set_random_seed(0)
pictures = keras.Input((8, 8, 3))
prefix = keras.Model(pictures, keras.layers.Conv2D(2, 3)(pictures))
compute = frozen._compute
def counted(*given):
    Path(f"computed-{sys.argv[1]}").touch()
    while not Path("waits").exists():
        time.sleep(0.1)
    compute(*given)
frozen._compute, frozen.PATIENCE = counted, 0.1
class Told:
    def write(self, text):
        if "waits for frozen layers that another cell computes" in text:
            Path("waits").touch()
    def flush(self):
        pass
sys.stderr = Told()
features = frozen.features(prefix, np.ones((70, 8, 8, 3), np.uint8), "digest", 1, "cell")
print(features[0].sum())
"""


def test_two_processes_compute_the_same_features_once(root):
    place = environment(root) | {"DVC_ROOT": str(root), "PYTHONPATH": str(ROOT / "src")}
    both = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, one], cwd=root, env=place, stdout=subprocess.PIPE, text=True)
        for one in "ab"
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert told[0] == told[1] != "" and (root / "waits").exists()
    assert len(list(root.glob("computed-*"))) == 1


def test_room_is_made_before_features_are_computed(root, monkeypatch, counted):
    for number, digest in enumerate("ab"):
        features(prefix(), digest)
        newest = max((root / frozen.FOLDER).glob("*/entry.json"), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (number, number))
    size = sum(path.stat().st_size for path in newest.parent.glob("*"))
    monkeypatch.setenv("ABLAB_FEATURES_GB", str(2.5 * size / 1e9))
    kept = []
    make_room = frozen._make_room

    def looking(*given):
        kept.append(len(list((root / frozen.FOLDER).glob("*/entry.json"))))
        make_room(*given)

    monkeypatch.setattr(frozen, "_make_room", looking)
    features(prefix(), "c")
    assert kept == [1]


def test_what_was_not_used_for_longest_goes_first(root, monkeypatch):
    folder = root / frozen.FOLDER
    for number, digest in enumerate("abc"):
        features(prefix(), digest)
        newest = max(folder.glob("*/entry.json"), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (number, number))
    features(prefix(), "a")  # used again
    size = sum(path.stat().st_size for path in newest.parent.glob("*"))
    monkeypatch.setenv("ABLAB_FEATURES_GB", str(3.5 * size / 1e9))
    features(prefix(), "d")
    kept = {path.parent for path in folder.glob("*/entry.json")}
    assert len(kept) == 3 and sum(path.stat().st_size for path in folder.glob("*/*")) <= frozen.limit()
    before = {path.parent: path.stat().st_mtime for path in folder.glob("*/entry.json")}
    for digest in "acd":
        features(prefix(), digest)
    assert len([entry for entry in before if entry.exists()]) == 3  # a, c and d were the ones that are kept


def test_what_another_process_uses_stays(root, monkeypatch):
    features(prefix(), "a")
    (entry,) = (root / frozen.FOLDER).glob("*/entry.json")
    monkeypatch.setenv("ABLAB_FEATURES_GB", "1e-9")
    with FileLock(frozen._lock(entry.parent)):
        features(prefix(), "b")
        assert entry.exists()
    features(prefix(), "b")
    assert not entry.exists()


def test_a_broken_computation_leaves_nothing(root, monkeypatch):
    def broken(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "predict_on_batch", broken)
        with pytest.raises(KeyboardInterrupt):
            features(prefix())
    assert not [path for path in (root / frozen.FOLDER).iterdir() if path.is_dir()]
    assert len(features(prefix())[0]) == 70


def test_a_disk_that_is_too_small_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(LabError, match=r"Expected .* GB of free disk for features"):
        features(prefix())


FILLED = """
import numpy as np
from ablation_lab import errors, frozen
from ablation_lab.backend import keras
frozen._make_room = lambda *_: None  # another process fills the disk right after this look at it
pictures = keras.Input((64, 64, 3))
prefix = keras.Model(pictures, keras.layers.Conv2D(8, 3)(pictures))
with errors.explained():
    frozen.features(prefix, np.zeros((200, 64, 64, 3), np.uint8), "digest", 1, "cell")
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_is_told_and_no_bus_error(tmp_path):
    (tmp_path / "features").mkdir()
    command = sys.executable, "-c", FILLED
    place = {"DVC_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    done = run(tmp_path, *full_disk(tmp_path / "features", 2000, *command), **place)
    assert done.returncode == 1
    assert f"error: {tmp_path}/features/" in done.stderr
    assert ": Expected room on the disk. Found: No space left on device" in done.stderr
    assert [path.suffix for path in (tmp_path / "features").iterdir()] == [".lock"]


def test_a_limit_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setenv("ABLAB_FEATURES_GB", "20GB")
    with pytest.raises(LabError, match=r"ABLAB_FEATURES_GB: Expected a number, such as 20. Found: 20GB"):
        frozen.limit()


def test_the_last_pictures_are_computed_like_the_first():
    alone = prefix().predict_on_batch(IMAGES[64:])[0]
    np.testing.assert_allclose(features(prefix())[0][64:], alone, rtol=1e-5)
    assert json.loads(prefix().to_json()) == json.loads(prefix().to_json())
