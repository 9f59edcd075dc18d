import inspect
import re

import numpy as np
import pytest

import one_thread  # noqa: F401  isort: skip
from ablation_lab import arguments, optimization
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
        ({"name": "adam", "momentum": 0.9}, "Found: momentum. A variant drops an inherited one with `momentum: null`."),
        (
            {"name": "sgd", "momentum": 7},
            "train.optimizer.momentum: Expected a number of at least 0 and less than 1. Found: 7.",
        ),
        ({"name": "adam", "clipnorm": 1.0, "clipvalue": 1.0}, "train.optimizer: Expected arguments that Adam takes."),
        (
            {"name": "lossscaleoptimizer"},
            "train.optimizer.name: Expected a Keras optimizer. Found: lossscaleoptimizer.",
        ),
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


COSINE = {"name": "CosineDecay", "initial_learning_rate": 0.1, "decay_steps": 100}
POLYNOMIAL = {"name": "PolynomialDecay", "initial_learning_rate": 0.1, "decay_steps": 100}
STEPS = {"name": "PiecewiseConstantDecay", "boundaries": [100, 200], "values": [0.1, 0.01, 0.001]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Texts that YAML 1.1 reads as truth values, and other kinds.
        (
            {"name": "sgd", "momentum": 0.9, "nesterov": "no"},
            'nesterov: Expected true or false. Found: "no". Write false',
        ),
        ({"name": "sgd", "momentum": 0.9, "nesterov": "off"}, "Write false: in YAML 1.2, off is a text."),
        ({"amsgrad": "yes"}, 'amsgrad: Expected true or false. Found: "yes". Write true: in YAML 1.2, yes is a text.'),
        ({"amsgrad": 1}, "amsgrad: Expected true or false. Found: 1."),
        ({"amsgrad": [True]}, "amsgrad: Expected true or false. Found: [true]."),
        ({"amsgrad": None}, "amsgrad: Expected true or false. Found: null."),
        ({"use_ema": "no"}, "use_ema: Expected true or false."),
        ({"name": "rmsprop", "centered": "Off"}, "centered: Expected true or false."),
        ({"clipnorm": True}, "clipnorm: Expected a number greater than 0. Found: true."),
        ({"weight_decay": "0.1"}, 'weight_decay: Expected a number of at least 0. Found: "0.1".'),
        ({"beta_1": [0.9]}, "beta_1: Expected a number of at least 0 and less than 1. Found: [0.9]."),
        # Numbers that mean nothing.
        ({"clipnorm": -1}, "clipnorm: Expected a number greater than 0. Found: -1."),
        ({"clipvalue": 0}, "clipvalue: Expected a number greater than 0. Found: 0."),
        ({"global_clipnorm": -0.1}, "global_clipnorm: Expected a number greater than 0. Found: -0.1."),
        ({"weight_decay": -1}, "weight_decay: Expected a number of at least 0. Found: -1."),
        ({"beta_1": 1.5}, "beta_1: Expected a number of at least 0 and less than 1. Found: 1.5."),
        ({"beta_2": 1}, "beta_2: Expected a number of at least 0 and less than 1. Found: 1."),
        ({"epsilon": -1e-7}, "epsilon: Expected a number of at least 0."),
        ({"name": "rmsprop", "momentum": -0.9}, "momentum: Expected a number of at least 0"),
        ({"name": "rmsprop", "rho": 2}, "rho: Expected a number of at least 0 and less than 1. Found: 2."),
        ({"use_ema": True, "ema_momentum": 1.0}, "ema_momentum: Expected a number of at least 0 and less than 1."),
        ({"use_ema": True, "ema_overwrite_frequency": 0}, "ema_overwrite_frequency: Expected a whole number of at"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: Expected a whole number of at least 2."),
        ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps: Expected a whole number of at least 2."),
        ({"loss_scale_factor": 0}, "loss_scale_factor: Expected a number greater than 0."),
        ({"name": "ScheduleFreeAdamW", "beta_1": 0}, "beta_1: Expected a number greater than 0, as ScheduleFreeAdamW"),
        # What has no effect beside other arguments.
        ({"name": "sgd", "nesterov": True}, "nesterov: Expected false, or a momentum"),
        ({"ema_momentum": 0.9}, "ema_momentum: Expected use_ema: true beside it"),
        ({"use_ema": False, "ema_overwrite_frequency": 5}, "ema_overwrite_frequency: Expected use_ema: true beside it"),
        # Schedules.
        ({"learning_rate": COSINE | {"initial_learning_rate": -0.1}}, "initial_learning_rate: Expected a number of at"),
        ({"learning_rate": COSINE | {"initial_learning_rate": 0}}, "initial_learning_rate: Expected a number greater"),
        ({"learning_rate": COSINE | {"decay_steps": 0}}, "decay_steps: Expected a number greater than 0. Found: 0."),
        ({"learning_rate": COSINE | {"alpha": 2}}, "alpha: Expected a number between 0 and 1. Found: 2."),
        ({"learning_rate": COSINE | {"warmup_steps": 5}}, "warmup_steps: Expected warmup_target beside it"),
        ({"learning_rate": COSINE | {"warmup_target": 0.2}}, "warmup_target: Expected warmup_steps beside it"),
        (
            {"learning_rate": COSINE | {"warmup_target": 0.2, "warmup_steps": -5}},
            "learning_rate.warmup_steps: Expected a whole number of at least 0. Found: -5.",
        ),
        (
            {"learning_rate": POLYNOMIAL | {"initial_learning_rate": 0, "end_learning_rate": 0}},
            "initial_learning_rate: Expected a number greater",
        ),
        ({"learning_rate": POLYNOMIAL | {"cycle": "no"}}, "cycle: Expected true or false."),
        ({"learning_rate": POLYNOMIAL | {"power": -1}}, "power: Expected a number greater than 0."),
        (
            {"learning_rate": POLYNOMIAL | {"name": "ExponentialDecay", "decay_rate": 0.9, "staircase": "no"}},
            'train.optimizer.learning_rate.staircase: Expected true or false. Found: "no". Write false',
        ),
        (
            {"learning_rate": POLYNOMIAL | {"name": "InverseTimeDecay", "decay_rate": -1}},
            "decay_rate: Expected a number greater than 0. Found: -1.",
        ),
        ({"learning_rate": STEPS | {"values": [0.1, -0.1, 0.1]}}, "values: Expected a list of numbers of at least 0"),
        (
            {"learning_rate": STEPS | {"values": [0, 0, 0.0]}},
            "values: Expected a list of numbers of at least 0, not all",
        ),
        ({"learning_rate": STEPS | {"boundaries": [200, 100]}}, "boundaries: Expected a list of ascending numbers"),
    ],
)
def test_an_argument_that_keras_does_not_check_is_refused(settings, message):
    with pytest.raises(LabError) as caught:
        optimization.optimizer({"name": "adam"} | settings)
    assert str(caught.value).startswith("train.optimizer.")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "rate",
    [
        COSINE,
        COSINE | {"warmup_steps": 5, "warmup_target": 0.2},
        POLYNOMIAL,
        POLYNOMIAL | {"end_learning_rate": 0.2},
        POLYNOMIAL | {"initial_learning_rate": 0, "end_learning_rate": 0.2},
        STEPS,
        STEPS | {"values": [0.1, 0.01, 0]},
    ],
)
def test_schedules_that_mean_something_are_taken(rate):
    found = optimization.optimizer({"name": "sgd", "momentum": 0, "nesterov": False, "learning_rate": rate})
    assert float(found.learning_rate) >= 0


