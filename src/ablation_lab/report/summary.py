"""The report's sentences, made from numbers by rules."""

import re
from itertools import count, islice
from typing import Any

from ablation_lab import duplicates, params
from ablation_lab.params import Params
from ablation_lab.report import tables
from ablation_lab.report.results import Material, lacking, mean_of, no_effect, validation_means
from ablation_lab.report.wording import VERDICT_ORDER, Format, changes, length, setting
from ablation_lab.words import counted, percent_change

SEVERAL = (
    "more than one setting is changed at once, so that the effect can't be attributed to one of them (compared_with in "
    "params.yaml compares a variant with one that is a single step away)"
)

TWIN = re.compile("the same network as (.*), trained the same way")  # the plan's warning
EQUAL = "weights and predictions are byte for byte those of"


def facts(study: Params, material: Material) -> list[tuple[str, str]]:
    card, counts = material.card, material.card["counts"]
    height, width, channels = card["image_shape"]
    seeds = ", ".join(map(str, study.seeds))
    devices = sorted({one["device"] for one in material.timings["variants"].values() if one["cells"]})
    threads = sorted({n for one in material.timings["variants"].values() for n in one["threads"]})
    facts = [
        ("Data", f"{card['name']}: {len(card['classes'])} classes, pictures of {height} × {width} × {channels}"),
        (
            "Pictures",
            f"{counts['train']:,} training, {counts['validation']:,} validation, {counts['test']:,} test "
            + (
                "(sealed)" if material.shown is None else "(the test part is scored once, after training and selection)"
            ),
        ),
        ("Split", ", ".join(f"{key} {setting(value)}" for key, value in card["split"].items())),
        ("Baseline", f"{study.study.baseline}: {length(study.baseline)}"),
        ("Trainings", _trainings(study, material) + f" ({seeds})"),
        ("Trained on", f"{', '.join(devices)}, {' or '.join(counted(n, 'thread') for n in threads)} a training"),
    ]
    if "skipped" in card:
        facts.insert(2, ("Left out", counted(card["skipped"]["count"], "unreadable picture")))
    return [*facts, ("Source", study.study.source)] if study.study.source else facts


def _trainings(study: Params, material: Material) -> str:
    told = f"{counted(len(study.variants), 'variant')} × {counted(len(study.seeds), 'seed')}"
    partial = material.results["partial"]
    return f"{partial['cells']} of {partial['of']} cells: {told}" if partial else told


