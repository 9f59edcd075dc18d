"""What does a study of a thousand cells cost, beside its trainings?

    python benchmarks/scale.py        # ten minutes, little else running; needs no network

Makes a project with a study of 200 variants × 5 seeds on the handwritten digits whose cells are not trained but
fabricated, as the tests do, and kept as `ablab repro` keeps those that it has trained. Then measures, each in a process
of its own, the stages that run once (plan, evaluate, report, track, and track again with nothing to do), `ablab plan`
of the study that is up to date, `dvc status`, and `dvc repro` with nothing to do. The latter also of 15 cells.

Printed are seconds, those that a processor worked, the peak of memory, and the size of the report.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fabricate  # noqa: E402
from conftest import new_project, write_params  # noqa: E402

from ablation_lab import cell, dvc_command, files, params, runner  # noqa: E402

CLASSES, EPOCHS, EACH = 10, 20, 40  # pictures of a class in each part
FEW = (5, 3)


def study(variants: int, seeds: int) -> dict[str, Any]:
    """Small networks that all differ, half of them in their layers."""
    changes: dict[str, Any] = {"baseline": {}}
    for number in range(1, variants):
        units, rate = 16 + number // 2, round(0.001 * number, 3)
        head = {"head": {"dense1": {"units": units}}} if number % 2 else {"head_dropout": rate}
        changes[f"variant_{number:03}"] = {"model": head}
    return {
        "study": {"name": "scale", "baseline": "baseline"},
        "data": {
            "dataset": "digits",
            "path": None,
            "limit": EACH,
            "split": {"validation": 0.25, "test": 0.25, "seed": 0},
        },
        "input": {},
        "model": {"builder": "mlp", "head_dropout": 0.5, "head": {"dense1": {"units": 16}, "dense2": {"units": 16}}},
        "train": {"epochs": EPOCHS},
        "seeds": list(range(seeds)),
        "variants": changes,
    }


def fabricated(variant: str, seed: int, skill: float) -> bool:
    """What a training would have left of a cell; in the project's folder."""
    pictures = CLASSES * EACH
    fabricate.cell(Path(), variant, seed, CLASSES, pictures, EPOCHS, skill, diverged=False)
    folder = cell.folder(variant, seed)
    (folder / cell.WEIGHTS).write_bytes(f"{variant}-{seed}".encode() * 4000)
    files.write_json(folder / cell.ARCHITECTURE, {})
    result = files.read_json(folder / cell.RESULT) | runner.identify(variant, seed)
    result |= {"validation_accuracy": 0.5 + skill / 20, "validation_loss": 1 / skill}
    files.write_json(folder / cell.RESULT, result)
    made = {"ablab.python": "3", "git.commit": "0" * 40}
    timing = files.read_json(folder / cell.TIMING) | {"started": 1.7e9 + 60 * seed, "made": made}
    files.write_json(folder / cell.TIMING, timing)
    cell.write_validation(variant, seed, result)
    return True


def timed(folder: Path, what: str, *command: str) -> dict[str, Any]:
    """Run a command of the environment: its seconds, those that a processor worked, and its peak of memory."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment(folder), check=False, capture_output=True
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout.decode()}\n{done.stderr.decode()}")
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # The peak is that of the largest process so far: of the first command that needs most.
    found = {"what": what, "seconds": seconds, "processor": busy, "megabytes": after.ru_maxrss / 2**10}
    print(f"{what:<34} {seconds:7.1f} s {busy:7.1f} s of a processor {found['megabytes']:7,.0f} MiB", flush=True)
    return found


def environment(folder: Path) -> dict[str, str]:
    here = {key: value for key, value in dvc_command.environment().items() if not key.startswith(("MLFLOW_", "ABLAB_"))}
    return here | {"PYTHONPATH": str(folder / "src")}


def made(folder: Path, variants: int, seeds: int) -> list[dict[str, Any]]:
    """A project with all cells of a study, and what it cost to keep them."""
    new_project(folder)
    raw = study(variants, seeds)
    write_params(folder, raw)
    found = [timed(folder, "dvc repro plan, from nothing", "dvc", "repro", "plan")]
    checked = params.validate(raw)
    skill = {name: 3 + 2 * number / variants for number, name in enumerate(checked.variants)}
    makers = {f"train@{name}-{seed}": partial(fabricated, name, seed, skill[name]) for name, seed in checked.cells}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    due = dvc_command.due(folder, list(makers))
    asked = time.perf_counter()
    assert due == list(makers)
    assert dvc_command.keep(folder, makers) == []
    seconds, after = time.perf_counter() - asked, resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    count = f"{len(makers):,} cells"
    print(f"{count}: {asked - started:.1f} s to ask which are due, {seconds:.1f} s to make and keep them", flush=True)
    rest = {"processor": busy, "megabytes": after.ru_maxrss / 2**10}
    kept = {"what": "cells made and kept", "seconds": seconds}
    return [*found, {"what": "which cells are due", "seconds": asked - started} | rest, kept | rest]


def measure(variants: int = 200, seeds: int = 5, place: Path | None = None) -> list[dict[str, Any]]:
    """All figures, one row a measurement: `what`, `seconds`, `processor` (seconds), `megabytes`; as they are printed.

    Args:
        place: a new folder to work in and to leave; a temporary one by default.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = (place or Path(temporary)) / "project"
        found = made(folder, variants, seeds)
        found.append(timed(folder, "stage plan", "stages.plan"))
        for name in ("evaluate", "report", "track"):
            if name == "evaluate":
                timed(folder, "stage select", "stages.select")
            found.append(timed(folder, f"stage {name}", f"stages.{name}"))
        found.append(timed(folder, "stage track, nothing to do", "stages.track"))
        found.append(timed(folder, "ablab plan, nothing to do", "ablation_lab.cli", "plan"))
        found.append(timed(folder, "dvc repro of the stages after", "dvc", "repro"))
        found.append(timed(folder, "dvc repro, nothing to do", "dvc", "repro"))
        found.append(timed(folder, "dvc status", "dvc", "status"))
        page = (folder / "reports/report.html").stat().st_size / 1e6
        written = [path.stat().st_size for path in (folder / "reports").rglob("*") if path.is_file()]
        print(f"report.html {page:.1f} MB; reports/ {sum(written) / 1e6:.1f} MB in {len(written):,} files")
        return found


def nothing_to_do(variants: int = FEW[0], seeds: int = FEW[1]) -> list[dict[str, Any]]:
    """`dvc repro` of a small study that is up to date."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        made(folder, variants, seeds)
        timed(folder, "dvc repro of the stages after", "dvc", "repro")
        return [timed(folder, f"dvc repro of {variants * seeds} cells, nothing to do", "dvc", "repro")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a new folder to work in and to leave, to look at the report")
    asked = parser.parse_args()
    nothing_to_do()
    measure(asked.variants, asked.seeds, asked.keep)


if __name__ == "__main__":
    main()
