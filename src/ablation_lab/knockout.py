"""Leave-one-out variants: what a study's baseline can do without, and how params.yaml is told."""

import dataclasses
import difflib
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tabulate import tabulate

from ablation_lab import params
from ablation_lab.errors import LabError
from ablation_lab.params import PATCHED, Custom, Network, Params, Variant

GROUPS = ("input.augment", "model.blocks", "model.stages", "model.head")
CONTAINERS = {"augment", "blocks", "stages", "head", "optimizer"}  # they don't show in a variant's name
# What an optimizer is without each of its extras. Not every default is that: Muon's `nesterov` is on.
OPTIMIZER_OFF = {
    **{"momentum": 0, "weight_decay": 0, "nesterov": False, "amsgrad": False, "centered": False, "use_ema": False},
    **{"clipnorm": None, "clipvalue": None, "global_clipnorm": None},
}
# What is on where nothing is said.
OPTIMIZER_ON = {"adamw": ("weight_decay",), "muon": ("weight_decay", "momentum", "nesterov")}
# What has no effect without another extra, and is refused then.
OPTIMIZER_NEEDS: dict[str, dict[str, Any]] = {
    "momentum": {"nesterov": False},
    "use_ema": {"ema_momentum": None, "ema_overwrite_frequency": None},
}
WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Removal:
    """Something that the baseline may do without.

    Args:
        path: the dotted path that a user types.
        note: what the variant's `note` says.
        patch: the merge patch of the baseline's settings that removes it; empty where there is nothing to remove.
        why: what there is instead of something to remove.
        variant: the variant's name.
    """

    path: str
    note: str
    patch: dict[str, Any]
    why: str = "nothing, it is off or not set in the baseline"
    variant: str = ""


def listed(file: Path) -> str:
    """What can be removed from a study's baseline, as a table."""
    raw, text = params.read(file)
    study = params.validate(raw, str(file), text)
    found = [one for one in removals(study, _baseline(raw)) if one.patch]
    if not found:
        told = "There is nothing in the baseline that could be removed and leave a network."
        own = " Of a network of your own, what stands under `model` is seen: write its arguments there first."
        return told + (own if isinstance(study.baseline.model, Custom) else "")
    taken = " There is a variant of this name."
    rows = [[one.path, one.variant, one.note + (taken if one.variant in study.variants else "")] for one in found]
    groups = [group for group in GROUPS if any(_is_in(one, group) for one in found)]
    lines = [tabulate(rows, headers=["path", "variant", "what it is"], disable_numparse=True), ""]
    if groups:
        lines.append(f"{', '.join(groups)}: one variant of each component.")
    lines.append("Add them to params.yaml with `ablab knockout PATH…`.")
    return "\n".join(lines)


def knock_out(file: Path, paths: list[str]) -> str:
    """Append a variant for everything that the paths name; comments and form of the file stay as they are.

    Returns:
        What was added, for people.

    Raises:
        LabError: when a path is unknown, when there is nothing to remove, or when a variant of that name is another
            one; the file is left as it was.
    """
    file = file.resolve()
    raw, text = params.read(file)
    study = params.validate(raw, str(file), text)
    base, baseline = {key: raw.get(key, {}) for key in PATCHED}, _baseline(raw)
    chosen = _chosen(removals(study, baseline), paths)
    written = {}
    for one in chosen:
        without = params.merge_patch(baseline, one.patch)
        written[one.variant] = {"note": one.note} | _patch_between(base, without)
    wanted = params.validate(raw | {"variants": raw["variants"] | written}, str(file))

    lines, added = [], {}
    for one in chosen:
        name, variant = one.variant, wanted.variants[one.variant]
        if name not in study.variants:
            same = [other for other in study.variants.values() if other.resolved() == variant.resolved()]
            twin = f" It is the same training as {same[0].name}, and will share its result." if same else ""
            lines.append(f"added {name}: {one.note}{twin}")
            added[name] = written[name]
        elif study.variants[name].resolved() == variant.resolved():
            lines.append(f"left {name} as it is: it removes {one.path} already.")
        else:
            patch = {key: written[name][key] for key in PATCHED if key in written[name]}
            found = {key: value for key, value in (raw["variants"][name] or {}).items() if key in PATCHED}
            raise LabError(
                f"{file}: variants.{name}: Expected none of this name, or what removes {one.path}: {_flow(patch)}. "
                f"Found: {_flow(found)}. Give that variant another name first."
            )
    if not added:
        return "\n".join([*lines, "params.yaml has not changed."])
    _replace(file, _with_variants(raw, text, added, file))
    return "\n".join([*lines, "", "See what they would train with `ablab plan`, then train them with `dvc repro`."])


