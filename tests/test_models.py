import sys

import numpy as np
import pytest

import one_thread  # noqa: F401  isort: skip
from ablation_lab import models, params
from ablation_lab.backend import keras
from ablation_lab.models import custom
from ablation_lab.plan import macs


def network(image_shape=(28, 28, 1), **settings) -> keras.Model:
    settings = {"builder": "cnn", "head": {"dense1": {"units": 100}}} | settings
    resolved = params.BUILDERS[settings["builder"]].model_validate(settings).resolved()
    return models.build(resolved, "unit", image_shape, 10)


# Sizes as published for these networks on Fashion-MNIST.
@pytest.mark.parametrize(
    ("blocks", "parameters"),
    [
        ([{"filters": 32}], 542_230),
        ([{"filters": 32}, {"filters": 32, "pool": 1}, {"filters": 32, "pool": 1}], 279_126),
        ([{"filters": 32, "convolution": "separable"}], 541_983),
        ([{"convolution": "depthwise", "kernel": 28, "pool": 1}], 1_995),
        ([{"filters": 32, "convolution": "transpose"}], 721_430),
    ],
)
def test_published_networks_have_their_published_size(blocks, parameters):
    built = network(blocks={f"block{i}": block for i, block in enumerate(blocks)})
    assert built.count_params() == parameters


def test_a_block_is_convolutions_with_normalisation_and_activation_then_pooling_then_dropout():
    built = network(
        blocks={
            "a": {"filters": 4, "convolutions": 2, "normalization": "batch", "pool_type": "average", "dropout": 0.1}
        },
        head_from="global_average",
        features_dropout=0.2,
        head_dropout=0.5,
    )
    kinds = [type(layer).__name__ for layer in built.layers]
    convolution = ["Conv2D", "BatchNormalization", "Activation"]
    block = [*convolution, *convolution, "AveragePooling2D", "Dropout"]
    head = ["GlobalAveragePooling2D", "Dropout", "Dense", "Activation", "Dropout", "Dense"]
    assert kinds == ["InputLayer", "Rescaling", *block, *head]
    assert [layer.rate for layer in built.layers if isinstance(layer, keras.layers.Dropout)] == [0.1, 0.2, 0.5]


def test_a_network_takes_raw_pictures_and_gives_probabilities():
    built = network(builder="mlp", image_shape=(8, 8, 3), activation="tanh")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype("uint8")
    probabilities = built.predict(pictures, verbose=0)
    assert probabilities.shape == (5, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert float(keras.ops.max(built.get_layer("rescale")(pictures))) <= 1


@pytest.mark.parametrize(("rescale", "black", "white"), [("unit", 0, 1), ("symmetric", -1, 1), ("none", 0, 255)])
def test_rescale(rescale, black, white):
    built = models.build(params.Mlp(builder="mlp").resolved(), rescale, (2, 2, 1), 2)
    features = keras.Model(built.input, built.get_layer("features").output)
    pictures = np.stack([np.zeros((2, 2, 1)), np.full((2, 2, 1), 255)])
    np.testing.assert_allclose(features.predict(pictures, verbose=0), [[black] * 4, [white] * 4], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": {"one": {"filters": 4, "pool": 40}}}, "layer one_pool (MaxPooling2D) does not fit"),
        ({"blocks": {"one": {"filters": 4}, "two": {"filters": 4, "kernel": 20}}}, "layer two_conv1 (Conv2D) does not"),
        ({"blocks": {"one": {"filters": 4, "kernel": 40}}}, "Found: shape 28×28×1;"),
        ({"builder": "mlp", "activation": "rellu"}, "Expected a Keras activation. Found: rellu. Did you mean relu?"),
        ({"builder": "mlp", "initializer": "he"}, "model.initializer: Expected a Keras initializer. Found: he."),
    ],
)
def test_what_does_not_fit_names_the_layer(settings, message):
    with pytest.raises(models.NetworkError) as caught:
        network(**settings)
    assert message in str(caught.value)


def test_multiply_accumulates_are_counted_by_hand():
    built = network(
        image_shape=(8, 8, 3),
        padding="same",
        blocks={
            "plain": {"filters": 4, "pool": 1},
            "separable": {"filters": 5, "convolution": "separable", "pool": 1},
            "depthwise": {"convolution": "depthwise", "stride": 2, "pool": 1},
            "transpose": {"filters": 2, "convolution": "transpose", "stride": 2, "pool": 1},
        },
    )
    counted = {layer.name: macs(layer) for layer in built.layers if macs(layer)}
    assert counted == {
        "plain_conv1": 8 * 8 * 3 * 3 * 3 * 4,
        "separable_conv1": 8 * 8 * (3 * 3 * 4 + 4 * 5),
        "depthwise_conv1": 4 * 4 * 3 * 3 * 5,
        "transpose_conv1": 4 * 4 * 3 * 3 * 5 * 2,
        "dense1": 8 * 8 * 2 * 100,
        "probabilities": 100 * 10,
    }


