"""The report's tables."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ablation_lab import params
from ablation_lab.params import Params
from ablation_lab.report import budget, figures
from ablation_lab.report.results import BINARY, PAIRS, Material, Shown, lacking, no_effect
from ablation_lab.report.wording import (
    NONE,
    Format,
    Table,
    changes,
    minus,
    plain,
    relative,
    seconds,
    short_name,
    si,
    span,
)
from ablation_lab.words import percent

UI = "http://127.0.0.1:5000"  # where `ablab ui` is
RISE = 0.1  # of the validation loss after its lowest, from which on it is called overfitting
FALL = 0.05  # of the validation loss over the last fifth of a training, from which on it is called improving
IMPROVING = "still improving when it ended"
STEADY = 3  # epochs whose mean is judged
LISTED = 20  # classes up to which tables list all of them


def selection(material: Material, text: Format) -> Table | None:
    """By what the second phase's start was chosen."""
    if material.choice is None:
        return None
    rows = []
    for name, means in material.choice["candidates"].items():
        loss = means["validation_loss"]
        chosen = "selected" if name == material.choice["variant"] else NONE
        accuracy = text.percent(means["validation_accuracy"]) if loss is not None else "diverged"
        rows.append([name, accuracy, NONE if loss is None else f"{loss:.3f}", chosen])
    columns = {"Candidate": "l", "Validation": "r", "Validation loss": "r", "Phase two": "l"}
    note = "Means over seeds, on the validation part alone; of equal accuracies the lower loss is taken."
    return Table("Selection for phase two", columns, rows, note)


def variants(study: Params, material: Material, text: Format) -> Table:
    results = material.results["variants"]
    base = results[study.study.baseline]
    scored = material.shown is not None
    reported = scored and any("test_accuracy" in one["reported"] for one in results.values())
    cut = any(budget.cuts(study, material.source, material.card, name) for name in study.variants)
    uncut = "Reported test, not cut" if cut else "Reported test"
    columns = {"Variant": "l", "Change": "l"} | ({"Test": "r", "Difference": "r", "Verdict": "v"} if scored else {})
    columns |= {uncut: "r"} if reported else {}
    columns |= {"Validation": "r", "Training": "r", "Parameters": "r", "MACs": "r", "Best epoch": "r"}
    rows = []
    for name, one in results.items():
        delta, cells, note = one["delta"], list(one["cells"].values()), plain(study.variants[name].note or "")
        difference = [text.points(delta["mean"])] if delta["verdict"] else ["baseline"]
        if delta["ci95"]:
            difference.append(f"[{text.interval(delta['ci95'], ', ')}]")
        if no_effect(one, study.study.baseline):
            difference = ["no effect"]
        row: list[str | list[str]] = [
            [name, note] if note else name,
            changes(one["differences"]) or NONE,
        ]
        if scored:
            gone = lacking(one) if one["test_accuracy"]["mean"] is None else NONE
            verdict = text.verdict(delta) if delta["verdict"] else gone
            row += [text.spread([cell["test_accuracy"] for cell in cells]), difference, verdict]
        row += [text.percent(one["reported"].get("test_accuracy"))] if reported else []
        row += [
            text.spread([cell["validation_accuracy"] for cell in cells]),
            text.spread([cell["train_accuracy"] for cell in cells]),
            relative(one["parameters"], base["parameters"], f"{one['parameters']:,}"),
            relative(one["macs"], base["macs"], si(one["macs"])),
            _best_epochs(study, name, cells),
        ]
        rows.append(row)
    note = "Accuracies are measured after training, with dropout off"
    note += ", and are means over seeds ± standard deviation." if len(study.seeds) > 1 else "."
    if scored:
        note += " Differences are in percentage points"
        note += ", with their 95 % interval and p adjusted after Holm." if len(study.seeds) > 1 else "."
    note += " MACs are the multiply–accumulate operations of one picture."
    return Table("Variants", columns, rows, note)


