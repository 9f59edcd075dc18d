"""Train one cell: fit, keep the best weights, predict, write the cell's files."""

import csv
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ablation_lab import backend, cell, checkpoint, distribution, feeding, files, frozen, models, optimization, pipeline
from ablation_lab.backend import keras
from ablation_lab.models import weights

PREDICTION_BATCH = 256  # fixed: the last bits of a prediction may depend on it
SHOWN = 8  # test pictures whose probabilities are also written for the untrained network


EpochReport = Callable[[dict[str, float]], None]


def train(
    plan: dict[str, Any],
    seed: int,
    data: Path,
    out: Path,
    name: str,
    report: EpochReport,
    start: Path | None = None,
    state: Path | None = None,
    features: Path | None = None,
) -> dict[str, Any]:
    """Train one cell and write its files to `out`; all but `timing.json` are the same bytes every time.

    Where the plan says so, the network's frozen prefix is computed once, and the rest is trained on what it gives.
    `cell.json` is not written here: whoever calls knows the cell's identity.

    Args:
        plan: the resolved configuration, `plan/<variant>.json`.
        seed: fixes initial weights, order of pictures, dropout and augmentation.
        data: the processed data set.
        out: an empty folder.
        name: what the progress bar is called.
        report: called after each epoch with its row of `history.csv` and `epoch_seconds`.
        start: the weights to start from; None are new ones, and a ready-made backbone's own.
        state: where the state is kept from which a training that was killed goes on; None keeps none.
        features: where what a frozen prefix gives is kept; by default where all cells of the project have it.

    Returns:
        The result for `cell.json`.
    """
    started, clock = time.time(), time.perf_counter()
    settings, model = plan["train"], plan["model"]
    replicas = settings["replicas"]
    device = backend.set_up(settings["threads"], replicas)
    keras.utils.clear_session()  # names are counted, and they are part of what is written
    keras.utils.set_random_seed(seed)
    card = files.read_json(data / "card.json")
    arrays = pipeline.open_arrays(data, card["classes"])
    train_part = pipeline.training_indices(arrays.train, arrays.labels, plan["input"]["fraction"])
    shuffled = pipeline.Shuffled(train_part, settings["batch_size"], settings["steps_per_epoch"], seed)
    form = optimization.label_form(settings, models.output(model))

    with backend.precision(settings["precision"]):
        network = models.build(model, plan["input"]["rescale"], tuple(card["image_shape"]), len(arrays.classes))
    if start is not None:
        network.load_weights(start)
    elif plan.get("weights"):
        weights.load(network, model, weights.locate(model, plan["weights"]))
    whole, trained = network, models.trained(network, model)
    if plan.get("frozen_once"):
        prefix, whole, trained = frozen.split(network, trained)
        found = frozen.features(prefix, arrays.inputs[0], card["digest"], settings["threads"], name, features)
        arrays = replace(arrays, inputs=found)
    backend.compile_network(whole, settings["xla"])  # for its predictions, where it isn't what is trained
    stored = feeding.stored(arrays.inputs, settings["data_on"]) if not replicas else None
    fed = replace(arrays, inputs=[np.arange(len(arrays.labels))]) if stored else arrays
    trainer = feeding.before(trained, plan["input"]["augment"], stored)
    untrained = trainer.get_weights()
    fitted = distribution.mirrored(trainer, replicas) if replicas else trainer
    for one in [trainer, fitted] if replicas else [trainer]:
        with one.distribute_strategy.scope():
            backend.compile_network(
                one,
                settings["xla"],
                optimizer=optimization.optimizer(settings["optimizer"], settings["precision"], one is not trainer),
                loss=optimization.loss(settings, models.output(model)),
                metrics=["accuracy"],
                auto_scale_loss=False,  # the optimizer does
            )
    recorder = Recorder(seed, settings["monitor"] if settings["keep"] == "best" else None)
    remembering = [recorder, *optimization.callbacks(settings)]
    # The averages go out of the network again before the state is kept, which is that of the weights in training.
    averaging = [Averages()] if settings["optimizer"].get("use_ema") else []
    keeper = checkpoint.Keeper(state, remembering, started)
    last = settings["epochs"]
    done = min(keeper.load(fitted), last)
    for row in recorder.rows():
        report(row)
    if recorder.history:
        print(f"{name}: goes on after epoch {len(recorder.history)}", file=sys.stderr, flush=True)
    class_weights = optimization.class_weights(settings["class_weights"], card["classes"], arrays.labels[train_part])
    epochs = (min(done, last - 1), last)
    if replicas:
        batches = pipeline.shared_batches(fed, shuffled, *epochs, form, replicas, class_weights)
        batches, class_weights = distribution.distributed(fitted, batches), None
    else:
        batches = pipeline.training_batches(fed, shuffled, *epochs, form)
    # An epoch is told when it is kept: what is known of a training is not trained again.
    tell = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: report(recorder.rows()[-1]))
    with backend.xla_explained(settings["xla"]):
        fitted.fit(
            batches,
            steps_per_epoch=shuffled.steps,
            epochs=last,
            initial_epoch=done,
            validation_data=pipeline.ordered_batches(fed, arrays.validation, PREDICTION_BATCH, form),
            class_weight=class_weights,
            callbacks=[*remembering, *averaging, keeper, tell, Progress(name, shuffled.steps, done)],
            shuffle=False,  # the batches come shuffled
            verbose=0,
        )

    # Fitting and model selection are over. Only now what was trained sees the test pictures (or their features), and
    # nothing is scored on them.
    def predicted(indices: np.ndarray) -> np.ndarray:
        return whole.predict(pipeline.ordered_batches(arrays, indices, PREDICTION_BATCH, form), verbose=0)

    shown = first_of_each_class(arrays.labels[arrays.test])
    kept = recorder.kept()
    trainer.set_weights(untrained)
    before = predicted(arrays.test[shown])
    trainer.set_weights(kept)
    predictions: dict[str, Any] = {}
    for part in ("validation", "test"):
        indices = getattr(arrays, part)
        predictions[f"{part}_probabilities"] = predicted(indices)
        predictions[f"{part}_labels"] = arrays.labels[indices].astype(np.int64)
    train_batches = pipeline.ordered_batches(fed, train_part, PREDICTION_BATCH, form)
    scores = trainer.evaluate(train_batches, verbose=0, return_dict=True)

    network.compiled = False  # what is kept is for predicting, without the optimizer and what it remembers
    files.write_json(out / cell.ARCHITECTURE, json.loads(network.to_json()))
    backend.save_weights(network, out / cell.WEIGHTS)
    _write_history(recorder.history, out / cell.HISTORY)
    np.savez(out / cell.PREDICTIONS, **predictions)
    np.savez(out / cell.UNTRAINED, positions=shown, probabilities=before)
    result = {
        "status": "diverged" if recorder.diverged else "ok",
        "epochs": len(recorder.history),
        "best_epoch": recorder.best_epoch,
        "train_accuracy": None if recorder.diverged else scores["accuracy"],
        "train_loss": None if recorder.diverged else scores["loss"],
        "validation_accuracy": None if recorder.diverged else _accuracy(predictions, "validation"),
        "validation_loss": None if recorder.diverged else recorder.history[(recorder.best_epoch or 1) - 1]["val_loss"],
    }
    timing = {
        "started": round(keeper.started, 3),  # seconds since 1970
        "device": device,
        "threads": settings["threads"],
        "epoch_seconds": recorder.seconds,
        "total_seconds": round(keeper.before + time.perf_counter() - clock, 4),
    }
    files.write_json(out / cell.TIMING, timing)
    return result


