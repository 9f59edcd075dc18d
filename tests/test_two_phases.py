"""A study in two phases on a user's pictures, for real: what is computed once, selected, fine-tuned, retrained."""

import copy
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import agree, in_mlflow, new_project, passed, run, trained, write_params
from PIL import Image

STUDY = {
    "study": {"name": "photographs", "baseline": "small"},
    "data": {
        "dataset": "image_folder",
        "path": "pictures",
        "pictures": {"dark": 20, "light": 30},
        "image_size": [32, 32],
        "split": {"validation": 0.2, "test": 0.2, "seed": 0},
    },
    "model": {
        "builder": "transfer",
        "backbone": "SqueezeNet",
        "weights": "weights/mine.h5",
        "output": "sigmoid",
        "head": {"dense1": {"units": 4}},
    },
    "train": {
        "epochs": 3,
        "optimizer": {"learning_rate": 0.01},
        "loss": "binary_crossentropy",
        "class_weights": "balanced",
    },
    "seeds": [0],
    "finetune": {
        "select": {"among": ["small", "none"]},
        "variants": {
            "deeper": {
                "model": {"trainable": {"last": 6}},
                "train": {"optimizer": {"learning_rate": 0.0001}, "epochs": 1},
            }
        },
    },
    "variants": {
        "small": {},
        "none": {"model": {"head": {"dense1": None}}},
        "flipped": {"input": {"augment": {"RandomFlip": {}}}, "train": {"epochs": 1}},
    },
}


def squeezenet_weights(path: Path, seed: int) -> None:
    """Random weights of SqueezeNet in Keras' old form."""
    fires = {2: (64, 16, 64), 3: (128, 16, 64), 4: (128, 32, 128), 5: (256, 32, 128)}
    fires |= {6: (256, 48, 192), 7: (384, 48, 192), 8: (384, 64, 256), 9: (512, 64, 256)}
    shapes = {"conv1": (3, 3, 3, 64)}
    for number, (given, squeeze, expand) in fires.items():
        shapes[f"fire{number}/squeeze1x1"] = (1, 1, given, squeeze)
        shapes |= {f"fire{number}/expand{size}x{size}": (size, size, squeeze, expand) for size in (1, 3)}
    random = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in shapes]
        for name, shape in shapes.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [b"kernel", b"bias"]
            scale = np.sqrt(2 / np.prod(shape[:3]))
            group["kernel"] = random.normal(scale=scale, size=shape).astype(np.float32)
            group["bias"] = np.zeros(shape[-1], np.float32)