def test_a_ramp_ends_at_its_end():
    ramp = POLYNOMIAL | {"initial_learning_rate": 0, "end_learning_rate": 0.2}
    found = optimization.optimizer({"name": "sgd", "learning_rate": ramp})
    assert [float(found._learning_rate(step)) for step in (0, 50, 100, 200)] == pytest.approx([0, 0.1, 0.2, 0.2])


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_momentum_0_ablates_nesterov_too(name):
    given = {"name": name, "learning_rate": 0.1, "nesterov": True}
    if name == "sgd":
        with pytest.raises(LabError, match="nesterov: Expected false, or a momentum"):
            optimization.optimizer(given)
    found = optimization.optimizer(given | {"momentum": 0})
    weight = keras.Variable(np.ones((2, 2), np.float32))
    found.apply([np.ones((2, 2), np.float32)], [weight])
    assert (np.asarray(weight) < 1).any()


@pytest.mark.parametrize(
    ("kinds", "table", "unchecked"),
    [
        (optimization.OPTIMIZERS, arguments.OF_OPTIMIZERS, {"learning_rate", "name", "kwargs", "exclude_layers"}),
        (optimization.SCHEDULES, arguments.OF_SCHEDULES, {"name"}),
    ],
    ids=["optimizers", "schedules"],
)
def test_every_argument_of_keras_has_a_range_or_is_a_truth_value(kinds, table, unchecked):
    for kind in kinds.values():
        for name, parameter in inspect.signature(kind).parameters.items():
            assert name in table or name in unchecked or isinstance(parameter.default, bool), (kind, name)


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
        ({"loss": "xyzzy", "label_smoothing": 0}, "Found: xyzzy. Known: binary_crossentropy,"),
    ],
)
def test_a_loss_that_keras_does_not_know_is_told(settings, message):
    with pytest.raises(LabError) as caught:
        optimization.loss(settings)
    assert message in str(caught.value)