def _write_history(rows: list[dict[str, float]], path: Path) -> None:
    """Write `history.csv`: the shortest numbers that are the same float32, nothing for one that isn't a number."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            numbers = [np.float32(value) for value in list(row.values())[1:]]
            writer.writerow([row["epoch"], *("" if np.isnan(number) else str(number) for number in numbers)])


def _accuracy(predictions: dict[str, Any], part: str) -> float:
    chosen = predictions[f"{part}_probabilities"].argmax(axis=1)
    return float((chosen == predictions[f"{part}_labels"]).mean())


def first_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Positions of a few pictures, the same in every cell of a study: the first of each of the first classes."""
    positions = np.unique(labels, return_index=True)[1]
    return np.sort(positions[:SHOWN]).astype(np.int64)


class Recorder(keras.callbacks.Callback):
    """Keeps the history, the best weights and the random state of a training; stops it when the loss is no number.

    Args:
        seed: the cell's seed; every epoch's random numbers depend on it and the epoch alone.
        monitor: `val_accuracy` or `val_loss`, whose best epoch's weights are kept; None keeps the last epoch's.
    """

    def __init__(self, seed: int, monitor: str | None):
        super().__init__()
        self.seed, self.monitor = seed, monitor
        self.history: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.best_epoch: int | None = None
        self.best: float = math.nan
        self.kept_weights: list[np.ndarray] | None = None
        self.diverged = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        backend.set_generator_states(self.model, self.seed, epoch)
        self._learning_rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs = logs or {}
        self.seconds.append(round(time.perf_counter() - self._started, 4))
        values = {name: logs[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
        values["learning_rate"] = self._learning_rate
        # The shortest numbers that are the same float32: what history.csv has, and so what MLflow is told.
        row = {"epoch": epoch + 1} | {name: float(str(np.float32(value))) for name, value in values.items()}
        self.history.append(row)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["val_loss"])):
            self.diverged = True
            self.model.stop_training = True
        elif self.monitor is None:
            self.best_epoch = epoch + 1
        elif self._improved(row[self.monitor]):
            self.best, self.best_epoch = row[self.monitor], epoch + 1
            self.kept_weights = self.model.get_weights()

    def rows(self) -> list[dict[str, float]]:
        """The rows of `history.csv`, each with its `epoch_seconds`."""
        return [row | {"epoch_seconds": spent} for row, spent in zip(self.history, self.seconds, strict=True)]

    def kept(self) -> list[np.ndarray]:
        """The weights to keep: the best epoch's; the last ones of a diverged network, broken as they are."""
        if self.kept_weights is None or self.diverged:
            return self.model.get_weights()
        return self.kept_weights

    def _improved(self, value: float) -> bool:
        return math.isnan(self.best) or (value < self.best if self.monitor == "val_loss" else value > self.best)


