import copy
import dataclasses
import json
import resource

import one_thread  # noqa: F401
import pytest
from conftest import ROOT, TINY, run, write_params

from ablation_lab import cell, models, params, plan, study_file, trial
from ablation_lab.backend import keras
from ablation_lab.errors import LabError

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))

# Sizes that the studies' authors published.
PUBLISHED = {
    "cifar10_knockout": {"no_dropout": 736_618},
    "fashion_layers": {
        "conv1": 542_230,
        "conv1_dropout": 542_230,
        "conv3": 279_126,
        "conv3_dropout": 279_126,
        "conv3_wide_head": 3_163_426,
        "separable": 541_983,
        "depthwise": 1_995,
        "transpose": 721_430,
    },
    "fashion_vgg16": {"no_dense": 14_714_688 + 512 * 10 + 10},
    "scenes_densenet201": {"dense256": 18_321_984 + 30_720 * 256 + 256 + 256 + 1},
    "scenes_resnet152": {"dense256": 58_370_944 + 32_768 * 256 + 256 + 256 * 2 + 2},
    "scenes_squeezenet": {"no_dense": 722_496 + 512 * 2 + 2},
}


def study_with(**variants) -> params.Params:
    study = copy.deepcopy(TINY)
    study["variants"] |= variants
    return params.validate(study)


def describe(study: params.Params) -> dict:
    return plan.describe(study, (8, 8, 1), 10)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_ready_made_study_can_be_planned_without_its_data(path, tmp_path):
    study = params.load(path)
    image_shape, classes, training, pictures, digest = plan.pictures(study, tmp_path)
    plan.check_names(study, classes)
    described, second = plan.describe_both(study, image_shape, len(classes), tmp_path, pictures)
    assert digest is None and pictures > training > 0
    assert list(described) == list(study.variants)
    assert {name: list(facts) for name, facts in second.items()} == {
        name: list(variants) for name, variants in study.second.items()
    }
    assert not [lint for facts in described.values() for lint in facts["lints"]]
    for name, parameters in PUBLISHED.get(path.stem, {}).items():
        assert described[name]["parameters"] == parameters


def test_what_does_not_fit_names_variant_and_layer_all_at_once():
    study = study_with(
        deep={"model": {"blocks": {"block2": {"filters": 2}, "block3": {"filters": 2}}}},
        typo={"train": {"optimizer": {"name": "adm"}}},
    )
    with pytest.raises(LabError) as caught:
        describe(study)
    assert "variants.deep: layer block2_pool (MaxPooling2D) does not fit" in str(caught.value)
    assert "variants.typo: train.optimizer.name: Expected a Keras optimizer. Found: adm." in str(caught.value)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"model": {"head": {"features": {"units": 3}}}}, "Expected a name of its own for each block and head layer."),
        ({"train": {"optimizer": {"clipnorm": "x"}}}, "variants.bad: "),
        ({"train": {"loss": "ctc"}}, "variants.bad: "),
        ({"model": {"initializer": "constant"}}, "variants.bad: "),
        ({"model": {"initializer": "identity"}}, "variants.bad: model.initializer: Expected settings that Keras"),
        (
            {"input": {"augment": {"RandomCrop": {"height": 4, "width": 4}}}},
            "variants.bad: input.augment.RandomCrop: Expected a Keras layer of augmentation that keeps",
        ),
        ({"input": {"augment": {"RandomRotation": {"factor": 0.1, "interpolation": "xx"}}}}, "variants.bad: "),
        (
            {"model": {"activation": "glu"}},
            "variants.bad: model.blocks.block1.activation: Expected a Keras activation that keeps the shape and needs",
        ),
        (
            {"model": {"head": {"dense1": {"activation": "threshold"}}}},
            "variants.bad: model.head.dense1.activation: Expected a Keras activation that keeps the shape and needs no",
        ),
        (
            {"input": {"augment": {"RandomSaturation": {"factor": 0.1}}}},
            "input.augment.RandomSaturation: Expected images in colour (data.color: rgb), as this layer changes no",
        ),
        (
            {"input": {"augment": {"RandomColorDegeneration": {"factor": 0.1}}}},
            "input.augment.RandomColorDegeneration: Expected images in colour",
        ),
    ],
)
def test_what_would_stop_a_training_stops_the_plan(patch, message):
    with pytest.raises(LabError) as caught:
        describe(study_with(bad=patch))
    assert message in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_command_refuses_what_cannot_be_trained(project):
    study = copy.deepcopy(TINY)
    study["variants"] |= {"gated": {"model": {"activation": "glu"}}}
    write_params(project, study)
    done = run(project, "ablab", "plan")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "variants.gated.model.activation: Expected a Keras activation that keeps the shape" in done.stderr


