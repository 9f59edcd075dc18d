"""Folders with names that nobody should trust, from the disk to the plan."""

import json
import zipfile

import pytest
from conftest import TINY, write_params
from fabricate import FOLDERS
from PIL import Image

from stages import download, plan, preprocess


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_names_of_folders_are_text_and_nothing_else(kind, tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    top, project = tmp_path / "$(touch pwned) <b>", tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    # In an archive a \ is taken for what Windows means by it.
    folders = [name for name in FOLDERS if kind == "folder" or not name.startswith("\\")]
    for number, folder in enumerate(folders):
        (top / folder).mkdir(parents=True)
        for name in range(4):
            picture = Image.new("L", (8, 8), number * 4 + name)
            picture.save(top / folder / f"{name} {folders[number - 1]}.png")
    path = top
    if kind == "zip":
        path = tmp_path / f"{top.name}.zip"
        with zipfile.ZipFile(path, "w") as packed:
            for file in top.rglob("*.png"):
                packed.write(file, file.relative_to(top))
    split = {"validation": 0.25, "test": 0.25, "seed": 0}
    data = {"dataset": "image_folder", "path": str(path), "color": "grayscale", "split": split}
    # In params.yaml control characters are refused.
    weights = {name: 1.0 + number for number, name in enumerate(folders) if name.isprintable()}
    write_params(project, TINY | {"data": data, "train": TINY["train"] | {"class_weights": weights}})
    before = set(tmp_path.iterdir())
    for stage in (download, preprocess, plan):
        stage.main()
    card = json.loads((project / "data/processed/card.json").read_text(encoding="utf-8"))
    assert card["classes"] == sorted(folders) and card["counts"]["train"] == 2 * len(folders)
    assert card["class_counts"]["test"] == dict.fromkeys(folders, 1)
    made = json.loads((project / "plan/baseline.json").read_text(encoding="utf-8"))
    assert made["train"]["class_weights"] == weights
    assert set(tmp_path.iterdir()) == before
    assert not list(project.rglob("pwned"))
