"""The plan: every variant resolved, built and sized before anything is trained."""

import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ablation_lab import cell, datasets, files, models, optimization, params
from ablation_lab.backend import keras
from ablation_lab.errors import LabError
from ablation_lab.models import custom
from ablation_lab.params import Params, Variant

# Seconds of a cell that are not training (imports, compilation, files), and forward multiply-accumulates a second and
# thread, for a first guess where nothing has been trained yet; both seen on a 2-core machine.
START_UP_SECONDS = 12
MACS_A_SECOND = 5e9


def describe(
    study: Params, image_shape: tuple[int, int, int], classes: int, root: Path = Path()
) -> dict[str, dict[str, Any]]:
    """Build every variant's network and say what it is.

    Args:
        study: a valid study.
        image_shape: height, width, channels of the pictures.
        classes: number of classes.

    Returns:
        For each variant `parameters`, `trainable_parameters`, `macs` (of one picture's forward pass), `differences`
        from the baseline, `layers`, `lints` and `plan_hash`.

    Raises:
        LabError: naming the variant, and the layer or the setting, of everything that can't be built.
    """
    found: dict[str, dict[str, Any]] = {}
    fingerprints: dict[str, str] = {}
    problems: dict[str, list[str]] = {}
    for name, variant in study.variants.items():
        try:
            json.dumps(variant.resolved(), allow_nan=False)
            network = _build(variant, image_shape, classes)
            fixed = settings(variant, root)
        except LabError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        except (TypeError, ValueError) as error:
            problems.setdefault(f"Expected numbers, texts, lists and mappings. Found: {error}.", []).append(name)
            continue
        placed = _flat(network)
        layers = [_layer(one) for one in placed]
        twin = fingerprints.setdefault(_fingerprint(network, variant), name)
        lints = [] if twin == name else [f"{name} is the same network as {twin}, trained the same way"]
        if "code" in fixed and (unseen := custom.lint(fixed["code"])):
            lints.append(unseen)
        if uncounted := _uncounted(placed):
            lints.append(uncounted)
        found[name] = {
            "parameters": network.count_params(),
            "trainable_parameters": sum(_size(weight) for weight in network.trainable_weights),
            "macs": sum(layer["macs"] for layer in layers),
            "differences": params.differences(study.baseline, variant),
            "layers": layers,
            "lints": lints,
            "plan_hash": params.digest(params.canonical_json(fixed)),
        }
    if problems:
        # What is wrong in the base is wrong in every variant, and said once.
        raise LabError("\n       ".join(f"variants.{', '.join(names)}: {text}" for text, names in problems.items()))
    return found


def settings(variant: Variant, root: Path) -> dict[str, Any]:
    """What `plan/<variant>.json` holds: the resolved configuration and, for a network of the user's, its source files
    with their sha256."""
    found = variant.resolved()
    return found | {"code": custom.sources(variant.model.builder, root)} if ":" in variant.model.builder else found


def write(study: Params, described: dict[str, dict[str, Any]], root: Path = Path()) -> None:
    """Write `plan/<variant>.json`, what fixes a result, and `plan/networks/<variant>.json`, what is worth knowing.

    Folders of cells that are no longer in the study are removed; DVC's cache keeps what was in them.
    """
    with files.whole(root / "plan") as folder:
        (folder / "networks").mkdir()
        for name, variant in study.variants.items():
            text = params.canonical_json(settings(variant, root))
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
            text = params.canonical_json(described[name])
            (folder / "networks" / f"{name}.json").write_text(text, encoding="utf-8")
    wanted = {cell.folder(name, seed, root) for name, seed in study.cells}
    for folder in (root / "cells").glob("*/seed-*"):
        if folder not in wanted:
            shutil.rmtree(folder)
    for folder in (root / "cells").glob("*"):
        if folder.name not in study.variants and not any(folder.iterdir()):
            folder.rmdir()


