import copy
import difflib
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY, new_project, passed, run, write_params
from ruamel.yaml import YAML

from ablation_lab import knockout, params
from ablation_lab.errors import LabError

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def offered(file: Path) -> list[knockout.Removal]:
    raw, text = params.read(file)
    found = knockout.removals(params.validate(raw, str(file), text), knockout._baseline(raw))
    return [one for one in found if one.patch]


def study_with(**sections) -> dict:
    """The tiny study with settings merged in."""
    return params.merge_patch(copy.deepcopy(TINY), sections)


def knocked_out(folder: Path, study: dict, *paths: str) -> dict[str, dict]:
    """The variants that the paths add to a study."""
    write_params(folder, study)
    knockout.knock_out(folder / "params.yaml", list(paths))
    written = YAML(typ="safe").load(folder / "params.yaml")["variants"]
    return {name: patch for name, patch in written.items() if name not in study["variants"]}


def removed_lines(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True))
    return [line for line in lines if line[0] == "-"]


@pytest.mark.parametrize("source", STUDIES, ids=lambda path: path.stem)
def test_everything_that_is_offered_can_be_knocked_out_of_every_study(source: Path, tmp_path: Path):
    file = tmp_path / "params.yaml"
    before = source.read_bytes()
    file.write_bytes(before)
    found = offered(file)
    assert found
    old = params.load(file)
    knockout.knock_out(file, [one.path for one in found])
    after = file.read_bytes()
    assert removed_lines(before.decode(), after.decode()) == []
    new = params.load(file)
    assert list(new.variants) == [*old.variants, *(one.variant for one in found if one.variant not in old.variants)]
    for one in found:
        assert params.differences(new.baseline, new.variants[one.variant])
        assert new.variants[one.variant].resolved() != new.baseline.resolved()
    for name in old.variants:
        assert new.variants[name] == old.variants[name]

    assert "params.yaml has not changed." in knockout.knock_out(file, [one.path for one in found])
    assert file.read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml"]


# A baseline with everything on, each in the base or in a layer.
RICH = study_with(
    input={"augment": {"RandomFlip": {"mode": "horizontal"}, "RandomRotation": {"factor": 0.1}}},
    model={
        "normalization": "batch",
        "l2": 0.001,
        "head_l2": 0.002,
        "features_dropout": 0.1,
        "head_dropout": 0.5,
        "blocks": {"block2": {"filters": 3, "dropout": 0.4, "normalization": "layer"}, "block3": {"dropout": 0}},
        "filters": 2,
        "head": {"dense1": {"dropout": 0.3, "normalization": "batch"}, "dense2": {"units": 3}},
    },
    train={
        "label_smoothing": 0.1,
        "early_stopping": {"patience": 3},
        "reduce_lr": {"patience": 2},
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "clipnorm": 1.0},
    },
)


