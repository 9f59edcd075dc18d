import copy
import json
import math
from pathlib import Path

import fabricate
import numpy as np
import one_thread  # noqa: F401
import pandas as pd
import pytest
from conftest import ROOT, TINY, passed, run

from ablation_lab import cell, datasets, models, params, preprocess, training
from ablation_lab.backend import keras
from ablation_lab.datasets import digits

STEADY = [cell.ARCHITECTURE, cell.HISTORY, cell.PREDICTIONS, cell.UNTRAINED, cell.WEIGHTS]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The tiny study's processed pictures."""
    folder = tmp_path_factory.mktemp("data")
    settings = params.validate(TINY).data
    digits.download(settings, folder / "raw")
    preprocess.preprocess(settings, folder / "raw", folder / "processed")
    return folder / "processed"


def plan_of(**sections) -> dict:
    """The tiny study's resolved baseline with some settings changed."""
    study = copy.deepcopy(TINY) | {"variants": {"baseline": {}}}
    for name, changes in sections.items():
        study[name] = params.merge_patch(study[name], changes)
    return params.validate(study).baseline.resolved()


def train(data: Path, out: Path, seed: int = 0, **sections):
    """Train a cell; returns the network, the result, and the rows reported after each epoch."""
    rows: list[dict] = []
    out.mkdir(exist_ok=True)
    plan = plan_of(**sections)
    result = training.train(plan, seed, data, out, "test-0", rows.append)
    return models.load(out, plan["model"]["builder"]), result, rows


VARIED = {
    "plain": {},
    "augmented": {"input": {"augment": {"RandomFlip": {}, "RandomRotation": {"factor": 0.1}}}},
    "normalised": {"model": {"normalization": "batch", "convolutions": 2, "padding": "same", "head_dropout": 0.5}},
    "perceptron": {"model": {"builder": "mlp", "blocks": None, "dropout": None, "head_dropout": 0.2}},
    "residual": {
        "model": {"builder": "resnet", "blocks": None, "dropout": None, "stem": {"filters": 4}}
        | {"stages": {"one": {"filters": 4}}, "any_size": True}
    },
    "own": {
        "model": {"builder": "networks.example:build", "blocks": None, "dropout": None, "head": None, "filters": 4}
    },
    "parts": {"input": {"fraction": 0.5}, "train": {"steps_per_epoch": 5, "optimizer": {"name": "sgd"}}},
    "smoothed": {"train": {"label_smoothing": 0.1, "reduce_lr": {"patience": 0}, "early_stopping": {"patience": 0}}},
    "sparse": {"train": {"loss": "sparse_categorical_crossentropy", "keep": "last", "batch_size": 7}},
}


@pytest.mark.parametrize("name", VARIED)
def test_a_cell_trained_twice_is_the_same_bytes(data, tmp_path, name):
    for folder in ("first", "second"):
        train(data, tmp_path / folder, **VARIED[name])
    for file in STEADY:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_what_the_machine_sets_for_keras_changes_nothing(data, tmp_path):
    (tmp_path / "keras/keras.json").parent.mkdir()
    (tmp_path / "keras/keras.json").write_text('{"floatx": "float16", "image_data_format": "channels_first"}')
    script = """
import json, sys
from pathlib import Path
from ablation_lab import training
training.train(json.loads(sys.argv[1]), 0, Path(sys.argv[2]), Path(sys.argv[3]), "test-0", lambda row: None)
"""
    written = {}
    for name, environment in {
        "plain": {},
        "set": {"KERAS_HOME": str(tmp_path / "keras"), "KERAS_MAX_EPOCHS": "1", "TF_ENABLE_ONEDNN_OPTS": "0"},
    }.items():
        (tmp_path / name).mkdir()
        arguments = [json.dumps(plan_of()), str(data), str(tmp_path / name)]
        passed(run(ROOT, "python", "-c", script, *arguments, **environment))
        written[name] = [(tmp_path / name / file).read_bytes() for file in STEADY]
    assert written["plain"] == written["set"]


AVERAGED = {"name": "adam", "learning_rate": 0.01, "use_ema": True, "ema_momentum": 0.9}


@pytest.mark.parametrize("keep", ["best", "last"])
def test_averages_of_the_weights_are_what_is_validated_kept_and_scored(data, tmp_path, keep):
    settings = {"epochs": 3, "keep": keep}
    optimizers = {"plain": {"name": "adam", "learning_rate": 0.01}, "averaged": AVERAGED}
    histories, networks = {}, {}
    for name, optimizer in optimizers.items():
        networks[name], result, _ = train(data, tmp_path / name, train=settings | {"optimizer": optimizer})
        histories[name] = pd.read_csv(tmp_path / name / cell.HISTORY)
    # What is trained is the same, and what comes of it is not.
    assert histories["plain"]["loss"].equals(histories["averaged"]["loss"])
    assert not histories["plain"]["val_loss"].equals(histories["averaged"]["val_loss"])
    with np.load(tmp_path / "averaged" / cell.PREDICTIONS) as found:
        chosen, labels = found["validation_probabilities"], found["validation_labels"]
    row = histories["averaged"].iloc[result["best_epoch"] - 1]
    assert result["best_epoch"] == (3 if keep == "last" else 1 + histories["averaged"]["val_accuracy"].argmax())
    assert result["validation_accuracy"] == (chosen.argmax(axis=1) == labels).mean()
    assert row["val_accuracy"] == pytest.approx(result["validation_accuracy"], abs=1e-6)
    loss = -np.log(chosen[np.arange(len(labels)), labels]).mean()
    assert row["val_loss"] == pytest.approx(loss, abs=1e-4) == result["validation_loss"]