def photographs(folder: Path, study: dict) -> Path:
    """A project with a user's pictures and weights, and a study of them."""
    new_project(folder)
    random = np.random.default_rng(0)
    for label, count, level in (("dark", 20, 60), ("light", 30, 190)):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(random.normal(level, 40, (40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"pictures/{label}/{number}.png")
    squeezenet_weights(folder / "weights/mine.h5", 0)
    write_params(folder, study)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The study, run once from nothing."""
    folder = photographs(tmp_path_factory.mktemp("phases") / "project", STUDY)
    assert trained(passed(run(folder, "dvc", "repro"))) == ["small-0", "none-0", "flipped-0"]
    return folder


@pytest.fixture
def study(project: Path):
    """A copy of the study to change; the project is put back afterwards."""
    yield copy.deepcopy(STUDY)
    write_params(project, STUDY)


REPLANNED = ("image size", "backbone")


def finetuned(output: str) -> list[str]:
    return re.findall(r"^Running stage 'finetune@(.+)'", output, re.MULTILINE)


def entries(project: Path) -> dict[str, int]:
    """The kept features, with when they were made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (project / "features").glob("*/0.npy")}


def selected(project: Path) -> str:
    return json.loads((project / "selection/start/choice.json").read_text())["variant"]


def test_the_best_on_validation_goes_on(project: Path):
    choice = json.loads((project / "selection/start/choice.json").read_text())
    results = json.loads((project / "reports/results.json").read_text())["variants"]
    assert list(results) == ["small", "none", "flipped", "deeper"]
    for name, means in choice["candidates"].items():
        assert means["validation_accuracy"] == results[name]["cells"]["0"]["validation_accuracy"]
    ranks = {name: (-one["validation_accuracy"], one["validation_loss"]) for name, one in choice["candidates"].items()}
    assert choice["variant"] == min(ranks, key=ranks.get)
    changed = {one["path"] for one in results["deeper"]["differences"]}
    assert changed >= {"model.trainable", "train.optimizer.learning_rate", "train.epochs"}
    assert set(results["deeper"]["cells"]["0"]) >= {"precision", "recall", "roc_auc"}


def test_the_second_phase_starts_from_the_trained_head(project: Path):
    with (
        np.load(project / "cells/deeper/seed-0/untrained.npz") as start,
        np.load(project / f"cells/{selected(project)}/seed-0/predictions.npz") as end,
    ):
        np.testing.assert_allclose(
            start["probabilities"], end["test_probabilities"][start["positions"]], rtol=1e-4, atol=1e-6
        )
        assert end["test_probabilities"].shape == (10, 2)


def test_features_are_computed_once_and_predict_what_the_whole_network_does(project: Path):
    assert len(entries(project)) == 2  # of the two heads, and of what is fine-tuned; none where pictures are flipped
    images = np.load(project / "data/processed/images.npy")
    test = np.load(project / "data/processed/test.npy")
    for place, index in enumerate(test[:3]):
        Image.fromarray(images[index]).save(project / f"test{place}.png")
    pictures = [str(project / f"test{place}.png") for place in range(3)]
    told = json.loads(passed(run(project, "ablab", "predict", "--json", "--variant", "deeper", *pictures)))
    with np.load(project / "cells/deeper/seed-0/predictions.npz") as kept:
        for place, one in enumerate(told):
            np.testing.assert_allclose(
                list(one["probabilities"].values()), kept["test_probabilities"][place], rtol=1e-3, atol=1e-5
            )


def test_report_and_mlflow_have_both_phases(project: Path):
    text = (project / "reports/report.md").read_text()
    assert f"Of phase one, {selected(project)} was selected for phase two" in text
    assert "SqueezeNet, frozen" in text and "SqueezeNet, trained" in text
    assert (project / "reports/figures/roc.png").exists()
    agree(project, "photographs")
    found = in_mlflow(project, "photographs")
    assert set(found) == {"small-0", "none-0", "flipped-0", "deeper-0"}
    assert found["deeper-0"].data.metrics["roc_auc"] >= 0
    assert found["deeper-0"].data.tags["dvc.stage"] == "finetune@deeper-0"
    shown = json.loads(passed(run(project, "ablab", "plan", "--json")))
    assert set(shown["second"]) == {"small", "none"}
    assert shown["cells"] == ["small-0", "none-0", "flipped-0", "deeper-0"]
    told = passed(run(project, "ablab", "plan"))
    assert f"Phase two, with {selected(project)}" in told and "0 of 4 cells to train" in told


def test_another_head_trains_its_cells_on_the_same_features(project: Path, study: dict):
    before = entries(project)
    study["variants"]["wide"] = {"model": {"head": {"dense1": {"units": 9}}}}
    study["finetune"]["select"] = {"among": [selected(project)]}
    write_params(project, study)
    output = passed(run(project, "dvc", "repro", "finetune"))
    assert trained(output) == ["wide-0"] and finetuned(output) == []
    assert entries(project) == before


@pytest.mark.slow
def test_only_another_choice_retrains_the_second_phase(project: Path, study: dict):
    (other,) = {"small", "none"} - {selected(project)}
    study["finetune"]["select"] = {"among": [other]}
    write_params(project, study)
    output = passed(run(project, "dvc", "repro", "finetune"))
    assert trained(output) == [] and finetuned(output) == ["deeper-0"]
    assert selected(project) == other
    write_params(project, STUDY)
    output = passed(run(project, "dvc", "repro", "finetune"))
    assert finetuned(output) == []  # DVC remembers


@pytest.mark.parametrize("change", ["weights", *(pytest.param(one, marks=pytest.mark.slow) for one in REPLANNED)])
def test_other_weights_another_size_or_backbone_concern_all_cells(project: Path, study: dict, change):
    # `train` depends on its variant's plan and on the pictures: what other tests see it train for.
    def depended_on() -> list[bytes]:
        passed(run(project, "dvc", "repro", "plan"))
        pictures = (project / "data/processed/images.npy").read_bytes()
        return [(project / f"plan/{name}.json").read_bytes() + pictures for name in STUDY["variants"]]

    write_params(project, study)
    before, weights = depended_on(), project / "weights/mine.h5"
    kept = weights.read_bytes()
    match change:
        case "weights":
            squeezenet_weights(weights, 1)
        case "image size":
            study["data"]["image_size"] = [36, 36]
        case "backbone":
            study["model"] |= {"backbone": "VGG16", "weights": None}
    write_params(project, study)
    try:
        assert not set(depended_on()) & set(before)
    finally:
        weights.write_bytes(kept)


def test_augmentation_falls_back_to_the_whole_network_and_the_plan_says_so(project: Path):
    told = passed(run(project, "ablab", "plan"))
    assert "frozen layers are computed anew for each epoch, as it augments its input" in told
    assert not json.loads((project / "plan/flipped.json").read_text())["frozen_once"]
    assert json.loads((project / "plan/small.json").read_text())["frozen_once"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetune": {"select": {"among": ["smal"]}}}, "finetune.select.among: Expected some of the variants"),
        (
            {"finetune": {"variants": {"same": {}}}},
            "finetune.variants.same: Expected a change of input, model or train",
        ),
        (
            {"finetune": {"variants": {"wider": {"model": {"head": {"dense1": {"units": 7}}}}}}},
            "finetune.variants.wider: Expected the layers of small with weights of the same shapes",
        ),
        ({"data": STUDY["data"] | {"pictures": {"dark": 20, "light": 31}}}, "Expected as many pictures of each class"),
    ],
)
def test_mistakes_are_told_and_results_stay(project: Path, study: dict, change, message):
    write_params(project, study | change)
    before = (project / "selection/start/choice.json").read_bytes()
    failed = run(project, "dvc", "repro")
    assert failed.returncode != 0
    assert message in failed.stderr and "Traceback" not in failed.stderr
    assert (project / "selection/start/choice.json").read_bytes() == before
