"""How long does the study of a fresh clone take, beside a shell loop of plain scripts?

    python benchmarks/quickstart.py        # 25 minutes of two cores, nothing else running; needs no network

The study is `studies/quickstart.yaml`: six variants × three seeds of a small network on the digits, 20 epochs each. It
is run from nothing to the report and MLflow's runs by `dvc repro` and by `ablab repro -j 2`, each in a fresh clone. The
loop is `xargs -P 2`, which starts one process a cell, two at a time: `benchmarks/plain/digits.py` takes the digits from
scikit-learn and trains the same network, with as many epochs, the same batch and optimizer and one thread, by `fit`
with validation data, then saves weights and history and scores the test part. Told is wall-clock time, from the
command's start to its end. The three ways take turns, three times unless `--times` says otherwise.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common  # noqa: E402


def study(small: bool) -> dict[str, Any]:
    """The study, or two cells of it."""
    made = YAML(typ="safe", pure=True).load(common.ROOT / "studies/quickstart.yaml")
    if small:
        kept = {name: made["variants"][name] for name in ("baseline", "no_dropout")}
        made |= {"variants": kept, "seeds": [0], "train": made["train"] | {"epochs": 2}}
    return made


def loop(folder: Path, made: dict[str, Any]) -> float:
    """The seconds of the shell loop."""
    folder.mkdir()
    cells = " ".join(f"{name} {seed} {made['train']['epochs']}" for name in made["variants"] for seed in made["seeds"])
    script = f"{sys.executable} {common.PLAIN / 'digits.py'}"
    return common.call(folder, "sh", "-c", f"echo {cells} | xargs -P 2 -n 3 {script}")


def same_networks(project: Path, plain: Path) -> dict[str, float]:
    """The mean test accuracy of both, whose networks must have as many parameters."""
    results = json.loads((project / "reports/results.json").read_text())
    accuracies: dict[str, list[float]] = {"pipeline": [], "plain": []}
    for name, one in results["variants"].items():
        for seed, cell in one["cells"].items():
            scores = json.loads((plain / f"{name}-{seed}.json").read_text())
            assert scores["parameters"] == one["parameters"], name
            accuracies["pipeline"].append(cell["test_accuracy"])
            accuracies["plain"].append(scores["test_accuracy"])
    return {way: 100 * statistics.mean(them) for way, them in accuracies.items()}


def measure(small: bool, times: int) -> list[common.Figure]:
    """Each way `times` times, in turns."""
    made = study(small)
    spent: dict[str, list[float]] = {"dvc": [], "ablab": [], "loop": []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(times):
            folder = Path(place) / str(number)
            for way, command in (("dvc", ("dvc", "repro")), ("ablab", ("ablab", "repro", "-j", "2"))):
                project = common.project(folder / way, made)
                if not number and way == "dvc":
                    common.warm(project)
                spent[way].append(common.call(project, *command))
            spent["loop"].append(loop(folder / "loop", made))
        accuracy = same_networks(folder / "ablab", folder / "loop")
    cells = len(made["variants"]) * len(made["seeds"])
    return [
        common.ratio("`ablab repro -j 2` : `dvc repro`", spent["ablab"], spent["dvc"], at_most=0.6),
        common.ratio("`ablab repro -j 2` : the shell loop, two at a time", spent["ablab"], spent["loop"], at_most=1),
        common.median(f"`dvc repro`, {cells} cells", spent["dvc"], "s"),
        common.median("`ablab repro -j 2`", spent["ablab"], "s"),
        common.median("the shell loop", spent["loop"], "s"),
        common.Figure("mean test accuracy, pipeline", accuracy["pipeline"], "%"),
        common.Figure("mean test accuracy, plain scripts", accuracy["plain"], "%"),
    ]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--times", type=int, help="how often each way is measured; 3 by default")
    asked = parser.parse_args()
    common.finish(measure(asked.small, asked.times or (1 if asked.small else 3)), asked)


if __name__ == "__main__":
    main()
