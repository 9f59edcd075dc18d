"""The `train` section in Keras' terms: optimizer, loss, what ends or slows a training. Names are Keras' own."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ablation_lab import arguments
from ablation_lab.arguments import Check
from ablation_lab.backend import keras, tf
from ablation_lab.errors import LabError, shown
from ablation_lab.models.layers import nearest, reason


def optimizer(
    settings: dict[str, Any], precision: str = "float32", distributed: bool = False
) -> keras.optimizers.Optimizer:
    """Build an optimizer from `name` and its constructor's arguments.

    Args:
        precision: with `mixed_float16` the loss is scaled, so that small gradients don't become 0.
        distributed: for a training on several devices.

    Raises:
        LabError: for a name or an argument that Keras doesn't know.
    """
    given = {key: value for key, value in settings.items() if key != "name"}
    rate = given.get("learning_rate")
    if isinstance(rate, dict):
        schedule = {key: value for key, value in rate.items() if key != "name"}
        where = (*OPTIMIZER, "learning_rate")
        kind = _find(rate["name"], SCHEDULES, where, "schedule")
        given["learning_rate"] = _construct(kind, schedule, where, arguments.OF_SCHEDULES)
        _check_schedule(schedule, where)
    kind = _find(settings["name"], OPTIMIZERS, OPTIMIZER, "optimizer")
    kind = Adam if kind is keras.optimizers.Adam else kind
    scaled = precision == "mixed_float16"
    if distributed:
        kind = type(kind.__name__, (Summed, kind) if scaled else (Summing, Summed, kind), {})
    found = _construct(kind, given, OPTIMIZER, arguments.OF_OPTIMIZERS)
    _check_optimizer(found, given)
    if not scaled:
        return found
    return (SummingLossScale if distributed else keras.optimizers.LossScaleOptimizer)(found)


def averages(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The moving averages of the trained weights, in their order; none without `use_ema`."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner._model_variables_moving_average if inner.use_ema else []


def lints(settings: dict[str, Any]) -> list[str]:
    """What a plan says of an optimizer that does not do all that its method does."""
    if settings["name"].lower() != "schedulefreeadamw":
        return []
    average = "ScheduleFreeAdamW evaluates an average of weights, which Keras doesn't give"
    return [f"{average}: the weights in training are validated and kept"]


class Adam(keras.optimizers.Adam):
    """Keras' Adam, a weight updated by one operation of TensorFlow's rather than a dozen.

    The formula is the same (D. Kingma, J. Ba (2014), Adam: A Method for Stochastic Optimization, arXiv:1412.6980), the
    last bits aren't. A step of a large dense layer takes a third of the time on the CPU, since weights and moments go
    through the memory once: `python benchmarks/transfer.py` lives on it.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self.amsgrad or isinstance(gradient, tf.IndexedSlices) or variable.dtype != tf.float32:
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        beta1, beta2 = tf.constant(self.beta_1, tf.float32), tf.constant(self.beta_2, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(beta1, step),
            beta2_power=tf.pow(beta2, step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=beta1,
            beta2=beta2,
            epsilon=tf.constant(self.epsilon, tf.float32),
            grad=gradient,
        )


class Summed:
    """Of an optimizer: takes gradients that are summed over the devices already."""

    def _all_reduce_sum_gradients(self, gradients: Any) -> list[Any]:
        return list(gradients)


class Summing:
    """Of an optimizer: sums gradients over the devices before anything else.

    Keras sums them last: each device would clip its own gradients, and skip steps for its own overflows.
    """

    def apply(self, gradients: Any, trainable_variables: Any = None) -> None:
        devices = tf.distribute.get_replica_context()
        there = [one for one in gradients if one is not None]
        summed = iter(devices.all_reduce(tf.distribute.ReduceOp.SUM, there))
        every = [None if one is None else next(summed) for one in gradients]
        super().apply(every, trainable_variables)  # type: ignore[misc]


class SummingLossScale(Summing, keras.optimizers.LossScaleOptimizer):
    """Keras' loss scaling, for several devices."""


OPTIMIZER = ("train", "optimizer")


def _named(module: Any, base: type, without: Sequence[str] = ()) -> dict[str, type]:
    """The concrete classes of a module of Keras' that a study may name, by their names in lower case."""
    return {name.lower(): one for name, one in vars(module).items() if name not in without and _is_concrete(one, base)}


def _is_concrete(one: Any, kind: type) -> bool:
    return inspect.isclass(one) and issubclass(one, kind) and one is not kind


# Those that are left out take other optimizers.
OPTIMIZERS = _named(keras.optimizers, keras.optimizers.Optimizer, ("LossScaleOptimizer", "MultiOptimizer"))
SCHEDULES = _named(keras.optimizers.schedules, keras.optimizers.schedules.LearningRateSchedule)


def _find(name: str, known: Mapping[str, type], place: tuple[str, ...], what: str) -> type:
    if name.lower() not in known:
        raise LabError(f"Expected a Keras {what}. Found: {name}.{_nearest(name, known)}", (*place, "name"))
    return known[name.lower()]


def _check_schedule(settings: dict[str, Any], place: tuple[str, ...]) -> None:
    """Refuse what has no effect beside the other arguments of a schedule."""
    start, end = settings.get("initial_learning_rate", 0), settings.get("end_learning_rate")
    steps, target = settings.get("warmup_steps"), settings.get("warmup_target")
    if steps and target is None:
        expected = "warmup_target beside it, the learning rate after warming up"
        raise LabError(f"Expected {expected}. Found: warmup_steps alone, without effect.", (*place, "warmup_steps"))
    if target is not None and not steps:
        expected = "warmup_steps beside it, the number of batches until that rate"
        raise LabError(f"Expected {expected}. Found: {target} alone.", (*place, "warmup_target"))
    if "initial_learning_rate" in settings and not start and target is None and not end:
        expected = "a number greater than 0, as there is no warmup_target"
        raise LabError(f"Expected {expected}. Found: {start}.", (*place, "initial_learning_rate"))


def _check_optimizer(found: keras.optimizers.Optimizer, settings: dict[str, Any]) -> None:
    """Refuse what has no effect beside the other arguments of an optimizer, or ends in no numbers.

    `momentum: 0` beside `nesterov: true` is taken: a variant without the base's momentum says no more than that.
    """
    if settings.get("nesterov") and "momentum" not in settings and not getattr(found, "momentum", 1):
        expected = "false, or a momentum, as Nesterov's method changes nothing without one"
        raise LabError(f"Expected {expected}. Found: true.", (*OPTIMIZER, "nesterov"))
    if isinstance(found, keras.optimizers.ScheduleFreeAdamW) and not found.beta_1:
        expected = "a number greater than 0, as ScheduleFreeAdamW divides by it"
        raise LabError(f"Expected {expected}. Found: {shown(settings['beta_1'])}.", (*OPTIMIZER, "beta_1"))
    for name in ("ema_momentum", "ema_overwrite_frequency") if not found.use_ema else ():
        if settings.get(name) is not None:
            expected = f"use_ema: true beside it (a variant drops an inherited one with `{name}: null`)"
            raise LabError(f"Expected {expected}. Found: {settings[name]}, without effect.", (*OPTIMIZER, name))


def _construct(kind: type, settings: dict[str, Any], place: tuple[str, ...], table: Mapping[str, Check]) -> Any:
    parameters = inspect.signature(kind).parameters
    valid = [name for name in parameters if name not in ("name", "kwargs")]
    for name in settings:
        if name not in valid:
            # An argument of others is rather inherited than misspelt.
            near = [] if name in table else difflib.get_close_matches(name, valid, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"A variant drops an inherited one with `{name}: null`."
            raise LabError(f"Expected an argument of {kind.__name__}. Found: {name}. {hint}", (*place, name))
    arguments.check(kind, settings, place, table)
    for name, value in settings.items():
        fractional = isinstance(parameters[name].default, float) or name == "initial_learning_rate"
        if fractional and type(value) is int:
            settings[name] = float(value)  # Keras refuses `momentum: 0`, and rounds all rates of a ramp from 0
        elif name == "values":
            settings[name] = [float(one) for one in value]  # Keras stops at steps from 0.1 to 0
    try:
        return kind(**settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise LabError(f"Expected arguments that {kind.__name__} takes. Found: {reason(error)}", place) from None


def _nearest(name: str, known: Iterable[str]) -> str:
    return nearest(name, known, lambda one: None)


def loss(settings: dict[str, Any], output: str = "softmax") -> keras.losses.Loss:
    """The loss named in `train.loss`, with `train.label_smoothing` where it is not 0.

    Args:
        output: what the loss is given, a builder's `output`: `softmax`, `sigmoid` or `logits`.

    Raises:
        LabError: for a name that Keras doesn't know, or label smoothing or logits that the loss doesn't take.
    """
    name, smoothing = settings["loss"], settings["label_smoothing"]
    kind = _loss(name)
    if kind is None:
        functions = [one.__name__ for one in vars(keras.losses).values() if inspect.isfunction(one)]
        hint = nearest(name, functions, _use_loss)
        raise LabError(f"Expected a Keras loss. Found: {name}.{hint}", ("train", "loss"))
    takes, chosen = inspect.signature(kind).parameters, {}
    if smoothing:
        if "label_smoothing" not in takes:
            expected = f"Expected 0, since {name} takes none. Found: {smoothing}."
            raise LabError(expected, ("train", "label_smoothing"))
        chosen["label_smoothing"] = smoothing
    if output == "logits":
        if "from_logits" not in takes:
            expected = f"Expected softmax, since {name} takes no logits. Found: logits."
            raise LabError(expected, ("model", "output"))
        chosen["from_logits"] = True
    return kind(**chosen)


def _loss(name: str) -> type[keras.losses.Loss] | None:
    """The class of a loss that is named like Keras' class, or its function in snake case."""
    try:
        found = keras.losses.get(name)
    except ValueError:
        return None
    classes = {one.__name__.lower(): one for one in vars(keras.losses).values() if _is_concrete(one, keras.losses.Loss)}
    return classes.get(getattr(found, "__name__", type(found).__name__).replace("_", "").lower())


def _use_loss(name: str) -> None:
    """Use a loss as a study does, with the probabilities of two pictures and three classes."""
    kind = _loss(name)
    if kind is None:
        raise ValueError(name)
    labels = np.eye(3, dtype=np.float32)[:2] if label_form({"loss": name}) == "one_hot" else np.arange(2)
    kind()(labels, np.full((2, 3), 1 / 3, np.float32))


def label_form(settings: dict[str, Any], output: str = "softmax") -> str:
    """How labels are given to the loss: `one_hot`, as a class's `number`, or for a sigmoid 1 for the `second` class."""
    if output == "sigmoid":
        return "second"
    return "number" if settings["loss"].lower().startswith("sparse") else "one_hot"


def class_weights(wanted: str | dict[str, float] | None, classes: list[str], labels: np.ndarray) -> dict | None:
    """The weight of each class number in the training loss.

    Args:
        wanted: `train.class_weights`: weights by class name, 1 where none is given; or `balanced`, inversely
            proportional to a class's pictures, 1 on average over them (as scikit-learn has it).
        labels: of the training pictures.

    Raises:
        LabError: for a name that is none of the classes.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = np.bincount(labels, minlength=len(classes))
        return {number: len(labels) / (len(classes) * max(count, 1)) for number, count in enumerate(counts.tolist())}
    assert isinstance(wanted, dict)
    for name in wanted:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Classes: {', '.join(classes)}."
            raise LabError(f"Expected names of classes. Found: {name}. {hint}", ("train", "class_weights"))
    return {number: wanted.get(name, 1.0) for number, name in enumerate(classes)}


def callbacks(settings: dict[str, Any]) -> list[keras.callbacks.Callback]:
    """Early stopping and learning-rate schedule, both on the validation part."""
    found: list[keras.callbacks.Callback] = []
    if settings["early_stopping"]:
        found.append(keras.callbacks.EarlyStopping(**settings["early_stopping"]))
    if settings["reduce_lr"]:
        found.append(keras.callbacks.ReduceLROnPlateau(**settings["reduce_lr"]))
    return found


def augmentation(augment: dict[str, dict[str, Any]]) -> list[keras.layers.Layer]:
    """Keras' augmentation layers by name, in the order given (a plan's are sorted); training alone uses them.

    Raises:
        LabError: for a name or an argument that Keras doesn't know, or that has no effect.
    """
    layers = []
    for name, settings in augment.items():
        place = ("input", "augment", name)
        if name not in AUGMENTATIONS:
            expected = "a Keras layer of augmentation that keeps the pictures' size"
            raise LabError(f"Expected {expected}. Found: {name}.{_nearest(name, AUGMENTATIONS)}", place)
        kind = AUGMENTATIONS[name]
        valid = [one for one in inspect.signature(kind).parameters if one not in IDLE]
        for argument, value in settings.items():
            if argument in IDLE:
                raise LabError(f"Expected none, {IDLE[argument]}. Found: {shown(value)}.", (*place, argument))
            if argument not in valid:
                hint = _nearest(argument, valid)
                raise LabError(f"Expected an argument of {name}. Found: {argument}.{hint}", (*place, argument))
        arguments.check(kind, settings, place, arguments.OF_AUGMENTATIONS)
        # RandomPerspective and RandomErasing fill in any case, and have no such mode.
        if "fill_value" in settings and "fill_mode" in valid and settings.get("fill_mode") != "constant":
            expected = "fill_mode: constant beside it, as other modes fill with the picture's own values"
            found = f"{shown(settings['fill_value'])}, without effect"
            raise LabError(f"Expected {expected}. Found: {found}.", (*place, "fill_value"))
        try:
            layers.append(kind(**settings))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise LabError(f"Expected arguments of {name}. Found: {reason(error)}", place) from None
    return layers


# RandomCrop changes the size of pictures, or nothing.
AUGMENTATIONS = {
    name: one
    for name, one in vars(keras.layers).items()
    if name.startswith(("Random", "AutoContrast")) and name != "RandomCrop"
}

# Arguments that change no picture, and why.
IDLE = {
    "seed": "as the cell's seed decides what is drawn",
    "name": "as a name changes nothing",
    "dtype": "as augmentation computes in float32",
    "data_format": "as channels come last",
    "kwargs": "as there is no such argument",
}

TRIED = 1024  # pictures, for layers that change few of them
AT_ONCE = 32  # of them, fewer where they are large


def check_augmentation(augment: dict[str, dict[str, Any]], image_shape: tuple[int, int, int]) -> list[str]:
    """Use each layer on random pictures until it has changed one.

    Returns:
        The layers that have changed none of `TRIED`, though their factors aren't 0: they may change others.

    Raises:
        LabError: for a layer that leaves all of them as they are since its factors are 0, such as a rotation by 0.
    """
    height, width, channels = (min(size, 256) for size in image_shape)
    number = max(2, min(AT_ONCE, 2_000_000 // (height * width * channels)))
    # Not the whole range, which there would be nothing to stretch to for a contrast.
    pictures = np.random.default_rng(0).integers(50, 200, (number, height, width, channels)).astype(np.float32)
    keras.utils.set_random_seed(0)
    idle = []
    for name, layer in zip(augment, augmentation(augment), strict=True):
        if all(np.array_equal(layer(pictures, training=True), pictures) for _ in range(-(-TRIED // number))):
            if _without_factor(name, augment[name]):
                expected = "arguments with which it changes pictures"
                raise LabError(f"Expected {expected}. Found: {shown(augment[name])}.", ("input", "augment", name))
            idle.append(name)
    return idle


def _without_factor(name: str, settings: dict[str, Any]) -> bool:
    """Whether a layer has factors, and all that are given or default are 0."""
    parameters = inspect.signature(AUGMENTATIONS[name]).parameters
    factors = [settings.get(one, parameters[one].default) for one in parameters if one.endswith("factor")]
    return bool(factors) and all(not np.any(one) for one in factors)