@pytest.mark.parametrize(
    ("path", "name", "note", "patch"),
    [
        ("model.blocks.block2", "no_block2", "block2 removed.", {"model": {"blocks": {"block2": None}}}),
        ("model.head.dense1", "no_dense1", "dense1 removed.", {"model": {"head": {"dense1": None}}}),
        (
            "model.dropout",
            "no_dropout",
            "Every dropout removed.",
            {
                "model": {
                    **{"dropout": 0, "blocks": {"block2": {"dropout": 0}}, "head": {"dense1": {"dropout": 0}}},
                    **{"features_dropout": 0, "head_dropout": 0},
                }
            },
        ),
        (
            "model.head_dropout",
            "no_head_dropout",
            "Dropout of the dense layers removed.",
            {"model": {"head_dropout": 0, "head": {"dense1": {"dropout": 0}}}},
        ),
        (
            "model.features_dropout",
            "no_features_dropout",
            "Dropout of the features removed.",
            {"model": {"features_dropout": 0}},
        ),
        (
            "model.blocks.block1.dropout",  # inherited from model.dropout
            "no_block1_dropout",
            "Dropout of block1 removed.",
            {"model": {"blocks": {"block1": {"dropout": 0}}}},
        ),
        (
            "model.normalization",
            "no_normalization",
            "Every normalisation removed.",
            {
                "model": {
                    **{"normalization": "none", "blocks": {"block2": {"normalization": "none"}}},
                    "head": {"dense1": {"normalization": "none"}},
                }
            },
        ),
        (
            "model.head.dense1.normalization",
            "no_dense1_normalization",
            "Normalisation of dense1 removed.",
            {"model": {"head": {"dense1": {"normalization": "none"}}}},
        ),
        ("model.l2", "no_l2", "L2 penalty of all kernels removed.", {"model": {"l2": 0, "head_l2": 0}}),
        (
            "model.head_l2",
            "no_head_l2",
            "L2 penalty of the dense layers and the output removed.",
            {"model": {"head_l2": 0}},
        ),
        (
            "input.augment.RandomFlip",
            "no_RandomFlip",
            "RandomFlip removed.",
            {"input": {"augment": {"RandomFlip": None}}},
        ),
        ("train.label_smoothing", "no_label_smoothing", "Label smoothing removed.", {"train": {"label_smoothing": 0}}),
        ("train.early_stopping", "no_early_stopping", "Early stopping removed.", {"train": {"early_stopping": None}}),
        (
            "train.reduce_lr",
            "no_reduce_lr",
            "Reduction of the learning rate removed.",
            {"train": {"reduce_lr": None}},
        ),
        (
            "train.optimizer.momentum",  # without which Nesterov's has no effect
            "no_momentum",
            "Momentum removed.",
            {"train": {"optimizer": {"momentum": 0, "nesterov": False}}},
        ),
        (
            "train.optimizer.weight_decay",
            "no_weight_decay",
            "Weight decay removed.",
            {"train": {"optimizer": {"weight_decay": 0}}},
        ),
        ("train.optimizer.nesterov", "no_nesterov", "Nesterov removed.", {"train": {"optimizer": {"nesterov": False}}}),
        ("train.optimizer.clipnorm", "no_clipnorm", "Clipnorm removed.", {"train": {"optimizer": {"clipnorm": None}}}),
    ],
)
def test_a_removal_is_the_patch_that_a_user_would_write(path, name, note, patch, tmp_path: Path):
    study = study_with(**{key: RICH[key] for key in params.PATCHED}, variants={"no_dropout": None})
    assert knocked_out(tmp_path, study, path) == {name: {"note": note, **patch}}


def test_no_dropout_is_left_in_the_network(tmp_path: Path):
    study = study_with(**{key: RICH[key] for key in params.PATCHED}, variants={"no_dropout": None})
    knocked_out(tmp_path, study, "model.dropout", "model.normalization")
    variants = params.load(tmp_path / "params.yaml").variants
    network = variants["no_dropout"].resolved()["model"]
    assert [layer["dropout"] for layer in [*network["blocks"], *network["head"]]] == [0] * 5
    assert network["features_dropout"] == 0
    network = variants["no_normalization"].resolved()["model"]
    assert {layer["normalization"] for layer in [*network["blocks"], *network["head"]]} == {"none"}


def test_a_mapping_of_components_makes_one_variant_each(tmp_path: Path):
    study = study_with(**{key: RICH[key] for key in params.PATCHED})
    added = knocked_out(tmp_path, study, "model.blocks", "input.augment", "model.blocks.block2", "model.head")
    assert list(added) == [
        *("no_block1", "no_block2", "no_block3", "no_RandomFlip", "no_RandomRotation", "no_dense1", "no_dense2")
    ]
    stages = {"stage1": {"filters": 2}, "stage2": {"filters": 4}}
    study["model"] = {"builder": "resnet", "stages": stages, "stem": {"filters": 2}}
    study["variants"] = {"baseline": {}}
    assert list(knocked_out(tmp_path, study, "model.stages")) == ["no_stage1", "no_stage2"]


def test_a_block_and_a_dense_layer_of_one_name_are_told_apart(tmp_path: Path):
    study = study_with(model={"blocks": {"A": {"filters": 2}}, "head": {"a": {"units": 2}}})
    added = knocked_out(tmp_path, study, "model.blocks.A", "model.head.a", "model.head.dense1")
    assert list(added) == ["no_blocks_A", "no_head_a", "no_dense1"]


