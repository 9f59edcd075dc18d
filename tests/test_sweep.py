"""Every key and value that docs/params.md names, set once: it is refused, or it changes what it says that it changes.

A few minutes: `pytest -m slow tests/test_sweep.py`. A key of the page, or a value of a list, without a case fails.
"""

import copy
import io
import re
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import one_thread  # noqa: F401
import pytest
from conftest import ROOT, TINY
from PIL import Image

from ablation_lab import cell, datasets, files, params, plan, preprocess, training
from ablation_lab.errors import LabError

# What a case is compared with, by name: patches of the tiny study's `input`, `model` and `train`.
CNN: dict[str, Any] = {
    "input": {},
    "model": {"dropout": 0.25, "features_dropout": 0.1, "padding": "same", "blocks": {"block1": {"filters": 2}}},
    "train": {"epochs": 3, "batch_size": 32, "optimizer": {"name": "adam", "learning_rate": 0.01}},
}
HEAD = {"head": {"dense1": {"units": 4}}}
RESNET = {"builder": "resnet", "stem": {"filters": 2, "kernel": 3}, "stages": {"stage1": {"filters": 2, "blocks": 1}}}
TRANSFER = {"builder": "transfer", "backbone": "SqueezeNet", "weights": None}
BASES: dict[str, dict[str, Any]] = {
    "cnn": CNN | {"model": {"builder": "cnn"} | CNN["model"] | HEAD},
    "pooled": CNN | {"model": {"builder": "cnn", "head_from": "global_average"} | CNN["model"]},
    "norm": CNN | {"model": {"builder": "cnn"} | CNN["model"] | HEAD},
    "mlp": CNN | {"model": {"builder": "mlp"} | HEAD},
    "resnet": CNN | {"model": RESNET | HEAD},
    "transfer": CNN | {"model": TRANSFER | HEAD},
}


def sets(path: str, *values: Any, bases: str = "cnn", **others: Any) -> list[tuple[str, dict[str, Any]]]:
    """(base, patch) of each base and value; `others` are settings of `train` beside it."""
    found = []
    for base in bases.split():
        for value in values:
            patch: Any = value
            for key in reversed(path.split(".")):
                patch = {key: patch}
            found.append((base, params.merge_patch(patch, {"train": others}) if others else patch))
    return found


EVERY = "cnn mlp resnet transfer"
NEVER = {"min_delta": 100, "patience": 0}  # nothing improves by so much
PLATEAU = NEVER | {"factor": 0.1, "cooldown": 1, "min_lr": 0.001}
NOTHING = dict.fromkeys(CNN["model"])
OWN = NOTHING | {"builder": "networks.example:build", "head": None}
DECAY = {"decay_steps": 2, "decay_rate": 0.5}
MONITORS = ("val_loss", "val_accuracy")

