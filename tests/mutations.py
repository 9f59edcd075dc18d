"""Studies that went wrong: what people, editors, scripts, merges and malice make of a valid params.yaml."""

import copy
import datetime
import io
from pathlib import Path
from typing import Any

from conftest import ROOT
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ablation_lab import params

FILES = [*sorted((ROOT / "studies").glob("*.yaml")), ROOT / "params.yaml"]
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
STUDIES = {name: YAML(typ="safe", pure=True).load(text) for name, text in TEXTS.items()}

NUMBERS = [0, -1, 1, 2, 3, 10**4, 10**6, 10**9, 10**12, 10**30, -(10**30), 65_536, 4096, 2**31, 2**63]
NUMBERS += [0.5, -0.1, 1.0, 1.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
NAMES = ["", " ", "a.b", "a b", "a/b", "../up", "/etc", "ä", "名", "😀", "\x07bell", "a\nb", "\x1b[31mred"]
NAMES += ["\u202eback", "__proto__", "constructor", "null", "no", "CON", ".", "..", "-", "--force"]
NAMES += ["${seeds}", "*", "%s", "{x}", "a" * 300]
WORDS = ["relu", "softmax", "sigmoid", "adam", "cnn", "mlp", "resnet", "transfer", "none", "all", "best", "mse"]
WORDS += ["val_loss", "backbone", "valid", "same", "imagenet", "SqueezeNet", "mirrored", "mixed_float16", "device"]
WORDS += ["networks.example:build", "networks.missing:build"]
VALUES: list[Any] = [None, True, False, [], {}, [[]], [None], {"a": 1}, {"a": {"b": None}}, {"name": "x"}]
VALUES += ["x" * 20_000, datetime.date(2001, 1, 1), b"\x00\xff", {1: 2}, {None: None}, {True: {}}, [0] * 3000]
VALUES += [list(range(1500)), {"last": 3}, {"x": {"units": 10**6}}, [100_000, 100_000]]
VALUES += [{"RandomFlip": {"mode": "horizontal"}}, {"RandomCrop": {"height": 8, "width": 8}}]
VALUES += [{"RandomGaussianBlur": {"kernel_size": 10**6}}, {"RandomZoom": {"factor": 1e9}}]

# Texts in the place of a value.
ODDITIES = ["no", "1e3", "0o17", "010", "12:30:45", "2001-01-01", "2001-99-99", "~", ".inf", ".nan", "0x1F"]
ODDITIES += ["1_000", "1e999", "'", "|", ">-", "{", "[", "@x", "`x`", "%x", "*nowhere"]
ODDITIES += ["!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary aGk=", "!!set {a, b}"]
ODDITIES += ["!!int x", "!!bool maybe", "!!float {}", "!!timestamp x", "!!omap [a: 1]", "!!str 5", "!own x"]
ODDITIES += ["&a [*a]", "&a {b: *a}", '"\\ud800"', '"\\0"', '"\\x1b[2J"', "[1, 2", "? [a] : b", "{? {b: 1} : 2}"]
ODDITIES += ["- x", "{<<: {filters: 3}}", "{<<: 5}", "{a: 1, a: 2}", "9" * 5000, "[" * 400, "{a: " * 200]

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: 1}\n" + BOMB.partition("\n")[2].replace("[", "{<<: [").replace("]", "]}")
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500))
WHOLE = [BOMB, MERGED, CHAIN, "[" * 5000, "- " * 5000, "x: " + "y" * 300_000, "a: &a\n  b: *a\n"]
WHOLE += ["", " \n", "\ufeff", "# nothing\n", "null", "- 1\n- 2\n", "5", '"text"', "\x00\x01\x02", "<html>"]
WHOLE += ["---\na: 1\n---\nb: 2\n", "%YAML 9.9\n---\na: 1\n"]
LINES = [
    "\tx: 1",
    "---",
    "...",
    "%YAML 1.1",
    "- x",
    "x",
    ": ",
    "? ",
    "study: {}",
    "variants: {}",
    "<<: *x",
    "  y: 1",
    "}",
]

