import copy
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, TINY, write_params
from ruamel.yaml import YAML

from ablation_lab import params
from ablation_lab.errors import LabError

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def changed(*path, to) -> dict:
    """The tiny study with one value set."""
    study = copy.deepcopy(TINY)
    *way, last = path
    place = study
    for key in way:
        place = place.setdefault(key, {})
    place[last] = to
    return study


# The cases of RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("target", "patch", "merged"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_follows_the_rfc(target, patch, merged):
    assert params.merge_patch(target, patch) == merged


def test_a_patch_keeps_the_place_of_what_it_changes():
    merged = params.merge_patch({"a": {"x": 1}, "b": {"x": 1}}, {"c": {}, "a": {"x": 2}})
    assert list(merged) == ["a", "b", "c"]


def test_the_order_of_layers_counts_and_no_other_order_does():
    first = changed("model", "blocks", to={"one": {"filters": 2}, "two": {"filters": 3}})
    second = changed("model", "blocks", to={"two": {"filters": 3}, "one": {"filters": 2}})
    shuffled = {key: first[key] for key in reversed(first)}
    texts = [params.canonical_json(params.validate(one).baseline.resolved()) for one in (first, second, shuffled)]
    assert texts[0] != texts[1]
    assert texts[0] == texts[2]


def test_settings_of_the_model_are_those_of_blocks_that_set_none():
    everywhere = params.validate(changed("model", "dropout", to=0.5)).baseline.resolved()
    here = params.validate(changed("model", "blocks", "block1", "dropout", to=0.5)).baseline.resolved()
    assert everywhere == here
    assert here["model"]["blocks"][0]["dropout"] == 0.5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "droput"), 0.3, "model.droput: Expected one of the keys builder, activation"),
        (("model", "droput"), 0.3, "Did you mean dropout?"),
        (("model", "dropout"), 1.3, "model.dropout: Expected a value less than 1. Found: 1.3."),
        (
            ("model", "builder"),
            "cmn",
            "Expected one of cnn, mlp, resnet, transfer, or a network of your own as networks.example:build. "
            'Found: "cmn". Did you mean cnn?',
        ),
        (("train", "epochs"), "ten", 'train.epochs: Expected a valid integer. Found: "ten".'),
        (("train", "epochs"), 1.5, "train.epochs: Expected a valid integer"),
        (("train", "epochs"), True, "train.epochs: Expected a valid integer. Found: true."),
        (
            ("data", "dataset"),
            "digit",
            "Expected 'digits', 'fashion_mnist', 'cifar10' or 'image_folder'.",
        ),
        (("data", "split", "test"), 2, "data.split.test: Expected 'given' or a value less than 1. Found: 2."),
        (
            ("data", "split"),
            {"validation": 0.5, "test": 0.5},
            "data.split: Expected validation + test below 1",
        ),
        (("data", "image_size"), [8], "data.image_size: Expected at least 2 items. Found: [8]."),
        (("seeds",), [], "seeds: Expected at least 1 item. Found: []."),
        (("seeds",), [1, 1], "seeds: Expected each seed once. Found: [1, 1]."),
        (("seeds",), [0, -1], "seeds.1: Expected a value greater than or equal to 0. Found: -1."),
        (
            ("train", "optimizer", "learning_rate"),
            -1,
            "train.optimizer.learning_rate: Expected a value greater than 0. Found: -1.",
        ),
        (
            ("train", "optimizer", "learning_rate"),
            {"nam": "CosineDecay"},
            "train.optimizer.learning_rate.name: Expected a value. Found: null.",
        ),
        (("model", "builder"), "networks/own.py:build", "or a network of your own as networks.example:build. Found:"),
        (("study", "baseline"), "bsae", "study.baseline: Expected one of the variants: baseline, no_dropout."),
        (("variants", "empty"), {}, "variants.empty: Expected a change of input, model or train"),
        (("variants", "empty"), None, "variants.empty: Expected a change of input, model or train"),
        (("variants", "empty"), {"note": "nothing"}, "variants.empty: Expected a change of input, model or train"),
        (("variants", "no"), {"model": {"dropout": 0}}, "variants.no: Expected a variant's name"),
        (("variants", "a.b"), {"model": {"dropout": 0}}, "variants.a.b: Expected a variant's name"),
        (("variants", 3), {"model": {"dropout": 0}}, "variants.3: Expected a variant's name"),
        (("variants", "NO_DROPOUT"), {"model": {"dropout": 0}}, "Expected names that differ in more than case"),
        (
            ("variants", "typo"),
            {"model": {"blocks": {"blok1": None}}},
            'model.blocks.blok1: Expected something to remove: block1. Found: "blok1". Did you mean block1?',
        ),
        (("variants", "typo"), {"modl": {}}, "variants.typo.modl: Expected one of the keys note, reported"),
        (("variants", "high"), {"model": {"dropout": 3}}, "variants.high.model.dropout: Expected a value less than 1."),
        (
            ("variants", "bare"),
            {"model": {"blocks": {"block1": None}}},
            "variants.bare.model.blocks: Expected at least 1",
        ),
        (
            ("variants", "x"),
            {"model": {"dropout": 0}, "compared_with": "y"},
            "variants.x.compared_with: Expected another",
        ),
        (("variants", "x"), {"model": {"dropout": 0}, "reported": {"accuracy": 1}}, "Did you mean test_accuracy?"),
        (("data",), 3, "data: Expected a mapping of names to values. Found: 3."),
        (("train", "strategy"), "miror", "Expected 'single' or 'mirrored'. Found: \"miror\". Did you mean mirrored?"),
        (("train", "replicas"), 2, "train.replicas: Expected none, as train.strategy is single"),
        (("train", "precision"), "mixed_float", "Did you mean mixed_float16?"),
        (("train", "xla"), "yes", "train.xla: Expected 'auto' or a valid boolean"),
        (("train", "xla"), "no", 'Found: "no". Write false: in YAML 1.2, no is a text.'),
        (("study", "quick"), "off", 'Found: "off". Write false: in YAML 1.2, off is a text.'),
        (
            ("train", "reduce_lr"),
            {"min_lr": 0.1},
            "train.reduce_lr.min_lr: Expected a value less than the learning rate",
        ),
        (("data", "path"), "somewhere", "data.path: Expected null, as digits does not come from a path"),
        (("train", "data_on"), "gpu", "train.data_on: Expected 'auto', 'device' or 'host'"),
        (("train", "epochs"), 10**30, "train.epochs: Expected a value less than or equal to 100000. Found: 1"),
        (("train", "batch_size"), 10**12, "train.batch_size: Expected a value less than or equal to 65536."),
        (("data", "image_size"), [100_000, 9], "data.image_size.0: Expected a value less than or equal to 4096."),
        (("seeds",), list(range(10**4)), "seeds: Expected at most 1000 items"),
        (("model", "convolutions"), 10**9, "model.convolutions: Expected a value less than or equal to 1000."),
        (
            ("model", "blocks"),
            {f"b{n}": {"filters": 1, "convolutions": 999} for n in range(2)},
            "model: Expected a network of at most 1,000 layers with weights. Found: 1999.",
        ),
        (
            ("train", "optimizer", "beta_1"),
            float("nan"),
            "train.optimizer.beta_1: Expected a finite number. Found: NaN",
        ),
        (("train", "optimizer", "seed"), 2**63, "train.optimizer.seed: Expected a whole number of at most 64 bits."),
        (("train", "optimizer", "rho"), {1: 2}, "train.optimizer.rho.1: Expected a text as the name, in quotes."),
        (("train", "optimizer", "rho"), date(2001, 1, 1), "Expected a text (a date in quotes), a number, true, false"),
        (("study", "notes"), "\x1b[2J", "study.notes: Expected a text without control characters."),
        (("study", "notes"), "\ud800", "study.notes: Expected a text without control characters."),
        (("study", "notes"), "x" * 10_001, "study.notes: Expected a text of at most 10,000 characters."),
        (
            ("input", "augment"),
            {"RandomZoom": {"kernel": 10**6}},
            "input.augment.RandomZoom.kernel: Expected a number of",
        ),
        (("model", "DROPOUT"), 0.1, "Did you mean dropout?"),
        (("model", "a\nb\x1b"), 1, 'model."a\\nb\\u001b": Expected one of the keys'),
        (("train", "class_weights"), {"float": 0}, "train.class_weights.float: Expected a value greater than 0"),
    ],
)
def test_a_mistake_is_told_with_its_place_the_expectation_and_the_finding(path, value, message):
    with pytest.raises(LabError) as caught:
        params.validate(changed(*path, to=value))
    assert message in str(caught.value)
    assert str(caught.value).startswith("params.yaml: ")


