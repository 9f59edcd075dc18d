"""A change without effect is told: by the report, and by `ablab repro` while it trains."""

import copy
import json

import pytest
from conftest import TINY, passed, run, write_params
from fabricate import study, write

from ablation_lab import cell, evaluation
from ablation_lab.report import results, writing


def equal_cells(root, made, variant, seed, weights=(b"same", b"same")):
    """Give a variant's cell the predictions of the baseline's, and both of them files of weights."""
    mine, other = cell.folder(variant, seed, root), cell.folder(made.study.baseline, seed, root)
    (mine / cell.PREDICTIONS).write_bytes((other / cell.PREDICTIONS).read_bytes())
    for folder, content in zip((mine, other), weights, strict=True):
        (folder / cell.WEIGHTS).write_bytes(content)


def reported(root, made) -> tuple[dict, str]:
    evaluation.evaluate(made, root)
    writing.write_report(made, root)
    results = json.loads((root / "reports/results.json").read_text())
    return results["variants"], (root / "reports/report.md").read_text().replace("\\", "")


def test_the_report_says_of_a_change_that_it_had_no_effect(tmp_path):
    made = study()
    write(tmp_path, made)
    for seed in made.seeds:
        equal_cells(tmp_path, made, "no_dropout", seed)
    equal_cells(tmp_path, made, "big_pool", 1, (b"other", b"same"))  # the same predictions from other weights
    variants, text = reported(tmp_path, made)
    assert {name: one["no_effect"] for name, one in variants.items()} == {
        "baseline": {},
        "no_dropout": {"baseline": [0, 1, 2]},
        "big_pool": {},
    }
    told = "this change had no effect: weights and predictions are byte for byte those of baseline"
    assert text.count(told) == 2  # its sentence, and the design's checks
    assert "the same test accuracy" not in text


def test_an_effect_in_some_seeds_is_told_of_those(tmp_path):
    made = study()
    write(tmp_path, made, diverged=[("baseline", 2), ("no_dropout", 2)])
    for seed in (0, 2):
        equal_cells(tmp_path, made, "no_dropout", seed)
    variants, text = reported(tmp_path, made)
    assert variants["no_dropout"]["no_effect"] == {"baseline": [0]}  # not of cells that diverged
    assert "this change had no effect with seed 0: weights and predictions are byte for byte those of base" in text


def test_variants_that_share_a_result_are_told_once(tmp_path):
    made = study()
    write(tmp_path, made, lints=["the same network as baseline, trained the same way"])
    for seed in made.seeds:
        equal_cells(tmp_path, made, "big_pool", seed)
    _, text = reported(tmp_path, made)
    assert text.count("the same network as baseline") == 1 and text.count("this change had no effect") == 1


def test_a_twin_of_another_variant_is_told_that_it_has_no_effect(tmp_path):
    made = study()
    write(tmp_path, made, lints=["the same network as no_dropout, trained the same way"])
    for seed in made.seeds:
        equal_cells(tmp_path, made, "big_pool", seed)
    _, text = reported(tmp_path, made)
    assert text.count("this change had no effect") == 2  # its sentence, and the design's checks


def test_a_partial_report_counts_the_cells_that_are_there(tmp_path):
    made = study()
    write(tmp_path, made)
    equal_cells(tmp_path, made, "no_dropout", 0)
    there = [one for one in made.cells if one not in (("no_dropout", 1), ("no_dropout", 2))]
    evaluation.evaluate(made, tmp_path, there, tmp_path / "evaluation")
    missing = [{"cell": f"no_dropout-{seed}", "state": "missing", "reason": ""} for seed in (1, 2)]
    partial = {"cells": 7, "of": 9, "missing": missing}
    table = writing.write(made, results.gather(made, tmp_path, partial=partial), tmp_path, tmp_path / "reports")
    text = (tmp_path / "reports/report.md").read_text().replace("\\", "")
    assert "no effect" in next(line for line in table.splitlines() if line.startswith("no_dropout"))
    assert text.count("this change had no effect: weights") == 2 and "had no effect with seed" not in text


def test_weights_are_read_where_predictions_are_equal_alone(tmp_path):
    made = study(variants=("baseline", "other"), seeds=(0,))
    write(tmp_path, made)
    evaluation.evaluate(made, tmp_path)  # there are none
    first, second = json.loads((tmp_path / "evaluation/cells.json").read_text())
    assert first["fingerprint"] != second["fingerprint"] and len(first["fingerprint"]) == 64


@pytest.mark.slow
def test_a_user_is_told_while_it_trains_and_by_the_report(project):
    """`keep: last` of one epoch is `keep: best` of it."""
    raw = copy.deepcopy(TINY)
    raw["train"]["epochs"] = 1
    raw["variants"] = {"baseline": {}, "last": {"train": {"keep": "last"}}, "shared": {"model": {"dropout": 0.25}}}
    raw["variants"]["tanh"] = {"model": {"activation": "tanh"}}
    write_params(project, raw)
    done = run(project, "ablab", "repro", "-j", "1")
    passed(done)
    told = "warning: last: this change had no effect with seed "
    assert done.stderr.count(told) == 1
    assert done.stderr.index(told) < done.stderr.index("(6 of 6")  # before the last cell is trained
    assert "shared: this change" not in done.stderr and "tanh: this change" not in done.stderr
    results = json.loads((project / "reports/results.json").read_text())["variants"]
    assert results["last"]["no_effect"] == {"baseline": [0, 1]} and results["tanh"]["no_effect"] == {}
    page = (project / "reports/report.html").read_text()
    assert "this change had no effect: weights and predictions are byte for byte those of baseline" in page
    weights = [(project / f"cells/{name}/seed-0/{cell.WEIGHTS}").read_bytes() for name in ("baseline", "last")]
    assert weights[0] == weights[1]