CHANGES = ["value", "value", "value", "drop", "typo", "name", "new", "twin", "patch", "section"]
EDITS = ["value", "value", "value", "line", "again", "tab", "cut", "crlf", "bom", "byte", "indent"]


def places(value: Any, here: tuple = ()) -> list[tuple]:
    """Every place in a study, the outer ones first."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inside in items for place in places(inside, (*here, key))]


def parent(study: Any, place: tuple) -> Any:
    for key in place[:-1]:
        study = study[key]
    return study


def renamed(mapping: dict, old: Any, new: Any) -> None:
    """Give a key another name; the order stays."""
    items = [(new if key == old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(items)


@st.composite
def typos(draw, word: str) -> str:
    """A word as a hurried hand writes it."""
    at = draw(st.integers(0, len(word) - 1))
    kinds = [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word[:at] + "x" + word[at + 1 :]]
    kinds += [word[:at] + word[at : at + 2][::-1] + word[at + 2 :], word.upper(), word + "s"]
    return draw(st.sampled_from(kinds))


@st.composite
def studies(draw) -> Any:
    """A valid study with one to three changes."""
    study = copy.deepcopy(STUDIES[draw(st.sampled_from(sorted(STUDIES)))])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(study) or [()]))
        if not place:
            break
        holder, key = parent(study, place), place[-1]
        match draw(st.sampled_from(CHANGES)):
            case "value":
                holder[key] = draw(st.sampled_from([*NUMBERS, *NAMES, *WORDS, *copy.deepcopy(VALUES)]))
            case "drop":
                del holder[key]
            case "typo" if isinstance(holder, dict) and isinstance(key, str) and key:
                renamed(holder, key, draw(typos(key)))
            case "name" if isinstance(holder, dict):
                renamed(holder, key, draw(st.sampled_from([*NAMES, 3, 1.5, True, None])))
            case "new" if isinstance(holder, dict):
                holder[draw(st.sampled_from([*NAMES, *WORDS]))] = draw(
                    st.sampled_from([*NUMBERS, *copy.deepcopy(VALUES)])
                )
            case "twin" if isinstance(holder, dict):  # the same again under another name
                holder[f"{key}_again"] = copy.deepcopy(holder[key])
            case "patch":  # two branches merged
                other = STUDIES[draw(st.sampled_from(sorted(STUDIES)))]
                name = draw(st.sampled_from(sorted(other)))
                study = params.merge_patch(study, copy.deepcopy({name: other[name]}))
            case "section":
                other = STUDIES[draw(st.sampled_from(sorted(STUDIES)))]
                name = draw(st.sampled_from(sorted(other)))
                study[name] = copy.deepcopy(other[name])
    return study


@st.composite
def texts(draw) -> bytes:
    """A valid study's text with changes that no mapping shows."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    for _ in range(draw(st.integers(1, 2))):
        lines = text.split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(EDITS)):
            case "value":
                name, colon, _ = lines[at].partition(":")
                lines[at] = f"{name}{colon} {draw(st.sampled_from(ODDITIES))}"
            case "line":
                lines.insert(at, draw(st.sampled_from(LINES)))
            case "again":
                lines.insert(at, lines[at])
            case "tab":
                lines[at] = lines[at].replace("  ", "\t", 1)
            case "indent":
                lines[at] = draw(st.sampled_from([" ", "   ", ""])) + lines[at].lstrip()
            case "cut":
                lines = lines[:at]
            case "crlf":
                lines = "\n".join(lines).replace("\n", "\r\n").split("\n")
            case "bom":
                lines[0] = "\ufeff" + lines[0]
            case "byte":
                at = draw(st.integers(0, len(text) - 1))
                lines = (text[:at] + draw(st.characters(max_codepoint=0x2FF)) + text[at + 1 :]).split("\n")
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def dumped(study: Any) -> bytes:
    """A study as YAML, its order kept."""
    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(study, out)
    return out.getvalue().encode()


def files() -> st.SearchStrategy[bytes]:
    """What may stand in a params.yaml."""
    whole = st.sampled_from([one.encode() for one in WHOLE]) | st.binary(max_size=200)
    return st.one_of(*[studies().map(dumped)] * 6, *[texts()] * 3, whole)


def is_below(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
