import io
import json
import re
import xml.etree.ElementTree as ET
from csv import reader

import fabricate
import pandas as pd
import pytest

from ablation_lab import evaluation
from ablation_lab.report import exports
from ablation_lab.report.wording import Table
from ablation_lab.report.writing import write_report

NASTY = [
    "<script>alert(1)</script>",
    "a | b & c % d $ e # f _ g { h } i ~ j ^ k \\ l\nnew line",
    "猫 é",
    '=HYPERLINK("http://example.org", "x")',
    "@sum",
    "-1+2",
    "\\input{/etc/passwd}",
    "[0, 1] *",
    "\x1b[31mred",
]
HASH = "0123456789abcdef" * 4


def parsed(table):
    return list(reader(io.StringIO(exports.csv(table))))


def cells(text):
    """The cells of a LaTeX table by row, the heading first; it is checked on the way that TeX could read it."""
    depth = 0
    for sign in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    opened = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        opened.append(name) if what == "begin" else None
        assert what == "begin" or opened.pop() == name
    assert not opened
    assert not re.search(r"(?<!\\)[#^]|(?<!\\)_(?!\w*\})|(?<!\\)%(?! Letters)", re.sub(r"\$\^\\circ\$|#[12]", "", text))
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    commands = set(re.findall(r"\\([A-Za-z]+)", text))
    assert commands <= KNOWN, commands - KNOWN
    body = re.search(r"\\toprule\n(.*)\\bottomrule", text, re.DOTALL)
    assert body
    rows = body[1].replace("\\midrule\n", "").removesuffix(" \\\\\n").split(" \\\\\n")
    split = [re.split(r"(?<!\\)&", row) for row in rows]
    assert len({len(row) for row in split}) == 1
    return [[cell.strip() for cell in row] for row in split]


