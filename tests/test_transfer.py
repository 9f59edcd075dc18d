import inspect

import numpy as np
import pytest

import one_thread  # noqa: F401  isort: skip
from ablation_lab import frozen, models, params
from ablation_lab.backend import keras
from ablation_lab.errors import LabError
from ablation_lab.models import transfer

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)


def network(backbone: str = "SqueezeNet", rescale: str = "backbone", shape=(40, 40, 3), classes=3, **settings):
    model = params.Transfer(builder="transfer", backbone=backbone, **settings).resolved()
    keras.utils.clear_session()
    return models.build(model, rescale, shape, classes)


@pytest.mark.parametrize(
    ("backbone", "features", "parameters"),
    [("DenseNet201", 30_720, 18_321_984), ("ResNet152", 32_768, 58_370_944), ("VGG16", 8_192, 14_714_688)],
)
def test_published_sizes(backbone, features, parameters):
    built = network(backbone, shape=(128, 128, 3), head_from="flatten")
    assert built.get_layer("features").output.shape == (None, features)
    assert transfer.backbone_of(built).count_params() == parameters


def test_a_small_picture_of_vgg16_is_512_features():
    assert network("VGG16", shape=(48, 48, 3), head_from="flatten").get_layer("features").output.shape == (None, 512)


@pytest.mark.parametrize(
    "backbone", ["SqueezeNet", "VGG16", "ResNet50V2", "DenseNet121", "EfficientNetB0", "ConvNeXtTiny"]
)
def test_pictures_are_prepared_as_the_backbones_own_function_does(backbone):
    _, prepare = transfer.find(backbone)
    inputs = keras.Input((None, None, 3))
    ours = keras.Model(inputs, transfer.preprocess(backbone, inputs))(PICTURES)
    np.testing.assert_allclose(ours, prepare(PICTURES.astype(np.float32)), atol=1e-4)


@pytest.mark.parametrize("backbone", ["ResNet50", "MobileNetV2", "EfficientNetB0"])
def test_the_backbone_is_keras_own_with_raw_pictures_in_front(backbone):
    built = network(backbone, shape=(64, 64, 3), head_from="global_max", weights=None)
    build, prepare = transfer.find(backbone)
    theirs = build(include_top=False, weights=None, input_shape=(64, 64, 3), pooling="max")
    theirs.set_weights(transfer.backbone_of(built).get_weights())
    pictures = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    ours = keras.Model(built.inputs, built.get_layer("features").output).predict(pictures, verbose=0)
    np.testing.assert_allclose(ours, theirs.predict(prepare(pictures.copy()), verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("none", lambda number, total: False),
        ("all", lambda number, total: True),
        ({"last": 10}, lambda number, total: number >= total - 10),
        ({"from_layer": 100}, lambda number, total: number >= 100),
    ],
)
def test_layers_are_counted_as_keras_counts_them(trainable, expected):
    built = network("ResNet50", shape=(64, 64, 3), trainable=trainable)
    theirs = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(64, 64, 3))
    for number, layer in list(enumerate(theirs.layers))[1:]:
        assert built.get_layer(layer.name).trainable == expected(number, len(theirs.layers)), layer.name
    assert built.get_layer("probabilities").trainable


def test_more_layers_than_there_are_is_told():
    with pytest.raises(
        LabError, match=r"model.trainable.last: Expected at most 62, as SqueezeNet has 62 layers. Found: 63"
    ):
        network(trainable={"last": 63})
    with pytest.raises(LabError, match=r"from_layer: Expected at most 61"):
        network(trainable={"from_layer": 62})