TRAINED_ALONE = """
import keras

@keras.saving.register_keras_serializable("moods")
class Moody(keras.layers.Layer):
    def call(self, inputs, training=False):
        if training:
            raise ValueError("no training on Mondays")
        return inputs

def build(image_shape, classes):
    layers = [keras.Input(image_shape), keras.layers.Flatten(), Moody(), keras.layers.Dense(classes, "softmax")]
    return keras.Sequential(layers)
"""


def test_a_network_that_fails_in_training_alone_is_refused_in_its_authors_words(tmp_path, monkeypatch):
    (tmp_path / "moody_network.py").write_text(TRAINED_ALONE)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"builder": "moody_network:build"} | dict.fromkeys(("blocks", "head", "dropout"))
    with pytest.raises(LabError) as caught:
        describe(study_with(own={"model": own}))
    told = "variants.own: model.builder moody_network:build: Expected a network that can be trained. Found: ValueError:"
    assert f"{told} no training on Mondays" in str(caught.value)


def backbone(**settings) -> params.Params:
    return params.validate(
        TINY
        | {
            "data": TINY["data"] | {"color": "rgb"},
            "input": {},
            "model": {"builder": "transfer", "backbone": "SqueezeNet"} | settings,
            "variants": {"baseline": {}},
        }
    )


def test_layers_that_have_nothing_to_train_are_told():
    """The last three of SqueezeNet are two activations and a concatenation."""
    lints = plan.describe(backbone(trainable={"last": 3}), (32, 32, 3), 10)["baseline"]["lints"]
    assert "the layers that model.trainable names have no weights, so none of the backbone is trained" in lints
    lints = plan.describe(backbone(trainable={"last": 10}), (32, 32, 3), 10)["baseline"]["lints"]
    assert not [one for one in lints if "no weights" in one]


