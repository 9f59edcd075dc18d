import json
import os
import threading
import time
from pathlib import Path

import one_thread  # noqa: F401
import pytest
from test_training import STEADY, VARIED, plan_of
from test_training import data as data

from ablation_lab import cell, checkpoint, resume, training

EPOCHS = 4
# Of all that a training may depend on, the most in few trainings; the others are slow tests.
RESUMED = {
    "everything": {
        "input": VARIED["augmented"]["input"],
        "model": VARIED["normalised"]["model"],
        "train": {"reduce_lr": {"patience": 1, "min_delta": 0.5}, "label_smoothing": 0.1, "batch_size": 7},
    },
    "averaged": {"train": {"optimizer": {"name": "adam", "use_ema": True, "ema_momentum": 0.9}, "keep": "last"}},
    "averaged, the best": {
        "train": {
            "optimizer": {"name": "adam", "use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 5},
            "precision": "mixed_float16",
        }
    },
    "stops": {
        "train": {
            "early_stopping": {"patience": 1, "min_delta": 0.5},
            "reduce_lr": {"patience": 1, "factor": 0.5, "min_delta": 0.5},
            "monitor": "val_loss",
        }
    },
    "diverges": {"train": {"optimizer": {"name": "sgd", "learning_rate": 1e30}}},
}
FAST = ("everything", "stops")
NOISY = """
from keras import Model, layers, ops, random

class Noise(layers.Layer):
    def call(self, x, training=False):
        return x + random.normal(ops.shape(x)) if training else x

def build(image_shape, classes):
    inputs = layers.Input(image_shape)
    return Model(inputs, layers.Dense(classes, activation="softmax")(layers.Flatten()(Noise()(inputs))))
"""


class Killed(BaseException):
    """As if the process ended here."""


def train(settings: dict, data: Path, out: Path, state: Path | None, end_after: int = 0) -> list[int]:
    """Train a cell, or end it when an epoch is told; the epochs that were fitted."""
    sections = settings | {"train": {"epochs": EPOCHS} | settings.get("train", {})}
    told = []

    def report(row):
        told.append(row["epoch"])
        if end_after and row["epoch"] == end_after:
            raise Killed

    fitted: list[int] = []
    out.mkdir(exist_ok=True)
    begin = training.Recorder.on_epoch_begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training.Recorder,
            "on_epoch_begin",
            lambda self, epoch, logs=None: (fitted.append(epoch + 1), begin(self, epoch, logs)),
        )
        try:
            training.train(plan_of(**sections), 0, data, out, "test-0", report, state=state)
        except Killed:
            return fitted
    assert told == list(range(1, len(told) + 1))  # a resumed training tells all of its epochs
    return fitted


@pytest.fixture(autouse=True)
def always_kept(monkeypatch):
    """However slow the disk is just now."""
    monkeypatch.setattr(checkpoint, "ALLOWED", float("inf"))


def the_same(folder: Path, whole: Path) -> bool:
    return [name for name in STEADY if (folder / name).read_bytes() != (whole / name).read_bytes()] == []


@pytest.mark.parametrize(
    "name", [*RESUMED, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIED if name not in RESUMED)]
)
def test_a_resumed_training_is_the_same_bytes_and_repeats_no_epoch(data, tmp_path, name):
    settings = (VARIED | RESUMED)[name]
    whole = train(settings, data, tmp_path / "whole", None)
    for end in {2, len(whole)}:
        out, state = tmp_path / f"broken{end}", tmp_path / f"state{end}"
        assert train(settings, data, out, state, end_after=end) + train(settings, data, out, state) == whole
        assert the_same(out, tmp_path / "whole")
        assert len(json.loads((out / cell.TIMING).read_text())["epoch_seconds"]) == len(whole)


def test_a_layer_that_draws_without_a_seed_goes_on_too(data, tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"model": {"builder": "noisy:build", "blocks": None, "dropout": None, "head": None}}
    train(settings, data, tmp_path / "whole", None)
    train(settings, data, tmp_path / "out", tmp_path / "state", end_after=2)
    train(settings, data, tmp_path / "out", tmp_path / "state")
    assert the_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_a_training_that_is_broken_off_again_and_again(data, tmp_path):
    whole = train({}, data, tmp_path / "whole", None)
    fitted = [train({}, data, tmp_path / "out", tmp_path / "state", end) for end in (1, 2, 3, 0)]
    assert fitted == [[1], [2], [3], [4]]
    assert [epoch for part in fitted for epoch in part] == whole
    assert the_same(tmp_path / "out", tmp_path / "whole")


def test_a_broken_state_is_not_used(data, tmp_path, capsys):
    whole = train({}, data, tmp_path / "whole", None)
    train({}, data, tmp_path / "first", tmp_path / "good", end_after=1)
    (good,) = (tmp_path / "good").glob("*.npz")
    content, middle = good.read_bytes(), good.stat().st_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for how, broken in {"cut off": content[:middle], "empty": b"", "one bit": flipped}.items():
        state = tmp_path / f"state {how}"
        state.mkdir()
        (state / good.name).write_bytes(broken)
        assert train({}, data, tmp_path / how, state, end_after=0 if how == "one bit" else 1) == (
            whole if how == "one bit" else [1]
        )
        assert f"warning: {state / good.name}: broken, and not used" in capsys.readouterr().err
    assert the_same(tmp_path / "one bit", tmp_path / "whole")


