"""The second phase of a study: which variant of the first one goes on, and what is done with it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ablation_lab import cell, files
from ablation_lab.errors import LabError
from ablation_lab.params import Params

CHOICE = "start/choice.json"  # beside a plan it might have a variant's name
ACCURACY, LOSS = "validation_accuracy", "validation_loss"


def select(study: Params, root: Path = Path()) -> dict[str, Any]:
    """Choose the variant with the best validation accuracy, and write `selection/`.

    There are `start/choice.json`, the second phase's plans as they are with the chosen variant, and for each seed what
    its cells start from.

    Returns:
        What it holds: `variant` and `candidates`, each with the means over seeds of its `validation_accuracy`
        and `validation_loss`, by which equal accuracies are told apart. `variant` is null without a second phase.

    Raises:
        LabError: when every candidate diverged.
    """
    choice = choose(study, root)
    variant = choice["variant"]
    if study.second and variant is None:
        raise LabError(
            f"finetune.select: Expected a variant that did not diverge. Found: none of {', '.join(study.second)}. "
            "Without `finetune` there is a report of phase one."
        )
    with files.whole(root / cell.SELECTION) as folder:
        files.write_json(folder / CHOICE, choice)
        if variant:
            shutil.copytree(root / "plan" / "second" / variant, folder, dirs_exist_ok=True)
            for seed in study.seeds:
                path = cell.folder(variant, seed, root) / cell.WEIGHTS
                if not path.exists():
                    raise files.missing(path)
                start = {"variant": variant, "sha256": files.sha256(path)}
                files.write_json(folder / "start" / f"seed-{seed}.json", start)  # as cell.start_file
    return choice


def choose(study: Params, root: Path = Path()) -> dict[str, Any]:
    """What `select` would choose, no variant where every candidate diverged; nothing is written."""
    candidates = {name: _means(name, study.seeds, root) for name in study.second}
    ranks = {name: (-means[ACCURACY], means[LOSS]) for name, means in candidates.items() if means[ACCURACY] is not None}
    return {"variant": min(ranks, key=lambda name: ranks[name]) if ranks else None, "candidates": candidates}


def both_phases(study: Params, root: Path = Path()) -> Params:
    """The study with the variants of its second phase, as they are since the selection."""
    if not study.second:
        return study
    path = root / cell.SELECTION / CHOICE
    selected = files.read_json(path)["variant"]
    if selected not in study.second:
        raise LabError(f"{path}: Expected one of {', '.join(study.second)}. Found: {selected}. Run `dvc repro`.")
    return study.with_second(selected)


def _means(variant: str, seeds: list[int], root: Path) -> dict[str, Any]:
    found = [files.read_json(cell.validation_file(variant, seed, root)) for seed in seeds]
    values = {key: [one[key] for one in found] for key in (ACCURACY, LOSS)}
    return {key: None if None in known else float(np.mean(known)) for key, known in values.items()}
