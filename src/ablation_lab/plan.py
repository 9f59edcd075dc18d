"""The plan: every variant resolved, built and sized before anything is trained."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ablation_lab import (
    backend,
    cell,
    datasets,
    files,
    frozen,
    models,
    optimization,
    params,
    selection,
    trial,
    words,
)
from ablation_lab.backend import keras, tf
from ablation_lab.datasets import fetch
from ablation_lab.errors import LabError
from ablation_lab.models import custom, transfer, weights
from ablation_lab.models.layers import reason
from ablation_lab.params import Params, Variant

# Seconds of a cell that are not training (imports, compilation, files), and forward multiply-accumulates a second and
# thread, for a first guess where nothing has been trained yet; both seen on a 2-core machine.
START_UP_SECONDS = 12
MACS_A_SECOND = 5e9
SECONDS_A_WEIGHT = 4e-9  # of a step, for the optimizer to go through a trained weight and what it remembers of it


# A training needs room for each weight four times: itself, its gradient, two moments of its optimizer's.
MOST_WEIGHTS = 10**9
# Outside of DVC's outputs: a plan's bytes don't depend on what was tried before.
TRIED = Path("resume/tried.json")
UNTRIED = "too large to be tried: whether it can be trained shows in training"

Facts = dict[str, Any]


def check_names(study: Params, classes: list[str]) -> None:
    """Whether what the study says of single classes is about classes that there are.

    Raises:
        LabError: naming the variant and the class.
    """
    for selected, variants in [(None, study.variants), *study.second.items()]:
        errors = {}
        for name, variant in variants.items():
            try:
                optimization.class_weights(variant.train.class_weights, classes, np.zeros(0, np.int64))
            except LabError as error:
                errors[name] = error
        if errors:
            raise LabError("\n       ".join(study.located(errors, selected)))


def describe(
    study: Params, image_shape: tuple[int, int, int], classes: int, root: Path = Path(), pictures: int = 0
) -> dict[str, Facts]:
    """Build every variant's network and say what it is.

    Args:
        study: a valid study.
        image_shape: height, width, channels of the pictures.
        classes: number of classes.
        pictures: their number in all parts, to see whether the features of a frozen prefix are too many to be kept.

    Returns:
        For each variant `parameters`, `trainable_parameters`, `macs` (of one picture's forward pass), `differences`
        from the baseline, `layers`, `lints`, `plan_hash`, `tried`, which is null for a network that is too large for a
        trial step, and where a network has a frozen prefix `frozen`, its `id`, which equal ones share, the `layers`,
        the `macs`, the `bytes` of its features of all pictures, the `threads` that compute it and whether it is
        computed `once`.

    Raises:
        LabError: naming the variant, and the layer or the setting, of everything that can't be built.
    """
    return _Describer(study, image_shape, classes, root, pictures).all(study.variants)


def describe_both(
    study: Params, image_shape: tuple[int, int, int], classes: int, root: Path = Path(), pictures: int = 0
) -> tuple[dict[str, Facts], dict[str, dict[str, Facts]]]:
    """As `describe`, and of the second phase what its variants are for each variant that may be selected."""
    describer = _Describer(study, image_shape, classes, root, pictures)
    first = describer.all(study.variants)
    second = {
        name: describer.all(variants, (study.variants[name], first[name])) for name, variants in study.second.items()
    }
    return first, second


class _Describer:
    """Builds networks one after the other; those that begin with the same backbone share it, which saves most of the
    time."""

    def __init__(self, study: Params, image_shape: tuple[int, int, int], classes: int, root: Path, pictures: int):
        self.study, self.root, self.pictures = study, root, pictures
        self.image_shape, self.classes = image_shape, classes
        self.backbones: dict[str, keras.Model] = {}
        self.passed: set[str] = set()  # what trial steps have shown
        self.known = _tried_before(root)

    def all(self, variants: dict[str, Variant], selected: tuple[Variant, Facts] | None = None) -> dict[str, Facts]:
        """Facts of all variants of a phase; in the second one they start from the `selected` one's weights."""
        found: dict[str, Facts] = {}
        fingerprints: dict[str, str] = {}
        errors: dict[str, LabError] = {}
        start = _shapes(self._network(selected[0])) if selected else None
        for name, variant in variants.items():
            try:
                network = self._network(variant)
                if start not in (None, _shapes(network)):
                    raise LabError(
                        f"Expected the layers of {selected[0].name if selected else ''} with weights of the same "
                        "shapes, as it starts from those. Found: others."
                    )
                found[name] = self._facts(name, variant, network, fingerprints, selected)
            except LabError as error:
                errors[name] = error
        if errors:
            raise LabError("\n       ".join(self.study.located(errors, selected[0].name if selected else None)))
        return found

    def _network(self, variant: Variant) -> keras.Model:
        model = variant.resolved()["model"]
        if model["builder"] != "transfer":
            return _build(variant, self.image_shape, self.classes)
        key = json.dumps([model["backbone"].lower(), variant.input.rescale, variant.train.precision])
        network = _build(variant, self.image_shape, self.classes, self.backbones.get(key))
        self.backbones.setdefault(key, transfer.backbone_of(network))
        return network

    def _facts(
        self,
        name: str,
        variant: Variant,
        network: keras.Model,
        fingerprints: dict[str, str],
        selected: tuple[Variant, Facts] | None,
    ) -> Facts:
        placed = _flat(network)
        ready = _ready_made(network, variant)
        layers = [_layer(one) | ({"of": ready[one.name]} if one.name in ready else {}) for one in placed]
        prefix = _frozen(network, variant, self.pictures)
        fixed = settings(variant, self.root, prefix, selected[1] if selected else None)
        twin = fingerprints.setdefault(_fingerprint(network, variant), name)
        lints = [] if twin == name else [f"the same network as {twin}, trained the same way"]
        if "code" in fixed and (unseen := custom.lint(fixed["code"])):
            lints.append(unseen)
        if variant.model.builder == "transfer" and not selected:
            lints += weights.lints(fixed["model"])
        if fixed["model"].get("trainable", "none") != "none" and not any(
            one.trainable_weights for one in transfer.own_layers(network)
        ):
            lints.append("the layers that model.trainable names have no weights, so none of the backbone is trained")
        lints += optimization.lints(fixed["train"]["optimizer"])
        lints += [
            f"its {one} changed none of {optimization.TRIED:,} random images"
            for one in _once_a_study(_check_augmentations, fixed["input"]["augment"], self.image_shape)
        ]
        if models.output(fixed["model"]) != "sigmoid" and fixed["train"]["loss"].lower().startswith("binary"):
            lints.append("its loss takes each class by itself: to softmax and logits belongs categorical_crossentropy")
        if prefix and not prefix["once"]:
            why = "it augments its input"
            if not variant.input.augment:
                most = f"more than ABLAB_FEATURES_GB, {_size(frozen.limit())}"
                why = f"their features would take {_size(prefix['bytes'])}, {most}"
            lints.append(f"its {prefix['layers']} frozen layers are computed anew for each epoch, as {why}")
        if uncounted := _uncounted(placed):
            lints.append(uncounted)
        facts = {
            "parameters": network.count_params(),
            "trainable_parameters": sum(_count(weight) for weight in network.trainable_weights),
            "macs": sum(layer["macs"] for layer in layers),
            "differences": params.differences(self.study.baseline, variant),
            "layers": layers,
            "lints": lints,
            "plan_hash": params.digest(params.canonical_json(fixed)),
            "tried": self._tried(fixed, network),
        }
        return facts | ({"frozen": prefix} if prefix else {})

    def _tried(self, fixed: dict[str, Any], network: keras.Model) -> str | None:
        """What says that a network like this can be trained: its parts, once a step has passed; None without a step."""
        parts = trial.parts(fixed, network, self.image_shape, self.classes)
        shown = trial.digest(parts)
        known = shown in self.known or parts <= self.passed
        if not known and not trial.run(fixed, network, self.image_shape, self.classes):
            return None
        self.passed |= parts
        return shown


def _tried_before(root: Path) -> set[str]:
    """What the last plan has tried, so that an unchanged network isn't tried again."""
    try:
        return set(json.loads((root / TRIED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def _ready_made(network: keras.Model, variant: Variant) -> dict[str, str]:
    """The layers of a ready-made backbone by name: whose they are, and whether they are trained."""
    if not isinstance(variant.model, params.Transfer):
        return {}
    return {
        one.name: f"{variant.model.backbone}, {'trained' if one.trainable else 'frozen'}"
        for one in transfer.own_layers(network)
    }


def _shapes(network: keras.Model) -> dict[str, tuple[int, ...]]:
    """Of all weights that are kept, by their place in the network."""
    return {one.path: one.shape for one in network.variables if not one.path.endswith("seed_generator_state")}


def _frozen(network: keras.Model, variant: Variant, pictures: int) -> dict[str, Any] | None:
    tensors = frozen.cut(network)
    if not tensors:
        return None
    prefix = keras.Model(network.inputs, tensors, name="prefix")
    layers = prefix.layers
    model = variant.resolved()["model"]
    size = sum(4 * math.prod(tensor.shape[1:]) for tensor in tensors) * pictures
    return {
        "id": params.digest(prefix.to_json() + str(model.get("weights")) + str(variant.train.threads))[:12],
        "threads": variant.train.threads,
        "layers": len(layers),
        "macs": sum(macs(layer) for layer in layers),
        "bytes": size,
        "once": not variant.input.augment and size <= frozen.limit(),
    }


def settings(
    variant: Variant, root: Path, prefix: dict[str, Any] | None = None, start: Facts | None = None
) -> dict[str, Any]:
    """What `plan/<variant>.json` holds: the resolved configuration and, where there is such a thing, the source files
    of a network of the user's, the weights of a backbone, whether a frozen prefix is computed once, and of a variant of
    the second phase the plan of what it starts from.

    Args:
        prefix: the `frozen` of the variant's facts.
        start: the facts of the variant that it starts from.
    """
    found = variant.resolved()
    if ":" in variant.model.builder:
        found["code"] = custom.sources(variant.model.builder, root)
    if ready := weights.wanted(found["model"]):
        found["weights"] = ready
    if prefix is not None:
        found["frozen_once"] = prefix["once"]
    if start is not None:
        found["start"] = start["plan_hash"]
    return found


def missing_weights(study: Params) -> dict[str, tuple[weights.Wanted, LabError]]:
    """The files of ready-made weights that a study wants and that are not there, by name, with what is missing."""
    found: dict[str, tuple[weights.Wanted, LabError]] = {}
    for variant in study.variants.values():
        model = variant.resolved()["model"]
        ready = weights.wanted(model)
        if ready and ready["url"]:
            try:
                weights.locate(model, ready)
            except LabError as missing:
                found[ready["file"]] = (ready, missing)
    return found


def fetch_weights(study: Params) -> None:
    """Download the weights of ready-made backbones that aren't there, so that no training has to wait for a network.

    Raises:
        LabError: when a file can be had from nowhere; it says where to put it.
    """
    for name, (ready, missing) in missing_weights(study).items():
        try:
            fetch.keep(name, ready["hash"], str(ready["url"]), weights.FOLDER, weights.keras_folder())
        except LabError as lost:
            raise LabError(f"{missing}\n       {lost}") from None


def write(
    study: Params,
    described: dict[str, Facts],
    root: Path = Path(),
    second: dict[str, dict[str, Facts]] | None = None,
) -> None:
    """Write `plan/<variant>.json`, what fixes a result, and `plan/networks/<variant>.json`, what is worth knowing; of
    the second phase the same in `plan/second/<selected variant>/`.

    Folders of cells that are no longer in the study are removed; DVC's cache keeps what was in them.
    """
    with files.whole(root / "plan") as folder:
        _write(folder, study.variants, described, root)
        for selected, facts in (second or {}).items():
            _write(folder / "second" / selected, study.second[selected], facts, root, described[selected])
    tried = {facts["tried"] for one in [described, *(second or {}).values()] for facts in one.values()}
    files.write_json(root / TRIED, sorted(tried - {None}))
    names = [*study.variants, *study.second_names]
    for place in (root / "cells", root / cell.VALIDATION):
        wanted = {f"{name}/seed-{seed}" for name in names for seed in study.seeds}
        for found in place.glob("*/seed-*"):
            if found.relative_to(place).with_suffix("").as_posix() not in wanted:
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        for found in place.glob("*"):
            if found.name not in names and not any(found.iterdir()):
                found.rmdir()


def _write(
    folder: Path, variants: dict[str, Variant], described: dict[str, Facts], root: Path, start: Facts | None = None
) -> None:
    (folder / "networks").mkdir(parents=True)
    for name, variant in variants.items():
        text = params.canonical_json(settings(variant, root, described[name].get("frozen"), start))
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        text = params.canonical_json(_documented(described[name]))
        (folder / "networks" / f"{name}.json").write_text(text, encoding="utf-8")


def reasons(study: Params, described: dict[str, Facts], data_digest: str | None, root: Path = Path()) -> dict:
    """Why each cell would be trained, or None where its result is there and up to date.

    Args:
        described: facts of the variants that are asked about.
        data_digest: the digest in the data card; None before `preprocess` has run.

    Returns:
        `{(variant, seed): reason | None}`.
    """
    code = cell.training_code(root)
    found: dict[tuple[str, int], str | None] = {}
    for name, seed in itertools.product(described, study.seeds):
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
    variants: dict[str, Variant], described: dict[str, Facts], seeds: list[int], pictures: int, root: Path = Path()
) -> dict[str, float]:
    """Estimated minutes of one cell of each variant: from its own past timings, else from its size. A frozen prefix
    that is computed once counts in the first variant that has it.

    Args:
        pictures: size of the training part.
    """
    guesses = {}
    computed: set[str] = set()
    for name, variant in variants.items():
        facts, threads = described[name], variant.train.threads
        used = pictures * variant.input.fraction
        if variant.train.steps_per_epoch:
            used = variant.train.steps_per_epoch * variant.train.batch_size
        # A frozen layer only goes forward; the others go backward too, which costs twice as much.
        prefix = facts.get("frozen", {"macs": 0, "once": False})
        ahead, once = prefix["macs"], prefix["once"]
        epoch = used * (facts["macs"] - ahead + (0 if once else ahead / 3)) / MACS_A_SECOND / threads**0.5
        epoch += used / variant.train.batch_size * (0.002 + facts["trainable_parameters"] * SECONDS_A_WEIGHT)
        for seed in seeds:
            folder = cell.folder(name, seed, root)
            if not (folder / cell.TIMING).exists() or not (folder / cell.RESULT).exists():
                continue
            if files.read_json(folder / cell.RESULT)["plan_hash"] == facts["plan_hash"]:
                seconds = files.read_json(folder / cell.TIMING)["epoch_seconds"]
                epoch = sum(seconds) / len(seconds)
        guesses[name] = (START_UP_SECONDS + variant.train.epochs * epoch) / 60
        if once and prefix["id"] not in computed:
            computed.add(prefix["id"])
            guesses[name] += 1.4 * pictures * ahead / 3 / MACS_A_SECOND / threads**0.5 / 60
    return guesses


def pictures(study: Params, root: Path = Path()) -> tuple[tuple[int, int, int], list[str], int, int, str | None]:
    """What the networks would be fed: by the data card where `preprocess` has run, else by what is known of the data.

    Returns:
        Image shape, names of the classes, size of the training part and of all, and the data's digest (None without a
        data card).
    """
    known = datasets.spec(study.data)
    processed = root / "data" / "processed"
    made_with = processed / "settings.json"
    # Pictures made before there were `unreadable` and `pictures` are those of their defaults.
    if (
        made_with.exists()
        and {"unreadable": "error", "pictures": None} | files.read_json(made_with) == study.data.model_dump()
    ):
        card = files.read_json(processed / "card.json")
        counts = card["counts"]
        return tuple(card["image_shape"]), card["classes"], counts["train"], sum(counts.values()), card["digest"]
    if known is None:
        raise LabError(
            f"{study.file}: data: Expected pictures that are preprocessed with these settings, since only they tell "
            "their classes. Found: none. Run `dvc repro preprocess` first."
        )
    split = study.data.split
    counts = known.counts
    if split.test == "given" and "train" not in counts:
        raise LabError(
            f"{study.file}: data.split.test: Expected a fraction like 0.2, as {study.data.dataset} has no given test "
            "set. Found: given, which is the default."
        )
    total = counts["train"] if split.test == "given" and "train" in counts else sum(counts.values())
    rest = 1 - split.validation - (split.test if isinstance(split.test, float) else 0)
    return known.image_shape, list(known.classes), round(total * rest), sum(counts.values()), None


def as_json(
    study: Params, described: dict[str, Facts], second: dict[str, dict[str, Facts]] | None = None
) -> dict[str, Any]:
    """The plan for programs (`ablab plan --json`). A study in two phases has in `second` its second phase's variants,
    by the variant that may be selected."""
    cells = [f"{name}-{seed}" for name in [*study.variants, *study.second_names] for seed in study.seeds]
    variants = {name: _documented(facts) for name, facts in described.items()}
    plan = {"study": study.study.name, "baseline": study.study.baseline, "cells": cells, "variants": variants}
    later = {name: {one: _documented(facts) for one, facts in those.items()} for name, those in (second or {}).items()}
    return plan | ({"second": later} if later else {})


def _documented(facts: Facts) -> Facts:
    """Facts without `tried`, which depends on what earlier plans have tried."""
    return {key: value for key, value in facts.items() if key != "tried"}


@dataclass(frozen=True)
class Row:
    """What the table shows of a variant: its facts, why its cells would be trained, minutes of one of them.

    Args:
        base: the variant that sizes are compared with, and its facts.
        sooner: whether early stopping may end its cells before all epochs are trained.
        counted: whether its cells count in the sum.
    """

    name: str
    base: tuple[str, Facts]
    facts: Facts
    reasons: list[str]
    minutes: float
    sooner: bool
    counted: bool = True


def rows(
    study: Params,
    described: dict[str, Facts],
    second: dict[str, dict[str, Facts]],
    pictures: int,
    data_digest: str | None,
    root: Path = Path(),
) -> tuple[list[Row], list[Row]]:
    """Both phases for `table`. The second one has a row for each variant that may be selected or, once today's first
    phase is trained, for the one that is."""
    base = (study.study.baseline, described[study.study.baseline])
    first = _rows(study, study.variants, base, described, pictures, data_digest, root, counted=True)
    chosen = next(iter(second), None)
    if second and not any(row.reasons for row in first if row.name in second):
        chosen = selection.choose(study, root)["variant"]
        second = {chosen: second[chosen]} if chosen else second
    found = [
        _rows(study, study.second[name], (name, described[name]), facts, pictures, data_digest, root, name == chosen)
        for name, facts in second.items()
    ]
    return first, [row for together in zip(*found, strict=True) for row in together]


def _rows(
    study: Params,
    variants: dict[str, Variant],
    base: tuple[str, Facts],
    described: dict[str, Facts],
    pictures: int,
    data_digest: str | None,
    root: Path,
    counted: bool,
) -> list[Row]:
    why = reasons(study, described, data_digest, root)
    spent = minutes(variants, described, study.seeds, pictures, root)
    return [
        Row(
            name,
            base,
            facts,
            [one for seed in study.seeds if (one := why[name, seed])],
            spent[name],
            bool(variants[name].train.early_stopping),
            counted,
        )
        for name, facts in described.items()
    ]


def table(study: Params, first: list[Row], second: list[Row]) -> str:
    """The plan for people: a row a variant, then warnings and the sum."""
    lines = ["Phase one", ""] if second else []
    lines += [_table(study, first), ""]
    if second:
        known = len({row.base[0] for row in second}) == 1
        lines += [f"Phase two, with {second[0].base[0]}" if known else "Phase two, by what phase one may select", ""]
        lines += [_table(study, second), ""]
    lines += _once([*first, *second])
    lines += _trained([*first, *second])
    lines += warnings((row.name, row.facts) for row in [*first, *second])
    counted = [row for row in [*first, *second] if row.counted]
    left = sum(len(row.reasons) for row in counted)
    total = sum(len(row.reasons) * row.minutes for row in counted)
    among = f", phase two as with {second[0].base[0]}" if len({row.base[0] for row in second}) > 1 else ""
    cells = len(counted) * len(study.seeds)
    spent = f", about {words.duration(60 * total)} one after another{among}" if left else ""
    if any(row.sooner and row.reasons for row in counted):
        spent += "; less where early stopping ends a training"
    lines.append(f"{left} of {words.counted(cells, 'cell')} to train{spent}.")
    if left:
        lines.append("`dvc repro` takes from DVC's cache what has been trained before with the same settings.")
    if study.data.dataset == "image_folder":
        lines.append("Pictures that changed since the last `dvc repro` are not seen here; it will notice them.")
    return "\n".join(lines)


def warnings(described: Iterable[tuple[str, Facts]]) -> list[str]:
    """All lints, each once, with the variants that they are about."""
    about: dict[str, dict[str, None]] = {}
    for name, facts in described:
        for lint in [*facts["lints"], *([] if facts["tried"] else [UNTRIED])]:
            about.setdefault(lint, {})[name] = None
    return [f"warning: {', '.join(names)}: {lint}" for lint, names in about.items()]


def _trained(rows: list[Row]) -> list[str]:
    """Where in a backbone training starts, of variants that train some of its layers."""
    lines: dict[str, str] = {}
    for row in rows:
        layers = [layer for layer in row.facts["layers"] if "of" in layer]
        ours = [layer["name"] for layer in layers if layer["of"].endswith(", trained")]
        if 0 < len(ours) < len(layers):
            told = f"trains {len(ours)} of the backbone's {len(layers) + 1} layers, from {ours[0]} on"
            lines[row.name] = f"{row.name}: {told}"
    return list(lines.values())


def _table(study: Params, rows: list[Row]) -> str:
    partly = any(row.facts["trainable_parameters"] != row.facts["parameters"] for row in rows)
    bases = {row.base[0] for row in rows}
    shown = []
    for number, row in enumerate(rows):
        facts, (base, base_facts) = row.facts, row.base
        again = number > 0 and rows[number - 1].name == row.name
        # What a variant of phase two has from the selected one is no change of its own.
        own = [
            one for one in facts["differences"] if base == study.study.baseline or one not in base_facts["differences"]
        ]
        cells = {"variant": "" if again else row.name, "change": "" if again else "; ".join(map(_change, own))}
        if len(bases) > 1:
            cells["selected"] = base
        cells["parameters"] = f"{facts['parameters']:,}"
        if partly:
            cells["trained"] = f"{facts['trainable_parameters']:,}"
        else:
            cells["difference"] = f"{facts['parameters'] - base_facts['parameters']:+,}" if row.name != base else ""
        why = f"{len(row.reasons)} of {len(study.seeds)}: {', '.join(dict.fromkeys(row.reasons))}"
        cells |= {"MACs": f"{facts['macs']:,}", "minutes a cell": f"{row.minutes:.1f}"}
        shown.append(cells | {"to train": why if row.reasons else "nothing"})
    heads = list(shown[0])
    widths = [{"change": 44, "to train": 24}.get(head) for head in heads]
    align = ["left" if head in ("variant", "change", "selected", "to train") else "right" for head in heads]
    return tabulate(
        [list(row.values()) for row in shown], heads, maxcolwidths=widths, colalign=align, disable_numparse=True
    )


def _once(rows: list[Row]) -> list[str]:
    """What is computed once of frozen prefixes, a line for each of them."""
    found: dict[str, dict[str, Any]] = {}
    sharing: dict[str, list[str]] = {}
    for row in rows:
        prefix = row.facts.get("frozen")
        if prefix and prefix["once"]:
            found[prefix["id"]] = prefix
            sharing.setdefault(prefix["id"], []).append(row.name)
    lines = [
        f"{', '.join(dict.fromkeys(sharing[key]))}: {prefix['layers']} frozen layers are computed once, for all "
        f"epochs, and {_size(prefix['bytes'])} of features kept in {frozen.FOLDER}/"
        for key, prefix in found.items()
    ]
    threads = sorted({prefix["threads"] for prefix in found.values()})
    if len(threads) > 1:
        several = " and ".join(map(str, threads))
        lines.append(f"Features are shared by variants with equal train.threads only; this study has {several}.")
    return lines


def _size(size: int) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _change(difference: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "none" if value is None else json.dumps(value, ensure_ascii=False).replace('"', "")

    return f"{difference['path']}: {shown(difference['baseline'])} → {shown(difference['variant'])}"


def _build(
    variant: Variant, image_shape: tuple[int, int, int], classes: int, backbone: keras.Model | None = None
) -> keras.Model:
    """Build a network without its weights, and use once everything of Keras' that is only named in the study: what
    would stop a training after hours of others stops the plan."""
    chosen = variant.resolved()
    # Layers that name themselves have the same names in every variant. Garbage is found without being looked for.
    keras.utils.clear_session(free_memory=False)
    # A network for pictures of any size is sized at that of the data.
    model = chosen["model"] | {"any_size": False}
    with _told_of("model"), backend.precision(chosen["train"]["precision"]):
        network = _without_weights(model, chosen["input"]["rescale"], image_shape, classes, backbone)
        if ":" in model["builder"]:  # what a function of the user's makes is used, too
            network = models.build(model, chosen["input"]["rescale"], image_shape, classes)
            custom.check(network, image_shape, classes, model["builder"])
            if chosen["model"]["any_size"]:
                models.build(chosen["model"], chosen["input"]["rescale"], image_shape, classes)
        elif "initializer" in model:
            with _told_of("model.initializer"):
                _check_initializer(network, model["initializer"])
    train = chosen["train"]
    if train["xla"] is True:
        _check_xla(network)
    with _told_of("input.augment"):
        _once_a_study(_check_augmentations, chosen["input"]["augment"], image_shape)
    with _told_of("train.optimizer"):
        _once_a_study(_check_optimizer, train["optimizer"])
    with _told_of("train.loss"):
        settings = {key: value for key, value in train.items() if key not in ("optimizer", "epochs", "batch_size")}
        _once_a_study(_check_loss, settings, models.output(model), classes)
    return network


def _once_a_study(check: Callable[..., Any], *settings: Any) -> Any:
    """Check settings that many variants have in common: what has passed passes again, with what was found."""
    key = (check.__name__, params.canonical_json(settings))
    if key not in _passed:
        _passed[key] = check(*settings)
    return _passed[key]


_passed: dict[tuple[str, str], Any] = {}


def _check_optimizer(settings: dict[str, Any]) -> None:
    optimizer = optimization.optimizer(settings)
    weight = keras.Variable(np.zeros((2, 2), np.float32))
    optimizer.apply([np.ones((2, 2), np.float32)], [weight])


def _check_loss(train: dict[str, Any], output: str, classes: int) -> None:
    labels, one_hot = np.zeros(2, np.int32), np.zeros((2, classes), np.float32)
    one_hot[:, 0] = 1
    given = {"number": labels, "one_hot": one_hot, "second": labels[:, None]}
    loss = optimization.loss(train, output)
    predicted = np.full((2, 1 if output == "sigmoid" else classes), 1 / classes, np.float32)
    value = loss(given[optimization.label_form(train, output)], predicted)
    if tuple(value.shape):
        raise LabError(f"train.loss: Expected one number for a batch. Found: shape {tuple(value.shape)}.")


@contextmanager
def _told_of(place: str) -> Iterator[None]:
    """Whatever Keras or TensorFlow make of a value that only they know, as a mistake at this place of the study."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {reason(error)}"
        raise LabError(f"Expected settings that Keras takes. Found: {found}", tuple(place.split("."))) from error


def _without_weights(
    model: dict[str, Any],
    rescale: str,
    image_shape: tuple[int, int, int],
    classes: int,
    backbone: keras.Model | None,
) -> keras.Model | None:
    """Build a network whose weights take no memory, which is all that a plan needs: shapes.

    Returns:
        None where a function of the user's can't do without their values.

    Raises:
        LabError: where there would be more weights than a machine has room for.
    """
    try:
        with keras.StatelessScope(initialize_variables=False):
            network = models.build(model, rescale, image_shape, classes, backbone)
    except Exception:
        if ":" not in model["builder"]:
            raise
        return None  # the building that follows tells what is wrong, if it is
    finally:
        keras.utils.clear_session(free_memory=False)  # Keras would fill these weights at the next opportunity
    found = network.count_params()
    if found > MOST_WEIGHTS:
        most = max(network.layers, key=lambda layer: layer.count_params())
        raise LabError(
            f"model: Expected a network of at most {MOST_WEIGHTS:,} weights. Found: {found:,}, most in the layer "
            f"{most.name}. Use fewer filters or units, smaller pictures, more pooling, or head_from: global_average."
        )
    return network


def _check_initializer(network: keras.Model, name: str) -> None:
    """Some initializers work on matrices alone: each kernel is filled, in small."""
    for layer in network.layers:
        for attribute in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            if (weight := getattr(layer, attribute, None)) is not None:
                _once_a_study(_fill, name, [min(size, 2) for size in weight.shape])


def _check_xla(network: keras.Model) -> None:
    """Max pooling has no gradient that XLA computes deterministically."""
    trained = False
    for layer in (placed.layer for placed in _flat(network)):
        if trained and isinstance(layer, keras.layers.MaxPooling2D):
            raise LabError(
                f"train.xla: Expected auto or false, as XLA has no deterministic gradient of {layer.name} "
                "(MaxPooling2D), behind layers that are trained. Found: true."
            )
        trained = trained or bool(layer.trainable_weights)


def _fill(name: str, shape: list[int]) -> None:
    keras.initializers.get(name)(shape)


def _check_augmentations(augment: dict[str, dict[str, Any]], image_shape: tuple[int, int, int]) -> list[str]:
    """Compile each layer for images of this shape, as a training does, and find those that change no random ones."""
    given = "×".join(map(str, image_shape))
    for layer in optimization.augmentation(augment):
        place = ("input", "augment", type(layer).__name__)
        try:
            found = _augmented_shape(layer, image_shape)
        except Exception as error:
            if image_shape[-1] == 1 and _takes_colour(layer, image_shape):
                expected = "images in colour (data.color: rgb), as this layer changes no others"
                raise LabError(f"Expected {expected}. Found: grey ones of {given}.", place) from error
            told = f"{type(error).__name__}: {reason(error)}"
            raise LabError(f"Expected settings that Keras takes for images of {given}. Found: {told}", place) from error
        if found != image_shape:
            raise LabError(f"Expected images of the same shape. Found: {'×'.join(map(str, found))}.", place)
    return optimization.check_augmentation(augment, image_shape)


def _augmented_shape(layer: keras.layers.Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a layer gives, once it is compiled as `feeding.before` has it."""
    network = keras.Sequential([keras.Input(shape), layer])
    step = tf.function(lambda images: network(images, training=True), autograph=False)
    step.get_concrete_function(tf.TensorSpec((None, *shape), tf.float32))
    return tuple(network.output_shape[1:])


def _takes_colour(layer: keras.layers.Layer, shape: tuple[int, ...]) -> bool:
    """Whether a layer that fails on grey images doesn't on those of the same size in colour."""
    with suppress(Exception):
        return bool(_augmented_shape(type(layer).from_config(layer.get_config()), (*shape[:2], 3)))
    return False


def _fingerprint(network: keras.Model, variant: Variant) -> str:
    """Equal for networks that differ in names alone and are fed and trained in the same way."""
    layers = []
    for layer in (placed.layer for placed in _flat(network)):
        config = {key: value for key, value in layer.get_config().items() if key != "name"}
        layers.append([type(layer).__name__, config])
    chosen = variant.resolved()
    # How the layers of a user's own network are wired is for its function to say.
    wiring = chosen["model"] if ":" in variant.model.builder else None
    weights_named = chosen["model"].get("weights")
    return json.dumps([layers, wiring, weights_named, chosen["input"], chosen["train"]], sort_keys=True, default=str)


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
            return positions * _count(layer.kernel)
        case "SeparableConv2D":
            return positions * (_count(layer.depthwise_kernel) + _count(layer.pointwise_kernel))
        case "Conv2DTranspose":  # each input position is spread by the whole kernel
            height, width = layer.input.shape[1:3]
            return height * width * _count(layer.kernel)
        case "Dense":
            return _count(layer.kernel)
    return 0


def _count(weight: keras.Variable) -> int:
    return math.prod(weight.shape)
