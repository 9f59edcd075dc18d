"""What benchmarks share: a project of its own to measure in, commands with their seconds, figures with their bounds."""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ROOT / "benchmarks" / "plain"  # scripts without Ablation Lab, to compare with
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


class Figure(NamedTuple):
    """A number that a benchmark has found.

    Args:
        what: what it is of.
        value: the median where it was measured several times.
        unit: nothing for a ratio.
        at_most: the bound, where something is promised.
        values: of each time.
    """

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    values: Sequence[float] = ()

    @property
    def measured(self) -> str:
        told = number(self.value, self.unit)
        if len(self.values) > 1:
            told += f" ({number(min(self.values))} to {number(max(self.values))}, n = {len(self.values)})"
        return told

    @property
    def bound(self) -> str:
        """The bound and whether it holds; nothing where there is none."""
        if self.at_most is None:
            return ""
        told = f"at most {self.at_most:,g} {self.unit}".rstrip()
        return f"{told}: {'met' if self.value <= self.at_most else '**missed**'}"


def median(what: str, values: Sequence[float], unit: str = "", at_most: float | None = None) -> Figure:
    """What was measured several times."""
    return Figure(what, statistics.median(values), unit, at_most, list(values))


def ratio(what: str, ours: Sequence[float], theirs: Sequence[float], at_most: float | None = None) -> Figure:
    """The ratio of two medians; `values` has the ratios of those that were measured one after the other."""
    value = statistics.median(ours) / statistics.median(theirs)
    return Figure(what, value, "", at_most, [one / other for one, other in zip(ours, theirs, strict=True)])


def number(value: float, unit: str = "") -> str:
    """Three digits, or all of a large number's, or of one that is counted."""
    if isinstance(value, int) or not value:
        told = f"{value:,.0f}"
    elif abs(value) < 0.001:
        told = f"{value:.1e}"
    else:
        told = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{told} {unit}".rstrip()


def parser(document: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="a minute, to see that it works; the figures mean nothing")
    made.add_argument("--figures", type=Path, help="a JSON file to write the figures to")
    return made


def finish(figures: Sequence[Figure], asked: argparse.Namespace) -> None:
    """Print what was found, and write it where `--figures` wants it."""
    for one in figures:
        print(f"{one.what}: {one.measured}{one.bound and f', {one.bound}'}", flush=True)
    if asked.figures:
        kept = [{key: value for key, value in one._asdict().items() if value not in ("", None, ())} for one in figures]
        asked.figures.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def project(folder: Path, study: dict[str, Any]) -> Path:
    """A fresh clone of this project with a study of its own."""
    from conftest import new_project, write_params  # with pytest and MLflow

    folder.parent.mkdir(parents=True, exist_ok=True)
    new_project(folder)
    write_params(folder, study)
    return folder


def study(
    data: dict[str, Any],
    filters: Sequence[int],
    units: int,
    train: dict[str, Any],
    variants: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The params.yaml of a network of blocks and a dense layer, with Adam: that of `plain/network.py`."""
    return {
        "study": {"name": "benchmark", "baseline": "baseline"},
        "data": data,
        "input": {},
        "model": {
            "builder": "cnn",
            "padding": "same",
            "dropout": 0.25,
            "head_dropout": 0.5,
            "blocks": {f"block{place}": {"filters": width} for place, width in enumerate(filters, 1)},
            "head": {"dense1": {"units": units}},
        },
        "train": {"optimizer": {"name": "adam", "learning_rate": 0.001}} | train,
        "seeds": [0],
        "variants": {"baseline": {}} | (variants or {}),
    }


def environment(folder: Path) -> dict[str, str]:
    """What a command in a project is called with: the project's own code, and nothing of the user's settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "ABLAB_"))}
    clean |= {"PYTHONPATH": str(folder / "src"), "DVC_NO_ANALYTICS": "1", "KERAS_BACKEND": "tensorflow"}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return clean


def call(folder: Path, *command: str) -> float:
    """Run a command there, its output in log.txt; the seconds that it took."""
    return _run(folder, *command)[0]


def cost(folder: Path, what: str, *command: str) -> list[Figure]:
    """Run a command there: its seconds, those that a processor worked, and the peak of its largest process' memory."""
    seconds, used = _run(folder, *command)
    return [
        Figure(what, seconds, "s"),
        Figure(f"{what}, of a processor", used.ru_utime + used.ru_stime, "s"),
        Figure(f"{what}, memory at most", used.ru_maxrss / 2**10, "MiB"),
    ]


def _run(folder: Path, *command: str) -> tuple[float, resource.struct_rusage]:
    log = folder / "log.txt"
    started = time.perf_counter()
    with log.open("a") as opened:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=opened, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)  # of this process and those that it has waited for
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        told = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{told}")
    return seconds, used


def warm(folder: Path) -> None:
    """Let the libraries be read from the disk once, so that whoever comes first doesn't wait for it."""
    call(folder, sys.executable, "-c", "import keras, mlflow, sklearn, statsmodels.api, tensorflow, dvc.repo")


def pictures(folder: Path, shape: tuple[int, int, int], counts: dict[str, int], classes: int = 10) -> None:
    """Write random pictures that can be learned, as the stage `preprocess` leaves them, a few at a time.

    Args:
        folder: `data/processed` of a project.
        shape: height, width, channels.
        counts: pictures of each part.
    """
    from ablation_lab import files

    folder.mkdir(parents=True)
    total, random = sum(counts.values()), np.random.default_rng(0)
    labels = random.integers(classes, size=total, dtype=np.int32)
    typical = random.integers(128, size=(classes, *shape), dtype=np.uint8)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (total, *shape))
    block = max(1, (64 << 20) // math.prod(shape))
    for start in range(0, total, block):
        chosen = labels[start : start + block]
        images[start : start + block] = typical[chosen] + random.integers(
            128, size=(len(chosen), *shape), dtype=np.uint8
        )
    del images  # what is mapped is written
    np.save(folder / "labels.npy", labels)
    order, start = random.permutation(total), 0
    names, class_counts = [f"class{number}" for number in range(classes)], {}
    for part, count in counts.items():
        indices = np.sort(order[start : start + count])
        np.save(folder / f"{part}.npy", indices)
        found = np.bincount(labels[indices], minlength=classes).tolist()
        class_counts[part] = dict(zip(names, found, strict=True))
        start += count
    card = {"name": "random", "classes": names, "image_shape": shape, "counts": counts, "class_counts": class_counts}
    split = {"validation": counts["validation"] / total, "test": counts["test"] / total, "seed": 0}
    files.write_json(folder / "card.json", card | {"split": split, "digest": f"random {shape} {counts}"})