def test_averages_are_those_of_the_formula(data, tmp_path):
    def weights(epochs: int, **optimizer) -> list[np.ndarray]:
        settings = {"epochs": epochs, "steps_per_epoch": 1, "keep": "last"}
        chosen = {"name": "adam", "learning_rate": 0.01} | optimizer
        network, _, _ = train(data, tmp_path / f"{epochs}{len(optimizer)}", train=settings | {"optimizer": chosen})
        return network.get_weights()

    averaged = weights(2, use_ema=True, ema_momentum=0.75)
    for average, first, second in zip(averaged, weights(1), weights(2), strict=True):
        np.testing.assert_allclose(average, 0.75 * first + 0.25 * second, rtol=1e-5, atol=1e-7)


def test_another_seed_is_another_training(data, tmp_path):
    for seed in (0, 1):
        train(data, tmp_path / str(seed), seed=seed)
    assert (tmp_path / "0" / cell.WEIGHTS).read_bytes() != (tmp_path / "1" / cell.WEIGHTS).read_bytes()


def test_what_a_cell_writes(data, tmp_path):
    network, result, rows = train(data, tmp_path, train={"epochs": 3})
    history = pd.read_csv(tmp_path / cell.HISTORY)
    assert list(history.columns) == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
    assert list(history["epoch"]) == [1, 2, 3] == [row["epoch"] for row in rows]
    np.testing.assert_allclose(history["val_loss"], [row["val_loss"] for row in rows], rtol=1e-6)
    assert json.loads((tmp_path / cell.TIMING).read_text())["device"]

    card = json.loads((data / "card.json").read_text())
    with np.load(tmp_path / cell.PREDICTIONS) as predictions:
        for part in ("validation", "test"):
            indices = np.load(data / f"{part}.npy")
            assert predictions[f"{part}_probabilities"].shape == (card["counts"][part], 10)
            assert list(predictions[f"{part}_labels"]) == list(np.load(data / "labels.npy")[indices])
        validation_accuracy = np.mean(
            predictions["validation_probabilities"].argmax(axis=1) == predictions["validation_labels"]
        )
    # The kept weights are those of the best epoch, and history and predictions tell the same story.
    assert result["best_epoch"] == 1 + int(history["val_accuracy"].argmax())
    assert validation_accuracy == pytest.approx(history["val_accuracy"].max())
    assert result["status"] == "ok"

    (tmp_path / cell.RESULT).write_text(json.dumps(result))
    pictures = np.load(data / "images.npy")[np.load(data / "test.npy")]
    loaded = models.load(tmp_path, "cnn")
    np.testing.assert_array_equal(loaded.predict(pictures, verbose=0), network.predict(pictures, verbose=0))


def test_the_untrained_networks_probabilities_of_a_few_test_pictures(data, tmp_path):
    train(data, tmp_path, seed=3)
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    fresh = models.build(plan_of()["model"], "unit", (8, 8, 1), 10)
    pictures = np.load(data / "images.npy")[np.load(data / "test.npy")]
    labels = np.load(data / "labels.npy")[np.load(data / "test.npy")]
    with np.load(tmp_path / cell.UNTRAINED) as untrained:
        assert sorted(labels[untrained["positions"]]) == list(range(8))  # the first of each of the first classes
        expected = fresh.predict(pictures[untrained["positions"]], verbose=0)
        np.testing.assert_allclose(untrained["probabilities"], expected, rtol=1e-5)


def test_a_learning_rate_that_follows_a_schedule(data, tmp_path):
    rate = {"name": "ExponentialDecay", "initial_learning_rate": 0.01, "decay_steps": 4, "decay_rate": 0.5}
    settings = {"epochs": 2, "steps_per_epoch": 4, "optimizer": {"name": "sgd", "learning_rate": rate}}
    _, _, rows = train(data, tmp_path, train=settings)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.005])