def test_names_that_are_always_refused_are_no_hint():
    with pytest.raises(LabError) as caught:
        optimization.loss({"loss": "xyzzy", "label_smoothing": 0})
    assert "sparse_categorical_crossentropy" in str(caught.value)
    assert not {"ctc", "circle", "categorical_generalized_cross_entropy"} & set(re.findall(r"\w+", str(caught.value)))


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
        (
            {"RandomFlop": {}},
            "input.augment.RandomFlop: Expected a Keras layer of augmentation that keeps the pictures' size. "
            "Found: RandomFlop. Did you mean RandomFlip?",
        ),
        ({"RandomCrop": {"height": 8, "width": 8}}, "input.augment.RandomCrop: Expected a Keras layer of augmentation"),
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


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            {"RandomFlip": {"mode": "horizonal"}},
            'RandomFlip.mode: Expected horizontal, vertical or horizontal_and_vertical. Found: "horizonal".',
        ),
        (
            {"RandomRotation": {"factor": 0.1, "fill_mode": "mirror"}},
            "fill_mode: Expected constant, nearest, reflect or",
        ),
        (
            {"RandomZoom": {"height_factor": 0.1, "interpolation": "cubic"}},
            "interpolation: Expected nearest or bilinear.",
        ),
        (
            {"RandomBrightness": {"factor": 0.1, "value_range": [0, 1]}},
            "RandomBrightness.value_range: Expected [0, 255], the values that augmentation sees. Found: [0, 1].",
        ),
        (
            {"RandomFlip": {"seed": 3}},
            "RandomFlip.seed: Expected none, as the cell's seed decides what is drawn. Found: 3.",
        ),
        ({"RandomFlip": {"name": "flip"}}, 'RandomFlip.name: Expected none, as a name changes nothing. Found: "flip".'),
        ({"RandomFlip": {"dtype": "float16"}}, "RandomFlip.dtype: Expected none, as augmentation computes in float32."),
        ({"RandomFlip": {"data_format": "channels_first"}}, "data_format: Expected none, as channels come last."),
        ({"RandomRotation": {"factor": 0.1, "fill_value": 9}}, "fill_value: Expected fill_mode: constant beside it"),
        ({"RandomShear": {"x_factor": "0.1"}}, 'x_factor: Expected a number. Found: "0.1".'),
        ({"RandomShear": {"x_factor": True}}, "x_factor: Expected a number. Found: true."),
    ],
)
def test_augmentation_that_keras_does_not_check_is_refused(augment, message):
    with pytest.raises(LabError) as caught:
        optimization.augmentation(augment)
    assert f"input.augment.{next(iter(augment))}." in str(caught.value)
    assert message in str(caught.value)


# Of each layer arguments that change pictures.
AUGMENTED = {
    "AutoContrast": {},
    "RandomBrightness": {"factor": 0.1, "value_range": [0, 255]},
    "RandomColorDegeneration": {"factor": 0.5},
    "RandomColorJitter": {"contrast_factor": 0.3},
    "RandomContrast": {"factor": 0.2},
    "RandomElasticTransform": {},
    "RandomErasing": {},
    "RandomFlip": {"mode": "vertical"},
    "RandomGaussianBlur": {},
    "RandomGrayscale": {"factor": 0.01},
    "RandomHue": {"factor": 0.1},
    "RandomInvert": {},
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 3},
    "RandomRotation": {"factor": 0.01, "fill_mode": "constant", "fill_value": 128},
    "RandomSaturation": {"factor": 0.3},
    "RandomSharpness": {"factor": 0.3},
    "RandomShear": {"x_factor": 0.1},
    "RandomTranslation": {"height_factor": 0.1, "width_factor": [-0.1, 0.2], "interpolation": "nearest"},
    "RandomZoom": {"height_factor": 0.1},
}


def test_all_layers_of_augmentation_that_keras_has_can_be_used():
    assert set(AUGMENTED) == set(optimization.AUGMENTATIONS)
    assert optimization.check_augmentation(AUGMENTED, (16, 16, 3)) == []


@pytest.mark.parametrize(
    "augment",
    [
        {"RandomRotation": {"factor": 0}},
        {"RandomShear": {}},
        {"RandomColorJitter": {}},
        {"RandomTranslation": {"height_factor": 0, "width_factor": 0}},
        {"RandomZoom": {"height_factor": [0, 0]}},
        {"RandomErasing": {"factor": 0}},
    ],
)
def test_augmentation_that_changes_no_picture_is_refused(augment):
    (name,) = augment
    with pytest.raises(LabError, match=f"input.augment.{name}: Expected arguments with which it changes pictures"):
        optimization.check_augmentation(augment, (8, 8, 3))


def test_augmentation_that_may_change_a_picture_is_taken():
    rare = {"RandomErasing": {"factor": 1e-4}, "RandomFlip": {}}
    assert optimization.check_augmentation(rare, (8, 8, 3)) == ["RandomErasing"]