def reasons(study: Params, described: dict[str, dict[str, Any]], data_digest: str | None, root: Path = Path()) -> dict:
    """Why each cell would be trained, or None where its result is there and up to date.

    Args:
        data_digest: the digest in the data card; None before `preprocess` has run.

    Returns:
        `{(variant, seed): reason | None}`.
    """
    code = cell.training_code(root)
    found: dict[tuple[str, int], str | None] = {}
    for name, seed in study.cells:
        path = cell.folder(name, seed, root) / cell.RESULT
        if not path.exists():
            found[name, seed] = "no result here"
            continue
        result = files.read_json(path)
        if result["plan_hash"] != described[name]["plan_hash"]:
            found[name, seed] = "its settings changed"
        elif result["data_digest"] != data_digest:
            found[name, seed] = "the data changed"
        elif result["cell_hash"] != cell.cell_hash(described[name]["plan_hash"], seed, data_digest or "", code):
            found[name, seed] = "the training code changed"
        else:
            found[name, seed] = None
    return found


def minutes(
    study: Params, described: dict[str, dict[str, Any]], pictures: int, root: Path = Path()
) -> dict[str, float]:
    """Estimated minutes of one cell of each variant: from its own past timings, else from its size.

    Args:
        pictures: size of the training part.
    """
    guesses = {}
    for name, variant in study.variants.items():
        used = pictures * variant.input.fraction
        if variant.train.steps_per_epoch:
            used = variant.train.steps_per_epoch * variant.train.batch_size
        epoch = used * described[name]["macs"] / MACS_A_SECOND / variant.train.threads**0.5
        epoch += 0.002 * used / variant.train.batch_size
        for seed in study.seeds:
            folder = cell.folder(name, seed, root)
            if not (folder / cell.TIMING).exists() or not (folder / cell.RESULT).exists():
                continue
            if files.read_json(folder / cell.RESULT)["plan_hash"] == described[name]["plan_hash"]:
                seconds = files.read_json(folder / cell.TIMING)["epoch_seconds"]
                epoch = sum(seconds) / len(seconds)
        guesses[name] = (START_UP_SECONDS + variant.train.epochs * epoch) / 60
    return guesses


def pictures(study: Params, root: Path = Path()) -> tuple[tuple[int, int, int], int, int, str | None]:
    """What the networks would be fed: by the data card where `preprocess` has run, else by what is known of the data.

    Returns:
        Image shape, number of classes, size of the training part, and the data's digest (None without a data card).
    """
    known = datasets.spec(study.data)
    processed = root / "data" / "processed"
    made_with = processed / "settings.json"
    # Pictures made before there was `unreadable` are those of its default.
    if made_with.exists() and {"unreadable": "error"} | files.read_json(made_with) == study.data.model_dump():
        card = files.read_json(processed / "card.json")
        return tuple(card["image_shape"]), len(card["classes"]), card["counts"]["train"], card["digest"]
    if known is None:
        raise LabError(
            "data: Expected pictures that are preprocessed with these settings, since only they tell their classes. "
            "Found: none. Run `dvc repro preprocess` first."
        )
    split = study.data.split
    counts = known.counts
    total = counts["train"] if split.test == "given" and "train" in counts else sum(counts.values())
    rest = 1 - split.validation - (split.test if isinstance(split.test, float) else 0)
    return known.image_shape, len(known.classes), round(total * rest), None


