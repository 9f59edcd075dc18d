"""Run the benchmarks one after the other and write docs/benchmarks.md from what they have found.

    python benchmarks/run.py                    # all of them: three and a half hours of two cores, nothing else running
    python benchmarks/run.py quickstart loop    # these
    python benchmarks/run.py loop -- --times 2  # one, with arguments of its own
    python benchmarks/run.py --small            # a minute each, to see that they work; nothing is kept
    python benchmarks/run.py --page             # nothing, but writes the page anew

Each runs in a process of its own. Its figures are kept in `benchmarks/results/`, with the date, the commit, the machine
and the versions that they are of; those of benchmarks that did not run stay as they are.
"""

import argparse
import ast
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.common import ROOT, Figure  # noqa: E402

# In the order in which they run and stand on the page; transfer, which takes an hour, comes last.
NAMES = (
    *("quickstart", "cifar", "loop", "xla", "overhead", "memory"),
    *("scale", "tracking", "report", "search", "coverage", "transfer"),
)
SCRIPTS, RESULTS, PAGE = ROOT / "benchmarks", ROOT / "benchmarks/results", ROOT / "docs/benchmarks.md"
PACKAGES = ("tensorflow", "keras", "numpy", "dvc", "mlflow")
INTRODUCTION = """# Benchmarks

What is claimed of speed and memory, measured by the scripts in `benchmarks/`. This page is written by
`benchmarks/run.py` out of the figures in `benchmarks/results/`: edit neither.

```console
$ make benchmarks                          # all: three and a half hours of two cores, nothing else running
$ make benchmarks ONLY="quickstart loop"   # these; the others' figures stay
$ python benchmarks/run.py --small         # a minute each, to see that they work; nothing is kept
```

Where something was measured several times, its median is told, with the lowest and the highest in brackets; of a ratio,
that of the medians, with the ratios of single turns. What the benchmarks call plain scripts are in `benchmarks/plain/`:
they know nothing of Ablation Lab."""


def run(name: str, arguments: list[str]) -> bool:
    """Run a benchmark and keep its figures; whether it ended well."""
    commit, started = _commit(), time.time()
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "figures.json"
        if not _call(name, "--figures", str(found), *arguments):
            return False
        figures = json.loads(found.read_text(encoding="utf-8"))
    if _commit() != commit:
        print(f"{name}: not kept, as the code has changed meanwhile", file=sys.stderr)
        return False
    kept = {
        "date": time.strftime("%Y-%m-%d", time.localtime(started)),
        "minutes": round((time.time() - started) / 60, 1),
        "commit": commit,
        "arguments": arguments,
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {one: version(one) for one in PACKAGES},
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    return True


def _call(name: str, *arguments: str) -> bool:
    print(f"\n{name}", flush=True)
    return subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), *arguments], check=False).returncode == 0


def _commit() -> str:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    kept = [f":!{path.relative_to(ROOT)}" for path in (RESULTS, PAGE)]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *kept)
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return f"{model or platform.processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()}"


def kept() -> dict[str, Any]:
    """What has been found so far, by benchmark."""
    files = {name: RESULTS / f"{name}.json" for name in NAMES}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def page(found: dict[str, Any]) -> str:
    """docs/benchmarks.md: the bounds at a glance, then a section for each benchmark."""
    parts = [INTRODUCTION, "## The bounds"]
    figures = {name: [Figure(**one) for one in result["figures"]] for name, result in found.items()}
    bounds = [
        [f"[{name}](#{name})", one.what, one.measured, one.bound, found[name]["date"]]
        for name, them in figures.items()
        for one in them
        if one.bound
    ]
    parts.append(
        _table(["benchmark", "what", "measured", "bound", "on"], bounds) if bounds else "None was measured yet."
    )
    for name in NAMES:
        question, explained = _told(name)
        parts += [f"## {name}", f"**{question}**", explained]
        if name in found:
            bounded = any(one.bound for one in figures[name])
            rows = [[one.what, one.measured, *([one.bound] if bounded else [])] for one in figures[name]]
            parts.append(_table(["what", "measured", *(["bound"] if bounded else [])], rows))
        parts.append(_when(found.get(name), name))
    return "\n\n".join(parts) + "\n"


def _told(name: str) -> tuple[str, str]:
    """What a script's docstring says: its question, and what is done, without how to call it."""
    document = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))) or ""
    question, *paragraphs = document.split("\n\n")
    return question, "\n\n".join(one for one in paragraphs if not one.startswith("    "))


def _when(result: dict[str, Any] | None, name: str) -> str:
    own = result["arguments"] if result else []
    command = f"`{shlex.join(['python', 'benchmarks/run.py', name, *(['--', *own] if own else [])])}`"
    if result is None:
        return f"Not measured yet: {command}."
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    minutes = f"{result['minutes']:.0f} minutes" if result["minutes"] >= 1.5 else "about a minute"
    told = f"Measured on {result['date']} at commit {result['commit']} in {minutes} by {command}"
    return f"{told}: {result['machine']}; {versions}."


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--small", action="store_true", help="see that they work; nothing is kept")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    asked, arguments = parser.parse_args(given[:cut]), given[cut + 1 :]
    if arguments and len(asked.names) != 1:
        parser.error(f"Expected one NAME where arguments follow. Found: {len(asked.names)}.")
    if unknown := set(asked.names) - set(NAMES):
        parser.error(f"Expected some of {', '.join(NAMES)}. Found: {', '.join(sorted(unknown))}.")
    failed = []
    for name in [] if asked.page else asked.names or NAMES:
        done = _call(name, "--small", *arguments) if asked.small else run(name, arguments)
        if not done:
            failed.append(name)
        if not asked.small:
            PAGE.write_text(page(kept()), encoding="utf-8")  # after each: the suite may be stopped
    if asked.page:
        PAGE.write_text(page(kept()), encoding="utf-8")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