def test_batch_normalisation_of_frozen_layers_stays_as_it_is():
    built = network("MobileNetV2", shape=(32, 32, 3), trainable="none")
    keras.utils.set_random_seed(0)
    before = [weight.copy() for weight in transfer.backbone_of(built).get_weights()]
    built.compile("adam", "categorical_crossentropy")
    built.fit(PICTURES[:, :32, :32].astype(np.float32), np.eye(3, dtype=np.float32), verbose=0)
    for left, right in zip(before, transfer.backbone_of(built).get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_dropout_of_frozen_layers_is_off_and_that_of_trained_ones_is_not():
    rates = []
    for trainable in ("none", {"last": 40}, "all"):
        built = network("EfficientNetB0", shape=(32, 32, 3), trainable=trainable)
        dropouts = [layer for layer in built.layers if isinstance(layer, keras.layers.Dropout)]
        assert all((layer.rate > 0) == layer.trainable for layer in dropouts)
        rates.append([layer.rate for layer in dropouts])
    none, last, every = rates
    assert not any(none) and all(every)
    assert 0 < np.count_nonzero(last) < len(every)
    # A plan's networks share a backbone, whatever of it they train.
    for trainable in ("none", "all"):
        transfer.set_trainable(built, {"backbone": "EfficientNetB0", "trainable": trainable, "l2": 0})
    assert [layer.rate for layer in dropouts] == every


@pytest.mark.parametrize("output", ["softmax", "logits", "sigmoid"])
def test_every_output_becomes_probabilities_that_survive_saving(output, tmp_path):
    built = network(output=output, classes=2, head={"dense1": {"units": 4, "activation": "linear"}})
    found = built.predict(PICTURES, verbose=0)
    assert found.shape == (3, 2)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    trained = models.trained(built, {"builder": "transfer", "output": output})
    raw = trained.predict(PICTURES, verbose=0)
    match output:
        case "sigmoid":
            np.testing.assert_allclose(found[:, 1:], raw, atol=1e-6)
        case "logits":
            np.testing.assert_allclose(found, np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True), atol=1e-5)
        case "softmax":
            np.testing.assert_array_equal(found, raw)
    again = keras.models.model_from_json(built.to_json())
    again.set_weights(built.get_weights())
    np.testing.assert_array_equal(again.predict(PICTURES, verbose=0), found)


def test_a_sigmoid_is_for_two_classes():
    with pytest.raises(LabError, match=r"model.output: Expected softmax or logits for 3 classes, .* Found: sigmoid"):
        network(output="sigmoid")


def test_an_unknown_backbone_is_told():
    with pytest.raises(LabError, match=r"Found: Densenet20. Did you mean DenseNet201?"):
        network("Densenet20")


def test_grey_pictures_are_told():
    with pytest.raises(LabError, match=r"Expected pictures in colour: set data.color: rgb. Found: shape 40×40×1"):
        network("VGG16", shape=(40, 40, 1))


def test_every_network_of_keras_is_known():
    for name, function in vars(keras.applications).items():
        if inspect.isfunction(function):
            assert transfer.find(name.lower())[0] is function


def test_pictures_of_any_size():
    built = network(any_size=True)
    assert built.predict(PICTURES, verbose=0).shape == built.predict(PICTURES[:, :36, :38], verbose=0).shape


def penalty(network: keras.Model) -> float:
    return float(sum(network.losses))


def squares(weights: list[keras.Variable]) -> float:
    """The sum of squares of all kernels among some weights."""
    return sum(float((np.asarray(one) ** 2).sum()) for one in weights if one.path.endswith("kernel"))


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [("SqueezeNet", (40, 40, 3)), ("MobileNet", (32, 32, 3)), ("Xception", (72, 72, 3)), ("ConvNeXtTiny", (32, 32, 3))],
)
def test_l2_is_of_every_kernel_that_is_trained(backbone, shape):
    settings = {"l2": 0.01, "head_l2": 0.1, "head": {"dense1": {"units": 4}}}
    built = network(backbone, shape=shape, trainable="all", **settings)
    head = [weight for name in ("dense1", "probabilities") for weight in built.get_layer(name).weights]
    whole = squares(transfer.backbone_of(built).trainable_weights)
    assert whole > 0
    assert penalty(built) == pytest.approx(0.01 * whole + 0.1 * squares(head), rel=1e-4)
    copy = keras.models.model_from_json(built.to_json())  # as it is saved, and copied to several devices
    copy.set_weights(built.get_weights())
    assert penalty(copy) == pytest.approx(penalty(built), rel=1e-5)
    # Variants of a study share the layers of a backbone while they are planned.
    model = params.Transfer(builder="transfer", backbone=backbone, trainable={"last": 9}, **settings).resolved()
    last = models.build(model, "backbone", shape, 3, transfer.backbone_of(built))
    head = [weight for name in ("dense1", "probabilities") for weight in last.get_layer(name).weights]
    some = squares(transfer.backbone_of(last).trainable_weights)
    assert 0 < some < whole
    assert penalty(last) == pytest.approx(0.01 * some + 0.1 * squares(head), rel=1e-4)
    prefix, _, trained = frozen.split(last, last)
    assert penalty(trained) == pytest.approx(penalty(last), rel=1e-6) and not prefix.losses
