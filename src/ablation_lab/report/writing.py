"""The report as a whole."""

import shutil
from pathlib import Path

from ablation_lab import files
from ablation_lab.params import Params
from ablation_lab.report import exports, figures, pages, provenance, results
from ablation_lab.report.results import Material

# What a report consists of: the outputs of DVC's stage `report`. Anything else in its folder is the user's.
WRITTEN = ("results.json", "timings.json", "provenance.json", "report.md", "report.html", "figures", "tables")
PARTIAL = "partial"  # the folder of the partial report, beside these


def write_report(study: Params, root: Path = Path()) -> str:
    """Write `reports/`: results.json, timings.json, provenance.json, figures, tables, report.md and report.html.

    A partial report of an earlier state is removed; other files that a user has put into `reports/` stay.

    Args:
        study: the study whose `evaluation/`, plan, data card and timings are read.
        root: the project's root, where they are and where `reports/` goes.

    Returns:
        the table of variants as plain text.

    Raises:
        LabError: when a result of an earlier stage is missing.
    """
    return write(study, results.gather(study, root), root, root / "reports")


def write(study: Params, material: Material, root: Path, folder: Path) -> str:
    """Write a report to a folder, whole or not at all; the table of variants as plain text."""
    page = pages.build(study, material)
    with files.whole(folder) as out:
        files.write_json(out / "results.json", material.results)
        files.write_json(out / "timings.json", material.timings)
        files.write_json(out / "provenance.json", provenance.gather(study, material, root))
        exports.write_tables(page, out / "tables")
        (out / "tables/numbers.csv").write_text(exports.numbers(material.results), encoding="utf-8", newline="\n")
        drawn = figures.draw(study, material, out / "figures")
        (out / "report.md").write_text(pages.markdown(page, drawn), encoding="utf-8")
        (out / "report.html").write_text(pages.html(page, drawn, out), encoding="utf-8")
        _keep_the_users(folder, out)
    return pages.text_table(page)


def _keep_the_users(before: Path, out: Path) -> None:
    """Copy what a user has put into a report's folder, or into that of the partial report in it, to the new one."""
    for path in sorted(before.glob("*")):
        if path.name in WRITTEN or path.name == f"{PARTIAL}.part":
            continue
        if path.name == f"{PARTIAL}.old":  # left by a killed process, as is the one above: the earlier partial report
            if not (before / PARTIAL).exists():
                _keep_the_users(path, out / PARTIAL)
            continue
        if path.name == PARTIAL and path.is_dir() and not path.is_symlink():
            _keep_the_users(path, out / PARTIAL)
            continue
        out.mkdir(exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, out / path.name, symlinks=True)
        else:
            shutil.copy2(path, out / path.name, follow_symlinks=False)