def removals(study: Params, baseline: dict[str, Any]) -> list[Removal]:
    """Everything that may be in a network and its training but need not, also what this baseline doesn't have."""
    found = [*_of_input(baseline["input"])]
    network = study.baseline.model
    found += _of_own_network(network) if isinstance(network, Custom) else _of_network(network)
    found += _of_train(study.baseline)
    parts = {one.path: one.path.split(".")[1:] for one in found}
    short = {path: "_".join(keys[1:] if keys[0] in CONTAINERS else keys) for path, keys in parts.items()}
    times = Counter(name.lower() for name in short.values())
    # A block and a dense layer may have the same name; then the mapping that holds them tells them apart.
    names = {path: name if times[name.lower()] == 1 else "_".join(parts[path]) for path, name in short.items()}
    return [dataclasses.replace(one, variant=f"no_{names[one.path]}") for one in found]


def _of_input(settings: dict[str, Any]) -> Iterator[Removal]:
    for name in settings.get("augment") or {}:
        yield Removal(f"input.augment.{name}", f"{name} removed.", {"input": {"augment": {name: None}}})


def _of_network(network: Network) -> Iterator[Removal]:
    resolved = network.resolved()
    for part in ("blocks", "stages", "head"):
        layers = getattr(network, part, {})
        alone = part != "head" and len(layers) == 1
        for name in layers:
            path, why = f"model.{part}.{name}", f"the only one of {part}, and a {network.builder} needs one"
            yield Removal(path, f"{name} removed.", {} if alone else _at(path, None), why)

    def on(part: str, key: str, off: Any) -> bool:
        return any(layer[key] != off for layer in resolved.get(part, []))

    if "blocks" in resolved:
        rates = ("dropout", "features_dropout", "head_dropout")
        patch = _everywhere(network, rates, ("blocks", "head"), "dropout", 0) if on("blocks", "dropout", 0) else {}
        yield Removal("model.dropout", "Every dropout removed.", patch)
        kind = "normalization"
        patch = _everywhere(network, (kind,), ("blocks", "head"), kind, "none") if on("blocks", kind, "none") else {}
        yield Removal("model.normalization", "Every normalisation removed.", patch)
    patch = _everywhere(network, ("head_dropout",), ("head",), "dropout", 0) if on("head", "dropout", 0) else {}
    yield Removal("model.head_dropout", "Dropout of the dense layers removed.", patch)
    if hasattr(network, "features_dropout"):
        patch = _at("model.features_dropout", 0) if network.features_dropout else {}
        yield Removal("model.features_dropout", "Dropout of the features removed.", patch)
    patch = _everywhere(network, ("l2", "head_l2"), (), "", 0) if network.l2 else {}
    yield Removal("model.l2", "L2 penalty of all kernels removed.", patch)
    patch = _at("model.head_l2", 0) if resolved["head_l2"] else {}
    yield Removal("model.head_l2", "L2 penalty of the dense layers and the output removed.", patch)
    for part in ("blocks", "head"):
        for layer in resolved.get(part, []):
            for key, off, word in (("dropout", 0, "Dropout"), ("normalization", "none", "Normalisation")):
                path = f"model.{part}.{layer['name']}.{key}"
                yield Removal(path, f"{word} of {layer['name']} removed.", {} if layer[key] == off else _at(path, off))


def _of_own_network(network: Custom) -> Iterator[Removal]:
    # Only its function knows what an argument means, but these mean the same everywhere.
    for key, value in (network.model_extra or {}).items():
        path = f"model.{key}"
        if isinstance(value, bool):
            yield Removal(path, f"{_words(key)} switched off.", _at(path, False) if value else {})
        elif isinstance(value, int | float) and key.endswith(("dropout", "l2", "weight_decay")):
            yield Removal(path, f"{_words(key)} removed.", _at(path, 0) if value else {})


def _of_train(variant: Variant) -> Iterator[Removal]:
    train = variant.train
    for key, off, note in (
        ("label_smoothing", 0, "Label smoothing removed."),
        ("early_stopping", None, "Early stopping removed."),
        ("reduce_lr", None, "Reduction of the learning rate removed."),
    ):
        yield Removal(f"train.{key}", note, _at(f"train.{key}", off) if getattr(train, key) else {})
    given = train.optimizer.model_dump()
    on = dict.fromkeys(OPTIMIZER_ON.get(given["name"], ()), True) | given
    for key, off in OPTIMIZER_OFF.items():
        useless = {one: value for one, value in OPTIMIZER_NEEDS.get(key, {}).items() if on.get(one)}
        patch = _at("train.optimizer", {key: off} | useless) if on.get(key) else {}
        yield Removal(f"train.optimizer.{key}", f"{_words(key)} removed.", patch)


