import numpy as np
import pytest

import one_thread  # noqa: F401  isort: skip
from ablation_lab import optimization
from ablation_lab.backend import keras
from ablation_lab.errors import LabError


def test_an_optimizer_gets_its_arguments():
    found = optimization.optimizer({"name": "sgd", "learning_rate": 0.05, "momentum": 0.9})
    assert isinstance(found, keras.optimizers.SGD)
    assert float(found.learning_rate) == pytest.approx(0.05)
    assert found.momentum == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adm"}, "train.optimizer.name: Expected a Keras optimizer. Found: adm. Did you mean adam?"),
        (
            {"name": "sgd", "momentm": 1},
            "train.optimizer.momentm: Expected an argument of SGD. Found: momentm. Did you",
        ),
        ({"name": "adam", "nesterov": True}, "A variant drops an inherited one with `nesterov: null`."),
        ({"name": "sgd", "momentum": 7}, "train.optimizer: Expected arguments that SGD takes."),
        (
            {"name": "sgd", "learning_rate": {"name": "CosinDecay"}},
            "train.optimizer.learning_rate.name: Expected a Keras schedule. Found: CosinDecay. Did you",
        ),
        (
            {"name": "sgd", "learning_rate": {"name": "CosineDecay", "steps": 3}},
            "train.optimizer.learning_rate.steps: Expected an argument of CosineDecay. Found: steps.",
        ),
    ],
)
def test_an_optimizer_that_keras_does_not_know_is_told(settings, message):
    with pytest.raises(LabError) as caught:
        optimization.optimizer(settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"beta_1": 0.5, "epsilon": 1e-3}, {"weight_decay": 0.1, "clipnorm": 0.5}])
def test_adam_is_keras_adam(settings):
    random = np.random.default_rng(0)
    gradients = random.normal(size=(20, 3, 4)).astype(np.float32)
    ours = optimization.optimizer({"name": "adam", "learning_rate": 0.1} | settings)
    theirs = keras.optimizers.Adam(learning_rate=0.1, **settings)
    weights = [keras.Variable(np.ones((3, 4), np.float32)) for _ in range(2)]
    for gradient in gradients:
        for optimizer, weight in zip((ours, theirs), weights, strict=True):
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [weight])
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(weights[0]) - 1).max() > 0.1


def test_losses_by_name():
    assert isinstance(
        optimization.loss({"loss": "mean_squared_error", "label_smoothing": 0}), keras.losses.MeanSquaredError
    )
    smoothed = optimization.loss({"loss": "categorical_crossentropy", "label_smoothing": 0.1})
    assert smoothed.get_config()["label_smoothing"] == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": "categorical_crosentropy", "label_smoothing": 0},
            "train.loss: Expected a Keras loss. Found: categorical_crosentropy. Did you mean categorical_crossentropy?",
        ),
        (
            {"loss": "mean_squared_error", "label_smoothing": 0.1},
            "train.label_smoothing: Expected 0, since mean_squared_error takes none. Found: 0.1.",
        ),
    ],
)
def test_a_loss_that_keras_does_not_know_is_told(settings, message):
    with pytest.raises(LabError) as caught:
        optimization.loss(settings)
    assert message in str(caught.value)


def test_a_loss_is_told_what_it_is_given():
    settings = {"loss": "categorical_crossentropy", "label_smoothing": 0}
    assert optimization.loss(settings, "logits").get_config()["from_logits"]
    assert [optimization.label_form(settings, output) for output in ("softmax", "sigmoid")] == ["one_hot", "second"]
    assert optimization.label_form(settings | {"loss": "sparse_categorical_crossentropy"}) == "number"
    with pytest.raises(LabError, match=r"model.output: Expected softmax, since mean_squared_error takes no logits"):
        optimization.loss(settings | {"loss": "mean_squared_error"}, "logits")


def test_class_weights():
    labels = np.repeat([0, 1], [500, 300])
    balanced = optimization.class_weights("balanced", ["indoor", "outdoor"], labels)
    assert balanced == {0: 0.8, 1: pytest.approx(4 / 3)}  # as scikit-learn's compute_class_weight
    assert optimization.class_weights({"outdoor": 3}, ["indoor", "outdoor"], labels) == {0: 1, 1: 3}
    assert optimization.class_weights(None, ["indoor", "outdoor"], labels) is None
    with pytest.raises(LabError, match=r"Expected names of classes. Found: outdor. Did you mean outdoor?"):
        optimization.class_weights({"outdor": 3}, ["indoor", "outdoor"], labels)


def test_augmentation_layers_by_name_in_order():
    layers = optimization.augmentation({"RandomFlip": {"mode": "horizontal"}, "RandomRotation": {"factor": 0.1}})
    assert [type(layer).__name__ for layer in layers] == ["RandomFlip", "RandomRotation"]


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"RandomFlop": {}}, "input.augment.RandomFlop: Expected a Keras layer. Found: RandomFlop. Did you mean"),
        (
            {"RandomFlip": {"way": 1}},
            "input.augment.RandomFlip.way: Expected an argument of RandomFlip. Found: way. Known",
        ),
        ({"RandomFlip": {"mod": 1}}, "Did you mean mode?"),
    ],
)
def test_augmentation_that_keras_does_not_know_is_told(augment, message):
    with pytest.raises(LabError) as caught:
        optimization.augmentation(augment)
    assert message in str(caught.value)