def test_all_mistakes_are_told_at_once_with_file_and_line(tmp_path: Path):
    study = changed("train", "epochs", to=0)
    study["data"]["dataset"] = "digit"
    write_params(tmp_path, study)
    with pytest.raises(LabError) as caught:
        params.load(tmp_path / "params.yaml")
    lines = (tmp_path / "params.yaml").read_text().splitlines()
    for key in ("epochs", "dataset"):
        number = next(i for i, line in enumerate(lines, start=1) if f"{key}:" in line)
        assert f"params.yaml, line {number}: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: {name: x", "params.yaml, line "),
        ("a: 1\na: 2\n", "params.yaml, line 2: Expected valid YAML 1.2. Found: found duplicate key"),
        ("", "Expected a mapping with the keys study, data, model, seeds, variants. Found: null."),
        ("- 1\n", "Expected a mapping with the keys"),
        ("a: !!python/object:os.system x\n", "Expected valid YAML 1.2"),
    ],
)
def test_a_file_that_is_no_study_is_told(tmp_path: Path, text: str, message: str):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(LabError) as caught:
        params.load(tmp_path / "params.yaml")
    assert message in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(LabError, match=r"no such file\. Go to the folder that holds dvc\.yaml"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_ready_made_study_is_valid_and_called_like_its_file(path: Path):
    study = params.load(path)
    assert study.study.name == path.stem
    assert study.study.title
    assert study.study.source


def test_differences_are_in_the_users_terms():
    study = changed("variants", "wide", to={"model": {"blocks": {"block1": {"kernel": 5}, "block2": {"filters": 8}}}})
    loaded = params.validate(study)
    assert params.differences(loaded.baseline, loaded.variants["no_dropout"]) == [
        {"path": "model.dropout", "baseline": 0.25, "variant": 0.0}
    ]
    assert params.differences(loaded.baseline, loaded.variants["wide"]) == [
        {"path": "model.blocks.block1.kernel", "baseline": 3, "variant": 5},
        {"path": "model.blocks.block2", "baseline": None, "variant": {"filters": 8}},
    ]
    assert params.differences(loaded.baseline, loaded.baseline) == []


TWO_PHASES = {
    "model": {"builder": "transfer", "backbone": "SqueezeNet", "head": {"dense1": {"units": 4}}},
    "variants": {"baseline": {}, "wide": {"model": {"head": {"dense1": {"units": 8}}}}},
    "finetune": {
        "select": {"among": ["wide"]},
        "variants": {"deep": {"note": "x", "model": {"trainable": {"last": 3}}, "train": {"epochs": 1}}},
    },
}


def test_the_second_phase_is_a_patch_of_what_may_be_selected():
    study = params.validate(copy.deepcopy(TINY) | TWO_PHASES | {"input": {}})
    assert study.second_names == ["deep"] and list(study.second) == ["wide"]
    deep = study.second["wide"]["deep"].resolved()
    assert deep["model"]["head"][0]["units"] == 8 and deep["train"]["epochs"] == 1
    assert deep["model"]["trainable"] == {"last": 3, "from_layer": None}
    assert study.second["wide"]["deep"].compared_with == "wide"
    assert list(study.variants) == ["baseline", "wide"]
    assert list(study.with_second("wide").variants) == ["baseline", "wide", "deep"]
    assert study.baseline.input.rescale == "backbone"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("finetune", "variants"),
            {"Wide": {"train": {"epochs": 1}}},
            "finetune.variants.Wide: Expected names that differ",
        ),
        (
            ("finetune", "variants"),
            {"wide": {"train": {"epochs": 1}}},
            "finetune.variants.wide: Expected names that occur",
        ),
        (("finetune", "variants"), {"same": {}}, "finetune.variants.same: Expected a change of input, model or train."),
        (
            ("finetune", "select"),
            {"among": ["wid"]},
            "finetune.select.among: Expected some of the variants: baseline, wide",
        ),
        (("finetune", "select"), {"among": []}, "finetune.select.among: Expected one variant at least"),
        (("finetune", "select"), {"by": "test_accuracy"}, "finetune.select.by: Expected 'validation_accuracy'"),
        (("model", "trainable"), {"last": 3, "from_layer": 2}, "model.trainable: Expected one of last and from_layer"),
        (("model", "trainable"), {"lst": 3}, "model.trainable.lst: Expected one of the keys last, from_layer."),
        (("model", "trainable"), "some", "model.trainable: Expected 'none' or 'all'"),
        (("model", "output"), "sigmoid", "train.loss: Expected a loss of one probability, such as binary_crossentropy"),
        (("train", "class_weights"), {"a": 0}, "train.class_weights.a: Expected a value greater than 0"),
        (("train", "class_weights"), "balance", "train.class_weights: Expected 'balanced'"),
        (("data", "pictures"), {"a": 3, "b": 4}, "data.pictures: Expected nothing, since only an image_folder"),
    ],
)
def test_mistakes_of_a_transfer_study_are_told(path, value, message):
    study = copy.deepcopy(TINY | TWO_PHASES)
    study[path[0]][path[1]] = value
    with pytest.raises(LabError) as caught:
        params.validate(study)
    assert message in str(caught.value)


