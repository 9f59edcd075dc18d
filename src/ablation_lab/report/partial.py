"""A report of a study that isn't finished: `reports/partial/`, from the cells that are there."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablation_lab import cell, evaluation, files, selection
from ablation_lab.errors import LabError
from ablation_lab.params import Params, Variant, canonical_json
from ablation_lab.report import results, summary, writing
from ablation_lab.words import counted

FOLDER = Path("reports") / writing.PARTIAL
DATA = Path("data/processed")
Cell = tuple[str, int]


def write_partial(study: Params, root: Path, failed: Mapping[Cell, str] | None = None) -> str:
    """Write `reports/partial/`: the report of the cells that are trained and up to date, marked as partial.

    Nothing is trained, and nothing else in the project is written. The cells that are missing are named in the report
    and in results.json, under `partial`: of each its name (`cell`), `state` (`missing`, `failed` or `out of date`) and
    `reason`. A variant without any cell is left out, the baseline excepted.

    Args:
        study: as params.yaml has it, the first phase alone.
        failed: the cells whose training has just failed, each with the reason.

    Returns:
        what the report is of, and its table of variants, as plain text.

    Raises:
        LabError: when no cell is there.
    """
    whole, lacking = _both_phases(study, root)
    missing = lacking | _missing(whole, root)
    last = {one: reason for one, reason in _failed_before(root).items() if missing.get(one, ("",))[0] == "missing"}
    missing |= {one: ("failed", reason) for one, reason in (last | dict(failed or {})).items() if one in missing}
    there = [one for one in whole.cells if one not in missing]
    if not there:
        (name, seed), (state, reason) = next(iter(missing.items()))
        raise LabError(
            f"cells: Expected at least one trained cell. Found: none; {name}-{seed} is {state}"
            f"{reason and f' ({reason})'}. Run `ablab repro`."
        )
    names = [name for name in whole.variants if name == whole.study.baseline or name in {name for name, _ in there}]
    shown = replace(
        whole,
        variants={name: _standing_alone(whole.variants[name], names) for name in names},
        seeds=[seed for seed in whole.seeds if seed in {seed for _, seed in there}],
        second=whole.second if len(whole.variants) > len(study.variants) else {},
    )
    partial = {"cells": len(there), "of": len(there) + len(missing), "missing": _listed(missing)}
    with tempfile.TemporaryDirectory() as folder:
        evaluated = Path(folder) / "evaluation"
        evaluation.evaluate(shown, root, there, evaluated)
        material = results.gather(shown, root, evaluated, partial)
        table = writing.write(shown, material, root, root / FOLDER)
    absent = "".join(f"\n{cells}: {reason}" for cells, reason in summary.missing(material.results))
    told = f"{len(there)} of {counted(len(there) + len(missing), 'cell')}"
    return f"{table}\n{absent}\n\nPartial report: {FOLDER}/report.html, {told}"


def _failed_before(root: Path) -> dict[Cell, str]:
    """The cells that the last partial report names as failed, each with the reason: a later one keeps it."""
    try:
        missing = files.read_json(root / FOLDER / "results.json")["partial"]["missing"]
    except (LabError, KeyError, TypeError):
        return {}
    named = ((*one["cell"].rpartition("-")[::2], one["reason"]) for one in missing if one["state"] == "failed")
    return {(name, int(seed)): reason for name, seed, reason in named}


def _listed(missing: Mapping[Cell, tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"cell": f"{name}-{seed}", "state": state, "reason": reason}
        for (name, seed), (state, reason) in missing.items()
    ]


def _both_phases(study: Params, root: Path) -> tuple[Params, dict[Cell, tuple[str, str]]]:
    """The study with its second phase, where the first one is complete; else the second phase's cells, as missing."""
    if not study.second:
        return study, {}
    try:
        chosen = selection.choose(study, root)["variant"]
        if chosen and files.read_json(root / cell.SELECTION / selection.CHOICE)["variant"] == chosen:
            return study.with_second(chosen), {}
        reason = "no variant is selected yet"
    except LabError:
        reason = "the first phase is not complete"
    return study, {(name, seed): ("missing", reason) for name in study.second_names for seed in study.seeds}


def _missing(study: Params, root: Path) -> dict[Cell, tuple[str, str]]:
    """The cells that are not there, or not up to date, with their state and, where it is known, the reason."""
    made_with = root / DATA / "settings.json"
    settings = study.data.model_dump()
    same_data = made_with.exists() and settings | files.read_json(made_with) == settings
    digest = files.read_json(root / DATA / "card.json")["digest"] if same_data else None
    code = cell.training_code(root)
    found: dict[Cell, tuple[str, str]] = {}
    for name, seed in study.cells:
        folder, plan = cell.folder(name, seed, root), cell.plan_file(name, root)
        if not (folder / cell.RESULT).exists():
            found[name, seed] = ("missing", "")
        elif digest is None:
            found[name, seed] = ("out of date", "its data settings in params.yaml have changed")
        elif not plan.exists() or not _is_planned(study.variants[name], files.read_json(plan)):
            found[name, seed] = ("out of date", "its settings in params.yaml have changed")
        elif not _has_the_files(files.read_json(plan), root):
            found[name, seed] = ("out of date", "its own code or weights have changed")
        elif not cell.is_finished(folder, cell.cell_hash(files.sha256(plan), seed, digest, code)):
            found[name, seed] = ("out of date", "it was trained with other settings, data or code")
    return found


def _is_planned(variant: Variant, plan: Mapping[str, Any]) -> bool:
    """Whether a plan is of a variant as params.yaml has it now."""
    resolved = variant.resolved()
    return canonical_json(resolved) == canonical_json({key: plan.get(key) for key in resolved})


def _has_the_files(plan: Mapping[str, Any], root: Path) -> bool:
    """Whether the user's code and weights that a plan was made with are as they were."""
    used = [(root / path, digest) for path, digest in plan.get("code", {}).items()]
    weights = plan.get("weights")
    if weights and weights["url"] is None:
        place = files.root() / plan["model"]["weights"]
        used += [(place, weights["hash"].removeprefix("sha256:"))] if place.is_file() else []  # else a cache has them
    return all(path.is_file() and files.sha256(path) == digest for path, digest in used)


def _standing_alone(variant: Variant, names: list[str]) -> Variant:
    """A variant that is compared with another one only where the other is shown."""
    return variant if variant.compared_with in names else replace(variant, compared_with=None)