def test_a_baseline_with_a_patch_of_its_own_keeps_it(tmp_path: Path):
    own = {"model": {"blocks": {"block1": {"filters": 5}, "block2": {"filters": 3, "dropout": 0.1}}, "dropout": None}}
    study = study_with(model={"head_dropout": 0.5}) | {"variants": {"baseline": own}}
    added = knocked_out(tmp_path, study, "model.blocks", "model.dropout")
    assert [one["model"] for one in added.values()] == [
        {"dropout": None, "blocks": {"block1": None, "block2": {"filters": 3, "dropout": 0.1}}},
        {"dropout": None, "blocks": {"block1": {"filters": 5}}},
        {
            **{"dropout": None, "head_dropout": 0},
            "blocks": {"block1": {"filters": 5}, "block2": {"filters": 3, "dropout": 0}},
        },
    ]
    loaded = params.load(tmp_path / "params.yaml")
    changes = params.differences(loaded.baseline, loaded.variants["no_block2"])
    assert [change["path"] for change in changes] == ["model.blocks.block2"]


def test_a_network_of_ones_own_does_without_what_can_be_switched_off(tmp_path: Path):
    model = {"builder": "networks.own:build", "dropout": 0.3, "gates": True, "l2": 0, "filters": 8, "any_size": True}
    study = study_with(variants={"no_dropout": None}) | {"model": model}
    write_params(tmp_path, study)
    assert [one.path for one in offered(tmp_path / "params.yaml")] == ["model.dropout", "model.gates"]
    added = knocked_out(tmp_path, study, "model.gates", "model.dropout")
    assert [one["model"] for one in added.values()] == [{"gates": False}, {"dropout": 0}]


def test_adamw_decays_weights_where_nothing_is_said(tmp_path: Path):
    study = study_with(train={"optimizer": {"name": "AdamW"}})
    added = knocked_out(tmp_path, study, "train.optimizer.weight_decay")
    assert added["no_weight_decay"]["train"] == {"optimizer": {"weight_decay": 0}}


def test_what_has_no_effect_without_an_extra_goes_with_it(tmp_path: Path):
    averaged = {"name": "adam", "use_ema": True, "ema_momentum": 0.9}
    added = knocked_out(tmp_path, study_with(train={"optimizer": averaged}), "train.optimizer.use_ema")
    assert added["no_use_ema"]["train"] == {"optimizer": {"use_ema": False, "ema_momentum": None}}
    added = knocked_out(tmp_path, study_with(train={"optimizer": {"name": "muon"}}), "train.optimizer.momentum")
    assert added["no_momentum"]["train"] == {"optimizer": {"momentum": 0, "nesterov": False}}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.blocks.blok1", "Expected what can be removed from the baseline. Found: model.blocks.blok1. Did you me"),
        ("model.haed", "Did you mean model.head?"),
        ("train.epochs", "Found: train.epochs. `ablab knockout` lists them."),
        ("model", "Found: model. "),
        ("variants.no_dropout", "Expected what can be removed from the baseline. Found: variants.no_dropout."),
        ("model.stages", "Expected something to remove. Found: nothing, it is empty in the baseline."),
        ("input.augment", "input.augment: Expected something to remove. Found: nothing, it is empty in the baseline."),
        ("model.head_dropout", "Expected something to remove. Found: nothing, it is off or not set in the baseline."),
        ("model.normalization", "Found: nothing, it is off or not set in the baseline."),
        ("train.early_stopping", "Found: nothing, it is off or not set in the baseline."),
        ("train.optimizer.momentum", "Found: nothing, it is off or not set in the baseline."),
        ("model.blocks.block1", "Found: the only one of blocks, and a cnn needs one."),
        ("model.blocks", "model.blocks: Expected something to remove. Found: the only one of blocks"),
    ],
)
def test_what_cannot_be_removed_is_told_and_the_file_is_left(path: str, message: str, tmp_path: Path):
    write_params(tmp_path, TINY)
    before = (tmp_path / "params.yaml").read_bytes()
    with pytest.raises(LabError) as caught:
        knockout.knock_out(tmp_path / "params.yaml", ["model.head.dense1", path])
    assert message in str(caught.value)
    assert (tmp_path / "params.yaml").read_bytes() == before