STUDIES = {path.stem: params.load(path) for path in sorted((ROOT / "studies").glob("*.yaml"))}


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Data sets of noise in the shapes that the ready-made studies are for."""
    made = {}
    for spec in [datasets.spec(study.data) for study in STUDIES.values()]:
        shape, key = spec.image_shape, (spec.image_shape, len(spec.classes))
        if key in made:
            continue
        made[key] = tmp_path_factory.mktemp("noise")
        fabricate.data(made[key], list(spec.classes), pictures=20)
        pictures = np.random.default_rng(0).integers(0, 256, (60, *shape), dtype=np.uint8)
        np.save(made[key] / "data/processed/images.npy", pictures)
        card = made[key] / "data/processed/card.json"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"image_shape": shape}))
    return made


# Variants of one study that differ in how they are trained are one network; of a backbone one head will do.
NETWORKS = {
    (study, json.dumps(variant.resolved()["model"])): (study, name)
    for study, chosen in STUDIES.items()
    for name, variant in chosen.variants.items()
    if variant.model.builder != "transfer" or name == chosen.study.baseline
}


LARGE = ("scenes_densenet201", "scenes_resnet152", "fashion_resnet")


@pytest.mark.parametrize(
    ("study", "name"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] in LARGE else ()) for one in NETWORKS.values()],
)
def test_each_network_of_each_study_trains_for_a_step(noise, tmp_path, monkeypatch, study, name):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # where features are kept
    chosen = STUDIES[study]
    plan = chosen.variants[name].resolved() | {"frozen_once": chosen.variants[name].model.builder == "transfer"}
    plan["train"] |= {"epochs": 1, "steps_per_epoch": 1, "batch_size": min(4, plan["train"]["batch_size"])}
    rows: list[dict] = []
    spec = datasets.spec(chosen.data)
    data = noise[spec.image_shape, len(spec.classes)] / "data/processed"
    result = training.train(plan, 0, data, tmp_path, name, rows.append)
    with np.load(tmp_path / cell.UNTRAINED) as untrained, np.load(tmp_path / cell.PREDICTIONS) as predictions:
        before, after = untrained["probabilities"], predictions["test_probabilities"][untrained["positions"]]
    assert len(rows) == 1
    assert result["status"] == ("diverged" if name == "exponential" else "ok")
    assert not np.array_equal(before, after)  # the step moved the weights


def test_training_accuracy_is_measured_with_dropout_off_on_the_kept_weights(data, tmp_path):
    network, result, rows = train(data, tmp_path, model={"dropout": 0.9}, train={"epochs": 6})
    indices = np.load(data / "train.npy")
    pictures, labels = np.load(data / "images.npy")[indices], np.load(data / "labels.npy")[indices]
    accuracy = np.mean(network.predict(pictures, verbose=0).argmax(axis=1) == labels)
    assert result["train_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert result["train_accuracy"] != pytest.approx(rows[result["best_epoch"] - 1]["accuracy"], abs=1e-6)


def test_a_loss_that_is_no_number_ends_the_cell_as_diverged(data, tmp_path):
    optimizer = {"name": "sgd", "learning_rate": 1e30}
    _, result, rows = train(
        data, tmp_path, model={"activation": "exponential"}, train={"optimizer": optimizer, "epochs": 9}
    )
    assert result["status"] == "diverged"
    assert len(rows) == result["epochs"] < 9
    assert not math.isfinite(rows[-1]["loss"])
    assert result["train_accuracy"] is None
    with np.load(tmp_path / cell.PREDICTIONS) as predictions:
        assert np.isnan(predictions["test_probabilities"]).all()


def test_early_stopping_and_learning_rate_schedule(data, tmp_path):
    settings = {"epochs": 30, "optimizer": {"name": "sgd", "learning_rate": 1e-9}}
    settings |= {"early_stopping": {"monitor": "val_loss", "patience": 3, "min_delta": 0.1}}
    settings |= {"reduce_lr": {"monitor": "val_loss", "patience": 1, "factor": 0.5, "min_delta": 0.1}}
    _, result, rows = train(data, tmp_path, train=settings)
    assert result["epochs"] == len(rows) == 4  # nothing improves after the first epoch
    assert rows[-1]["learning_rate"] == pytest.approx(1e-9 / 4)


def test_keep_last_takes_the_last_epoch(data, tmp_path):
    _, result, rows = train(data, tmp_path, train={"keep": "last", "epochs": 3})
    assert result["best_epoch"] == 3
    with np.load(tmp_path / cell.PREDICTIONS) as predictions:
        accuracy = np.mean(predictions["validation_probabilities"].argmax(axis=1) == predictions["validation_labels"])
    assert accuracy == pytest.approx(rows[-1]["val_accuracy"])


def test_an_epochs_random_numbers_do_not_depend_on_what_ran_before(data):
    from ablation_lab import backend

    network = models.build(plan_of(model={"dropout": 0.5})["model"], "unit", (8, 8, 1), 10)
    pictures = np.load(data / "images.npy")[:4]
    seen = {}
    for epoch in (0, 1, 0):
        backend.set_generator_states(network, 7, epoch)
        seen.setdefault(epoch, []).append(np.asarray(network(pictures, training=True)))
    np.testing.assert_array_equal(*seen[0])
    assert not np.array_equal(seen[0][0], seen[1][0])
