"""Is a cell's training loop as fast as a plain `fit` on arrays?

    python benchmarks/loop.py        # 25 minutes of two cores, nothing else running; needs no network

Both train the same network on the same random pictures, with one thread, Adam and no XLA: a cell as `dvc repro` trains
it, from pictures mapped from disk, with deterministic operations, all callbacks, a checkpoint after each epoch and
MLflow's run; and `benchmarks/plain/fit.py`, `fit` on uint8 arrays in memory with `shuffle=True`, Keras' own Adam and
nothing else. Each training is a process of its own, and the two take turns, five times unless
`--times` says otherwise.

Timed is the whole of `fit`, with its first batch's tracing, validation after each epoch and all that callbacks do; on
the cell's side also the making of its batches' data sets. The epochs after the first are told apart: on the cell's side
the `epoch_seconds` of its results, which end before the checkpoint is written, on the other side those of a callback.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common  # noqa: E402


class Size(NamedTuple):
    shape: tuple[int, int, int]
    pictures: int  # of the training part; the validation part has a fifth
    filters: tuple[int, ...]
    units: int
    batch: int
    epochs: int


SIZES = {
    "digits": Size((8, 8, 1), 1078, (16, 32), 64, batch=64, epochs=20),
    "Fashion-MNIST": Size((28, 28, 1), 20_000, (32,), 100, batch=500, epochs=4),
    "CIFAR-10": Size((32, 32, 3), 5000, (48, 96, 192), 128, batch=64, epochs=4),
}


def small_sizes() -> dict[str, Size]:
    """The sizes with little to do."""
    return {name: size._replace(pictures=min(size.pictures, 1000), epochs=2) for name, size in SIZES.items()}


def project(folder: Path, size: Size) -> Path:
    """A project with a size's pictures and plan."""
    data = {"dataset": "digits", "path": None}  # in place of which the random pictures are laid
    train = {"epochs": size.epochs, "batch_size": size.batch}
    common.project(folder, common.study(data, size.filters, size.units, train))
    counts = {"train": size.pictures, "validation": size.pictures // 5, "test": size.pictures // 5}
    common.pictures(folder / "data/processed", size.shape, counts)
    common.call(folder, sys.executable, "-m", "stages.plan")
    return folder


def plain(folder: Path, size: Size, *jit: str) -> dict[str, Any]:
    """The seconds of the plain script's `fit` and of its epochs."""
    settings = {"filters": size.filters, "units": size.units, "batch": size.batch, "epochs": size.epochs, "threads": 1}
    found = folder / "plain.json"
    script = [sys.executable, str(common.PLAIN / "fit.py"), str(folder / "data/processed"), json.dumps(settings)]
    common.call(folder, *script, str(found), *jit)
    return json.loads(found.read_text())


def cell(folder: Path) -> dict[str, Any]:
    """The same of the cell."""
    common.call(folder, sys.executable, str(Path(__file__).resolve()), "--cell")
    return json.loads((folder / "cell.json").read_text())


def train() -> None:
    """Train the cell of the current folder as its stage does, with a clock around `fit`; called in its own process."""
    from ablation_lab import pipeline, runner
    from ablation_lab.backend import keras

    fit, batches = keras.Model.fit, pipeline.training_batches
    clock: list[float] = []

    def timed_batches(*arguments: Any) -> Any:
        clock.append(time.perf_counter())
        return batches(*arguments)

    def timed_fit(*arguments: Any, **named: Any) -> Any:
        done = fit(*arguments, **named)
        clock.append(time.perf_counter())
        return done

    keras.Model.fit, pipeline.training_batches = timed_fit, timed_batches
    runner.run_cell("baseline", 0)
    epochs = json.loads(Path("cells/baseline/seed-0/timing.json").read_text())["epoch_seconds"]
    started, ended = clock
    Path("cell.json").write_text(json.dumps({"fit": ended - started, "epochs": epochs}))


def measure(sizes: dict[str, Size], times: int) -> list[common.Figure]:
    """Both ways, in turns, for each size."""
    figures, seconds = [], []
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as place:
            folder = project(Path(place) / "project", size)
            common.warm(folder)
            found = [(cell(folder), plain(folder, size)) for _ in range(times)]
        ours, theirs = ([one["fit"] for one in them] for them in zip(*found, strict=True))
        figures.append(common.ratio(f"{name}: cell : plain `fit`", ours, theirs, at_most=1.05))
        later = ([sum(one["epochs"][1:]) for one in them] for them in zip(*found, strict=True))
        figures.append(common.ratio(f"{name}: the same, epochs after the first", *later))
        seconds.append(common.median(f"{name}: `fit` of the cell, {size.epochs} epochs", ours, "s"))
        seconds.append(common.median(f"{name}: plain `fit`", theirs, "s"))
    return figures + seconds


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)}; all by default")
    parser.add_argument("--times", type=int, help="how often each way is measured; 5 by default")
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cell:
        return train()
    sizes = small_sizes() if asked.small else SIZES
    if unknown := set(asked.sizes) - set(sizes):
        parser.error(f"Expected some of {', '.join(sizes)}. Found: {', '.join(sorted(unknown))}.")
    chosen = {name: sizes[name] for name in asked.sizes or sizes}
    common.finish(measure(chosen, asked.times or (1 if asked.small else 5)), asked)


if __name__ == "__main__":
    main()
