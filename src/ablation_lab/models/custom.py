"""A network of the user's: `builder: "package.module:function"`.

The function gets the pictures' shape (height, width, channels; None for a size left open), the number of classes and,
as keyword arguments, the other keys of the study's `model`. It returns a Keras model that takes pictures rescaled as
`input.rescale` says and gives class probabilities.
"""

import difflib
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import numpy as np

from ablation_lab import arguments
from ablation_lab.backend import keras
from ablation_lab.errors import LabError
from ablation_lab.models.layers import NetworkError, reason

# The folder that dvc.yaml's `plan` depends on.
FOLDER = "networks"


def network(model: dict[str, Any], image_shape: Sequence[int | None], classes: int) -> keras.Model:
    """Call the user's function and check what it returns.

    Raises:
        NetworkError: for a function that isn't there, settings that it doesn't take, and whatever it does wrong.
    """
    builder = model["builder"]
    function = find(builder)
    settings = {key: value for key, value in model.items() if key not in ("builder", "any_size")}
    parameters = inspect.signature(function).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name in () if takes_all else [name for name in settings if name not in list(parameters)[2:]]:
        near = difflib.get_close_matches(name, list(parameters)[2:], n=1)
        hint = f"Did you mean {near[0]}?" if near else "A variant drops an inherited key with null."
        raise NetworkError(f"Expected {_arguments(function, builder)}. Found: {name}. {hint}", ("model", name))
    try:
        arguments.check_own(function, settings, ("model",))
    except LabError as error:
        raise NetworkError(
            f"{error.text} The default or the annotation in {builder} sets the type.", error.place
        ) from None
    try:
        inspect.signature(function).bind(tuple(image_shape), classes, **settings)
    except TypeError as error:
        raise NetworkError(f"Expected {_arguments(function, builder)}. Found: {error}.", ("model",)) from None
    try:
        built = function(tuple(image_shape), classes, **settings)
    except (Exception, SystemExit) as error:  # it is the user's code: whatever it raises is told with its place there
        raise NetworkError(f"model.builder {builder}: Expected a network. Found: {_told(error)}") from error
    if not isinstance(built, keras.Model):
        raise NetworkError(f"model.builder {builder}: Expected a keras.Model. Found: {type(built).__name__}.")
    _end_in_float32(built)
    return built


def _end_in_float32(network: keras.Model) -> None:
    """Let the layers that give a network's outputs compute in float32, whatever the precision of the others. Those of
    a model that is no graph can't be told from here: such a model says `dtype="float32"` in its last layer itself."""
    for tensor in getattr(network, "outputs", None) or ():
        layer = tensor._keras_history.operation
        if isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.Model | keras.layers.InputLayer):
            layer.dtype_policy = keras.DTypePolicy("float32")


def check(network: keras.Model, image_shape: Sequence[int], classes: int, builder: str) -> None:
    """Use a network once as training and predicting will: probabilities come out, and Keras can save and load it.

    Args:
        network: takes raw pictures.
        image_shape: height, width and channels of those pictures.

    Raises:
        NetworkError: telling what is wrong with it.
    """
    pictures = np.random.default_rng(0).integers(0, 256, (4, *image_shape), dtype=np.uint8)
    try:
        copy = keras.models.model_from_json(network.to_json())
        copy.set_weights(network.get_weights())
        outputs, expected = copy(pictures).numpy(), network(pictures).numpy()
    except Exception as error:  # Keras names what it can't save in many ways
        raise NetworkError(
            f"model.builder {builder}: Expected a network that Keras can save and load; layers of your own need "
            f"@keras.saving.register_keras_serializable() and get_config(). Found: {_told(error)}"
        ) from error
    if outputs.shape != expected.shape or not np.allclose(outputs, expected, rtol=1e-3, atol=1e-5):
        raise NetworkError(
            f"model.builder {builder}: Expected a network that is the same once Keras has saved and loaded it. Found: "
            "other outputs. Does the get_config() of a layer of your own leave out an argument?"
        )
    wanted = (len(pictures), classes)
    if outputs.shape != wanted or (outputs < 0).any() or not np.allclose(outputs.sum(axis=1), 1, atol=1e-3):
        found = "numbers that don't sum to 1" if outputs.shape == wanted else f"{outputs.shape[1:]} numbers a picture"
        raise NetworkError(
            f"model.builder {builder}: Expected probabilities of {classes} classes, as a last layer "
            f'Dense(classes, activation="softmax") gives them. Found: {found}.'
        )


def untrainable(builder: str, error: Exception) -> NetworkError:
    """What a training step of a network of the user's has raised."""
    return NetworkError(f"model.builder {builder}: Expected a network that can be trained. Found: {_told(error)}")


def find(builder: str) -> Callable[..., Any]:
    """Import the function; custom layers that its module registers are known to Keras afterwards."""
    module_name, _, function_name = builder.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise NetworkError(
            f"Expected a module that can be imported, such as {FOLDER}.mine for {FOLDER}/mine.py. "
            f"Found: {module_name}: {_told(error)}",
            ("model", "builder"),
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [name for name, one in inspect.getmembers(module, inspect.isfunction) if one.__module__ == module_name]
        raise NetworkError(
            f"Expected a function of {module_name}: {', '.join(own) or 'it has none'}. Found: {function_name}.",
            ("model", "builder"),
        )
    return function


def sources(builder: str, root: Path) -> dict[str, str]:
    """The user's source files that a builder's module imports, itself included, each with its sha256.

    Only files below the root count: what is installed is part of the environment.
    """
    finder = ModuleFinder(path=[str(root.resolve())])
    try:
        finder.import_hook(builder.partition(":")[0])
    except (ImportError, SyntaxError):
        return {}  # find() says why
    except AttributeError:  # modulefinder's way of meeting a folder without __init__.py
        raise NetworkError(
            f"model.builder {builder}: Expected modules in folders with an `__init__.py`, so that their edits are "
            "noticed. Found: a folder without one, among what it imports."
        ) from None
    paths = {Path(file) for module in finder.modules.values() if (file := getattr(module, "__file__", None))}
    return {
        path.relative_to(root.resolve()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


def lint(sources: dict[str, str]) -> str | None:
    """A warning where DVC can't see that the builder's code changes."""
    unseen = [path for path in sources if not path.startswith(f"{FOLDER}/")]
    if sources and not unseen:
        return None
    where = ", ".join(unseen) or "an installed package"
    return f"its network comes from {where}: DVC notices changes of files in {FOLDER}/ only"


def _arguments(function: Callable[..., Any], builder: str) -> str:
    names = list(inspect.signature(function).parameters)[2:]
    return f"an argument of {builder}: {', '.join(names) or 'it takes none'}"


def _told(error: BaseException) -> str:
    """An error in the user's words: its type, its first line, and the last place in a file that isn't a library's."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {reason(error)}{place}"


def _is_own(filename: str) -> bool:
    return (
        Path(filename).is_file()
        and not {"site-packages", "ablation_lab"} & set(Path(filename).parts)
        and ("importlib" not in filename)
    )
