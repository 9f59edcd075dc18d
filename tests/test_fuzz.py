"""Whatever stands in a params.yaml: it is a study that can be planned, or one message that says what is wrong.

2,000 of them: `pytest -m slow tests/test_fuzz.py`.
"""

import json
import re
import resource
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import one_thread  # noqa: F401
import pytest
from conftest import TINY, write_params
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import FILES, STUDIES, dumped, files, is_below, places, renamed, texts, typos
from ruamel.yaml import YAML

from ablation_lab import cli, knockout, params, plan, study_file
from ablation_lab.errors import LabError

# The same examples every time, and no clock that a busy machine could stop.
FIXED = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
QUICK = settings(max_examples=100, phases=[Phase.generate], **FIXED)
MISTAKE = re.compile(r"(?P<file>.+?params\.yaml)(, line (?P<line>\d+))?: (?P<told>.*Expected .+ Found: .+)", re.DOTALL)
SECONDS, MEGABYTES = 60, 1500  # of computing for one file; of all. What a machine needs stays far below


def well_told(error: LabError, file: Path) -> None:
    """Every line has the file, the place, the expectation and the finding, and nothing that spoils a terminal."""
    text = str(error)
    assert len(text) < 20_000
    assert not [one for one in text if not one.isprintable() and one not in "\n\u202e\u3000\xa0"], text
    for line in text.split("\n       "):
        if line.endswith("more like these"):
            continue
        found = MISTAKE.fullmatch(line)
        assert found, f"no file, expectation and finding: {text}"
        assert found["file"] == str(file)
        assert len(line) < 3000, line
        told = found["told"]
        # A file that can't be read as YAML has a line; everything else has the path of a key.
        assert found["line"] or not told.startswith("Expected valid YAML") or "haracter" in told, line
        if not told.startswith(("Expected valid YAML", "Expected a text file", "Expected at most")):
            place = told.partition(": Expected ")[0]
            assert place and not place.startswith(("Expected", " ")), line


def outcome(file: Path) -> str:
    """`refused`, `read` or `planned`: what becomes of a file, by the functions that every command calls."""
    try:
        study = params.load(file)
        ready = any(variant.model.builder == "transfer" for variant in study.variants.values())
        if ready and zlib.crc32(file.read_bytes()) % 200:  # building backbones takes long
            return "read"
        image_shape, classes, _, pictures, _ = plan.pictures(study, file.parent)
        plan.check_names(study, classes)
        describe = plan.describe if ready else plan.describe_both
        describe(study, image_shape, len(classes), file.parent, pictures)
    except LabError as error:
        well_told(error, file)
        return "refused"
    return "planned"


