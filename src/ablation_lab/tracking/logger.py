"""python -m ablation_lab.tracking.logger: writes a training's run, told by `live` in lines of JSON.

What the store does not take is kept and tried again with what comes next. When the lines end before the training has
said how it ended, it was killed, and so is its run.
"""

import json
import os
import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from ablation_lab.tracking.live import Identity

Messages = SimpleQueue[dict[str, Any] | None]
EVERY = 2  # seconds from one writing to the next: short epochs are written together, in a tenth of the time


def forked(lines: int, pipe: int) -> None:
    """As a process that a training has forked: `lines` is what it reads, `pipe` the training's end of it."""
    os.close(pipe)  # else the lines would never end
    os.setsid()  # Ctrl-C is for the training, which says how it ended
    with os.fdopen(lines, encoding="utf-8") as text:
        sys.exit(main(text))


def main(lines: TextIO) -> int:
    """Log until the training ends; 0 when the store has all of it."""
    messages: Messages = SimpleQueue()
    # Read at once, so that the training never waits for a full pipe.
    threading.Thread(target=_read, args=(lines, messages), daemon=True).start()
    first = messages.get()
    if first is None:
        return 1
    run = Run(Identity(**first["identity"]), first["stage"], first["time"])
    run.flush()
    message = messages.get()
    while message is not None and "status" not in message:
        run.add(message)
        try:
            message = messages.get(timeout=max(0, run.flushed + EVERY - time.monotonic()))
        except Empty:
            run.flush()
            message = messages.get()
    if message is None:
        return 0 if run.end("KILLED") else 1
    return 0 if run.end(message["status"], message["reason"], message["time"], message["outcome"]) else 1


def _read(lines: TextIO, messages: Messages) -> None:
    for line in lines:
        if line.endswith("\n"):  # not what a killed training has left of one
            messages.put(json.loads(line))
    messages.put(None)


class Run:
    """What of a training the store has, and what it has still to take."""

    def __init__(self, identity: Identity, stage: str, started: int):
        from ablation_lab.tracking import runs  # mlflow takes seconds, in which messages are read already

        self.identity, self.epoch, self.told, self.flushed = identity, 0, False, 0.0
        self.live = runs.LiveRun(identity, stage, started)
        self.metrics: list[tuple[dict[str, float], int, int]] = []

    def add(self, message: dict[str, Any]) -> None:
        self.epoch = max(self.epoch, message["step"])
        self.metrics.append((message["metrics"], message["step"], message["time"]))

    def flush(self) -> bool:
        """Whether the store has taken all that it was told of."""
        taken = self._tolerant(lambda: self.live.log(self.metrics))
        self.flushed = time.monotonic()
        if taken:
            self.metrics = []
        return taken

    def end(self, status: str, reason: str = "", ended: int | None = None, outcome: str = "") -> bool:
        from ablation_lab.tracking import runs

        reason = reason or (runs.killed(self.epoch) if status == "KILLED" else "")
        return self.flush() and self._tolerant(lambda: self.live.end(status, reason, ended, outcome))

    def _tolerant(self, call) -> bool:
        try:
            call()
        except Exception as error:  # MLflow, SQLAlchemy and the network each have their own
            from ablation_lab.tracking import store

            if not self.told:
                print(f"warning: MLflow does not take {self.identity.name}: {store.first_line(error)}", file=sys.stderr)
            self.told = True
            return False
        return True


if __name__ == "__main__":
    sys.exit(main(sys.stdin))