def test_a_file_of_weights_is_the_backbones(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    for name in ("text.h5", "other.weights.h5"):
        path = tmp_path / "weights" / name
        path.parent.mkdir(exist_ok=True)
        other.save_weights(path) if name.startswith("other") else path.write_text("no weights")
        with pytest.raises(LabError) as caught:
            plan.describe(backbone(weights=f"weights/{name}"), (32, 32, 3), 10, tmp_path)
        assert "model.weights: Expected the weights of SqueezeNet without its top. Found: " in str(caught.value)


def test_an_augmentation_that_changes_nothing_is_told():
    grey = study_with(grey={"input": {"augment": {"RandomGrayscale": {}, "RandomFlip": {}}}})
    (lint,) = describe(grey)["grey"]["lints"]
    assert lint == "its RandomGrayscale changed none of 1,024 random images"


def test_an_augmentation_that_rarely_changes_an_image_is_told_of_each_variant():
    rare = {"input": {"augment": {"RandomErasing": {"factor": 1e-4}}}}
    described = describe(study_with(rare=rare, rare_too=rare | {"model": {"dropout": 0.1}}))
    lint = "its RandomErasing changed none of 1,024 random images"
    assert {name: facts["lints"] for name, facts in described.items() if facts["lints"]} == {
        "rare": [lint],
        "rare_too": [lint],
    }


def test_the_average_that_keras_does_not_evaluate_is_told():
    free = {"train": {"optimizer": {"name": "ScheduleFreeAdamW"}}}
    described = describe(study_with(free=free, adam={"train": {"optimizer": {"name": "adam", "beta_1": 0}}}))
    (lint,) = described["free"]["lints"]
    assert lint.startswith("ScheduleFreeAdamW evaluates an average of weights, which Keras doesn't give")
    assert described["adam"]["lints"] == []


def test_one_step_is_enough_for_networks_of_one_kind_and_none_where_the_last_plan_had_it(tmp_path, monkeypatch):
    steps = []
    step = trial.run
    monkeypatch.setattr(trial, "run", lambda *given: steps.append(given) or step(*given))
    study = study_with(
        wide={"model": {"blocks": {"block1": {"filters": 30}}}},
        half={"train": {"precision": "mixed_float16"}},
        rate={"train": {"optimizer": {"learning_rate": 0.5}}},
    )
    plan.write(study, described := plan.describe(study, (8, 8, 1), 10, tmp_path), tmp_path)
    assert len(steps) == 2 and all(one["tried"] for one in described.values())
    assert "tried" not in json.loads((tmp_path / "plan/networks/wide.json").read_text())  # else the order would count
    assert plan.describe(study, (8, 8, 1), 10, tmp_path) == described
    assert len(steps) == 2
    plan.describe(study_with(tanh={"model": {"activation": "tanh"}}), (8, 8, 1), 10, tmp_path)
    assert len(steps) == 3


def test_a_network_too_large_for_a_step_is_planned_without_one():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = plan.describe(study_with(), (4000, 4000, 3), 10)
    assert facts["baseline"]["tried"] is None
    assert f"warning: baseline, no_dropout: {plan.UNTRIED}" in plan.warnings(facts.items())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_variants_with_other_threads_share_no_features():
    study = backbone()
    other = copy.deepcopy(study.variants["baseline"])
    two = other.train.model_copy(update={"threads": 2})
    study.variants["two"] = dataclasses.replace(other, name="two", train=two)
    described = plan.describe(study, (32, 32, 3), 10, pictures=100)
    table = plan.table(study, *plan.rows(study, described, {}, 50, None))
    assert "Features are shared by variants with equal train.threads only; this study has 1 and 2." in table
    assert described["baseline"]["frozen"]["id"] != described["two"]["frozen"]["id"]


def test_augmentation_is_tried_with_what_a_training_gives_it():
    """Floats: this layer takes nothing else."""
    describe(study_with(contrast={"input": {"augment": {"RandomContrast": {"factor": 0.2}}}}))


def test_a_network_that_no_machine_has_room_for_takes_no_memory():
    """10¹² weights; those of the largest that is planned would take 3 GB."""
    large = study_with(large={"model": {"head": {"dense1": {"units": 10**6}, "dense2": {"units": 10**6}}}})
    with pytest.raises(LabError) as caught:
        describe(large)
    text = "params.yaml: variants.large: model: Expected a network of at most 1,000,000,000 weights. Found: 1,000,0"
    assert str(caught.value).startswith(text) and "most in the layer dense2." in str(caught.value)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = describe(study_with(wide={"model": {"head": {"dense1": {"units": 28_000}, "dense2": {"units": 28_000}}}}))
    assert facts["wide"]["parameters"] > 784_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_what_is_wrong_in_the_base_is_said_once():
    study = copy.deepcopy(TINY)
    study["model"]["activation"] = "rleu"
    with pytest.raises(LabError) as caught:
        describe(params.validate(study))
    assert str(caught.value).count("Did you mean relu?") == 1
    assert str(caught.value).startswith("params.yaml: variants.baseline, no_dropout: ")


INHERITED = """\
study: {name: inherited, baseline: baseline}
data: {dataset: digits, path: null, split: {test: 0.2}}
model: {builder: mlp}
train:
  optimizer:
    name: sgd
    momentum: 0.9
seeds: [0]
variants:
  baseline: {}
  adam: {train: {optimizer: {name: adam}}}
  decayed: {train: {optimizer: {name: adamw}}}
  ftrl: {train: {optimizer: {name: adam, momentum: null, rho: 1}}}
"""


def test_a_mistake_of_a_variant_in_an_inherited_setting_names_the_variant():
    """The line is the base's, which is right without these variants."""
    study = params.validate(study_file.parse(INHERITED, "s1.yaml"), "s1.yaml", INHERITED)
    with pytest.raises(LabError) as caught:
        describe(study)
    drop = "Found: momentum. A variant drops an inherited one with `momentum: null`."
    assert str(caught.value).split("\n       ") == [
        f"s1.yaml, line 7: train.optimizer.momentum (in variants.adam): Expected an argument of Adam. {drop}",
        f"s1.yaml, line 7: train.optimizer.momentum (in variants.decayed): Expected an argument of AdamW. {drop}",
        "s1.yaml, line 13: variants.ftrl.train.optimizer.rho: Expected an argument of Adam. Found: rho. "
        "A variant drops an inherited one with `rho: null`.",
    ]


def test_a_mistake_in_the_base_names_the_variants_that_have_it():
    text = INHERITED[: INHERITED.index("  adam:")].replace("momentum: 0.9", "momentum: 9")
    fails = "momentum{}: Expected a number of at least 0 and less than 1. Found: 9."
    every = "  also: {model: {l2: 0.1}}\n"
    some = every + "  right: {train: {optimizer: {momentum: 0.5}}}\n"
    for variants, among in ((every, ""), (some, " (in variants.baseline, also)")):
        with pytest.raises(LabError) as caught:
            describe(params.validate(study_file.parse(text + variants, "s1.yaml"), "s1.yaml", text + variants))
        assert str(caught.value) == f"s1.yaml, line 7: train.optimizer.{fails.format(among)}"


def test_classes_of_the_base_name_the_variants_that_have_them():
    text = INHERITED[: INHERITED.index("  adam:")] + "  other: {train: {class_weights: null}}\n"
    text = text.replace("train:\n", "train:\n  class_weights: {ten: 2}\n", 1)
    with pytest.raises(LabError) as caught:
        plan.check_names(params.validate(study_file.parse(text, "s1.yaml"), "s1.yaml", text), ["one", "two"])
    told = "s1.yaml, line 5: train.class_weights (in variants.baseline): Expected names of classes. Found: ten. "
    assert str(caught.value).startswith(told)


def test_an_integer_will_do_where_keras_wants_a_float():
    describe(study_with(plain={"train": {"optimizer": {"name": "SGD", "momentum": 0}}}))


def test_a_plan_is_not_made_from_the_card_of_other_data(tmp_path):
    study = study_with()
    processed = tmp_path / "data/processed"
    processed.mkdir(parents=True)
    card = {"image_shape": [8, 8, 1], "classes": ["a", "b"], "counts": {"train": 7, "test": 2}, "digest": "d"}
    (processed / "card.json").write_text(json.dumps(card))
    (processed / "settings.json").write_text(json.dumps(study.data.model_dump()))
    assert plan.pictures(study, tmp_path) == ((8, 8, 1), ["a", "b"], 7, 9, "d")
    (processed / "settings.json").write_text(json.dumps(study.data.model_dump(exclude={"unreadable"})))
    assert plan.pictures(study, tmp_path)[4] == "d"  # made before there was this setting
    (processed / "settings.json").write_text(json.dumps(study.data.model_dump() | {"limit": 13}))
    assert plan.pictures(study, tmp_path)[4] is None
    own = copy.deepcopy(TINY)
    own["data"] |= {"dataset": "image_folder", "path": "nowhere"}
    with pytest.raises(LabError, match="Run `dvc repro preprocess` first"):
        plan.pictures(params.validate(own), tmp_path)


def test_variants_that_are_the_same_training_are_told():
    study = study_with(
        here={"model": {"blocks": {"block1": {"dropout": 0}}}},  # in other words, what no_dropout is
        renamed={"model": {"dropout": 0, "blocks": {"block1": None, "other": {"filters": 2}}}},
        longer={"model": {"dropout": 0}, "train": {"epochs": 3}},
    )
    described = describe(study)
    assert described["here"]["lints"] == ["the same network as no_dropout, trained the same way"]
    assert described["renamed"]["lints"] == ["the same network as no_dropout, trained the same way"]
    assert described["longer"]["lints"] == []
    assert described["here"]["plan_hash"] == described["no_dropout"]["plan_hash"]


def test_weights_make_another_training():
    made = copy.deepcopy(TINY)
    made |= {
        "input": {},
        "model": {"builder": "transfer", "backbone": "SqueezeNet", "weights": "imagenet"},
        "variants": {"baseline": {}, "random": {"model": {"weights": None}}},
    }
    described = plan.describe(params.validate(made), (32, 32, 3), 10)
    assert not [lint for facts in described.values() for lint in facts["lints"] if "the same network" in lint]
    assert described["baseline"]["plan_hash"] != described["random"]["plan_hash"]


def test_names_of_classes_are_checked_before_anything_is_trained():
    study = study_with(weighted={"train": {"class_weights": {"dgit": 2.0}}})
    with pytest.raises(LabError, match=r"weighted: train.class_weights: Expected names of classes. Found: dgit"):
        plan.check_names(study, ["digit", "letter"])


def test_a_loss_that_judges_each_class_alone_is_told():
    described = describe(study_with(binary={"train": {"loss": "binary_crossentropy"}}))
    assert "to softmax and logits belongs categorical_crossentropy" in described["binary"]["lints"][0]


def test_the_plan_holds_what_fixes_a_result_and_nothing_else(tmp_path):
    written = {}
    for noted in (False, True):
        study = study_with(
            extra={"model": {"dropout": 0.5}} | ({"note": "x", "reported": {"epochs": 3}} if noted else {})
        )
        plan.write(study, describe(study), tmp_path)
        written[noted] = {path.name: path.read_bytes() for path in (tmp_path / "plan").glob("*.json")}
    assert written[False] == written[True]
    assert set(written[True]) == {"baseline.json", "no_dropout.json", "extra.json"}
    assert set(json.loads(written[True]["extra.json"])) == {"input", "model", "train"}


def test_cells_that_left_the_study_are_removed(tmp_path):
    study = study_with()
    for folder in ("baseline/seed-0", "baseline/seed-7", "gone/seed-0"):
        (tmp_path / "cells" / folder).mkdir(parents=True)
    plan.write(study, describe(study), tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "cells").rglob("*")) == [
        "cells/baseline",
        "cells/baseline/seed-0",
    ]