def missing(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The cells that a partial report lacks, those with the same reason together, and the reason."""
    about: dict[str, list[str]] = {}
    for one in (results["partial"] or {"missing": []})["missing"]:
        reason = one["state"] + (f": {one['reason']}" if one["reason"] else "")
        about.setdefault(reason, []).append(one["cell"])
    return [(", ".join(cells), reason) for reason, cells in about.items()]


def headline(study: Params, results: dict[str, Any], text: Format) -> list[str]:
    if study.study.test == "sealed":
        return _first_on_validation(results, text)
    base = results["variants"][study.study.baseline]["test_accuracy"]
    verdicts = [one["delta"]["verdict"] for one in results["variants"].values() if one["delta"]["verdict"]]
    name = "The baseline" + (f" ({study.study.baseline})" if study.study.baseline != "baseline" else "")
    if base["mean"] is None:
        gone = lacking(results["variants"][study.study.baseline])
        first = f"{name} {gone if gone == 'diverged' else f'is {gone}'}, so nothing can be compared with it."
    else:
        first = f"{name} reaches a test accuracy of {text.percent(base['mean'])}"
        if base["ci95"]:
            low, high = (text.percent(value) for value in base["ci95"])
            seeds = len(results["variants"][study.study.baseline]["cells"])
            test = results["data"]["counts"]["test"]
            first += f" (95 % interval {low} to {high}, {counted(seeds, 'seed')}, {counted(test, 'test picture')})"
        first += "."
    tally = [(verdict, verdicts.count(verdict)) for verdict in VERDICT_ORDER if verdict in verdicts]
    if not tally:
        return [first]
    hints = [name for name, one in results["variants"].items() if hint(one["delta"])]
    told = {"indistinguishable": f" (of which {', '.join(hints)} {'is a hint' if len(hints) == 1 else 'are hints'})"}
    listed = ", ".join(f"{n} {verdict}{told.get(verdict, '') if hints else ''}" for verdict, n in tally)
    return [first, f"Of {counted(len(verdicts), 'change')} to it: {listed}."]


def _first_on_validation(results: dict[str, Any], text: Format) -> list[str]:
    means = validation_means(results)
    if not means:
        return ["Every variant diverged in some seed."]
    best = max(means, key=lambda name: means[name])
    first = f"{best} reaches a validation accuracy of {text.percent(means[best])}"
    return [first + (f", the highest of {len(results['variants'])} variants." if len(results["variants"]) > 1 else ".")]


def selected(material: Material, text: Format) -> list[str]:
    """What became of the first phase, where there is a second."""
    choice = material.choice
    if choice is None:
        return []
    accuracy = text.percent(choice["candidates"][choice["variant"]]["validation_accuracy"])
    return [
        f"Of phase one, {choice['variant']} was selected for phase two: with a validation accuracy of {accuracy} it is "
        f"the first of {counted(len(choice['candidates']), 'candidate')} on the validation part."
    ]


def findings(study: Params, results: dict[str, Any], text: Format) -> list[dict[str, str]]:
    """One sentence a variant, the clearest first."""
    findings = []
    for name, variant in results["variants"].items():
        delta = variant["delta"]
        if not delta["verdict"]:
            continue
        base = results["variants"][study.study.baseline]
        said = _unaffected(study, variant) or _sentence(variant, base, text)
        said += _cheaper(variant, base)
        change = "; ".join(changes(variant["differences"]))
        findings.append({"variant": name, "change": change, "text": said, "verdict": delta["verdict"]})
    size = {name: abs(one["delta"]["mean"] or 0) for name, one in results["variants"].items()}
    return sorted(findings, key=lambda one: (VERDICT_ORDER.index(one["verdict"]), -size[one["variant"]]))


def _sentence(variant: dict[str, Any], base: dict[str, Any], text: Format) -> str:
    delta, seeds = variant["delta"], len(variant["cells"].keys() & base["cells"].keys())
    if delta["verdict"] == "diverged":
        lost = [seed for seed, cell in variant["cells"].items() if cell["status"] == "diverged"]
        of = counted(len(variant["cells"]), "seed")
        return f"training diverged in {len(lost)} of {of} ({', '.join(lost)}): no mean is given"
    if delta["mean"] is None:
        mean = text.percent(variant["test_accuracy"]["mean"])
        why = "diverged" if lacking(base) == "diverged" else "is missing"
        why = why if seeds or not base["cells"] else "has no seed in common with it"
        return f"test accuracy {mean}, with nothing to compare it with, since the baseline {why}"
    if delta["mean"]:
        points = text.points(abs(delta["mean"]), sign=False)
        said = "about the same test accuracy" if not float(points) else ""
        said = said or f"test accuracy {points} points {'higher' if delta['mean'] > 0 else 'lower'}"
    else:
        said = "the same test accuracy"
    if not delta["ci95"]:
        return f"{said} in the one seed" if seeds == 1 else said
    interval, p = text.interval(delta["ci95"]), text.p(delta["p_adjusted"])
    return f"{said} (95 % interval {interval} points, adjusted {p}, {seeds} seeds){_more_seeds(delta)}"


def _unaffected(study: Params, variant: dict[str, Any]) -> str:
    """That a variant is the baseline, where it is with each seed."""
    if not no_effect(variant, study.study.baseline):
        return ""
    return f"this change had no effect: {EQUAL} {study.study.baseline}"


def _cheaper(variant: dict[str, Any], base: dict[str, Any]) -> str:
    """What a variant costs, where that is another size than the baseline's."""
    told = []
    for key, what in (("parameters", "parameters"), ("macs", "multiply–accumulates")):
        change = 100 * (variant[key] / base[key] - 1) if base[key] else 0.0
        if change >= 100:
            told.append(f"{1 + change / 100:.3g} times the {what}")
        elif abs(change) >= 1:
            size = percent_change(variant[key], base[key], sign=False)
            told.append(f"{size} {'more' if change > 0 else 'fewer'} {what}")
    return f"; with {' and '.join(told)}" if told else ""


def hint(delta: dict[str, Any]) -> bool:
    """Whether the interval leaves out zero and the adjusted p doesn't confirm it."""
    interval = delta["ci95"]
    return delta["verdict"] == "indistinguishable" and bool(interval) and interval[0] * interval[1] > 0


def _more_seeds(delta: dict[str, Any]) -> str:
    """What would tell an indistinguishable difference from none."""
    if delta["verdict"] != "indistinguishable" or not delta["mean"]:
        return ""
    needed = delta["seeds_needed"]
    if hint(delta):
        said = "; a hint, as the interval leaves out zero, but among so many comparisons no more than that"
        return said if needed is None or needed > 1000 else f"{said}: about {needed} seeds would tell"
    if needed is None:
        return "; no number of seeds would tell a difference of this size apart, the test part is too small"
    seeds = "more than 1,000" if needed > 1000 else f"about {needed}"
    return f"; {seeds} seeds would tell a difference of this size apart"


def checks(study: Params, material: Material, went: dict[str, list[str]], text: Format) -> list[tuple[str, str]]:
    """What is wrong with the study's design, and with which variants: the data first, then the plan's warnings."""
    about: dict[str, list[str]] = {told: ["all variants"] for told in _equal_pictures(material, text)}
    for name, network in material.networks.items():
        for lint in network["lints"]:
            about.setdefault(lint, []).append(name)
    for name, variant in study.variants.items():
        if name == study.study.baseline:
            continue
        reference = variant.compared_with or study.study.baseline
        before = study.variants[reference]
        if len(params.differences(before, variant)) > 1:
            about.setdefault(SEVERAL, []).append(name)
        result = material.results["variants"][name]
        for other, seeds in result["no_effect"].items():
            if _first_twin(material, name) == _first_twin(material, other):
                continue  # the plan's warning says so
            some = f" with {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
            some = "" if no_effect(result, other) else some
            about.setdefault(f"this change had no effect{some}: {EQUAL} {other}", []).append(name)
        if _budget(variant) != _budget(before):
            told = f"trained for {length(variant)}, {reference} for {length(before)}: the budget is part of the change"
            about.setdefault(told, []).append(name)
    for name, seen in went.items():
        if tables.IMPROVING in seen:
            told = (
                "the validation loss was still falling when training ended: with more epochs, differences may be others"
            )
            about.setdefault(told, []).append(name)
    pictures = counted(material.card["counts"]["test"], "test picture")
    for name, half in material.resolution.items():
        delta = material.results["variants"][name]["delta"]
        difference, verdict = abs(delta["mean"] or 0), delta["verdict"]
        if verdict == "indistinguishable" and difference and delta["seeds_needed"] is None:
            told = f"{pictures} are too few to tell so small a difference from none, whatever the number of seeds"
            about.setdefault(told, []).append(name)
        elif verdict == "undetermined" and half and 0 < difference < half:
            told = f"{pictures} can't tell so small a difference: their choice alone may make up more"
            about.setdefault(told, []).append(name)
    return [(", ".join(names), told) for told, names in about.items()]


def _first_twin(material: Material, name: str) -> str:
    """The first of the variants with the network and training of this one, by the plan's warning."""
    return next((found[1] for lint in material.networks[name]["lints"] if (found := TWIN.fullmatch(lint))), name)


def _equal_pictures(material: Material, text: Format) -> list[str]:
    """What equal pictures in two parts or classes do to the numbers."""
    if material.duplicates is None:
        return []
    told = duplicates.told(material.duplicates, material.card["counts"])
    for key, part in (("test_in_train", "test"), ("validation_in_train", "validation")):
        worst = _flattery(material, key, part)
        if worst:
            points = text.points(worst, sign=False)
            points = points if float(points) else f"less than {10**-text.digits:.{text.digits}f}"
            told[key] += f": {part} accuracies are too high by up to {points} points"
    if "test_in_validation" in told:
        told["test_in_validation"] += ", by which epochs are chosen"
    if "in_classes" in told:
        told["in_classes"] += ": no network can be right about all their copies"
    return list(told.values())


def _flattery(material: Material, key: str, part: str) -> float:
    """By how much the lowest accuracy on a part is too high when all its pictures that were trained on are answered
    right; 0 where there is no accuracy."""
    results, known = material.results, material.duplicates[key]["same_class"] if material.duplicates else 0
    means = [mean_of(one, f"{part}_accuracy") for one in results["variants"].values()]
    lowest = min((mean for mean in means if mean is not None), default=1.0)
    unknown = results["data"]["counts"][part] - known
    return min(lowest, known * (1 - lowest) / unknown) if unknown else lowest


def _budget(variant: params.Variant) -> tuple:
    """What fixes how many pictures a training sees at most, and when it may stop."""
    train = variant.train
    batches = train.steps_per_epoch and train.steps_per_epoch * train.batch_size
    return train.epochs, batches, variant.input.fraction, train.early_stopping


def limits(study: Params, material: Material, text: Format) -> list[str]:
    """What the numbers do not say."""
    verdicts = {one["delta"]["verdict"] for one in material.results["variants"].values()}
    seeds, test = len(study.seeds), material.card["counts"]["test"]
    limits = []
    if material.duplicates and duplicates.told(material.duplicates, material.card["counts"]):
        limits.append(
            "Only pictures that are equal after resizing, to the last pixel, were counted as being in two parts or "
            "classes: near duplicates were not looked for, so there may be more of them."
        )
    if material.shown is None:
        return [
            "The validation accuracy of whatever was chosen by it is too good: only the test part can say by how much.",
            *limits,
        ]
    if seeds == 1:
        limits.append(
            "One seed was trained, so chance can't be told from effect: no difference has an interval, a p value or a "
            "verdict. Two seeds are the least, five or more are better."
        )
    else:
        limits.append(
            f"The intervals count two sources of chance: the training's ({seeds} seeds) and that of which pictures are "
            f"in the test part ({test:,}). They don't count a third: all networks were trained on the same pictures, "
            "and with others the effects may be others."
        )
        if len(material.results["variants"]) > 2:
            limits.append(
                "Where the seeds of a comparison agree better than is usual among the variants, perhaps by chance, its "
                "interval is wider than they alone would have it."
            )
        if seeds < 5:
            limits.append(f"{seeds} seeds give wide intervals: small effects stay hidden.")
        if any(one["delta"]["seeds_needed"] for one in material.results["variants"].values()):
            limits.append(
                "The number of seeds that would tell a difference apart is an estimate from few seeds: with it, a true "
                "difference as large as the one seen is found four times out of five."
            )
    if "indistinguishable" in verdicts:
        limits.append(
            "Indistinguishable does not mean equal: any difference inside the interval agrees with what was seen."
        )
    if len(material.results["variants"]) > 2 and verdicts & {"better", "worse", "indistinguishable"}:
        limits.append(
            "p values are adjusted after Holm for all comparisons with the baseline, the intervals are not; a verdict "
            "of better or worse needs an adjusted p below 0.05."
        )
    hidden = [name for name, one in material.results["variants"].items() if hint(one["delta"])]
    if hidden:
        limits.append(
            f"{', '.join(hidden)}: the interval leaves out zero and yet the adjusted p is not below 0.05. Among "
            "several comparisons one such interval is no surprise: this is a hint, which more seeds would settle."
        )
    validation = validation_means(material.results)
    if len(validation) > 1:
        best = max(validation, key=lambda name: validation[name])
        limits.append(
            f"To choose a variant, use the validation part: there {best} is first with "
            f"{text.percent(validation[best])}. Choosing by test accuracy would make that number too good."
        )
    return limits


def commands(study: Params) -> list[tuple[str, str]]:
    if study.study.quick:
        return [("ablab quick", "this check"), ("make repro", "the real thing")]
    seeds = [*study.seeds, *islice((seed for seed in count() if seed not in study.seeds), 2)]
    return [
        ("make repro", "set up from the lock file and run the study of params.yaml; what is up to date is kept"),
        (f"dvc exp run -S 'seeds=[{','.join(map(str, seeds))}]'", "more seeds: only the new cells are trained"),
    ]
