"""The `train` section in Keras' terms: optimizer, loss, what ends or slows a training. Names are Keras' own."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from ablation_lab.backend import keras, tf
from ablation_lab.errors import LabError
from ablation_lab.models.layers import reason


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
    arguments = {key: value for key, value in settings.items() if key != "name"}
    rate = arguments.get("learning_rate")
    if isinstance(rate, dict):
        schedule = {key: value for key, value in rate.items() if key != "name"}
        where = "train.optimizer.learning_rate"
        kind = _find(rate["name"], vars(keras.optimizers.schedules), SCHEDULE, where, "schedule")
        arguments["learning_rate"] = _construct(kind, schedule, where)
    kind = _find(settings["name"], vars(keras.optimizers), keras.optimizers.Optimizer, "train.optimizer", "optimizer")
    kind = Adam if kind is keras.optimizers.Adam else kind
    scaled = precision == "mixed_float16"
    if distributed:
        kind = type(kind.__name__, (Summed, kind) if scaled else (Summing, Summed, kind), {})
    found = _construct(kind, arguments, "train.optimizer")
    if not scaled:
        return found
    return (SummingLossScale if distributed else keras.optimizers.LossScaleOptimizer)(found)


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


SCHEDULE = keras.optimizers.schedules.LearningRateSchedule


def _find(name: str, among: Mapping[str, Any], base: type, where: str, what: str) -> type:
    known = {key.lower(): one for key, one in among.items() if _is_concrete(one, base)}
    if name.lower() not in known:
        raise LabError(f"{where}.name: Expected a Keras {what}. Found: {name}.{_nearest(name, list(known))}")
    return known[name.lower()]


def _is_concrete(one: Any, kind: type) -> bool:
    return inspect.isclass(one) and issubclass(one, kind) and one is not kind


def _construct(kind: type, arguments: dict[str, Any], where: str) -> Any:
    parameters = inspect.signature(kind).parameters
    valid = [name for name in parameters if name not in ("name", "kwargs")]
    for name in arguments:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"A variant drops an inherited one with `{name}: null`."
            raise LabError(f"{where}.{name}: Expected an argument of {kind.__name__}. Found: {name}. {hint}")
        if isinstance(parameters[name].default, float) and type(arguments[name]) is int:
            arguments[name] = float(arguments[name])  # Keras refuses `momentum: 0`
    try:
        return kind(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise LabError(f"{where}: Expected arguments that {kind.__name__} takes. Found: {reason(error)}") from None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."


def loss(settings: dict[str, Any], output: str = "softmax") -> keras.losses.Loss:
    """The loss named in `train.loss`, with `train.label_smoothing` where it is not 0.

    Args:
        output: what the loss is given, a builder's `output`: `softmax`, `sigmoid` or `logits`.

    Raises:
        LabError: for a name that Keras doesn't know, or label smoothing or logits that the loss doesn't take.
    """
    name, smoothing = settings["loss"], settings["label_smoothing"]
    try:
        found = keras.losses.get(name)  # a class's instance, or the function of the same name in snake case
    except ValueError:
        found = None
    classes = {one.__name__.lower(): one for one in vars(keras.losses).values() if _is_concrete(one, keras.losses.Loss)}
    kind = classes.get(getattr(found, "__name__", type(found).__name__).replace("_", "").lower())
    if kind is None:
        functions = [one for one in vars(keras.losses).values() if inspect.isfunction(one)]
        known = [one.__name__ for one in functions if one.__name__.replace("_", "") in classes]
        raise LabError(f"train.loss: Expected a Keras loss. Found: {name}.{_nearest(name, known)}")
    takes, arguments = inspect.signature(kind).parameters, {}
    if smoothing:
        if "label_smoothing" not in takes:
            raise LabError(f"train.label_smoothing: Expected 0, since {name} takes none. Found: {smoothing}.")
        arguments["label_smoothing"] = smoothing
    if output == "logits":
        if "from_logits" not in takes:
            raise LabError(f"model.output: Expected softmax, since {name} takes no logits. Found: logits.")
        arguments["from_logits"] = True
    return kind(**arguments)


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
            raise LabError(f"train.class_weights: Expected names of classes. Found: {name}. {hint}")
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
        LabError: for a name or an argument that Keras doesn't know.
    """
    known = {name: one for name, one in vars(keras.layers).items() if name.startswith(("Random", "AutoContrast"))}
    layers = []
    for name, arguments in augment.items():
        if name not in known:
            raise LabError(f"input.augment.{name}: Expected a Keras layer. Found: {name}.{_nearest(name, list(known))}")
        valid = [one for one in inspect.signature(known[name]).parameters if one != "kwargs"]
        for argument in arguments:
            if argument not in [*valid, "name", "dtype"]:
                where = f"input.augment.{name}.{argument}"
                hint = _nearest(argument, valid)
                raise LabError(f"{where}: Expected an argument of {name}. Found: {argument}.{hint}")
        try:
            layers.append(known[name](**arguments))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise LabError(f"input.augment.{name}: Expected arguments of {name}. Found: {reason(error)}") from None
    return layers
