"""What does MLflow cost a training?

    python benchmarks/tracking.py        # a quarter of an hour, nothing else running; needs no network

Trains a cell of the digits for 20 epochs, with its run in a new store, and then for ten minutes. Of each is told what
logging has cost at most: the seconds that the training waited for it, and the processor seconds of the process that
logs, which go on beside the training where a core is free. `ablab sync` is timed for one cell, with its imports.
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

from conftest import TINY, new_project, write_params  # noqa: E402

from ablation_lab import training  # noqa: E402
from ablation_lab.tracking import live  # noqa: E402
from stages import download, plan, preprocess  # noqa: E402

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


def cell(epochs: int) -> dict[str, float]:
    """Train a cell; seconds in all, waited for logging, and of the logging process."""
    global waited
    study = TINY | {"data": TINY["data"] | {"limit": None}, "train": TINY["train"] | {"epochs": epochs}}
    write_params(Path(), study | {"seeds": [0]})
    plan.main()
    waited, before = 0.0, resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    training.run_cell("baseline", 0)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"epochs": epochs, "seconds": seconds, "waited": waited, "busy": busy}


def sync() -> float:
    """Seconds of `ablab sync` for the one cell."""
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
        short = cell(20)
        long = cell(round(asked.minutes * 60 / (short["seconds"] / 20)))
        for name, one in (("short", short), ("long", long)):
            cost = one["waited"] + one["busy"]
            print(
                f"{name}: {one['epochs']} epochs in {one['seconds']:.1f} s; waited for logging {one['waited']:.2f} s, "
                f"the process that logs {one['busy']:.1f} s of a processor: together at most "
                f"{100 * cost / one['seconds']:.1f} %, waited alone {100 * one['waited'] / one['seconds']:.2f} %"
            )
        print(json.dumps({"live run completed, s a cell": sync(), "nothing to do": sync()}))
        shutil.rmtree("mlruns")
        print(json.dumps({"run made from files, s a cell": sync()}))


if __name__ == "__main__":
    main()