def test_a_backbones_preprocessing_needs_a_backbone():
    with pytest.raises(LabError, match=r"input.rescale: Expected unit, symmetric or none, as there is no backbone"):
        params.validate(changed("input", "rescale", to="backbone"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 65}, "train.replicas: Expected a value less than or equal to 64. Found: 65."),
        ({"replicas": 5}, "train.batch_size: Expected a multiple of 5, the number of train.replicas"),
        ({"batch_size": 1}, "train.batch_size: Expected a multiple of 2"),
        ({"xla": True}, "train.xla: Expected auto or false, as train.strategy is mirrored. Found: true."),
        ({"data_on": "device"}, "train.data_on: Expected auto or host, as train.strategy is mirrored"),
    ],
)
def test_what_several_devices_cannot_do(settings, message):
    study = changed("variants", "two", to={"train": {"strategy": "mirrored"} | settings})
    with pytest.raises(LabError) as caught:
        params.validate(study)
    assert f"variants.two.{message}" in str(caught.value)


def test_two_devices_are_meant_where_no_number_is_given():
    given = {"strategy": "mirrored"}
    study = changed("variants", to={"baseline": {}, "a": {"train": given}, "b": {"train": given | {"replicas": 2}}})
    variants = params.validate(study).variants
    assert variants["a"].resolved() == variants["b"].resolved()
    assert variants["baseline"].resolved()["train"]["replicas"] is None