def test_reasons_and_minutes(tmp_path):
    study = study_with()
    described = describe(study)
    (tmp_path / "dvc.yaml").write_text("stages: {train: {deps: [src/code.py]}}")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/code.py").write_text("1")
    facts = described["baseline"]
    hashes = {"plan_hash": facts["plan_hash"], "data_digest": "d"}
    hashes["cell_hash"] = cell.cell_hash(facts["plan_hash"], 0, "d", cell.training_code(tmp_path))
    folder = cell.folder("baseline", 0, tmp_path)
    folder.mkdir(parents=True)
    (folder / cell.TIMING).write_text('{"epoch_seconds": [600, 600]}')

    def reason(digest: str = "d", **changes) -> str | None:
        (folder / cell.RESULT).write_text(json.dumps(hashes | changes))
        return plan.reasons(study, described, digest, tmp_path)["baseline", 0]

    assert plan.reasons(study, described, "d", tmp_path)["baseline", 1] == "no result here"
    assert reason() is None
    assert reason(plan_hash="other") == "its settings changed"
    assert reason(digest="other") == "the data changed"
    (tmp_path / "src/code.py").write_text("2")
    assert reason() == "the training code changed"
    minutes = plan.minutes(study.variants, described, study.seeds, 1000, tmp_path)
    assert minutes["baseline"] == pytest.approx(20, abs=1)  # two epochs of ten minutes, as measured
    assert minutes["no_dropout"] < 1
    table = plan.table(study, *plan.rows(study, described, {}, 1000, "d", tmp_path))
    assert "4 of 4 cells to train, about 41 min" in table
    assert "model.dropout: 0.25 → 0.0" in table


