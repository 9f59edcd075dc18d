"""What does a study of a thousand cells cost, beside its trainings?

    python benchmarks/scale.py        # twenty minutes, nothing else running; needs no network

Makes a project with a study of 200 variants × 5 seeds on the handwritten digits whose cells are not trained but
fabricated, as the tests do, and kept as `ablab repro` keeps those that it has trained. Then measures, each in a process
of its own, the stages that run once (plan, evaluate, report, track, and track again with nothing to do), `ablab plan`
of the study that is up to date, `dvc status`, and `dvc repro` with nothing to do. The latter also of 15 cells.

Told are seconds, those that a processor worked, the peak of memory, and the size of the report.
"""

import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import Figure

CLASSES, EPOCHS, EACH = 10, 20, 40  # pictures of a class in each part
FEW = (5, 3)
PLAN, NOTHING = 20, 3  # seconds that are promised: of `ablab plan` of 1,000 cells, of `dvc repro` with 15 that are done


def study(variants: int, seeds: int) -> dict[str, Any]:
    """Small networks that all differ, half of them in their layers."""
    changes: dict[str, Any] = {"baseline": {}}
    for number in range(1, variants):
        units, rate = 17 + number // 2, round(0.001 * number, 3)
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
    import fabricate

    from ablation_lab import cell, files, runner

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


def timed(folder: Path, what: str, *command: str, at_most: float | None = None) -> list[Figure]:
    """Run a command of the environment: what it costs."""
    seconds, *others = common.cost(folder, what, sys.executable, "-m", *command)
    return [seconds._replace(at_most=at_most), *others]


def made(folder: Path, variants: int, seeds: int) -> list[Figure]:
    """A project with all cells of a study, and what it cost to keep them."""
    from ablation_lab import dvc_command, params

    raw = study(variants, seeds)
    common.project(folder, raw)
    found = timed(folder, "dvc repro plan, from nothing", "dvc", "repro", "plan")
    checked = params.validate(raw)
    skill = {name: 3 + 2 * number / variants for number, name in enumerate(checked.variants)}
    makers = {f"train@{name}-{seed}": partial(fabricated, name, seed, skill[name]) for name, seed in checked.cells}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    due = dvc_command.due(folder, list(makers))
    asked = time.perf_counter()
    if due != list(makers) or dvc_command.keep(folder, makers):
        sys.exit("not all cells are due, or not all could be kept")
    seconds, after = time.perf_counter() - asked, resource.getrusage(resource.RUSAGE_SELF)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        *found,
        Figure("which cells are due", asked - started, "s"),
        Figure("cells fabricated and kept", seconds, "s"),
        Figure("both, of a processor", busy, "s"),
    ]


def measure(variants: int = 200, seeds: int = 5, place: Path | None = None) -> list[Figure]:
    """All figures of a study of so many cells.

    Args:
        place: a new folder to work in and to leave; a temporary one by default.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = (place or Path(temporary)) / "project"
        found = [Figure("cells", variants * seeds), *made(folder, variants, seeds)]
        found += timed(folder, "stage plan", "stages.plan")
        timed(folder, "stage select", "stages.select")
        for name in ("evaluate", "report", "track"):
            found += timed(folder, f"stage {name}", f"stages.{name}")
        found += timed(folder, "stage track, nothing to do", "stages.track")
        found += timed(folder, "ablab plan, nothing to do", "ablation_lab.cli", "plan", at_most=PLAN)
        found += timed(folder, "dvc repro of the stages after", "dvc", "repro")
        found += timed(folder, "dvc repro, nothing to do", "dvc", "repro")
        found += timed(folder, "dvc status", "dvc", "status")
        written = [path.stat().st_size for path in (folder / "reports").rglob("*") if path.is_file()]
        return [
            *found,
            Figure("report.html", (folder / "reports/report.html").stat().st_size / 1e6, "MB"),
            Figure("reports/", sum(written) / 1e6, "MB"),
            Figure("files in reports/", len(written)),
        ]


def nothing_to_do(variants: int = FEW[0], seeds: int = FEW[1]) -> list[Figure]:
    """`dvc repro` of a small study that is up to date."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        made(folder, variants, seeds)
        timed(folder, "dvc repro of the stages after", "dvc", "repro")
        what = f"dvc repro of {variants * seeds} cells, nothing to do"
        return timed(folder, what, "dvc", "repro", at_most=NOTHING)[:1]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variants", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a new folder to work in and to leave, to look at the report")
    asked = parser.parse_args()
    size = (6, 2) if asked.small else (asked.variants, asked.seeds)
    common.finish([*nothing_to_do(), *measure(*size, asked.keep)], asked)


if __name__ == "__main__":
    main()