LOCATED = """\
study: {name: located, baseline: baseline}
data: {dataset: digits, path: null, split: {test: 0.2}}
model:
  builder: cnn
  activation: relu
  blocks:
    block1: {filters: 2}
    block2: {filters: 2, activation: elu}
  head:
    dense1: {units: 4}
train:
  optimizer: {name: adam, clipnorm: 1.0}
seeds: [0]
finetune:
  variants:
    second:
      train: {epochs: 1}
variants:
  baseline: {}
  other:
    model:
      activation: tanh
    train:
      optimizer:
        clipnorm: 2.0
"""


@pytest.mark.parametrize(
    ("place", "variant", "selected", "told"),
    [
        ("train.optimizer.clipnorm", "baseline", None, "line 12: train.optimizer.clipnorm (in variants.baseline)"),
        ("train.optimizer.clipnorm", "other", None, "line 25: variants.other.train.optimizer.clipnorm"),
        ("train.optimizer.name", "other", None, "line 12: train.optimizer.name (in variants.other)"),
        ("model.blocks.block1.activation", "baseline", None, "line 5: model.activation (in variants.baseline)"),
        ("model.blocks.block1.activation", "other", None, "line 22: variants.other.model.activation"),
        ("model.blocks.block2.activation", "other", None, "line 8: model.blocks.block2.activation (in variants.other)"),
        ("model.head.dense1.activation", "baseline", None, "line 5: model.activation (in variants.baseline)"),
        (
            "train.optimizer.clipnorm",
            "second",
            "other",
            "line 25: variants.other.train.optimizer.clipnorm (in finetune.variants.second)",
        ),
        (
            "train.optimizer.clipnorm",
            "second",
            "baseline",
            "line 12: train.optimizer.clipnorm (in finetune.variants.second)",
        ),
        ("train.epochs", "second", "baseline", "line 17: finetune.variants.second.train.epochs"),
    ],
)
def test_a_mistake_that_only_keras_finds_has_the_line_and_the_key_that_the_user_wrote(place, variant, selected, told):
    study = params.validate(YAML(typ="safe", pure=True).load(LOCATED), text=LOCATED)
    found = study.located({variant: LabError("Expected another.", tuple(place.split(".")))}, selected)
    assert found == [f"params.yaml, {told}: Expected another."]


def test_a_mistake_without_a_line_is_said_once_for_all_variants():
    study = params.validate(YAML(typ="safe", pure=True).load(LOCATED), text=LOCATED)
    error = LabError("Expected another.", ("model", "initializer"))
    told = study.located({"baseline": error, "other": error})
    assert told == ["params.yaml: variants.baseline, other: model.initializer: Expected another."]