def sources(network: keras.Model) -> dict[str, list[str]]:
    return {placed.name: placed.inputs for placed in plan._flat(network)}


def test_what_feeds_a_layer_in_a_network_inside_the_network():
    model = {"builder": "networks.example:build", "any_size": False}
    network = models.build(model, "unit", (8, 8, 3), 4)
    found = sources(network)
    assert found["branch3"] == found["branch5"] == ["rescale"]
    (joined,) = (name for name in found if name.startswith("concatenate"))
    assert found[joined] == ["branch3", "branch5"]


def test_what_feeds_a_layer_through_operations_that_are_none_and_names_that_occur_twice():
    inputs = keras.Input((4, 4, 1), name="image")
    left = keras.layers.Conv2D(2, 1, name="conv")(inputs)
    inner = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 1, name="conv")], name="inner")
    x = keras.layers.Flatten(name="flat")(left + inner(inputs))
    found = sources(keras.Model(inputs, keras.layers.Dense(3, name="out")(x)))
    assert found == {"image": [], "conv": ["image"], "conv_2": ["image"], "flat": ["conv", "conv_2"], "out": ["flat"]}


@keras.saving.register_keras_serializable()
class Odd(keras.layers.Layer):
    """A layer with two outputs and a matrix of weights, whose configuration has a window but no strides."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], 2))

    def call(self, inputs):
        return inputs @ self.matrix, inputs

    def get_config(self):
        return super().get_config() | {"kernel_size": 3}


def test_layers_of_any_kind_can_be_described():
    inputs = keras.Input((4, 4, 1), name="image")
    outputs, _ = Odd(name="odd")(inputs)
    placed = plan._flat(keras.Model(inputs, outputs))
    described = plan._layer(placed[1])
    assert described["output_shape"] == [4, 4, 2] and described["detail"] == "3" and described["inputs"] == ["image"]
    assert plan._uncounted(placed) == "its multiply-accumulates leave out Odd"


def test_a_test_set_that_the_data_does_not_come_with_is_refused_before_anything_is_prepared(tmp_path):
    study = params.validate(TINY | {"data": {"dataset": "digits", "path": None}})
    with pytest.raises(LabError) as caught:
        plan.pictures(study, tmp_path)
    assert str(caught.value).startswith("params.yaml: data.split.test: Expected a fraction like 0.2, as digits has no")