# A key of the page → (base, patch) of each value.
TRAINED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "input.rescale": sets("input.rescale", "symmetric", "none")
    + sets("input.rescale", "unit", "symmetric", "none", bases="transfer"),
    "input.fraction": sets("input.fraction", 0.5),
    "input.augment": sets("input.augment", {"RandomFlip": {"mode": "horizontal"}}),
    "model.builder": sets("model", NOTHING | BASES["mlp"]["model"], NOTHING | BASES["resnet"]["model"], OWN),
    "model.activation": sets("model.activation", "tanh", bases=EVERY) + sets("model.blocks.block1.activation", "elu"),
    "model.initializer": sets("model.initializer", "he_normal", bases=EVERY),
    "model.l2": sets("model.l2", 0.1, bases=EVERY),
    "model.head": sets("model.head.dense1.units", 5)
    + sets("model.head.dense1.activation", "tanh")
    + sets("model.head.dense1.normalization", "batch", "layer")
    + sets("model.head.dense1.dropout", 0.4),
    "model.head_units": sets("model", {"head_units": 3, "head": {"dense2": {}}}),
    "model.head_dropout": sets("model.head_dropout", 0.5, bases=EVERY),
    "model.head_l2": sets("model.head_l2", 0.1, bases="cnn resnet"),
    "model.output": sets("model.output", "logits"),
    "model.convolution": sets("model.convolution", "separable", "depthwise", "transpose"),
    "model.convolutions": sets("model.convolutions", 2),
    "model.filters": sets("model.blocks.block1.filters", 3) + sets("model", {"filters": 3, "blocks": {"block2": {}}}),
    "model.kernel": sets("model.kernel", 2),
    "model.stride": sets("model.stride", 2),
    "model.padding": sets("model.padding", "valid"),
    "model.normalization": sets("model.normalization", "batch", "layer"),
    "model.pool": sets("model.pool", 1, 4),
    "model.pool_type": sets("model.pool_type", "average"),
    "model.dropout": sets("model.dropout", 0.5) + sets("model.blocks.block1.dropout", 0),
    "model.backbone": sets("model.backbone", "MobileNetV2", bases="transfer"),
    "model.trainable": sets("model.trainable", "all", {"last": 10}, {"from_layer": 50}, bases="transfer"),
    "model.head_from": sets("model.head_from", "global_average", "global_max")
    + sets("model.head_from", "flatten", bases="resnet transfer"),
    "model.features_dropout": sets("model.features_dropout", 0.5, bases="cnn resnet transfer"),
    "train.epochs": sets("train.epochs", 6, keep="last"),
    "train.batch_size": sets("train.batch_size", 16),
    "train.steps_per_epoch": sets("train.steps_per_epoch", 2),
    "train.optimizer": sets("train.optimizer.name", "sgd", "adamw")
    + sets("train.optimizer", {"name": "sgd", "momentum": 0.9}, {"name": "sgd", "momentum": 0.9, "nesterov": True})
    + sets("train.optimizer.learning_rate", 0.1)
    + sets("train.optimizer.learning_rate", {"name": "ExponentialDecay", "initial_learning_rate": 0.1, **DECAY})
    + sets("train.optimizer", {"clipnorm": 0.001}, {"amsgrad": True}, {"use_ema": True, "ema_momentum": 0.5}),
    "train.loss": sets("train.loss", "kl_divergence", "binary_crossentropy", "mean_squared_error"),
    "train.label_smoothing": sets("train.label_smoothing", 0.3),
    "train.class_weights": sets("train.class_weights", {"1": 5.0}),
    "train.early_stopping": [
        one for name in MONITORS for one in sets("train.early_stopping", NEVER | {"monitor": name}, keep="last")
    ],
    "train.reduce_lr": [
        one for name in MONITORS for one in sets("train.reduce_lr", PLATEAU | {"monitor": name}, keep="last")
    ],
    "train.precision": sets("train.precision", "mixed_float16", "mixed_bfloat16"),
}

# What leaves a cell as it is, and why; the report says so of each ("this change had no effect").
UNCHANGED: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "model.any_size": [("pooled", {"model": {"any_size": True}}, "opens the network for images of other sizes")],
    "train.keep": [("cnn", {"train": {"epochs": 1, "keep": "last"}}, "of one epoch the last is the best")],
    "train.monitor": [("cnn", {"train": {"epochs": 1, "monitor": "val_loss"}}, "of one epoch each is the best")],
    "train.data_on": [("cnn", {"train": {"data_on": one}}, "both feed the same bytes") for one in ("device", "host")],
    "train.xla": [("cnn", {"train": {"xla": False}}, "auto uses none on the CPU")],
    "train.class_weights": [
        ("cnn", {"train": {"class_weights": "balanced"}}, "with this limit the classes are equally large")
    ],
    "train.loss": [("cnn", {"train": {"loss": "sparse_categorical_crossentropy"}}, "the same loss of class numbers")],
}

# What is refused, where and in which words.
REFUSED: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "input.rescale": [("cnn", {"input": {"rescale": "backbone"}}, "input.rescale: Expected unit, symmetric or none")],
    "model.output": [("cnn", {"model": {"output": "sigmoid"}}, "train.loss: Expected a loss of one probability")],
    "model.weights": [("transfer", {"model": {"weights": "weights/none.h5"}}, "model.weights: Expected imagenet")],
    "model.any_size": [("cnn", {"model": {"any_size": True}}, "model.head_from: Expected global")],
    "train.xla": [
        (
            "cnn",
            {"model": {"blocks": {"block2": {"filters": 2}}}, "train": {"xla": True}},
            "train.xla: Expected auto or",
        )
    ],
    "train.replicas": [("cnn", {"train": {"replicas": 2}}, "train.replicas: Expected none")],
    "train.strategy": [("cnn", {"train": {"strategy": "mirrored", "batch_size": 31}}, "train.batch_size: Expected a")],
    # Without a file's text there is no line to name, and a block has inherited the key.
    "model.activation": [
        ("cnn", {"model": {"activation": one}}, "model.blocks.block1.activation: Expected") for one in ("glu", "x")
    ],
}