def test_a_variant_that_is_there_is_left_and_another_one_of_its_name_is_told(tmp_path: Path):
    file = tmp_path / "params.yaml"
    write_params(tmp_path, TINY)  # its no_dropout is written without a note
    told = knockout.knock_out(file, ["model.dropout"])
    assert told.splitlines() == [
        "left no_dropout as it is: it removes model.dropout already.",
        "params.yaml has not changed.",
    ]

    study = study_with(variants={"no_dropout": {"model": {"dropout": 0.1}}})
    write_params(tmp_path, study)
    before = file.read_bytes()
    expected = "variants.no_dropout: Expected none of this name, or what removes model.dropout: {model: {dropout: 0}}. "
    with pytest.raises(LabError, match=re.escape(expected + "Found: {model: {dropout: 0.1}}.")):
        knockout.knock_out(file, ["model.head", "model.dropout"])
    assert file.read_bytes() == before

    study = study_with(variants={"No_Dense1": {"train": {"epochs": 1}}})
    write_params(tmp_path, study)
    with pytest.raises(LabError, match=r"Expected names that differ in more than case \(there is No_Dense1\)"):
        knockout.knock_out(file, ["model.head"])


def test_the_same_training_under_another_name_is_told(tmp_path: Path):
    headless = {"model": {"head": {"dense1": None}}}
    write_params(tmp_path, TINY | {"variants": TINY["variants"] | {"headless": headless}})
    told = knockout.knock_out(tmp_path / "params.yaml", ["model.head.dense1"])
    assert "added no_dense1: dense1 removed. It is the same training as headless, and will share its result." in told


def test_a_mistake_in_the_study_is_told_first(tmp_path: Path):
    write_params(tmp_path, study_with(train={"epochs": 0}))
    for call in (knockout.listed, lambda file: knockout.knock_out(file, ["model.head"])):
        with pytest.raises(LabError, match=r"line \d+: train\.epochs: Expected a value greater"):
            call(tmp_path / "params.yaml")


