"""The `train` section in Keras' terms: optimizer, loss, what ends or slows a training. Names are Keras' own."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from ablation_lab.backend import keras
from ablation_lab.errors import LabError


def optimizer(settings: dict[str, Any]) -> keras.optimizers.Optimizer:
    """Build an optimizer from `name` and its constructor's arguments.

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
    return _construct(kind, arguments, "train.optimizer")


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
        raise LabError(f"{where}: Expected arguments that {kind.__name__} takes. Found: {error}") from None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."


def loss(settings: dict[str, Any]) -> keras.losses.Loss:
    """The loss named in `train.loss`, with `train.label_smoothing` where it is not 0.

    Raises:
        LabError: for a name that Keras doesn't know, or label smoothing that the loss doesn't take.
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
    if not smoothing:
        return kind()
    if "label_smoothing" not in inspect.signature(kind).parameters:
        raise LabError(f"train.label_smoothing: Expected 0, since {name} takes none. Found: {smoothing}.")
    return kind(label_smoothing=smoothing)


def takes_one_hot(settings: dict[str, Any]) -> bool:
    """Whether the loss wants one-hot labels rather than class numbers."""
    return not settings["loss"].lower().startswith("sparse")


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
        try:
            layers.append(known[name](**arguments))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise LabError(f"input.augment.{name}: Expected arguments of {name}. Found: {error}") from None
    return layers