# Of LaTeX itself and of booktabs.
KNOWN = {"begin", "end", "centering", "caption", "label", "toprule", "midrule", "bottomrule", "linewidth", "newline"}
KNOWN |= {"texttt", "textbackslash", "textless", "textgreater", "textbar", "textasciitilde", "textasciicircum"}
KNOWN |= {"dots", "pm", "times", "to", "cdot", "leq", "geq", "approx", "circ", "mu", "sigma", "chi"}
KNOWN |= {"rightskip", "relax", "Delta", "triangle", "bigtriangledown", "bullet", "diamond"}
KNOWN |= {"providecommand", "ablabletters", "ifdefined", "Umathchar", "else", "fi"}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A study of two variants and two seeds whose classes have names that no one should trust; one cell tells what it
    was trained with."""
    root = tmp_path_factory.mktemp("exports")
    study = fabricate.study(("baseline", "no_dropout"), seeds=(0, 1), baseline={"test_accuracy": 0.9})
    fabricate.write(root, study, classes=NASTY, pictures=80)
    file = root / "cells/no_dropout/seed-1/timing.json"
    made = {"git.commit": "c" * 40, "git.dirty": "true", "ablab.host": "here", "ablab.keras": "3.15.0"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"made": made}))
    evaluation.evaluate(study, root)
    write_report(study, root)
    return root / "reports", study


def test_all_tables_of_the_page_are_written_twice(usual):
    names = {path.name for path in (usual[0] / "tables").iterdir()}
    slugs = {"variants", "reported_and_reproduced", "most_confused_pairs", "f1_of_each_class", "cells"}
    slugs |= {"probability_of_the_actual_class", "pictures_of_each_class"}
    slugs |= {"timing", "timing_of_cells"}
    slugs |= {"costs", "training_behaviour", "calibration"}
    slugs |= {f"{what}_of_{one}" for what in ("classification_report", "layers") for one in ("baseline", "no_dropout")}
    assert names == {f"{slug}.{suffix}" for slug in slugs for suffix in ("csv", "tex")} | {"numbers.csv"}


def test_the_main_numbers_are_numbers(usual):
    found = json.loads((usual[0] / "results.json").read_text())["variants"]
    table = pd.read_csv(usual[0] / "tables/numbers.csv", index_col="variant")
    assert list(table.index) == list(found)
    for name, one in found.items():
        row = table.loc[name]
        assert row["test_accuracy"] == pytest.approx(one["test_accuracy"]["mean"], rel=1e-12)
        assert row["parameters"] == one["parameters"]
        if one["delta"]["ci95"]:
            assert [row["difference_low"], row["difference_high"]] == pytest.approx(one["delta"]["ci95"], rel=1e-12)
            assert row["verdict"] == one["delta"]["verdict"]


def test_csv_is_read_as_it_was_meant(usual):
    variants = pd.read_csv(usual[0] / "tables/variants.csv")
    assert variants["Variant"].tolist() == ["baseline", "no_dropout"]
    assert variants["Difference"][0] == "baseline" and variants["Reported test"].tolist()[0] == "90.0 %"
    assert re.fullmatch(r"\d\d\.\d % ± \d\.\d", variants["Test"][0])
    text = (usual[0] / "tables/variants.csv").read_text(encoding="utf-8")
    assert "\r" not in text and "\xa0" not in text and "−" not in text
    layers = pd.read_csv(usual[0] / "tables/layers_of_baseline.csv")
    assert layers["Parameters"].tolist() == [80, 5130]
    cells = pd.read_csv(usual[0] / "tables/cells.csv", dtype=str)
    assert cells["In MLflow"].tolist() == [f"{seed:064x}" for seed in (0, 1, 0, 1)]


def test_no_name_is_a_formula(usual):
    for file in (usual[0] / "tables").glob("*.csv"):
        rows = list(reader(io.StringIO(file.read_text(encoding="utf-8"))))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))):
            assert re.match(r"[-+]\d[\d.]*( points| \[|$)", cell), cell
    names = pd.read_csv(usual[0] / "tables/pictures_of_each_class.csv")["Class"].tolist()
    assert names[3].startswith("'=HYPERLINK") and names[4:6] == ["'@sum", "'-1+2"]
    assert names[2] == "猫 é" and "\n" not in names[1]


@pytest.mark.parametrize(
    ("cell", "kind", "shown"),
    [
        ("−1.20", "r", "-1.20"),
        ("+0.4", "r", "+0.4"),
        (["+1.20", "[−0.30, 2.70]"], "r", "+1.20 [-0.30, 2.70]"),
        ("−1.5 points", "r", "-1.5 points"),
        ("12,345", "r", "12345"),
        (["12,345", "−8\xa0%"], "r", "12345 -8 %"),
        ("1,000", "l", "1,000"),
        (["93.3\xa0%", "±\xa00.2"], "r", "93.3 % ± 0.2"),
        (["worse", "p\xa0=\xa00.001"], "v", "worse p = 0.001"),
        (["01234567", f"http://127.0.0.1:5000/cells/{HASH}/x"], "a", HASH),
        (["told", "http://example.org"], "a", "told"),
        ("–", "r", ""),
        ("- a list", "l", "'- a list"),
        ("−x", "l", "'-x"),
        ("＝1+1", "l", "'＝1+1"),
        ("-1+cmd|' /C calc'!A0", "l", "'-1+cmd|' /C calc'!A0"),
        ("  =1", "l", "'=1"),
        ("a\r\nb\x00", "l", "a b"),
    ],
)
def test_a_field_of_csv(cell, kind, shown):
    assert parsed(Table("T", {"Head": "l", "x": kind}, [["row", cell]])) == [["Head", "x"], ["row", shown]]


@pytest.mark.parametrize("name", fabricate.NASTY)
def test_a_name_is_neither_a_formula_nor_a_command_of_tex(name):
    table = Table("T", {"Class": "l", "Pictures": "r"}, [[name, "1,000"]])
    ((shown, number),) = parsed(table)[1:]
    assert not shown.startswith(("=", "+", "-", "@")) and number == "1000"
    plain = " ".join(name.replace("\x1b", " ").split())
    assert shown in (plain, f"'{plain}")
    assert [len(row) for row in cells(exports.latex(table, "t"))] == [2, 2]


def test_a_heading_is_no_formula_either():
    assert parsed(Table("T", {"=1": "l", "b": "r"}, [])) == [["'=1", "b"]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a & b_c 5 % $1 #2 {x}", r"a \& b\_c 5 \% \$1 \#2 \{x\}"),
        (r"~ ^ \input", r"\textasciitilde{} \textasciicircum{} \textbackslash{}input"),
        ("<b>|", r"\textless{}b\textgreater{}\textbar{}"),
        ("−1.2 ± 0.3", r"$-$1.2 $\pm$ 0.3"),
        ("3 × 3 → 1–2", r"3 $\times$ 3 $\to$ 1--2"),
        ("p\xa0<\xa00.001", r"p~\textless{}~0.001"),
        ("[0, 1] *", "{[}0, 1{]} {*}"),
        ("a--b---c", "a-{}-b-{}-{}-c"),
        ("two\nlines", "two lines"),
        ("Größe é", "Größe é"),
        ("e\u0301", "é"),
        ("猫 ▲", r"\ablabletters{猫}{U+732B} $\triangle$"),
    ],
)
def test_latex_prints_a_text_as_it_is(text, shown):
    assert exports.tex(text) == shown


def test_latex_tables_are_whole(usual):
    for file in (usual[0] / "tables").glob("*.tex"):
        text = file.read_text(encoding="utf-8")
        rows = cells(text)
        table = list(reader(io.StringIO(file.with_suffix(".csv").read_text(encoding="utf-8"))))
        assert (len(rows), len(rows[0])) == (len(table), len(table[0]))
        assert f"\\label{{tab:{file.stem}}}" in text and "\\centering" in text
        assert text.startswith("% Letters") == ("\\ablabletters{" in text)
    names = [
        row[0].split("\\relax ")[-1]
        for row in cells((usual[0] / "tables/pictures_of_each_class.tex").read_text(encoding="utf-8"))
    ]
    assert names[7] == r"\textbackslash{}input\{/etc/passwd\}"


def test_latex_keeps_lines_sides_and_links():
    columns = {"Variant": "l", "Change": "l", "Difference": "r", "Verdict": "v", "In MLflow": "a"}
    long = ["model.blocks.block1.dropout: 0.25 → 0.5", "without b"]
    link = ["01234567", f"http://127.0.0.1:5000/cells/{HASH}/x"]
    row = ["a_b", long, ["−1.2", "[−2, 0]"], ["worse", "p\xa0=\xa00.01"], link]
    text = exports.latex(Table("Variants", columns, [row], "All of them."), "variants", "QUICK CHECK")
    heads, found = cells(text)
    ragged = r"\rightskip=0pt plus 1fil\relax "
    assert heads == ["Variant", f"{ragged}Change", "Difference", "Verdict", "In MLflow"]
    assert found == [
        r"a\_b",
        ragged + r"model.blocks.block1.dropout: 0.25 $\to$ 0.5 \newline without b",
        r"\begin{tabular}[t]{@{}r@{}}$-$1.2 \\ {[}$-$2, 0{]}\end{tabular}",
        r"\begin{tabular}[t]{@{}l@{}}worse \\ p~=~0.01\end{tabular}",
        r"\texttt{01234567}",
    ]
    assert r"\begin{tabular}{lp{0.25\linewidth}rll}" in text
    assert r"\caption[Variants]{Variants. All of them. QUICK CHECK.}" in text


def test_names_that_make_one_slug_are_numbered(tmp_path):
    page = {"mark": None, "scores": {name: Table(name, {"x": "l"}, [["1"]]) for name in ("A-b", "a_b", "猫")}}
    exports.write_tables(page, tmp_path / "tables")
    found = sorted(path.name for path in (tmp_path / "tables").glob("*.csv"))
    assert found == ["a_b.csv", "a_b_2.csv", "table.csv"]


def test_each_figure_is_also_svg_with_its_text_and_without_a_date(usual):
    folder = usual[0] / "figures"
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")}
    for path in folder.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "dc:date" not in text and "<script" not in text
    words = "".join(ET.parse(usual[0] / "figures/accuracy.svg").getroot().itertext())
    assert "test accuracy" in words and "no_dropout" in words


def test_provenance_tells_what_each_cell_was_trained_with(usual):
    reports, study = usual
    found = json.loads((reports / "provenance.json").read_text())
    assert found["study"] == "fabricated" and found["data"] == {"name": "digits", "digest": "d" * 64}
    results = json.loads((reports / "results.json").read_text())["variants"]
    assert {name: set(seeds) for name, seeds in found["cells"].items()} == {name: {"0", "1"} for name in study.variants}
    for name, one in results.items():
        assert {seed: cell["cell_hash"] for seed, cell in one["cells"].items()} == {
            seed: cell["cell_hash"] for seed, cell in found["cells"][name].items()
        }
    told, silent = found["cells"]["no_dropout"]["1"], found["cells"]["no_dropout"]["0"]
    assert (told["commit"], told["dirty"], told["host"], told["device"]) == ("c" * 40, True, "here", "CPU")
    assert told["versions"]["keras"] == "3.15.0" and told["versions"]["numpy"] is None
    assert told["plan_hash"] == silent["plan_hash"] and len(told["plan_hash"]) == 64
    assert (silent["commit"], silent["dirty"], silent["host"]) == (None, None, None)


def test_tables_are_found_wherever_they_are():
    one, two = (Table(name, {}, []) for name in "ab")
    assert list(exports._tables({"a": None, "b": [("x", one)], "c": {"d": two}, "e": "text"})) == [one, two]