START = """\
# A study.
study: {name: odd,   title: 'Single "quotes"', baseline: baseline}
data: {dataset: digits, path: null, split: {test: 0.2}}
input:   {}
model:
    builder: "cnn"
    head_dropout:   .5
    blocks: {a: &block {filters: 2}, b: *block}
    head: {dense1: {units: 0x10}}
train: {epochs: 1_0}
"""
BASELINE = """\
variants:
    baseline: {}   # nothing
    wide: &wide
        note: >-
          Folded
          text.
        model: {blocks: {a: {filters: 4}}}
"""
FORMS = {
    "at the end": START + "seeds:\n- 1\n-   2\n" + BASELINE,
    "without a last newline": START + "seeds: [1]\n" + BASELINE.rstrip("\n"),
    "before another section": START + BASELINE + "\n\n# The seeds.\nseeds: [1]\n",
    "before a variant in a comment": START + BASELINE + "    # later: {}\n\n# The seeds.\nseeds: [1]\n",
    "after an empty value": START + "seeds: [1]\nvariants:\n    baseline:\n",
    "after a literal text": START + "seeds: [1]\nvariants:\n  baseline:\n    note: |\n      # no comment\n\n",
    "with an end": "---\n" + START + "seeds: [1]\n" + BASELINE + "...\n",
    "with merge keys": START + BASELINE + "    other: {<<: *wide, note: other}\nseeds: [1]\n",
    "with Windows' line ends": (START + BASELINE + "\nseeds: [1]\n").replace("\n", "\r\n"),
    "without spaces": START + "seeds: [1]\n" + BASELINE.replace("    ", " "),
    "with a byte order mark": "\ufeff" + START + "seeds: [1]\n" + BASELINE,
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_only_lines_are_added_whatever_the_file_looks_like(text: str, tmp_path: Path):
    file = tmp_path / "params.yaml"
    file.write_bytes(text.encode())
    old = params.load(file)
    knockout.knock_out(file, ["model.blocks", "model.head_dropout"])
    after = file.read_bytes().decode()
    assert removed_lines(text if text.endswith("\n") else text + "\n", after) == []
    if "\r" in text:
        assert after.count("\n") == after.count("\r\n")
    new = params.load(file)
    assert list(new.variants) == [*old.variants, "no_a", "no_b", "no_head_dropout"]
    assert all(new.variants[name] == old.variants[name] for name in old.variants)


def test_variants_in_braces_grow_inside_them(tmp_path: Path):
    file = tmp_path / "params.yaml"
    text = START + "variants: {baseline: {}, wide: {model: {blocks: {a: {filters: 4}}}}}   # two\nseeds: [1]\n"
    file.write_text(text)
    knockout.knock_out(file, ["model.blocks.b"])
    added = ", no_b: {note: b removed., model: {blocks: {b: null}}}"
    assert file.read_text() == text.replace("}   # two", added + "}   # two")


def test_what_cannot_be_added_to_is_told_with_the_entry(tmp_path: Path):
    text = START + "seeds: [1]\nvariants:\n  baseline:\n    note: |+\n      kept\n\n\n"  # |+ keeps the empty lines
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(LabError) as caught:
        knockout.knock_out(tmp_path / "params.yaml", ["model.blocks.b"])
    assert "Add them by hand:\n  no_b:\n    note: b removed.\n    model: {blocks: {b: null}}" in str(caught.value)
    assert (tmp_path / "params.yaml").read_text() == text


def test_a_long_patch_is_written_over_several_lines(tmp_path: Path):
    blocks = {f"a_block_of_a_long_name_{number}": {"filters": 2, "dropout": 0.5} for number in range(6)}
    study = study_with(model={"blocks": blocks}, variants={"no_dropout": None})
    added = knocked_out(tmp_path, study, "model.dropout")
    assert added["no_dropout"]["model"] == {"dropout": 0, "blocks": {name: {"dropout": 0} for name in blocks}}
    assert max(map(len, (tmp_path / "params.yaml").read_text().splitlines())) <= 120


def test_the_files_mode_and_a_link_to_it_stay(tmp_path: Path):
    write_params(tmp_path, TINY)
    file, link = tmp_path / "params.yaml", tmp_path / "link.yaml"
    file.chmod(0o640)
    link.symlink_to(file)
    knockout.knock_out(link, ["model.head"])
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert "no_dense1" in params.load(file).variants


def test_the_command(tmp_path_factory):
    folder = new_project(tmp_path_factory.mktemp("knockout") / "project")
    passed(run(folder, "ablab", "use", "quickstart"))
    listed = passed(run(folder, "ablab", "knockout"))
    assert re.search(r"model\.blocks\.block2 +no_block2 +block2 removed\.", listed)
    assert re.search(r"model\.dropout +no_dropout +Every dropout removed\. There is a variant of this name\.", listed)
    assert "model.blocks, model.head: one variant of each component." in listed
    assert (folder / "params.yaml").read_bytes() == (folder / "studies/quickstart.yaml").read_bytes()

    told = passed(run(folder, "ablab", "knockout", "model.dropout", "model.blocks"))  # as in the README
    assert told.splitlines()[:3] == [
        "left no_dropout as it is: it removes model.dropout already.",
        "added no_block1: block1 removed.",
        "added no_block2: block2 removed. It is the same training as no_second_block, and will share its result.",
    ]
    assert "`ablab plan`" in told
    changed = run(folder, "git", "diff", "--no-index", "--numstat", "studies/quickstart.yaml", "params.yaml")
    assert changed.stdout.split()[:2] == ["6", "0"]

    unknown = run(folder, "ablab", "knockout", "model.blocks.blok2")
    assert unknown.returncode == 1
    assert "Did you mean model.blocks.block2?" in unknown.stderr
    assert "Traceback" not in unknown.stderr