def steps(study: Params, material: Material, text: Format) -> Table | None:
    """Changes from another variant than the baseline, for studies that build step by step."""
    rows = []
    for name, delta in material.steps.items():
        before = str(study.variants[name].compared_with)
        parameters = material.networks[name]["parameters"] - material.networks[before]["parameters"]
        made = changes(params.differences(study.variants[before], study.variants[name]))
        interval = [f"[{text.interval(delta['ci95'], ', ')}]"] if delta["ci95"] else []
        difference = [text.points(delta["mean"]), *interval]
        row = [name, before, made or NONE, minus(f"{parameters:+,}"), difference]
        rows.append([*row, text.verdict(delta), _epochs_to_reach(material, name, before)])
    columns = {"Variant": "l", "Compared with": "l", "Change": "l", "Parameters": "r", "Difference": "r"}
    columns |= {"Verdict": "v", "Epochs to reach it": "r"}
    note = (
        "Each variant against the one that it is built on; p adjusted after Holm for these comparisons. Epochs to "
        "reach it: after how many epochs the validation accuracy was first as high as the best of the variant compared "
        "with, and how many that one took, over the seeds."
    )
    return Table("Step by step", columns, rows, note) if rows else None


def _epochs_to_reach(material: Material, name: str, before: str) -> str | list[str]:
    """Epochs until a variant's validation accuracy is the best of another one's, seed by seed; `> n` where it never is
    in n epochs."""
    mine: list[int] = []
    theirs: list[int] = []
    never: list[int] = []
    for seed in sorted(set(material.curves["seed"])):
        ours, other = (material.history(one, seed) for one in (name, before))
        best = other["val_accuracy"].max()
        if not best > 0:
            return NONE
        theirs.append(int(other.loc[other["val_accuracy"].idxmax(), "epoch"]))
        reached = ours[ours["val_accuracy"] >= best]["epoch"]
        (mine if len(reached) else never).append(int(reached.min()) if len(reached) else len(ours))
    told = [span(mine)] if mine else []
    told += [f"> {span(never)}"] if never else []
    return [", ".join(told), f"{before}: {span(theirs)}"]


def costs(study: Params, material: Material) -> Table:
    """What each variant costs, in size and in epochs."""
    base = material.networks[study.study.baseline]
    rows: list[list[str | list[str]]] = []
    for name in study.variants:
        network = material.networks[name]
        rows.append(
            [
                name,
                relative(network["parameters"], base["parameters"], f"{network['parameters']:,}"),
                f"{network['trainable_parameters']:,}",
                relative(network["macs"], base["macs"], si(network["macs"])),
                _best_epochs(study, name, material.results["variants"][name]["cells"].values()),
            ]
        )
    columns = {"Variant": "l", "Parameters": "r", "Trained": "r", "MACs": "r", "Best epoch": "r"}
    note = "Trained: parameters that training changes. MACs are the multiply–accumulate operations of one picture."
    return Table("Costs", columns, rows, note)


# All that a clock measured is in tables whose names, and so whose files', begin with "timing": the other files are the
# same bytes every time.


def timing(study: Params, material: Material) -> Table:
    """The seconds that each variant's trainings took."""
    target = material.target
    rows: list[list[str | list[str]]] = []
    for name in study.variants:
        measured = material.timings["variants"][name]
        row: list[str | list[str]] = [name, seconds(measured["seconds_per_epoch"]), seconds(measured["total_seconds"])]
        rows.append(row + ([] if target is None else [_time_to(material, name, target)]))
    columns = {"Variant": "l", "s/epoch": "r", "Seconds in all": "r"}
    note = (
        "Means over seeds, on the machine that trained them. s/epoch: the median epoch. Seconds in all: with building, "
        "compiling and predicting."
    )
    if target is not None:
        columns |= {f"Seconds to {100 * target:.0f}\xa0%": "r"}
        note += (
            f" Seconds to {100 * target:.0f} %: until the validation accuracy was first that high, which every seed of "
            "the baseline reaches; the mean over the seeds that got there."
        )
    return Table("Timing", columns, rows, note)


def timing_of_cells(material: Material) -> Table:
    """The seconds that each cell took."""
    rows = [
        [f"{name}-{seed}", seconds(cell["seconds_per_epoch"]), seconds(cell["total_seconds"])]
        for name, one in material.timings["variants"].items()
        for seed, cell in one["cells"].items()
    ]
    return Table("Timing of cells", {"Cell": "l", "s/epoch": "r", "Seconds in all": "r"}, rows)


