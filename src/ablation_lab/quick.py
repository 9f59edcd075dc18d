"""A quick check of a study: the real pipeline on a sliver of data, in a folder of its own."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ablation_lab import params
from ablation_lab.dvc_command import DVC, environment

FOLDER = "quick"
PICTURES = 24  # of each class, in each part
STEPS = 3
SEEDS = 2  # enough to see every table and band


def run(root: Path) -> int:
    """Run the current study's quick check; the project's own results stay as they are.

    Returns:
        The exit status of `dvc repro`.
    """
    params.load(root / "params.yaml")
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    for name in ("src", "stages", "networks", "studies"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    if not (folder / "weights").is_symlink():
        (folder / "weights").symlink_to(Path("..") / "weights")  # large files, perhaps
    shutil.copyfile(root / "dvc.yaml", folder / "dvc.yaml")
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with (root / "params.yaml").open(encoding="utf-8") as file:
        sliver = shrink(yaml.load(file), root)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(sliver, file)
    if not (folder / ".dvc").exists():
        subprocess.run([*DVC, "init", "--no-scm", "--quiet"], cwd=folder, env=environment(), check=True)
    status = subprocess.run([*DVC, "repro"], cwd=folder, env=environment(), check=False).returncode
    if status == 0:
        print(f"\nEverything works. Look at {FOLDER}/reports/report.html; its numbers mean nothing.")
    return status


def shrink(study: dict[str, Any], root: Path) -> dict[str, Any]:
    """The same study with few pictures, one short epoch and at most two seeds, marked as a quick check."""
    study["study"] |= {"quick": True, "name": f"{study['study']['name']}-quick"}
    study["data"]["limit"] = min(PICTURES, study["data"].get("limit") or PICTURES)
    if study["data"].get("path"):
        found = root / study["data"]["path"]  # a relative path is relative to the project, not to the folder in it
        study["data"]["path"] = str(found) if found.exists() else study["data"]["path"]
    study["seeds"] = study["seeds"][:SEEDS]
    second = (study.get("finetune") or {}).get("variants") or {}
    for settings in [study, *(patch for patch in [*study["variants"].values(), *second.values()] if patch)]:
        train = settings.get("train", {})
        if settings is study or "epochs" in train:
            train["epochs"] = 1
        if train.get("steps_per_epoch"):
            train["steps_per_epoch"] = min(STEPS, train["steps_per_epoch"])
        if settings is study:
            settings["train"] = train
    return study
