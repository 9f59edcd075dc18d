"""Equal pictures across parts and classes: what is found, what is told, and what it leaves alone."""

import json

import fabricate
import numpy as np
import pytest
from PIL import Image
from test_dvc_yaml import STAGES
from test_preprocess import contents, image_folder, no_project_around  # noqa: F401

from ablation_lab import duplicates, evaluation, params, preprocess
from ablation_lab.params import Split
from ablation_lab.report import pages, results
from ablation_lab.report.writing import write_report

NOTHING = {"count": 0, "same_class": 0, "first": []}
NONE = {key: NOTHING for key in ("test_in_train", "test_in_validation", "validation_in_train")}
NONE |= {"in_classes": {"count": 0, "first": []}}


def found(pictures, labels, train, validation, test):
    """What is found in pictures of one number each."""
    digests = np.array([duplicates.digest(np.full((2, 2, 1), n, np.uint8)) for n in pictures], duplicates.DIGEST)
    parts = {"train": train, "validation": validation, "test": test}
    indices = {part: np.array(chosen, int) for part, chosen in parts.items()}
    return duplicates.find(digests, np.array(labels), indices, ["cat", "dog"], lambda index: f"p{index}")


def cat(index):
    return {"name": f"p{index}", "class": "cat"}


def dog(index):
    return {"name": f"p{index}", "class": "dog"}


def test_copies_are_found_in_every_pair_of_parts():
    assert found([1, 2, 3, 4], [0, 1, 0, 1], [0], [1], [2, 3]) == NONE
    result = found([1, 2, 1, 2, 1, 9], [0, 1, 0, 1, 0, 0], [0, 1], [2, 5], [3, 4])
    assert result["test_in_train"] == {"count": 2, "same_class": 2, "first": [[dog(3), dog(1)], [cat(4), cat(0)]]}
    assert result["test_in_validation"] == {"count": 1, "same_class": 1, "first": [[cat(4), cat(2)]]}
    assert result["validation_in_train"] == {"count": 1, "same_class": 1, "first": [[cat(2), cat(0)]]}
    assert result["in_classes"] == NONE["in_classes"]
    assert found([1, 1, 2, 3], [0] * 4, [0, 1], [2], [3]) == NONE  # copies within a part flatter no score


def test_one_picture_under_two_classes():
    result = found([1, 1, 1, 2, 2, 3], [0, 0, 1, 1, 0, 1], [0, 3, 5], [1], [2, 4])
    assert result["in_classes"] == {"count": 2, "first": [[cat(0), dog(2)], [dog(3), cat(4)]]}
    assert result["test_in_train"] == {"count": 2, "same_class": 0, "first": [[dog(2), cat(0)], [cat(4), dog(3)]]}
    assert result["validation_in_train"] == {"count": 1, "same_class": 1, "first": [[cat(1), cat(0)]]}
    # Of several copies the one of the same class is named.
    assert found([1, 1, 1], [0, 1, 1], [0, 1], [], [2])["test_in_train"]["first"] == [[dog(2), dog(1)]]


def test_no_more_than_a_few_are_named():
    many = list(range(30))
    result = found(many * 2, [0] * 30 + [1] * 30, many, [], list(range(30, 60)))
    assert [result[key]["count"] for key in ("test_in_train", "in_classes")] == [30, 30]
    assert [len(result[key]["first"]) for key in ("test_in_train", "in_classes")] == [10, 10]


def test_findings_are_told_in_words():
    counts = {"train": 9000, "validation": 1, "test": 1000}
    assert duplicates.told(NONE, counts) == {}
    result = NONE | {
        "test_in_train": NOTHING | {"count": 12, "same_class": 10},
        "validation_in_train": NOTHING | {"count": 1, "same_class": 1},
        "in_classes": {"count": 1234, "first": []},
    }
    assert duplicates.told(result, counts) == {
        "test_in_train": "12 of 1,000 test pictures are also in the training part (2 under another class)",
        "validation_in_train": "1 of 1 validation pictures is also in the training part",
        "in_classes": "1,234 pictures are in more than one class",
    }


def shade(number):
    return Image.new("RGB", (6, 4), (number, 0, 0))


def different(part, start):
    return {f"{part}/{label}/{i}.png": shade(start + 10 * n + i) for n, label in enumerate("ab") for i in range(8)}