STAGES = {f"stage{i}": {"filters": 4 * 2**i, "stride": 1 if i == 0 else 2} for i in range(3)}


def test_a_residual_network_has_projections_where_the_shape_changes():
    built = network(builder="resnet", stem={"filters": 4}, stages=STAGES, features_pool=2, head={}, head_from="flatten")
    kinds = [type(layer).__name__ for layer in built.layers]
    assert kinds.count("Add") == 6
    assert kinds.count("Conv2D") == 1 + 6 * 2 + 2  # stem, two a block, two projections
    assert built.get_layer("stage0_block1_add").output.shape[1:] == (14, 14, 4)
    assert built.get_layer("stage2_block2_add").output.shape[1:] == (4, 4, 16)
    assert built.get_layer("features").output.shape[1:] == (2 * 2 * 16,)


@pytest.mark.parametrize(
    "settings",
    [
        *({"blocks": {"block1": {"filters": 3, "convolution": kind}}} for kind in ("standard", "separable")),
        *({"blocks": {"block1": {"filters": 3, "convolution": kind}}} for kind in ("depthwise", "transpose")),
        {"builder": "resnet", "stem": {"filters": 4}, "stages": {"one": {"filters": 4}, "two": {"filters": 6}}},
        {"builder": "mlp", "head": {"dense1": {"units": 4}}},
    ],
)
def test_l2_is_of_every_kernel(settings):
    built = network(l2=0.01, **settings)
    kernels = [weight for weight in built.trainable_weights if weight.path.endswith("kernel")]
    squares = sum(float((np.asarray(one) ** 2).sum()) for one in kernels)
    assert float(sum(built.losses)) == pytest.approx(0.01 * squares, rel=1e-5)


def test_weight_decay_of_the_head_may_differ():
    built = network(builder="resnet", stem={"filters": 4}, stages=STAGES, l2=0.5, head_l2=0)
    decayed = {layer.name for layer in built.layers if getattr(layer, "kernel_regularizer", None)}
    assert decayed == {layer.name for layer in built.layers if isinstance(layer, keras.layers.Conv2D)}


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": {"one": {"filters": 4}}, "head_from": "global_average"},
        {"builder": "resnet", "stem": {"filters": 4}, "stages": STAGES},
    ],
)
def test_a_network_for_pictures_of_any_size(settings):
    built = network(any_size=True, **settings)
    for height, width in ((28, 28), (36, 30)):
        assert built.predict(np.zeros((2, height, width, 1), np.uint8), verbose=0).shape == (2, 10)


def own(model: str, **settings) -> keras.Model:
    resolved = params.Custom.model_validate({"builder": model} | settings).resolved()
    return models.build(resolved, "unit", (8, 8, 3), 4)


def test_a_network_of_the_users_stands_behind_the_rescaling(own_networks):
    built = own("networks.mine:good", units=7)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype("uint8")
    np.testing.assert_allclose(built.predict(pictures, verbose=0).sum(axis=1), 1, rtol=1e-5)
    assert built.layers[1].name == "rescale"
    custom.check(built, (8, 8, 3), 4, "networks.mine:good")
    assert built.count_params() == (8 * 8 * 3 + 1) * 7 + (7 + 1) * 4


@pytest.mark.parametrize(
    ("builder", "settings", "message"),
    [
        (
            "networks.mien:good",
            {},
            "Expected a module that can be imported, such as networks.mine for networks/mine.py.",
        ),
        ("networks.mine:goood", {}, "Expected a function of networks.mine: broken, forgetful, good,"),
        (
            "networks.mine:good",
            {"unit": 3},
            "model.unit: Expected an argument of networks.mine:good: units. Found: unit. Did",
        ),
        ("networks.mine:broken", {}, "Expected a network. Found: KeyError: 'x' ("),
        ("networks.mine:text", {}, "Expected a keras.Model. Found: str."),
        ("networks.broken:good", {}, "networks.broken: SyntaxError: "),
    ],
)
def test_what_a_users_function_does_wrong_is_told(own_networks, builder, settings, message):
    with pytest.raises(models.NetworkError) as caught:
        own(builder, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual": "no"}, 'model.residual: Expected true or false. Found: "no". Write false: in YAML 1.2, no is a'),
        ({"residual": "off"}, "Write false"),
        ({"residual": 1}, "model.residual: Expected true or false. Found: 1. The default or the annotation in netw"),
        ({"residual": [True]}, "model.residual: Expected true or false."),
        ({"normalised": "yes"}, 'model.normalised: Expected true or false or null. Found: "yes". Write true'),
        ({"rate": "0.5"}, 'model.rate: Expected a number. Found: "0.5".'),
        ({"rate": True}, "model.rate: Expected a number. Found: true."),
    ],
)
def test_a_value_of_another_kind_than_the_function_asks_for_is_refused(own_networks, settings, message):
    with pytest.raises(models.NetworkError) as caught:
        own("networks.mine:typed", **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"residual": False}, {"rate": 0}, {"rate": [0.1, 0.2]}, {"units": "many"}, {"units": 3}, {"free": "no"}],
)
def test_values_of_the_kinds_that_the_function_asks_for_are_taken(own_networks, settings):
    assert own("networks.mine:typed", **settings)