def tried(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    start = time.process_time()
    result = outcome(file)
    assert time.process_time() - start < SECONDS
    assert file.read_bytes() == content
    return result


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "params.yaml"


@QUICK
@given(files())
def test_a_file_is_a_plan_or_a_message(file: Path, content: bytes):
    tried(file, content)


@settings(max_examples=60, phases=[Phase.generate], **FIXED)
@given(texts())
def test_what_is_read_is_what_yaml_says(content: bytes):
    text = content.decode("utf-8", "surrogatepass")
    try:
        expected = YAML(typ="safe", pure=True).load(text)
    except Exception:  # ruamel's own ways of refusing
        with pytest.raises(LabError):
            study_file.parse(text, "x")
        return
    try:
        assert repr(study_file.parse(text, "x")) == repr(expected)
    except LabError as error:
        assert "[...]" in repr(expected) or "{...}" in repr(expected) or "levels" in str(error)


@pytest.mark.slow
def test_two_thousand_files_are_plans_or_messages_in_bounded_time_and_memory(file: Path):
    seen: Counter[str] = Counter()

    @settings(max_examples=2000, phases=[Phase.generate], **FIXED)
    @given(files())
    def each(content: bytes) -> None:
        seen[tried(file, content)] += 1

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    each()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{dict(seen)} in {time.monotonic() - start:.0f} s, {grown:.0f} MB more", file=sys.stderr)
    assert seen["planned"] > 100 and seen["refused"] > 500
    assert grown < MEGABYTES


# Mappings whose keys a study chooses, and those that only Keras or a function of the user's can check.
NAMED = {"variants", "blocks", "head", "stages", "augment", "pictures", "class_weights"}


def fixed_keys(study: dict) -> list[tuple]:
    found = [place for place in places(study) if isinstance(place[-1], str) and len(place[-1]) > 3]
    return [one for one in found if len(one) < 2 or (one[-2] not in NAMED and not {"optimizer", "augment"} & set(one))]


@settings(max_examples=50, phases=[Phase.generate], **FIXED)
@given(st.data())
def test_a_mistyped_key_is_told_with_the_one_that_was_meant(file: Path, data: st.DataObject):
    study = params.merge_patch(STUDIES[data.draw(st.sampled_from(sorted(STUDIES)))], {})
    place = data.draw(st.sampled_from(fixed_keys(study)))
    typed = data.draw(typos(place[-1]))
    holder = study
    for key in place[:-1]:
        holder[key] = dict(holder[key])
        holder = holder[key]
    if typed in holder or (typed, place[-1]) in {("loss", "loss")}:
        return
    renamed(holder, place[-1], typed)
    file.write_bytes(dumped(study))
    with pytest.raises(LabError) as caught:
        params.load(file)
    well_told(caught.value, file)
    here = ".".join((*place[:-1], typed))
    (line,) = (one for one in str(caught.value).split("\n       ") if f": {here}: Expected one of the keys" in one)
    assert f'Found: "{typed}". Did you mean {place[-1]}?' in line
    number = int(MISTAKE.fullmatch(line)["line"])
    assert typed in file.read_text().split("\n")[number - 1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project that has planned and reported."""
    folder = tmp_path_factory.mktemp("finished")
    write_params(folder, TINY)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    processed = folder / "data/processed"
    processed.mkdir(parents=True)
    card = {"image_shape": [8, 8, 1], "classes": list("0123456789"), "counts": {"train": 70, "test": 20}, "digest": "d"}
    (processed / "card.json").write_text(json.dumps(card))
    study = params.load(folder / "params.yaml")
    plan.write(study, plan.describe(study, (8, 8, 1), 10), folder)
    (folder / "reports").mkdir()
    (folder / "reports/results.json").write_text("{}")
    (folder / "cells/no_dropout/seed-0").mkdir(parents=True)
    (folder / "cells/no_dropout/seed-0/cell.json").write_text("{}")
    return folder


@settings(max_examples=30, phases=[Phase.generate], **FIXED)
@given(files())
def test_a_refused_file_changes_no_result(finished: Path, content: bytes):
    from stages import plan as stage

    (finished / "params.yaml").write_bytes(content)
    before = is_below(finished)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        try:
            if params.load().baseline.model.builder == "transfer":
                return  # its weights would be downloaded
        except LabError:
            pass
        else:
            return  # a study: that its plan replaces this one is what the stage is for
        with pytest.raises(LabError):
            stage.main()
    assert is_below(finished) == before


@settings(max_examples=30, phases=[Phase.generate], **FIXED)
@given(files(), st.sampled_from(["plan --params", "use --force", "knockout", "knockout model.dropout"]))
def test_a_command_ends_with_a_message_and_its_status(finished: Path, capsys, content: bytes, command: str):
    other = finished.parent / "other-params.yaml"
    current = finished / "params.yaml"
    given_file = current if command.startswith("knockout") else other
    write_params(finished, TINY)
    given_file.write_bytes(content)
    before = is_below(finished)
    words = command.split() + ([str(other)] if given_file == other else [])
    try:
        params.load(given_file)
    except LabError:
        pass
    else:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        patch.setattr(sys, "argv", ["ablab", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    told = capsys.readouterr()
    assert ended.value.code == (2 if words[0] == "plan" else 1)
    assert told.out == "" and told.err.startswith(f"\nerror: {given_file}")
    assert is_below(finished) == before


def test_a_valid_study_is_no_finding(file: Path):
    for path in FILES:
        file.write_bytes(path.read_bytes())
        params.load(file)


@settings(max_examples=30, phases=[Phase.generate], **FIXED)
@given(files())
def test_knockout_adds_to_a_file_or_leaves_it(file: Path, content: bytes):
    file.write_bytes(content)
    try:
        found = [one.path for one in knockout.removals(params.load(file), knockout._baseline(params.read(file)[0]))]
        knockout.knock_out(file, found[:2])
    except LabError:
        assert file.read_bytes() == content
        return
    params.load(file)