# Of `study`, `data` and a variant's reserved keys: the tests that follow. What this process can't try:
ELSEWHERE = {
    "train.threads": "a process has one number of threads; tests/test_training.py trains with two",
    "train.strategy": "mirrored: TensorFlow's devices are fixed at a process' start; tests/test_devices.py",
    "train.replicas": "likewise",
    "model.weights": "imagenet and files: tests/test_weights.py, tests/test_transfer.py",
    "study.test": "tests/test_evaluation.py: trains nothing",
    "study.smooth": "tests/test_report.py: draws other curves",
}
STUDY = {
    "name": "other", "title": "x", "source": "x", "notes": "x", "test": "sealed", "smooth": 3, "quick": True,
}  # fmt: skip


def named_on_the_page() -> set[str]:
    """The keys in the tables of docs/params.md, those of `ablab knockout` and of the limits left out."""
    found = set()
    for section in re.split(r"\n## ", (ROOT / "docs/params.md").read_text(encoding="utf-8"))[1:]:
        name, text = section.partition("\n")[0], section.partition("### ablab knockout")[0]
        rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) if name != "Limits" else []
        found |= {f"{name}.{key}" for row in rows for key in re.findall(r"`([\w.]+)`", row)}
    return found


DATA = {
    "data.image_size": {"image_size": [10, 12]},
    "data.color": {"color": "rgb"},
    "data.resize": {"resize": "pad", "image_size": [10, 20]},
    "data.split.validation": {"split": {"validation": 0.3, "test": 0.2, "seed": 0}},
    "data.split.test": {"split": {"validation": 0.2, "test": 0.3, "seed": 0}},
    "data.split.seed": {"split": {"validation": 0.2, "test": 0.2, "seed": 1}},
    "data.limit": {"limit": 11},
}
FOLDER_KEYS = {"data.dataset", "data.path", "data.pictures", "data.unreadable", "data.resize", "data.color"}
RESERVED = {"variants.note", "variants.reported", "variants.compared_with"}


def test_each_key_of_the_page_has_a_case():
    cases = {*TRAINED, *UNCHANGED, *REFUSED, *ELSEWHERE, *DATA, *FOLDER_KEYS, *RESERVED}
    cases |= {f"study.{key}" for key in (*STUDY, "baseline")}
    named = named_on_the_page()
    assert len(named) > 55 and named - cases == set()


def literals(section: type[params.Section]) -> dict[str, set]:
    def words(annotation: Any) -> set:
        if typing.get_origin(annotation) is typing.Literal:
            return set(typing.get_args(annotation))
        if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
            return set().union(*map(words, typing.get_args(annotation)))
        return set()

    return {key: found for key, field in section.model_fields.items() if (found := words(field.annotation))}


def set_values(value: Any, key: str = "") -> typing.Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from set_values(inside, name)
    yield key, str(value)


def test_each_value_of_a_list_has_a_case():
    patches = [one[1] for cases in (TRAINED, UNCHANGED, REFUSED) for them in cases.values() for one in them]
    tried = {pair for patch in [*patches, *BASES.values()] for pair in set_values(patch)}
    for section in (params.Input, params.Cnn, params.Resnet, params.Transfer, params.Train):
        for key, words in literals(section).items():
            default = section.model_fields[key].default
            lacking = {one for one in words if (key, str(one)) not in tried and one != default}
            assert not lacking, f"{section.__name__}.{key}: {lacking}"


def study(base: str, patch: dict[str, Any] | None = None, **data: Any) -> params.Params:
    made = copy.deepcopy(TINY) | {"seeds": [0]} | copy.deepcopy(BASES[base])
    made["data"] |= data | ({"color": "rgb", "image_size": [64, 64]} if base == "transfer" else {})
    made["variants"] = {"baseline": {}} | ({"changed": patch} if patch else {})
    return params.validate(made, "params.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def processed(root: Path, made: params.Params) -> Path:
    """The data set as a study wants it, made once."""
    place = root / params.digest(params.canonical_json(made.data.model_dump()))[:12]
    if not (place / "data").exists():
        datasets.download(made.data, place / "raw")
        preprocess.preprocess(made.data, place / "raw", place / "data")
    return place / "data"


def trained(root: Path, made: params.Params, name: str) -> dict[str, bytes]:
    """What a cell of a variant holds; equal plans are trained once."""
    data = processed(root, made)
    card = files.read_json(data / "card.json")
    shape, classes = tuple(card["image_shape"]), card["classes"]
    plan.check_names(made, classes)
    facts = plan.describe(made, shape, len(classes), root, sum(card["counts"].values()))[name]
    variant = made.variants[name]
    fixed = plan.settings(variant, root, facts.get("frozen"))
    out = root / f"{data.parent.name}-{facts['plan_hash'][:12]}"
    if not out.exists():
        with files.whole(out) as part:
            training.train(fixed, 0, data, part, name, lambda row: None, features=root / "features")
    return {one: (out / one).read_bytes() for one in (cell.WEIGHTS, cell.PREDICTIONS, cell.HISTORY)}


def cases(of: dict[str, list]) -> list:
    return [
        pytest.param(*one, id=f"{key}-{one[0]}-{number}") for key, them in of.items() for number, one in enumerate(them)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "patch"), cases(TRAINED))