def test_the_last_whole_state_is_used(data, tmp_path):
    """Two are kept: a power loss may take the last one, which was not on the disk yet."""
    train({}, data, tmp_path / "out", tmp_path / "state", end_after=3)
    _, newer = sorted((tmp_path / "state").glob("*.npz"))
    content = newer.read_bytes()
    newer.write_bytes(content[: len(content) // 2])
    (tmp_path / "state/part").write_bytes(content[:100])
    assert train({}, data, tmp_path / "out", tmp_path / "state", end_after=3) == [3]
    assert train({}, data, tmp_path / "out", tmp_path / "state") == [4]


def test_a_state_of_another_network_is_not_used(data, tmp_path):
    train({}, data, tmp_path / "out", tmp_path / "state", end_after=2)
    assert train({"model": {"blocks": {"block1": {"filters": 3}}}}, data, tmp_path / "out", tmp_path / "state") == [
        *range(1, EPOCHS + 1)
    ]


def test_a_place_that_takes_no_state_stops_no_training(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fitted = train({}, data, tmp_path / "out", tmp_path / "file/state")
    assert fitted == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("the training goes on, and starts anew should it be killed") == 1


def test_large_states_are_kept_seldom(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ALLOWED", 0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    assert train({}, data, tmp_path / "out", tmp_path / "state", end_after=3) == [1, 2, 3]
    assert train({}, data, tmp_path / "out", tmp_path / "state") == [2, 3, 4]


def test_all_that_callbacks_remember_is_kept(data, tmp_path):
    """Whatever Keras' callbacks change from one epoch to another, also in versions to come."""
    callbacks: list = []
    before: list[dict] = []

    class Spy(checkpoint.Keeper):
        def on_train_begin(self, logs=None):
            super().on_train_begin(logs)
            callbacks.extend(self.callbacks)
            before.extend(dict(vars(one)) for one in self.callbacks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Keeper", Spy)
        train(RESUMED["stops"], data, tmp_path / "out", tmp_path / "state")
    assert {type(one).__name__ for one in callbacks} == checkpoint.MEMORY.keys()
    # Of each epoch anew, or made from the settings.
    passing = {"_learning_rate", "_started", "kept_weights", "monitor_op", "min_delta", "_params", "_model"}
    for one, earlier in zip(callbacks, before, strict=True):
        changed = {key for key, value in vars(one).items() if key not in earlier or earlier[key] is not value}
        assert changed - passing <= set(checkpoint.MEMORY[type(one).__name__]), type(one).__name__


def test_a_second_process_waits_for_the_first(tmp_path, capsys):
    def second():
        with resume.alone("baseline", 0, tmp_path):
            entered.append("second")

    entered: list[str] = []
    other = threading.Thread(target=second)  # with a lock of its own, as a process has
    with resume.alone("baseline", 0, tmp_path):
        other.start()
        with resume.alone("baseline", 1, tmp_path):  # another cell needn't wait
            pass
        other.join(0.5)
        assert entered == []
    other.join(10)
    assert entered == ["second"]
    assert f"baseline-0 is being trained here already, by process {os.getpid()}: waiting" in capsys.readouterr().out


def test_two_equal_trainings_have_places_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with resume.place("abc") as first:
        with resume.place("abc") as second:
            second.mkdir()
            assert first != second
        assert not second.exists()
    with resume.place("abc") as again:
        assert again == first


def finished(place: Path) -> Path:
    """A finished cell, left in a place."""
    for folder in ("cell", "state"):
        (place / folder).mkdir(parents=True)
    (place / "cell/cell.json").write_text('{"cell_hash": "abc"}')
    (place / "cell/weights").write_text("many")
    resume.leave(place)
    return place


def test_a_finished_cell_is_taken_as_a_whole(tmp_path):
    place, out = finished(tmp_path / "place"), tmp_path / "cells/baseline/seed-0"
    out.mkdir(parents=True)
    (out / "old").touch()
    resume.take(place, out)
    assert sorted(path.name for path in out.iterdir()) == ["cell.json", "weights"]
    assert not place.exists()


def test_a_finished_cell_that_is_damaged_is_not_taken(tmp_path):
    place = finished(tmp_path / "place")
    assert resume.is_ready(place, "abc") and not resume.is_ready(place, "other")
    (place / "cell/weights").write_text("few")
    assert not resume.is_ready(place, "abc")
    (place / "cell/weights").unlink()
    assert not resume.is_ready(place, "abc")
    (place / resume.SUMS).unlink()
    assert not resume.is_ready(place, "abc")


def test_a_state_of_other_versions_is_not_used(data, tmp_path, monkeypatch, capsys):
    train({}, data, tmp_path / "out", tmp_path / "state", end_after=2)
    monkeypatch.setattr(checkpoint, "surroundings", lambda devices: ["2.0.0", "3.0.0", "2.0.0"])
    assert train({}, data, tmp_path / "out", tmp_path / "state", end_after=1) == [1]
    assert "of other versions or another device, and not used" in capsys.readouterr().err


def test_the_time_of_a_resumed_training_is_that_of_all_its_parts(data, tmp_path):
    train({}, data, tmp_path / "out", tmp_path / "state", end_after=3)
    train({}, data, tmp_path / "out", tmp_path / "state")
    timing = json.loads((tmp_path / "out" / cell.TIMING).read_text())
    assert timing["total_seconds"] > sum(timing["epoch_seconds"])
    assert timing["started"] < (tmp_path / "state").stat().st_mtime - timing["epoch_seconds"][-1]


def test_forgotten_states_go(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("old", "new"):
        (tmp_path / "resume" / name).mkdir(parents=True)
    os.utime(tmp_path / "resume/old", (0, time.time() - 2 * resume.FORGOTTEN))
    with resume.place("abc"):
        assert sorted(path.name for path in (tmp_path / "resume").glob("*/")) == ["new"]