def timing_reported(material: Material) -> Table | None:
    """The seconds of a training that the study's authors reported, beside those measured here."""
    rows: list[list[str | list[str]]] = []
    for name, one in material.results["variants"].items():
        if "seconds" in one["reported"]:
            here = material.timings["variants"][name]["total_seconds"]
            rows.append([name, seconds(one["reported"]["seconds"]), seconds(here)])
    note = "Seconds of a training, on other machines than the authors'."
    columns = {"Variant": "l", "Reported": "r", "Here": "r"}
    return Table("Timing reported and measured", columns, rows, note) if rows else None


def _time_to(material: Material, name: str, target: float) -> str | list[str]:
    """Seconds until a variant's validation accuracy first was that high: the mean, and the seeds that got there."""
    cells = material.timings["variants"][name]["cells"]
    spent = []
    for seed, timing in cells.items():
        reached = np.flatnonzero(material.history(name, int(seed))["val_accuracy"] >= target - 1e-9)
        if len(reached):
            spent.append(sum(timing["epoch_seconds"][: reached[0] + 1]))
    if not cells:
        return NONE
    if not spent:
        return "never"
    shown = seconds(float(np.mean(spent)))
    return shown if len(spent) == len(cells) else [shown, f"{len(spent)} of {len(cells)} seeds"]


def _best_epochs(study: Params, name: str, cells: Iterable[dict[str, Any]]) -> str:
    """Of a variant that keeps its last epoch's weights, whatever they are, there is none."""
    if study.variants[name].train.keep == "last":
        return NONE
    return span([cell["best_epoch"] for cell in cells if cell["best_epoch"] is not None])


def behaviour(study: Params, material: Material, went: dict[str, list[str]]) -> Table:
    """How each variant's training went, with what was `seen` of it."""
    rows: list[list[str | list[str]]] = []
    for name, one in material.results["variants"].items():
        cells = list(one["cells"].values())
        gaps = material.gaps(name)
        rows.append(
            [
                name,
                span([cell["epochs"] for cell in cells]),
                _best_epochs(study, name, cells),
                minus(f"{np.mean(gaps):.1f}") if gaps else NONE,
                went[name],
            ]
        )
    columns = {"Variant": "l", "Epochs": "r", "Best epoch": "r", "Gap, points": "r", "What was seen": "l"}
    note = (
        "Best epoch: the one whose weights are kept, by train.monitor on the validation part. Gap: training minus "
        "validation accuracy of the kept weights, mean over seeds. The validation loss is judged "
        f"as a mean over {STEADY} epochs. Overfitting: it ends {100 * RISE:.0f} % or more above its lowest, while the "
        f"training loss falls. Still improving: it has fallen by {100 * FALL:.0f} % or more over the last fifth."
    )
    return Table("Training behaviour", columns, rows, note)