def test_what_is_accepted_changes_the_cell(root, monkeypatch, base, patch):
    monkeypatch.chdir(ROOT)
    made = study(base, patch)
    before, after = (trained(root, made, name) for name in ("baseline", "changed"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed & {cell.WEIGHTS, cell.PREDICTIONS}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "patch", "why"), cases(UNCHANGED))
def test_what_changes_nothing_is_in_the_list_of_what_changes_nothing(root, monkeypatch, base, patch, why):
    monkeypatch.chdir(ROOT)
    short = {"train": {"epochs": patch["train"]["epochs"]}} if "epochs" in patch.get("train", {}) else None
    before = trained(root, study(base, short), "changed" if short else "baseline")
    after = trained(root, study(base, patch), "changed")
    if "loss" in patch.get("train", {}):  # computed in another way, so that the last bits may differ
        arrays = [np.load(io.BytesIO(one[cell.PREDICTIONS]))["test_probabilities"] for one in (before, after)]
        np.testing.assert_allclose(*arrays, atol=1e-3)
        return
    assert all(before[name] == after[name] for name in (cell.WEIGHTS, cell.PREDICTIONS)), why


@pytest.mark.slow
@pytest.mark.parametrize(("base", "patch", "message"), cases(REFUSED))
def test_what_is_refused_names_its_key(root, monkeypatch, base, patch, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(LabError) as caught:
        made = study(base, patch)
        shape = (64, 64, 3) if base == "transfer" else (8, 8, 1)
        plan.describe(made, shape, 10, root)
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("key", DATA)
def test_what_is_said_of_the_data_changes_it(root, key):
    digests = [
        files.read_json(processed(root, study("cnn", **data)) / "card.json")["digest"] for data in ({}, DATA[key])
    ]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_folders_of_images(root, tmp_path, monkeypatch):
    """`path`, `pictures`, `unreadable`, each `resize` and each `color`."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (9, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    own = {"dataset": "image_folder", "path": "images", "image_size": [8, 8]}
    found = {}
    for name, more in {
        "stretch": {}, "pad": {"resize": "pad"}, "crop": {"resize": "crop"}, "grey": {"color": "grayscale"},
        "counted": {"pictures": {"cats": 12, "dogs": 12}},
    }.items():  # fmt: skip
        found[name] = files.read_json(processed(root, study("cnn", **own, **more)) / "card.json")["digest"]
    assert found["counted"] == found["stretch"]  # `pictures` checks, and changes nothing
    assert len(set(found.values())) == 4
    with pytest.raises(LabError, match="cats"):
        processed(root, study("cnn", **own, pictures={"cats": 13, "dogs": 12}))
    (tmp_path / "images/cats/broken.png").write_bytes(b"no image")
    with pytest.raises(LabError, match=r"broken\.png"):
        processed(root, study("cnn", **own, unreadable="error", limit=99))
    assert (
        files.read_json(processed(root, study("cnn", **own, unreadable="skip")) / "card.json")["skipped"]["count"] == 1
    )


def test_what_is_said_of_the_study_and_of_a_variant_trains_nothing():
    made = study("cnn", {"model": {"dropout": 0}})
    other = copy.deepcopy(TINY) | {"seeds": [0]} | copy.deepcopy(BASES["cnn"])
    said = {"note": "x", "reported": {"test_accuracy": 0.5}, "compared_with": "baseline"}
    other["study"] |= STUDY | {"baseline": "baseline"}
    other["variants"] = {"baseline": {"note": "y"}, "changed": said | {"model": {"dropout": 0}}}
    for name, variant in params.validate(other).variants.items():
        assert plan.settings(variant, ROOT) == plan.settings(made.variants[name], ROOT)
        assert params.validate(other).data == made.data
