"""Fabricated results of the earlier stages: what `evaluate` and `report` read, made with numpy in milliseconds."""

import csv
import json
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from ablation_lab import params

# What folders of pictures, and so classes, may be called; and what an archive can claim that they are called.
FOLDERS = [
    "<img src=x onerror=alert(1)>",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "${PATH}",
    "a\"b'c&d",
    "|",
]
FOLDERS += [
    "--help",
    "-rf",
    "=1+1",
    "@SUM(A1)",
    "two\nlines",
    "猫 é",
    "%s %d",
    "{{ 7*7 }}",
    "{% raw %}",
    "\\input{x}",
    "*",
    "~",
]
FOLDERS += ["\x1b[31mred", "\tx", "$x_{$", "nan", "null", "#no comment", "'", "C:x"]
NASTY = ["<script>alert(1)</script>", "../x", "/etc/passwd", *FOLDERS]

SKILL = 4.0  # logit of the right class above the noise: about 90 % accuracy with ten classes


def study(variants=("baseline", "no_dropout", "big_pool"), seeds=(0, 1, 2), quick=False, **reported) -> params.Params:
    """A valid study; `reported` maps a variant to what its authors reported."""
    changes = {name: {"model": {"dropout": 0.01 * i}} for i, name in enumerate(variants)}
    changes[variants[0]] = {}
    for name, figures in reported.items():
        changes[name]["reported"] = figures
    raw = {
        "study": {
            "name": "fabricated",
            "title": "What does dropout do?",
            "baseline": variants[0],
            "source": "made up",
            "notes": "Numbers from a generator.\n\nA second paragraph.",
            "quick": quick,
        },
        "data": {"dataset": "digits", "path": None, "split": {"validation": 0.2, "test": 0.2}},
        "input": {},
        "model": {"builder": "cnn", "dropout": 0.5, "blocks": {"block1": {"filters": 8}}},
        "train": {"epochs": 6},
        "seeds": list(seeds),
        "variants": changes,
    }
    return params.validate(raw)


def write(root: Path, made: params.Params, classes=10, pictures=200, epochs=6, skill=None, diverged=(), lints=()):
    """Write data/processed, plan/networks and cells.

    Args:
        classes: their number, or their names.
        skill: maps a variant to the logit of its right class (default `SKILL`).
        diverged: (variant, seed) pairs whose training ended in NaN.
        lints: warnings of the plan about the last variant.
    """
    names = [f"class {i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
    data(root, names, pictures)
    for number, (name, variant) in enumerate(made.variants.items()):
        plan = {
            "parameters": 12_345 + 1000 * number,
            "trainable_parameters": 12_345,
            "macs": 1_234_567 * (number + 1),
            "differences": params.differences(made.baseline, variant),
            "layers": [
                {
                    "name": "block1_conv",
                    "type": "Conv2D",
                    "detail": "3×3, same",
                    "inputs": [],
                    "output_shape": [8, 8, 8],
                    "parameters": 80,
                    "macs": 4608,
                },
                {
                    "name": "output",
                    "type": "Dense",
                    "detail": "softmax",
                    "inputs": ["block1_conv"],
                    "output_shape": [len(names)],
                    "parameters": 5130,
                    "macs": 5120,
                },
            ],
            "lints": list(lints) if name == list(made.variants)[-1] else [],
            "plan_hash": params.digest(name),
        }
        _json(root / f"plan/networks/{name}.json", plan)
        for seed in made.seeds:
            level = (skill or {}).get(name, SKILL)
            cell(root, name, seed, len(names), pictures, epochs, level, (name, seed) in set(diverged))


def data(root: Path, names: list[str], pictures: int) -> None:
    """A data set of noise, with as many pictures in each part."""
    random = np.random.default_rng(0)
    total = 3 * pictures
    labels = np.arange(total) % len(names)
    parts = dict(zip(("train", "validation", "test"), np.split(np.arange(total), 3), strict=True))
    folder = root / "data/processed"
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", random.integers(0, 256, (total, 8, 8, 1), dtype=np.uint8))
    np.save(folder / "labels.npy", labels)
    for part, index in parts.items():
        np.save(folder / f"{part}.npy", index)
    counts = {part: np.bincount(labels[index], minlength=len(names)).tolist() for part, index in parts.items()}
    card = {
        "name": "digits",
        "classes": names,
        "image_shape": [8, 8, 1],
        "counts": {part: len(index) for part, index in parts.items()},
        "class_counts": {part: dict(zip(names, numbers, strict=True)) for part, numbers in counts.items()},
        "split": {"validation": 0.2, "test": 0.2, "seed": 0},
        "digest": "d" * 64,
    }
    _json(folder / "card.json", card)


def cell(root: Path, name: str, seed: int, classes: int, pictures: int, epochs: int, skill: float, diverged: bool):
    """One cell of a noisy classifier, which takes a class for the next one rather than another."""
    random = np.random.default_rng([seed, *name.encode()])
    folder = root / "cells" / name / f"seed-{seed}"
    folder.mkdir(parents=True)
    arrays = {}
    for part, first in (("validation", pictures), ("test", 2 * pictures)):
        labels = np.arange(first, first + pictures) % classes
        logits = random.normal(size=(pictures, classes)) * 1.5
        logits[np.arange(pictures), labels] += skill
        logits[np.arange(pictures), (labels + 1) % classes] += skill / 2
        if diverged:
            logits[:] = np.nan
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        arrays[f"{part}_probabilities"] = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        arrays[f"{part}_labels"] = labels
    np.savez(folder / "predictions.npz", **arrays)
    positions = np.arange(min(8, classes, pictures))
    untrained = np.full((len(positions), classes), 1 / classes, np.float32)
    np.savez(folder / "untrained.npz", positions=positions, probabilities=untrained)
    x = np.arange(1, epochs + 1)
    jitter = random.normal(size=(2, epochs)) * 0.01
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"])
        for i, epoch in enumerate(x.tolist()):
            rise = 1 - np.exp(-epoch * skill / 8)
            row = [2.3 * (1 - rise) + 0.1, 0.1 + 0.88 * rise, 2.3 * (1 - rise) + 0.25 + jitter[0, i]]
            row += [0.1 + 0.8 * rise + jitter[1, i], 0.001]
            if diverged and i > 1:
                row[:4] = ["nan"] * 4
            writer.writerow([epoch, *row])
    fit = {
        "status": "diverged" if diverged else "ok",
        "cell_hash": f"{seed:064x}",
        "plan_hash": params.digest(name),
        "epochs": epochs,
        "best_epoch": None if diverged else epochs - 1,
        "train_accuracy": None if diverged else 0.97,
        "train_loss": None if diverged else 0.1,
    }
    _json(folder / "cell.json", fit)
    seconds = {"epoch_seconds": [0.5] * epochs, "total_seconds": 0.5 * epochs, "device": "CPU", "threads": 1}
    _json(folder / "timing.json", seconds)


def _json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def params_yaml(root: Path, raw: dict) -> None:
    with (root / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(raw, file)
