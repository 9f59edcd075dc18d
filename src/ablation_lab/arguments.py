"""Arguments that params.yaml passes on to Keras' constructors, or to a function of the user's: what those leave
unchecked. A text is true wherever a truth value is asked for, and a negative `clipnorm` trains without a word."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ablation_lab.errors import LabError, shown, truth_hint

KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", types.NoneType: "null"}

Place = tuple[str, ...]
Check = tuple[str, Callable[[Any], bool]]

NUMBERS = (int, float)


def _is_number(value: Any) -> bool:
    return type(value) in NUMBERS


def _numbers(text: str, fits: Callable[[Any], bool]) -> Check:
    return f"a number {text}", lambda value: _is_number(value) and fits(value)


def _whole(least: int) -> Check:
    return f"a whole number of at least {least}", lambda value: type(value) is int and value >= least


SHARE = _numbers("of at least 0 and less than 1", lambda value: 0 <= value < 1)
FRACTION = _numbers("between 0 and 1", lambda value: 0 <= value <= 1)
ABOVE_0 = _numbers("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = _numbers("of at least 0", lambda value: value >= 0)
ANY = _numbers("", lambda value: True)
ASCENDING = (
    "a list of ascending numbers greater than 0",
    lambda value: isinstance(value, list) and all(map(_is_number, value)) and sorted({0, *value}) == [0, *value],
)
RATES = (
    "a list of numbers of at least 0, not all of them 0",
    lambda value: isinstance(value, list) and all(_is_number(one) and one >= 0 for one in value) and any(value),
)

# Of optimizers. The same name means the same in all of them.
OF_OPTIMIZERS: dict[str, Check] = {
    **dict.fromkeys(("momentum", "beta_1", "beta_2", "adam_beta_1", "adam_beta_2", "rho", "ema_momentum"), SHARE),
    **dict.fromkeys(("clipnorm", "clipvalue", "global_clipnorm", "clip_threshold", "loss_scale_factor"), ABOVE_0),
    **dict.fromkeys(("epsilon", "epsilon_1", "epsilon_2", "weight_decay", "adam_weight_decay", "beta"), NOT_NEGATIVE),
    **dict.fromkeys(("l1_regularization_strength", "l2_regularization_strength"), NOT_NEGATIVE),
    **dict.fromkeys(("l2_shrinkage_regularization_strength", "initial_accumulator_value"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_lr_ratio", "rms_rate"), ABOVE_0),
    **dict.fromkeys(("muon_a", "muon_b", "muon_c"), ANY),
    "beta_2_decay": _numbers("less than 0", lambda value: value < 0),
    "learning_rate_power": _numbers("of at most 0", lambda value: value <= 0),
    "ema_overwrite_frequency": _whole(1),
    "gradient_accumulation_steps": _whole(2),
    "warmup_steps": _whole(0),
    "ns_steps": _whole(1),
}

# Of schedules of the learning rate.
OF_SCHEDULES: dict[str, Check] = {
    **dict.fromkeys(("decay_steps", "first_decay_steps", "decay_rate", "power", "t_mul", "m_mul"), ABOVE_0),
    **dict.fromkeys(("initial_learning_rate", "end_learning_rate"), NOT_NEGATIVE),
    "alpha": FRACTION,
    "warmup_steps": _whole(0),
    "warmup_target": ABOVE_0,
    "boundaries": ASCENDING,
    "values": RATES,
}

# Of augmentation, which sees pictures with values from 0 to 255, whatever `input.rescale` is.
OF_AUGMENTATIONS: dict[str, Check] = {
    "value_range": ("[0, 255], the values that augmentation sees", lambda value: value == [0, 255]),
    "mode": (
        "horizontal, vertical or horizontal_and_vertical",
        lambda value: value in ("horizontal", "vertical", "horizontal_and_vertical"),
    ),
    "fill_mode": (
        "constant, nearest, reflect or wrap",
        lambda value: value in ("constant", "nearest", "reflect", "wrap"),
    ),
    "interpolation": ("nearest or bilinear", lambda value: value in ("nearest", "bilinear")),
}


def check(function: Callable[..., Any], settings: Mapping[str, Any], place: Place, table: Mapping[str, Check]) -> None:
    """Refuse values that a constructor of Keras' takes without a word, though they mean nothing.

    Args:
        function: what takes the arguments.
        settings: those that the study gives, by name.
        place: where they are in the study.
        table: what arguments may be, by name.

    Raises:
        LabError: for the first argument of a kind or a size that it can't have.
    """
    parameters = inspect.signature(function).parameters
    for name, value in settings.items():
        if name not in parameters or (value is None and parameters[name].default is None):
            continue
        if name == "learning_rate":  # params has checked it, and a schedule is made by now
            continue
        if name in table:
            expected, fits = table[name]
            if not fits(value):
                raise LabError(f"Expected {expected.strip()}. Found: {shown(value)}.", (*place, name))
        else:
            _check_kind(parameters[name], value, (*place, name))


def check_own(function: Callable[..., Any], settings: Mapping[str, Any], place: Place) -> None:
    """Refuse values of another kind than a function of the user's asks for, by its annotations or defaults.

    Raises:
        LabError: for the first such value.
    """
    names = getattr(inspect.unwrap(function), "__globals__", {})
    for name, parameter in inspect.signature(function).parameters.items():
        if name in settings:
            resolved = parameter.replace(annotation=_resolved(parameter.annotation, names))
            _check_kind(resolved, settings[name], (*place, name))


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation that is a text, as what it means; as it is where only a type checker can resolve it."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names)["it"]
    except Exception:  # whatever the user's text makes Python raise
        return annotation


def _check_kind(parameter: inspect.Parameter, value: Any, place: Place) -> None:
    kinds = _annotated(parameter.annotation)
    if kinds is None and parameter.annotation is parameter.empty and type(parameter.default) in (bool, *NUMBERS):
        if isinstance(value, list) and not isinstance(parameter.default, bool):
            return  # several numbers, one for each dimension, where the default is a single one
        kinds = {type(parameter.default)}
    if kinds is None and isinstance(parameter.default, bool) and isinstance(value, str):
        kinds = None if _takes_text(parameter.annotation) else {bool}  # a text would be true, whatever it says
    if kinds is None or type(value) in kinds or (_is_number(value) and kinds & set(NUMBERS)):
        return
    expected = " or ".join(dict.fromkeys(name for kind, name in KINDS.items() if kind in kinds))
    raise LabError(f"Expected {expected}. Found: {shown(value)}.{truth_hint(value) if bool in kinds else ''}", place)


def _takes_text(annotation: Any) -> bool:
    """Whether an annotation names texts among others."""
    if isinstance(annotation, str):  # not resolved
        return bool(re.search(r"\b(str|Any|object|Literal)\b", annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return any(isinstance(one, str) for one in typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return any(map(_takes_text, typing.get_args(annotation)))
    return annotation in (Any, object) or (isinstance(annotation, type) and issubclass(annotation, str))


def _annotated(annotation: Any) -> set[type] | None:
    """The kinds of values that an annotation names; None where it names others than those of a study."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    kinds = set(typing.get_args(annotation)) if union else {annotation}
    return kinds if kinds <= {bool, int, float, str, types.NoneType} else None
