"""A training that was killed goes on: all that its next epoch depends on is kept after each epoch.

Kept are the weights, the best ones so far, the optimizer's memory, and what early stopping and the learning-rate
schedule have counted. An epoch's order of pictures, dropout and augmentation depend on the seed and its number alone,
so nothing else is needed for the same bytes as without the break. A file is called by its epochs and its own sha256
and gets its name when it is whole: a broken one is told by its name, and not used.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablation_lab import files, optimization
from ablation_lab.backend import keras, surroundings

# Keeping states takes at most a fiftieth of the training's time, and a second. Where that would be exceeded, waiting
# for the disk, so that a power loss takes nothing, is left out first.
SHARE, ALLOWED = 50, 1
STATES = 2  # that are kept: should a power loss break the last one, there is the one before

# What callbacks remember from epoch to epoch, by the name of their class.
MEMORY = {
    "Recorder": ("history", "seconds", "best_epoch", "best", "diverged"),
    "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch"),
    "ReduceLROnPlateau": ("wait", "best", "cooldown_counter"),
}


class Keeper(keras.callbacks.Callback):
    """Keeps the state after each epoch; comes after the callbacks whose state it keeps.

    Args:
        folder: where; None keeps nothing.
        callbacks: those that remember something, the first of them the cell's `Recorder`.
        started: when the training began, in seconds since 1970; `load` puts it right.
    """

    def __init__(self, folder: Path | None, callbacks: Sequence[keras.callbacks.Callback], started: float):
        super().__init__()
        self.folder, self.callbacks, self.started = folder, callbacks, started
        self.before = 0.0  # seconds that earlier processes trained
        self._clock = time.perf_counter()
        self._memory: list[dict[str, Any]] | None = None
        self._cost = {True: 0.0, False: 0.0}  # the last time's seconds, with waiting for the disk and without
        self._spent, self._began = 0.0, 0.0

    def load(self, network: keras.Model) -> int:
        """Give a compiled network the state that was kept.

        Returns:
            The epoch to go on with, counted from 0; beyond the last one when the training had stopped by itself.
        """
        found = self._read(network) if self.folder else None
        if found is None:
            return 0
        state, weights, optimizer, best = found
        network.set_weights(weights)
        for variable, value in zip(network.optimizer.variables, optimizer, strict=True):
            variable.assign(value)
        recorder = self.callbacks[0]
        recorder.kept_weights = weights if state["best_is_last"] else best or None
        self._memory = state["callbacks"]
        self.started, self.before = state["started"], state["seconds"]
        self._recall()
        return sys.maxsize if state["stopped"] else state["epochs"]

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._recall()  # the others have just forgotten all
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        started = time.perf_counter()
        left = ALLOWED + (started - self._began) / SHARE - self._spent
        durable = self._cost[True] <= left
        if self.folder is None or not (durable or self._cost[False] <= left):
            return
        try:
            self._write(epoch + 1, durable)
        except OSError as error:
            lost = f"{self.folder}: can't be written ({error.strerror or error})"
            print(f"warning: {lost}; the training goes on, and starts anew should it be killed", file=sys.stderr)
            shutil.rmtree(self.folder, ignore_errors=True)  # the finished cell needs the room
            self.folder = None
        self._cost[durable] = time.perf_counter() - started
        self._spent += self._cost[durable]

    def _recall(self) -> None:
        for callback, memory in zip(self.callbacks, self._memory or (), strict=False):
            vars(callback).update(memory)

    def _write(self, epochs: int, durable: bool) -> None:
        assert self.folder is not None
        recorder = self.callbacks[0]
        state = {
            "epochs": epochs,
            "started": self.started,
            "seconds": self.before + time.perf_counter() - self._clock,
            "surroundings": _surroundings(self.model),
            "stopped": self.model.stop_training,
            # With moving averages, what is kept of an epoch aren't the weights that the next one starts with.
            "best_is_last": recorder.kept_weights is not None
            and recorder.best_epoch == epochs
            and not optimization.averages(self.model.optimizer),
            "callbacks": [{key: getattr(one, key) for key in MEMORY[type(one).__name__]} for one in self.callbacks],
        }
        arrays = {
            "weight": self.model.get_weights(),
            "optimizer": [variable.numpy() for variable in self.model.optimizer.variables],
            "best": [] if state["best_is_last"] else recorder.kept_weights or [],
        }
        named = {f"{kind}{number}": one for kind, them in arrays.items() for number, one in enumerate(them)}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "part"
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, state=np.array(json.dumps(state)), **named)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(self.folder / f"{epochs:06}-{files.sha256(part)}.npz")
        if durable:
            files.flush(self.folder)
        for older in sorted(self.folder.glob("*.npz"))[:-STATES]:
            older.unlink()

    def _read(self, network: keras.Model) -> tuple[dict[str, Any], list, list, list] | None:
        """The last state that is whole and fits the network."""
        assert self.folder is not None
        with network.distribute_strategy.scope():
            network.optimizer.build(network.trainable_variables)
        shapes = [
            [one.shape for one in network.get_weights()],
            [tuple(one.shape) for one in network.optimizer.variables],
        ]
        for path in sorted(self.folder.glob("*.npz"), reverse=True):
            if files.sha256(path) != path.stem.rpartition("-")[2]:
                print(f"warning: {path}: broken, and not used", file=sys.stderr)
                continue
            with np.load(path, allow_pickle=False) as content:
                state = json.loads(str(content["state"]))
                kinds = [
                    [content[f"{kind}{number}"] for number in range(sum(name.startswith(kind) for name in content))]
                    for kind in ("weight", "optimizer", "best")
                ]
            if state["surroundings"] != _surroundings(network):
                print(f"warning: {path}: of other versions or another device, and not used", file=sys.stderr)
            elif [[one.shape for one in kind] for kind in kinds[:2]] == shapes:
                return state, *kinds
        return None


def _surroundings(network: keras.Model) -> list[str]:
    return surroundings(network.distribute_strategy.num_replicas_in_sync)