@pytest.mark.usefixtures("no_project_around")
def test_the_stage_finds_and_tells_them(tmp_path, capsys):
    pictures = different("train", 0) | different("test", 100)
    split = Split(validation=0.25, test="given")
    data = image_folder(tmp_path, pictures, split=split, image_size=[2, 3])
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "clean")
    assert json.loads((tmp_path / "clean/duplicates.json").read_text()) == NONE
    assert "warning" not in capsys.readouterr().err

    # Copies in other files and of other sizes are the same picture once they are resized.
    copies = {
        "test/a/copy.bmp": shade(3),
        "test/b/copy.png": Image.new("RGB", (60, 40), (11, 0, 0)),
        "test/b/lie.png": shade(5),
    }
    data = image_folder(tmp_path, copies, split=split, image_size=[2, 3]).model_copy(
        update={"path": str(tmp_path / "pictures")}
    )
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "out")
    text = (tmp_path / "out/duplicates.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert text == params.canonical_json(result) and str(tmp_path) not in text
    assert result["in_classes"] == {
        "count": 1,
        "first": [[{"class": "b", "name": "test/b/lie.png"}, {"class": "a", "name": "train/a/5.png"}]],
    }
    across = [result[key] for key in ("test_in_train", "test_in_validation")]
    assert [sum(one[key] for one in across) for key in ("count", "same_class")] == [3, 2]
    pairs = sorted([one["name"] for one in pair] for finding in across for pair in finding["first"])
    assert pairs == [
        ["test/a/copy.bmp", "train/a/3.png"],
        ["test/b/copy.png", "train/b/1.png"],
        ["test/b/lie.png", "train/a/5.png"],
    ]
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "of 19 test pictures" in warning and "1 picture is in more than one class. Remove the copies" in warning
    assert warning.endswith(f"{tmp_path / 'out/duplicates.json'} names some.")


@pytest.mark.usefixtures("no_project_around")
def test_what_networks_are_trained_on_is_not_touched(tmp_path, monkeypatch):
    data = image_folder(tmp_path, different("train", 0) | different("test", 3), split=Split(validation=0.25))
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "with")
    assert json.loads((tmp_path / "with/duplicates.json").read_text())["test_in_train"]["count"] > 0
    monkeypatch.setattr(duplicates, "find", lambda *_: NONE)
    preprocess.preprocess(data, tmp_path / "raw", tmp_path / "without")
    some, none = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert some.pop("duplicates.json") != none.pop("duplicates.json")
    assert some == none
    seen = {
        name
        for name, stage in STAGES.items()
        if {"data/processed", "data/processed/duplicates.json"} & {*stage["deps"]}
    }
    assert seen == {"report"}


def told(root, study, equal):
    """The report's checks of the data and its limits; `equal` is None for data from before they were looked for."""
    if equal is not None:
        (root / "data/processed/duplicates.json").write_text(json.dumps(equal))
    page = pages.build(study, results.gather(study, root))
    return [text for name, text in page["checks"] if name == "all variants"], page["limits"]


def test_the_report_tells_what_they_do_to_the_numbers(tmp_path):
    study = fabricate.study(("baseline", "other"), seeds=(0, 1))
    fabricate.write(tmp_path, study, classes=3, pictures=60)
    evaluation.evaluate(study, tmp_path)
    none, limits = told(tmp_path, study, None)
    assert none == [] and not any("near duplicates" in text for text in limits)
    assert told(tmp_path, study, NONE) == (none, limits)

    equal = NONE | {
        "test_in_train": NOTHING | {"count": 12, "same_class": 10},
        "test_in_validation": NOTHING | {"count": 3, "same_class": 3},
        "validation_in_train": NOTHING | {"count": 60, "same_class": 60},
        "in_classes": {"count": 7, "first": []},
    }
    variants = results.gather(study, tmp_path).results["variants"].values()
    lowest = min(one["test_accuracy"]["mean"] for one in variants)
    # When the ten are right, as many of the other fifty are as make up the rest of the accuracy.
    bound = 100 * (lowest - (60 * lowest - 10) / 50)
    assert bound > 0.5
    validation = min(np.mean([cell["validation_accuracy"] for cell in one["cells"].values()]) for one in variants)
    checks, limits = told(tmp_path, study, equal)
    assert checks == [
        "12 of 60 test pictures are also in the training part (2 under another class): test accuracies are too high by "
        f"up to {bound:.1f} points",
        "3 of 60 test pictures are also in the validation part, by which epochs are chosen",
        # Nothing else is there.
        "60 of 60 validation pictures are also in the training part: validation accuracies are too high by up to "
        f"{100 * validation:.1f} points",
        "7 pictures are in more than one class: no network can be right about all their copies",
    ]
    assert "equal after resizing" in limits[0] and "near duplicates were not looked for" in limits[0]


@pytest.mark.parametrize("end", ["sealed", "diverged"])
def test_without_an_accuracy_no_bound_is_told(end, tmp_path):
    study = fabricate.study(("baseline", "other"), seeds=(0, 1))
    if end == "sealed":
        object.__setattr__(study.study, "test", "sealed")
    fabricate.write(tmp_path, study, classes=3, pictures=30, diverged=study.cells if end == "diverged" else ())
    evaluation.evaluate(study, tmp_path)
    checks, limits = told(tmp_path, study, NONE | {"test_in_train": NOTHING | {"count": 4, "same_class": 4}})
    assert checks == ["4 of 30 test pictures are also in the training part"]
    assert any("near duplicates were not looked for" in text for text in limits)
    if end == "sealed":
        write_report(study, tmp_path)
        for name in ("report.html", "report.md"):
            page = (tmp_path / "reports" / name).read_text(encoding="utf-8")
            assert checks[0] in page and "near duplicates" in page