class Averages(keras.callbacks.Callback):
    """With `use_ema`, has the moving averages of the weights in the network while it is validated, until the callbacks
    before this one have seen the end of the epoch: they are what is scored and kept.

    Keras' `SwapEMAWeights` adds and subtracts the two, which changes the last digits of the weights in training, and
    takes the averages out before the end of the epoch, so these are copies.
    """

    def on_test_begin(self, logs: dict | None = None) -> None:
        averages = optimization.averages(self.model.optimizer)
        self._trained = [keras.ops.convert_to_numpy(one) for one in self.model.trainable_variables]
        self._assign([keras.ops.convert_to_numpy(one) for one in averages])

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._assign(self._trained)

    def _assign(self, values: list[np.ndarray]) -> None:
        for variable, value in zip(self.model.trainable_variables, values, strict=True):
            variable.assign(value)


class Progress(keras.callbacks.Callback):
    """A bar that moves with every batch and shows the last epoch's figures."""

    async_safe = True  # Keras needn't wait for a batch's loss: the bar doesn't show it

    def __init__(self, name: str, steps: int, done: int = 0):
        super().__init__()
        self.name, self.steps, self.done = name, steps, done

    def on_train_begin(self, logs: dict | None = None) -> None:
        total, done = self.params["epochs"] * self.steps, self.done * self.steps
        often = 0.5 if sys.stderr.isatty() else 10  # seconds; a log file needn't grow by the second
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit="step", mininterval=often)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs = logs or {}
        shown = {name: f"{float(logs[name]):.4f}" for name in ("loss", "val_loss", "val_accuracy") if name in logs}
        self.bar.set_postfix({"epoch": f"{epoch + 1}/{self.params['epochs']}"} | shown, refresh=False)

    def on_train_end(self, logs: dict | None = None) -> None:
        self.bar.close()