def _everywhere(network: Network, keys: tuple[str, ...], parts: tuple[str, ...], own: str, off: Any) -> dict[str, Any]:
    """Switches off what `model` says for all layers, and what layers say themselves under the key `own`."""
    patch: dict[str, Any] = {key: off for key in keys if getattr(network, key, None) not in (None, off)}
    for part in parts:
        layers = getattr(network, part, {})
        named = {name: {own: off} for name, layer in layers.items() if getattr(layer, own) not in (None, off)}
        patch |= {part: named} if named else {}
    return {"model": patch}


def _at(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _words(key: str) -> str:
    return key[0].upper() + key[1:].replace("_", " ")


def _baseline(raw: dict[str, Any]) -> dict[str, Any]:
    """The baseline's settings as they are written: the base with the baseline's own patch, if it has one."""
    own = raw["variants"][raw["study"]["baseline"]] or {}
    return {key: params.merge_patch(raw.get(key, {}), own.get(key, {})) for key in PATCHED}


def _patch_between(base: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The merge patch that makes one out of the other."""
    patch = {}
    for key in [*base, *(key for key in wanted if key not in base)]:
        old, new = base.get(key), wanted.get(key)
        if old != new:
            patch[key] = _patch_between(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return patch


def _is_in(one: Removal, group: str) -> bool:
    return one.path.rpartition(".")[0] == group


def _chosen(found: list[Removal], paths: list[str]) -> list[Removal]:
    """What the paths name, each once, in their order."""
    by_path = {one.path: one for one in found}
    chosen: dict[str, Removal] = {}
    for path in paths:
        named = [by_path[path]] if path in by_path else [one for one in found if path in GROUPS and _is_in(one, path)]
        if not named and path not in GROUPS:
            near = difflib.get_close_matches(path, [*by_path, *GROUPS], n=1)
            hint = f"Did you mean {near[0]}?" if near else "`ablab knockout` lists them."
            raise LabError(f"ablab knockout: Expected what can be removed from the baseline. Found: {path}. {hint}")
        on = [one for one in named if one.patch]
        if not on:
            why = named[0].why if named else "nothing, it is empty in the baseline"
            raise LabError(f"{path}: Expected something to remove. Found: {why}. `ablab knockout` lists what there is.")
        chosen |= {one.path: one for one in on}
    return list(chosen.values())


def _with_variants(raw: dict[str, Any], text: str, added: dict[str, dict[str, Any]], file: Path) -> str:
    """The text with variants after its last one. A YAML library that writes the whole file would change its form
    elsewhere (spaces, line breaks, null), so it writes the new entries alone."""
    node = {key.value: value for key, value in YAML().compose(text).value}["variants"]
    newline = "\r\n" if "\r\n" in text else "\n"
    if node.flow_style:
        end = node.end_mark.index - 1
        new = (
            text[:end] + "".join(f", {_flow({name: settings})[1:-1]}" for name, settings in added.items()) + text[end:]
        )
    else:
        column = node.value[0][0].start_mark.column
        lines = text[: node.end_mark.index].split("\n")
        while _is_between(lines[-1], column):
            lines.pop()
        kept = "\n".join(lines).removesuffix("\r")
        new = newline.join([kept, *_entries(added, column)]) + (text[len(kept) :] or newline)
    try:
        done = YAML(typ="safe", pure=True).load(io.StringIO(new)) == raw | {"variants": raw["variants"] | added}
    except (YAMLError, ValueError):
        done = False
    if not done:  # a block of text that ends in empty lines, say
        by_hand = "\n".join(_entries(added, 2))
        raise LabError(f"{file}: Expected a mapping of variants that can be added to. Add them by hand:\n{by_hand}")
    params.validate(raw | {"variants": raw["variants"] | added}, str(file), new)
    return new


def _is_between(line: str, column: int) -> bool:
    """Whether a line after the last variant belongs to what follows: it is empty, or a comment further left."""
    stripped = line.lstrip()
    return not stripped or (stripped.startswith("#") and len(line) - len(stripped) < column)


def _entries(added: dict[str, dict[str, Any]], column: int) -> list[str]:
    """Variants as the ready-made studies have them: a key a line, its patch in braces where it fits."""
    outer, inner, lines = " " * column, " " * 2 * column, []
    for name, settings in added.items():
        lines.append(f"{outer}{name}:")
        for key, value in settings.items():
            line = f"{inner}{_flow({key: value})[1:-1]}"
            lines += (
                [line] if len(line) <= WIDTH else [inner + one for one in _dumped({key: value}, column).splitlines()]
            )
    return lines


def _flow(value: dict[str, Any]) -> str:
    return _dumped(value, flow=True)


def _dumped(value: dict[str, Any], indent: int = 2, flow: bool = False) -> str:
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.map_indent = flow, 10_000, indent  # type: ignore[assignment]
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(value, text)
    return text.getvalue().strip()


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(text.encode())
        shutil.copymode(file, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
