"""What does MLflow cost a training?

    python benchmarks/tracking.py        # a quarter of an hour, nothing else running; needs no network

Trains four cells of the digits for 20 epochs, with their runs in a new store, and then one for ten minutes. Of each is
told what logging has cost at most: the seconds that the training waited for it, and the processor seconds of the
process that logs, which go on beside the training where a core is free. Then `ablab sync` is timed, which completes or
makes the runs: in all, and when there is nothing to do, which is the time of its imports.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import one_thread  # noqa: E402, F401
from conftest import TINY, new_project, write_params  # noqa: E402

from ablation_lab import runner  # noqa: E402
from ablation_lab.tracking import live  # noqa: E402
from stages import download, plan, preprocess  # noqa: E402

FILTERS = 640  # an epoch of about a second: ten minutes are hundreds of them
SEEDS = 4
waited = 0.0


class Timed(live.CellRun):
    """A run whose every call is timed."""

    def __init__(self, identity: live.Identity):
        self._clock(super().__init__, identity)

    def metrics(self, *arguments) -> None:
        self._clock(super().metrics, *arguments)

    def end(self, *arguments) -> None:
        self._clock(super().end, *arguments)

    def _clock(self, call, *arguments) -> None:
        global waited
        started = time.perf_counter()
        call(*arguments)
        waited += time.perf_counter() - started


def cell(epochs: int, seed: int) -> dict[str, float]:
    """Train a cell; seconds in all, waited for logging, and of the logging process."""
    global waited
    study = TINY | {"data": TINY["data"] | {"limit": None}, "train": TINY["train"] | {"epochs": epochs}}
    study["model"] = TINY["model"] | {"blocks": {"block1": {"filters": FILTERS}}}
    write_params(Path(), study | {"seeds": [*range(SEEDS)]})
    plan.main()
    waited, before = 0.0, resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    runner.run_cell("baseline", seed)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"epochs": epochs, "seconds": seconds, "waited": waited, "busy": busy}


def sync() -> float:
    """Seconds of `ablab sync`."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ablation_lab.cli", "sync"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long the long training is; 10 by default")
    asked = parser.parse_args()
    live.CellRun = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as place:
        folder = new_project(Path(place) / "project")
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder / "src")
        for key in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            os.environ.pop(key, None)
        write_params(Path(), TINY | {"data": TINY["data"] | {"limit": None}})
        for stage in (download, preprocess):
            stage.main()
        shorts = [cell(20, seed) for seed in range(SEEDS)]
        found = {"live runs completed": sync(), "nothing to do": sync()}
        shutil.rmtree("mlruns")
        found["runs made from files"] = sync()
        print(json.dumps(found | {"cells": SEEDS}))
        short = {key: sum(one[key] for one in shorts) / SEEDS for key in shorts[0]}
        long = cell(round(asked.minutes * 60 / (min(one["seconds"] for one in shorts) / 20)), 0)
        for name, one in (("short", short), ("long", long)):
            cost = one["waited"] + one["busy"]
            print(
                f"{name}: {one['epochs']:.0f} epochs in {one['seconds']:.1f} s; waited for logging "
                f"{one['waited']:.2f} s, the process that logs {one['busy']:.1f} s of a processor: together at most "
                f"{100 * cost / one['seconds']:.1f} %, waited alone {100 * one['waited'] / one['seconds']:.2f} %"
            )


if __name__ == "__main__":
    main()