def seen(study: Params, material: Material, name: str) -> list[str]:
    """What a variant's trainings did, in words."""
    planned, cells = study.variants[name].train.epochs, material.results["variants"][name]["cells"]
    diverged, overfitted, early, improving = [], [], [], []
    for seed, cell in cells.items():
        history = material.history(name, int(seed))
        loss, val_loss = (history[key].to_numpy(dtype=float) for key in ("loss", "val_loss"))
        if cell["status"] == "diverged":
            finite = int((np.isfinite(loss) & np.isfinite(val_loss)).sum())
            diverged.append(f"seed {seed} in epoch {min(finite + 1, len(loss))}")
            continue
        if cell["epochs"] < planned:
            early.append(cell["epochs"])
        if len(val_loss) < 2 * STEADY:
            continue
        steady, falling = (np.convolve(one, np.full(STEADY, 1 / STEADY), "valid") for one in (val_loss, loss))
        lowest, fifth = int(steady.argmin()), max(1, len(steady) // 5)
        if steady[-1] > (1 + RISE) * steady[lowest] and falling[-1] < falling[lowest]:
            overfitted.append((lowest + 1 + STEADY // 2, steady[-1] / steady[lowest] - 1))
        elif cell["epochs"] == planned and steady[-1] < (1 - FALL) * steady[-1 - fifth]:
            improving.append(seed)

    def of(found: list) -> str:
        return "" if len(found) == len(cells) else f" in {len(found)} of {len(cells)} seeds"

    if not cells:
        return ["missing"]
    told = [f"diverged: {', '.join(diverged)}"] if diverged else []
    if overfitted:
        rise = 100 * float(np.mean([rise for _, rise in overfitted]))
        told.append(f"overfits after epoch {span([at for at, _ in overfitted])}: validation loss +{rise:.0f} %")
        told[-1] += of(overfitted)
    if early:
        told.append(f"stopped early, after {span(early)} of {planned} epochs{of(early)}")
    if improving:
        told.append(IMPROVING + of(improving))
    return told or [NONE if max(cell["epochs"] for cell in cells.values()) < 2 * STEADY else "nothing noticed"]


def calibration(study: Params, material: Material, text: Format) -> Table:
    """How far confidence and accuracy are apart on the test part."""
    rows: list[list[str | list[str]]] = []
    for name in study.variants:
        found = material.calibration(name)
        if found is None:
            rows.append([name, NONE, NONE, NONE, NONE])
            continue
        pictures = found["pictures"].sum()
        confidence, right = found["confidence"].sum() / pictures, found["right"].sum() / pictures
        tests = [one["test"] for (variant, _), one in material.cells.items() if variant == name]
        error = float(np.mean([one["calibration_error"] for one in tests if one]))
        shown = text.points(error, sign=False)
        rows.append([name, text.percent(confidence), text.percent(right), text.points(confidence - right), shown])
    columns = {"Variant": "l", "Confidence": "r", "Accuracy": "r", "Over-confidence, points": "r"}
    columns |= {"Calibration error, points": "r"}
    note = (
        "Confidence: the mean highest probability. Calibration error: the distance of confidence and accuracy in "
        "fifteen ranges of confidence, weighted by their pictures (ECE; Guo et al., 2017), the mean over seeds. Few "
        "pictures make it larger."
    )
    return Table("Calibration", columns, rows, note)


def reported(study: Params, material: Material, text: Format) -> Table | None:
    rows: list[list[str | list[str]]] = []
    cut: dict[str, list[str]] = {}
    for name, one in material.results["variants"].items():
        if one["reported"] and (cuts := budget.cuts(study, material.source, material.card, name)):
            cut.setdefault("; ".join(cuts), []).append(name)
        cells = list(one["cells"].values())
        for key, figure in one["reported"].items():
            if key == "seconds":
                continue  # in `timing_reported`
            values = [cell.get(key) for cell in cells]
            known = None if None in values or not values else float(np.mean(values))
            if "accuracy" in key or key == "macro_f1":
                difference = NONE if known is None else f"{text.points(known - figure)} points"
                rows.append([name, key, text.percent(figure), " ".join(text.spread(values)), difference])
            else:
                shown = NONE if known is None else f"{known:.4g}"
                rows.append(
                    [name, key, f"{figure:.4g}", shown, NONE if known is None else minus(f"{known - figure:+.3g}")]
                )
    columns = {"Variant": "l", "Figure": "l", "Reported": "r", "Reproduced": "r", "Difference": "r"}
    note = "Reported: by the study's authors. Reproduced: the mean over seeds ± standard deviation."
    if cut:
        columns = {"Reproduced, cut" if head == "Reproduced" else head: kind for head, kind in columns.items()}
        for what, names in cut.items():
            note += f" Cut: {what}" + (f" ({', '.join(names)})." if len(cut) > 1 else ".")
        note += f" {budget.NO_FAILURE}"
    return Table("Reported and reproduced", columns, rows, note) if rows else None


def binary(study: Params, material: Material, text: Format) -> Table | None:
    names = material.card["classes"]
    if len(names) != 2 or material.shown is None:
        return None
    rows: list[list] = []
    for name, one in material.results["variants"].items():
        rows.append([name, *(text.spread([cell.get(key) for cell in one["cells"].values()]) for key in BINARY)])
    columns = {"Variant": "l", "Precision": "r", "Recall": "r", "ROC AUC": "r"}
    return Table("Two classes", columns, rows, f"On the test part; the positive class is “{names[1]}”.")


def mistakes(study: Params, material: Material, text: Format) -> dict[str, Any] | None:
    """What the networks get wrong on the test part; nothing while it is sealed."""
    if material.shown is None:
        return None
    return {
        "pairs": _pairs(study, material),
        "classes": _class_scores(study, material, text),
        "scores": {name: _classification(name, material) for name in study.variants},
        "calibration": calibration(study, material, text),
        "probabilities": _probabilities(study, material, material.shown),
    }


def _pairs(study: Params, material: Material) -> Table:
    """The three most frequent confusions of each variant."""
    names = material.card["classes"]
    rows: list[list[str | list[str]]] = []
    for variant in study.variants:
        counts = material.confusion(variant)
        lines = [NONE]
        if counts is not None:
            wrong = counts - np.diag(np.diag(counts))
            places = np.argsort(-wrong.ravel(), kind="stable")[:PAIRS]
            lines = [
                f"{short_name(names[actual])} → {short_name(names[predicted])}: "
                f"{percent(n / counts[actual].sum())} ({n:,})"
                for actual, predicted in (divmod(int(place), len(names)) for place in places)
                if (n := int(wrong[actual, predicted]))
            ] or ["no mistakes"]
        rows.append([variant, lines])
    columns = {"Variant": "l", "Actual → predicted: share of the actual class (pictures, all seeds)": "l"}
    return Table("Most confused pairs", columns, rows, "On the test part, all seeds counted.")


def _class_scores(study: Params, material: Material, text: Format) -> Table:
    names = material.card["classes"]
    variants, which = figures.telling(study, material, figures.DISTINCT)
    f1 = {variant: material.class_scores(variant, "f1") for variant in variants}
    order = range(len(names))
    base = f1[study.study.baseline]
    note = (
        "F1 on the test part, the mean over seeds, in per cent, and its change from the baseline's in points. A class "
        "has few pictures: such changes have no interval here, and small ones are chance."
    )
    if len(names) > LISTED:
        known = [scores for scores in f1.values() if scores is not None]
        hard = np.argsort(np.mean(known, axis=0), kind="stable") if known else np.arange(len(names))
        order = hard[:LISTED].tolist()
        note += f" The {LISTED} classes of {len(names)} with the lowest mean."

    def told(name: str, i: int) -> str | list[str]:
        scores = f1[name]
        if scores is None:
            return NONE
        shown = f"{100 * scores[i]:.1f}"
        if base is None or name == study.study.baseline:
            return shown
        change = f"{100 * (scores[i] - base[i]):+.1f}"
        return [shown, minus(change) if float(change) else "0.0"]

    rows = [[short_name(names[i]), *(told(name, i) for name in f1)] for i in order]
    return Table("F1 of each class", {"Class": "l"} | dict.fromkeys(variants, "r"), rows, note + which)


def _classification(name: str, material: Material) -> Table:
    """Precision, recall and F1 of each class, as scikit-learn's classification report has them."""
    names = material.card["classes"]
    support = [material.card["class_counts"]["test"].get(one, 0) for one in names]
    scores = [material.class_scores(name, which) for which in ("precision", "recall", "f1")]
    rows = []
    for i, one in enumerate(names):
        shown = [NONE if values is None else f"{values[i]:.3f}" for values in scores]
        rows.append([short_name(one), *shown, f"{support[i]:,}"])
    means = [NONE if values is None else f"{np.mean(values):.3f}" for values in scores]
    rows.append(["macro average", *means, f"{sum(support):,}"])
    weighted = [NONE if values is None else f"{np.average(values, weights=support):.3f}" for values in scores]
    rows.append(["weighted average", *weighted, f"{sum(support):,}"])
    columns = {"Class": "l", "Precision": "r", "Recall": "r", "F1": "r", "Test pictures": "r"}
    note = "On the test part, the mean over seeds."
    return Table(f"Classification report of {name}", columns, rows, note, totals=2)


def _probabilities(study: Params, material: Material, shown: Shown) -> Table:
    """What each variant made of the shown test pictures' actual classes."""
    names = material.card["classes"]
    variants, which = figures.telling(study, material, figures.DISTINCT)
    rows: list[list[str | list[str]]] = []
    for i, label in enumerate(shown.labels.tolist()):
        row: list[str | list[str]] = [short_name(names[label])]
        for name in variants:
            if name not in shown.before:
                row.append(NONE)
                continue
            before, after = shown.before[name][i], shown.after[name][i]
            if not np.isfinite(after).all():
                row.append(NONE)
                continue
            chosen = int(after.argmax())
            told = f"{100 * before[label]:.0f} → {100 * after[label]:.0f}\xa0%"
            row.append(told if chosen == label else [told, f"took it for {short_name(names[chosen])}"])
        rows.append(row)
    note = (
        "The probability of the actual class before and after training, first seed; a few fixed test pictures, the "
        "first of each class."
    )
    columns = {"Picture of": "l"} | dict.fromkeys(variants, "r")
    return Table("Probability of the actual class", columns, rows, note + which)


def cells(study: Params, material: Material, text: Format) -> Table:
    rows = []
    for name, one in material.results["variants"].items():
        for seed, cell in one["cells"].items():
            accuracies = [text.percent(cell[f"{part}_accuracy"]) for part in ("train", "validation", "test")]
            loss, f1 = cell["test_loss"], cell["macro_f1"]
            rows.append(
                [
                    f"{name}-{seed}",
                    cell["status"],
                    str(cell["epochs"]),
                    str(cell["best_epoch"] or NONE),
                    *accuracies,
                    NONE if loss is None else f"{loss:.3f}",
                    NONE if f1 is None else f"{f1:.3f}",
                    [cell["cell_hash"][:8], f"{UI}/cells/{cell['cell_hash']}/{name}"],
                ]
            )
    columns = {"Cell": "l", "Status": "l", "Epochs": "r", "Best epoch": "r", "Training": "r", "Validation": "r"}
    columns |= {"Test": "r", "Test loss": "r", "Macro F1": "r", "In MLflow": "a"}
    note = "One variant trained with one seed is a cell. The links lead to its run while `ablab ui` runs."
    return Table("Cells", columns, rows, note)


def layers(study: Params, material: Material, name: str) -> Table:
    """A network's layers, and which of them its reference has not, or has otherwise."""
    network, before = material.networks[name], study.variants[name].compared_with or study.study.baseline
    other = {layer["name"]: layer for layer in material.networks[before]["layers"]}
    rows: list[list[str | list[str]]] = []
    for layer in network["layers"]:
        shape = " × ".join("any" if size is None else str(size) for size in layer["output_shape"])
        row = [layer["name"], layer["type"], layer["detail"], shape, f"{layer['parameters']:,}", f"{layer['macs']:,}"]
        if before != name:
            there = other.get(layer["name"])
            same = there and all(layer[key] == there[key] for key in ("type", "detail", "output_shape", "parameters"))
            row.append(NONE if same else "differs" if there else "new")
        rows.append([*row])
    columns = {"Layer": "l", "Type": "l", "Detail": "l", "Output": "r", "Parameters": "r", "MACs": "r"}
    note = f"{network['parameters']:,} parameters, {network['trainable_parameters']:,} of them trained."
    if before != name:
        columns |= {f"Against {before}": "l"}
        own = {layer["name"] for layer in network["layers"]}
        gone = [one for one in other if one not in own]
        note += f" Not there, but in {before}: {', '.join(gone)}." if gone else ""
    return Table(f"Layers of {name}", columns, rows, note)


def data(material: Material) -> Table:
    card = material.card
    names, counts = card["classes"], card["class_counts"]
    columns = {"Class": "l", "Number": "r"} | ({"One-hot": "l"} if len(names) <= 10 else {})
    rows = []
    for i, name in enumerate(names):
        one_hot = [" ".join("1" if j == i else "0" for j in range(len(names)))] if len(names) <= 10 else []
        numbers = [f"{counts[part].get(name, 0):,}" for part in ("train", "validation", "test")]
        rows.append([short_name(name), str(i), *one_hot, *numbers])
    return Table("Pictures of each class", columns | {"Training": "r", "Validation": "r", "Test": "r"}, rows)