UNRESOLVED = """
from __future__ import annotations

import typing
from typing import Any, Literal, TYPE_CHECKING

if TYPE_CHECKING:
    import keras


def annotated(
    image_shape: tuple[int, int, int],
    classes: int,
    residual: bool = True,
    several: bool | list = True,
    unknown: bool | keras.Layer = False,
    invalid: typing.nothing[0] = True,
    mode: bool | str = True,
    kept: bool | Literal["first", "last"] = True,
    free: Any = False,
    either: str | keras.Layer | bool = False,
) -> keras.Model:
    from networks.mine import sigmoids

    return sigmoids(image_shape, classes)
"""


def test_annotations_that_only_a_type_checker_resolves_hide_no_others(own_networks):
    (own_networks / "networks" / "unresolved.py").write_text(UNRESOLVED)
    for name in ("residual", "several", "unknown", "invalid"):
        with pytest.raises(models.NetworkError) as caught:
            own("networks.unresolved:annotated", **{name: "no"})
        assert f'model.{name}: Expected true or false. Found: "no". Write false' in str(caught.value)
    taken = {"residual": False, "several": [1], "unknown": True, "invalid": 3, "mode": "no", "kept": "last"}
    assert own("networks.unresolved:annotated", **taken, free="no", either="no")


def test_the_place_in_the_users_own_file_is_told(own_networks):
    with pytest.raises(models.NetworkError, match=r"mine\.py, line 14\)"):
        own("networks.mine:broken")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("logits", 'Expected probabilities of 4 classes, as a last layer Dense(classes, activation="softmax") gives'),
        ("private", "layers of your own need @keras.saving.register_keras_serializable() and get_config()."),
        ("forgetful", "Does the get_config() of a layer of your own leave out an argument?"),
        ("sigmoids", "Found: numbers that don't sum to 1."),
    ],
)
def test_a_network_that_training_could_not_use_is_refused(own_networks, function, message):
    with pytest.raises(models.NetworkError) as caught:
        custom.check(own(f"networks.mine:{function}"), (8, 8, 3), 4, f"networks.mine:{function}")
    assert message in str(caught.value)


def test_the_sources_of_a_users_network_are_what_it_imports_below_the_root(own_networks):
    found = custom.sources("networks.mine:good", own_networks)
    assert list(found) == ["networks/__init__.py", "networks/mine.py", "networks/parts.py"]
    (own_networks / "networks/parts.py").write_text("SIZE = 6\n")
    changed = custom.sources("networks.mine:good", own_networks)
    assert [path for path in found if found[path] != changed[path]] == ["networks/parts.py"]
    assert custom.lint(found) is None
    assert "DVC notices changes of files in networks/ only" in custom.lint(found | {"elsewhere.py": "0"})
    assert "an installed package" in custom.lint(custom.sources("keras.applications:ResNet50", own_networks))


def test_a_folder_without_init_is_told_since_its_edits_would_go_unnoticed(own_networks):
    (own_networks / "networks/deep").mkdir()
    (own_networks / "networks/deep/net.py").write_text("")
    with pytest.raises(models.NetworkError, match=r"an `__init__\.py`, so that their edits are noticed"):
        custom.sources("networks.deep.net:build", own_networks)


MINE = """
import keras
from keras import layers

from networks.parts import SIZE


def good(image_shape, classes, units=SIZE):
    outside = [layers.Flatten(), layers.Dense(units), layers.Dense(classes, activation="softmax")]
    return keras.Sequential([keras.Input(image_shape), *outside])


def broken(image_shape, classes):
    return {}["x"]


def text(image_shape, classes):
    return "network"


def logits(image_shape, classes):
    return keras.Sequential([keras.Input(image_shape), layers.Flatten(), layers.Dense(classes)])


class Private(layers.Layer):
    def call(self, inputs):
        return inputs


def private(image_shape, classes):
    return keras.Sequential([keras.Input(image_shape), Private(), layers.Flatten(), layers.Dense(classes, "softmax")])


@keras.saving.register_keras_serializable()
class Forgetful(layers.Layer):
    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, inputs):
        return inputs * self.scale

    def get_config(self):
        return super().get_config()


def forgetful(image_shape, classes):
    outside = [Forgetful(30.0), layers.Flatten(), layers.Dense(classes, "softmax")]
    return keras.Sequential([keras.Input(image_shape), *outside])


def sigmoids(image_shape, classes):
    return keras.Sequential([keras.Input(image_shape), layers.Flatten(), layers.Dense(classes, "sigmoid")])


def typed(
    image_shape, classes, residual=True, normalised: bool | None = None, rate=0.5, units: int | str = 1, free=None
):
    return sigmoids(image_shape, classes)
"""


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    folder = tmp_path / "networks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "parts.py").write_text("SIZE = 5\n")
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("def good(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "networks"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "networks"]:
        del sys.modules[name]