def as_json(study: Params, described: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The plan for programs (`ablab plan --json`)."""
    cells = [f"{name}-{seed}" for name, seed in study.cells]
    return {"study": study.study.name, "baseline": study.study.baseline, "cells": cells, "variants": described}


def table(
    study: Params,
    described: dict[str, dict[str, Any]],
    reasons: dict[tuple[str, int], str | None],
    minutes: dict[str, float],
) -> str:
    """The plan for people: a row a variant, then warnings and the sum."""
    base = described[study.study.baseline]["parameters"]
    rows, left, total = [], 0, 0.0
    for name, facts in described.items():
        why = [reason for seed in study.seeds if (reason := reasons[name, seed])]
        left, total = left + len(why), total + len(why) * minutes[name]
        changes = "; ".join(_change(one) for one in facts["differences"])
        to_train = f"{len(why)} of {len(study.seeds)}: {', '.join(dict.fromkeys(why))}" if why else "nothing"
        change = f"{facts['parameters'] - base:+,}" if name != study.study.baseline else ""
        rows.append([name, changes, f"{facts['parameters']:,}", change, f"{facts['macs']:,}", minutes[name], to_train])
    headers = ["variant", "change", "parameters", "change", "MACs", "minutes a cell", "to train"]
    widths = [None, 44, None, None, None, None, 24]
    align = ("left", "left", "right", "right", "right", "right", "left")
    lines = [tabulate(rows, headers, floatfmt=".1f", maxcolwidths=widths, colalign=align), ""]
    lines += [f"warning: {lint}" for facts in described.values() for lint in facts["lints"]]
    lines.append(f"{left} of {len(study.cells)} cells to train, about {_duration(total)} one after another.")
    if left:
        lines.append("`dvc repro` takes from DVC's cache what has been trained before with the same settings.")
    if study.data.dataset == "image_folder":
        lines.append("Pictures that changed since the last `dvc repro` are not seen here; it will notice them.")
    return "\n".join(lines)


def _duration(minutes: float) -> str:
    if minutes < 100:
        return f"{max(minutes, 1):.0f} min"
    return f"{minutes / 60:.0f} hours" if minutes < 100 * 60 else f"{minutes / 60 / 24:.0f} days"


def _change(difference: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "none" if value is None else json.dumps(value, ensure_ascii=False).replace('"', "")

    return f"{difference['path']}: {shown(difference['baseline'])} → {shown(difference['variant'])}"


def _build(variant: Variant, image_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Build a network, and use once everything of Keras' that is only named in the study: what would stop a training
    after hours of others stops the plan."""
    chosen = variant.resolved()
    keras.utils.clear_session()  # layers that name themselves have the same names in every variant
    try:
        # A network for pictures of any size is sized at that of the data.
        model = chosen["model"] | {"any_size": False}
        network = models.build(model, chosen["input"]["rescale"], image_shape, classes)
        pictures = np.zeros((2, *image_shape), np.uint8)
        if ":" in model["builder"]:
            custom.check(network, image_shape, classes, model["builder"])
            if chosen["model"]["any_size"]:
                models.build(chosen["model"], chosen["input"]["rescale"], image_shape, classes)
        for layer in optimization.augmentation(chosen["input"]["augment"]):
            changed = layer(pictures, training=True)
            if tuple(changed.shape) != pictures.shape:
                name, shape = type(layer).__name__, "×".join(map(str, changed.shape[1:]))
                raise LabError(f"input.augment.{name}: Expected pictures of the same shape. Found: {shape}.")
        optimizer = optimization.optimizer(chosen["train"]["optimizer"])
        weight = keras.Variable(np.zeros((2, 2), np.float32))
        optimizer.apply([np.ones((2, 2), np.float32)], [weight])
        labels = np.zeros(2, np.int32)
        one_hot = keras.ops.one_hot(labels, classes) if optimization.takes_one_hot(chosen["train"]) else labels
        value = optimization.loss(chosen["train"])(one_hot, np.full((2, classes), 1 / classes, np.float32))
        if tuple(value.shape):
            raise LabError(f"train.loss: Expected one number for a batch. Found: shape {tuple(value.shape)}.")
    except LabError:
        raise
    except Exception as error:  # whatever Keras or TensorFlow make of a value that only they know
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise LabError(f"Expected settings that Keras takes. Found: {type(error).__name__}: {reason}") from error
    return network


def _fingerprint(network: keras.Model, variant: Variant) -> str:
    """Equal for networks that differ in names alone and are fed and trained in the same way."""
    layers = []
    for layer in (placed.layer for placed in _flat(network)):
        config = {key: value for key, value in layer.get_config().items() if key != "name"}
        layers.append([type(layer).__name__, config])
    chosen = variant.resolved()
    # How the layers of a user's own network are wired is for its function to say.
    wiring = chosen["model"] if ":" in variant.model.builder else None
    return json.dumps([layers, wiring, chosen["input"], chosen["train"]], sort_keys=True, default=str)


@dataclass(frozen=True)
class Placed:
    """A layer of a network, under a name of its own, and the names of the layers that feed it."""

    name: str
    layer: keras.layers.Layer
    inputs: list[str]


def _flat(network: keras.Model) -> list[Placed]:
    """The layers of a network, those of networks inside it in their place."""
    found: list[Placed] = []
    sources: dict[int, list[str]] = {}  # of what comes out of a layer or a network, by its id

    def behind(tensor: Any) -> list[str]:
        operation, node, _ = tensor._keras_history
        if id(operation) in sources:
            return sources[id(operation)]
        # An operation that is no layer, such as a + b: what feeds it.
        tensors = operation._inbound_nodes[node].arguments.keras_tensors
        return list(dict.fromkeys(name for one in tensors for name in behind(one)))

    def walk(model: keras.Model, inner: bool) -> None:
        graph = model._functional if isinstance(model, keras.Sequential) else model
        own = {id(node) for nodes in graph._nodes_by_depth.values() for node in nodes}
        for layer in graph.layers:
            if inner and isinstance(layer, keras.layers.InputLayer):
                continue  # what feeds the network inside stands for it
            nodes = [node for node in layer._inbound_nodes if id(node) in own]
            tensors = [tensor for node in nodes for tensor in node.arguments.keras_tensors]
            if isinstance(layer, keras.Sequential) or hasattr(layer, "operations"):
                inside = layer._functional if isinstance(layer, keras.Sequential) else layer
                for given, tensor in zip(inside.inputs, tensors, strict=False):
                    sources[id(given._keras_history.operation)] = behind(tensor)
                walk(layer, inner=True)
                outputs = [name for one in inside.outputs for name in behind(one)]
                sources[id(layer)] = list(dict.fromkeys(outputs))
                continue
            taken = {placed.name for placed in found}
            numbered = (f"{layer.name}_{number}" for number in itertools.count(2))
            name = next(one for one in itertools.chain([layer.name], numbered) if one not in taken)
            found.append(Placed(name, layer, list(dict.fromkeys(name for one in tensors for name in behind(one)))))
            sources[id(layer)] = [name]

    walk(network, inner=False)
    return found


def _layer(placed: Placed) -> dict[str, Any]:
    return {
        "name": placed.name,
        "type": type(placed.layer).__name__,
        "detail": _detail(placed.layer),
        "inputs": placed.inputs,
        "output_shape": list(_output_shape(placed.layer)),
        "parameters": placed.layer.count_params(),
        "macs": macs(placed.layer),
    }


def _output_shape(layer: keras.layers.Layer) -> tuple[int | None, ...]:
    """Of one picture; of a layer with several outputs that of the first."""
    return tuple(keras.tree.flatten(layer.output)[0].shape[1:])


def _detail(layer: keras.layers.Layer) -> str:
    """What a drawing says of a layer beside its type: window, stride, padding, rate, activation."""
    settings = layer.get_config()
    found = []
    if window := _sizes(settings.get("kernel_size") or settings.get("pool_size")):
        found.append("×".join(window))
        strides = _sizes(settings.get("strides"))
        if strides and set(strides) != {"1"} and strides != _sizes(settings.get("pool_size")):
            found.append(f"stride {strides[0]}" if len(set(strides)) == 1 else f"strides {'×'.join(strides)}")
        found += ["same"] if settings.get("padding") == "same" else []
    found += [f"{settings['rate']:g}"] if isinstance(settings.get("rate"), int | float) else []
    activation = settings.get("activation")
    found += [activation] if isinstance(activation, str) and activation != "linear" else []
    return ", ".join(found)


def _sizes(value: Any) -> list[str]:
    return [str(one) for one in keras.tree.flatten(value)] if value else []


def _uncounted(placed: list[Placed]) -> str | None:
    """A warning where layers with matrices of weights are of a type whose multiply-accumulates nobody has counted."""
    kinds = {
        type(one.layer).__name__
        for one in placed
        if not macs(one.layer) and any(len(weight.shape) > 1 for weight in one.layer.weights)
    }
    return f"its multiply-accumulates leave out {', '.join(sorted(kinds))}" if kinds else None


def macs(layer: keras.layers.Layer) -> int:
    """Multiply-accumulates of a layer for one picture; only convolutions and dense layers count."""
    out = _output_shape(layer)
    positions = math.prod(size for size in out[:2] if size) if len(out) == 3 else 1
    match type(layer).__name__:
        case "Conv2D" | "DepthwiseConv2D":
            return positions * _size(layer.kernel)
        case "SeparableConv2D":
            return positions * (_size(layer.depthwise_kernel) + _size(layer.pointwise_kernel))
        case "Conv2DTranspose":  # each input position is spread by the whole kernel
            height, width = layer.input.shape[1:3]
            return height * width * _size(layer.kernel)
        case "Dense":
            return _size(layer.kernel)
    return 0


def _size(weight: keras.Variable) -> int:
    return math.prod(weight.shape)
