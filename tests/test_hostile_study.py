"""A params.yaml that is no study never gets to DVC, which would unfold it without a bound."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment, new_project, passed, run, write_params
from mutations import BOMB, CHAIN, MERGED

# 2 GB of address space: the interpreter and our imports take half a gigabyte, an unfolded bomb all there is.
LIMITED = ("bash", "-c", 'ulimit -v 2000000; exec timeout 60 "$@"', "limited")
NESTED = "values that don't contain themselves. Found: an alias of a mapping that it stands in"
VALUES = "at most 50,000 values, what aliases stand for counted. Found: "
NO_FILE = "the parameters of a study. Found: no file."

TEXTS = {
    "bomb": (BOMB.encode(), f"params.yaml, line 5: e: Expected {VALUES}"),
    "merged": (MERGED.encode(), f"Expected {VALUES}"),
    "deep": (CHAIN.encode(), "params.yaml, line 30: a29: Expected at most 30 levels. Found: 31."),
    "itself": (b"a: &a [*a]\n", f"params.yaml, line 1: a.0: Expected {NESTED}"),
    "a variant of itself": (b"variants: &v\n  one: *v\n", f"params.yaml, line 1: variants.one: Expected {NESTED}"),
    "300 KB": (b"# " + b"x" * 300_000, "params.yaml: Expected at most 262,144 characters. Found: 300,002."),
    "not UTF-8": ("study: {name: café}\n".encode("latin-1"), "params.yaml: Expected a text file in UTF-8. Found: "),
    "empty": (b"", "params.yaml: the file: Expected a mapping with the keys study, data, model, seeds, variants."),
    "byte order mark": (b"\xef\xbb\xbf", "params.yaml: the file: Expected a mapping with the keys study, "),
}
FILES = {
    "a pipe": (os.mkfifo, NO_FILE),
    "a folder": (os.mkdir, NO_FILE),
    "a link to itself": (lambda path: path.symlink_to(path), "a text file in UTF-8. Found: "),
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), NO_FILE),
    "nothing": (lambda path: None, "the parameters of a study. Found: no such file."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A project that the tests of this module share: nothing that they call may change it."""
    return new_project(tmp_path_factory.mktemp("hostile") / "project")


def refuses(folder: Path, told: str, *command: str, status: int = 1) -> None:
    done = run(folder, *LIMITED, *command)
    assert done.returncode == status, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr and "unexpected error" not in done.stderr
    assert not (folder / "data").exists() and not (folder / "dvc.lock").exists()


def replace(folder: Path, make) -> None:
    path = folder / "params.yaml"
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("name", TEXTS)
def test_repro_refuses_a_text_that_is_no_study_before_dvc_reads_it(folder: Path, name: str):
    text, told = TEXTS[name]
    replace(folder, lambda path: path.write_bytes(text))
    refuses(folder, told, "ablab", "repro")


@pytest.mark.parametrize("name", FILES)
def test_repro_refuses_what_is_no_file_and_use_replaces_nothing_that_is_none(folder: Path, name: str):
    make, told = FILES[name]
    replace(folder, make)
    refuses(folder, told, "ablab", "repro")
    if name not in ("an endless device", "nothing"):
        told = "params.yaml: Expected a file. Found: a folder, a pipe or a broken link."
        refuses(folder, told, "ablab", "use", "quickstart", "--force")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *("repro --engine ray", "quick", "search -S model.head_units=4,8 --trials 2", "verify", "sync", "ui", "plan"),
        *("knockout model.dropout", "predict --variant baseline one.png"),
    ],
)
def test_no_command_unfolds_a_bomb(folder: Path, command: str):
    replace(folder, lambda path: path.write_text(BOMB))
    status = 2 if command == "plan" else 1
    done = run(folder, "timeout", "120", "ablab", *command.split())  # TensorFlow's import needs more address space
    assert done.returncode == status and f"Expected {VALUES}" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "params.yaml").read_text() == BOMB


def test_a_study_from_elsewhere_is_checked_before_it_becomes_the_current_one(folder: Path, tmp_path: Path):
    replace(folder, lambda path: None)
    write_params(folder, TINY)
    before = (folder / "params.yaml").read_bytes()
    (tmp_path / "bomb.yaml").write_text(BOMB)
    os.mkfifo(tmp_path / "pipe.yaml")
    refuses(folder, f"bomb.yaml, line 5: e: Expected {VALUES}", "ablab", "use", str(tmp_path / "bomb.yaml"))
    refuses(folder, f"Expected {VALUES}", "ablab", "plan", "--params", str(tmp_path / "bomb.yaml"), status=2)
    refuses(folder, NO_FILE, "ablab", "plan", "--params", str(tmp_path / "pipe.yaml"), status=2)
    refuses(folder, "Expected another file than the current params.yaml.", "ablab", "use", "params.yaml")
    assert (folder / "params.yaml").read_bytes() == before


def test_more_cells_than_dvc_can_hold_are_refused(folder: Path):
    variants = {f"v{number}": {"model": {"dropout": number / 1000}} for number in range(400)}
    write_params(folder, TINY | {"seeds": list(range(30)), "variants": {"baseline": {}, **variants}})
    told = "line 19: seeds: Expected at most 10,000 cells of a phase, a variant with a seed each. Found: 12030."
    refuses(folder, told, "ablab", "repro")


def test_make_repro_refuses_a_bomb_before_dvc_reads_it(folder: Path):
    """`make` finds the environment set up: the stamp of its lock file is there."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copyfile(ROOT / name, folder / name)
    environment(folder)
    (folder / ".venv/.ready-requirements.lock").touch()
    replace(folder, lambda path: path.write_text(BOMB))
    refuses(folder, f"params.yaml, line 5: e: Expected {VALUES}", "make", "repro", status=2)


@pytest.mark.slow
def test_dvc_alone_unfolds_a_bomb_as_the_page_says(folder: Path):
    """Once it doesn't, docs/security.md can say so."""
    replace(folder, lambda path: path.write_text(BOMB))
    assert run(folder, *LIMITED, "dvc", "status").returncode != 0
    write_params(folder, TINY)
    passed(run(folder, *LIMITED, "dvc", "status"))


def test_a_byte_order_mark_before_a_study_is_read_by_us_and_by_dvc(folder: Path):
    write_params(folder, TINY)
    text = (folder / "params.yaml").read_bytes()
    (folder / "params.yaml").write_bytes(b"\xef\xbb\xbf" + text)
    passed(run(folder, "python", "-m", "ablation_lab.dvc_command"))
    passed(run(folder, "dvc", "status", "download"))
