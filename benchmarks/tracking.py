"""What does MLflow cost a training?

    python benchmarks/tracking.py        # a quarter of an hour, nothing else running; needs no network

Trains four cells of the digits for 20 epochs, with their runs in a new store, and then one for ten minutes. Of each is
told what logging has cost at most: the seconds that the training waited for it, and the processor seconds of the
process that logs, which go on beside the training where a core is free. Then `ablab sync` is timed, which completes or
makes the runs: in all, and when there is nothing to do, which is the time of its imports.
"""

import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import one_thread  # noqa: E402, F401
from conftest import TINY, write_params  # noqa: E402

from ablation_lab import runner  # noqa: E402
from ablation_lab.tracking import live  # noqa: E402
from benchmarks import common  # noqa: E402
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
    return common.call(Path.cwd(), sys.executable, "-m", "ablation_lab.cli", "sync")


def measure(minutes: float) -> list[common.Figure]:
    """Short trainings and one of so many minutes."""
    live.CellRun = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as place:
        folder = common.project(Path(place) / "project", TINY | {"data": TINY["data"] | {"limit": None}})
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder / "src")
        for key in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            os.environ.pop(key, None)
        for stage in (download, preprocess):
            stage.main()
        shorts = [cell(20, seed) for seed in range(SEEDS)]
        synced = {"live runs to complete": sync(), "nothing to do": sync()}
        shutil.rmtree("mlruns")
        synced["runs to make from files"] = sync()
        figures = [common.Figure(f"`ablab sync`, {SEEDS} cells, {what}", spent, "s") for what, spent in synced.items()]
        short = {key: sum(one[key] for one in shorts) / SEEDS for key in shorts[0]}
        long = cell(round(minutes * 60 / (min(one["seconds"] for one in shorts) / 20)), 0)
        os.chdir(ROOT)
    for one in (short, long):
        what = f"training of {one['epochs']:.0f} epochs"
        both = one["waited"] + one["busy"]
        figures += [
            common.Figure(what, one["seconds"], "s"),
            common.Figure(f"{what}: waited for logging", one["waited"], "s"),
            common.Figure(f"{what}: the process that logs, of a processor", one["busy"], "s"),
            common.Figure(f"{what}: both together, of the training", 100 * both / one["seconds"], "%"),
        ]
    return figures


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--minutes", type=float, help="how long the long training is; 10 by default")
    asked = parser.parse_args()
    common.finish(measure(asked.minutes or (0.2 if asked.small else 10)), asked)


if __name__ == "__main__":
    main()
