"""How long does the report of a large study take, and how large is it?

    python benchmarks/report.py        # a minute or two, nothing else running; needs no network

Fabricates a study of 50 variants × 5 seeds on 10,000 test pictures of ten classes, as the tests do, with networks of 18
layers, other ones in every second variant. Then runs the stages `evaluate` and `report` on it, each in a process of its
own, and prints the seconds and the memory that each took, and the sizes of the page and of all that lies in `reports/`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fabricate  # noqa: E402

from ablation_lab import params  # noqa: E402
from benchmarks import common  # noqa: E402

CLASSES, EPOCHS = 10, 30


def project(folder: Path, variants: int, seeds: int, pictures: int) -> None:
    """A project with all that the two stages read."""
    names = [f"variant_{number:02}" for number in range(variants)]
    raw = {
        "study": {"name": "large", "baseline": names[0]},
        "data": {"dataset": "digits", "path": None},
        "input": {},
        "model": {"builder": "cnn", "dropout": 0.5, "blocks": {"block1": {"filters": 8}}},
        "train": {"epochs": EPOCHS},
        "seeds": list(range(seeds)),
        "variants": {name: {"model": {"dropout": number / 100}} if number else {} for number, name in enumerate(names)},
    }
    common.project(folder, raw)
    skill = {name: 3 + 2 * number / variants for number, name in enumerate(names)}
    fabricate.write(folder, params.validate(raw), CLASSES, pictures, EPOCHS, skill)
    for number, name in enumerate(names):
        file = folder / f"plan/networks/{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"layers": layers(32 + number % 2 * number)}))


def layers(filters: int) -> list[dict[str, Any]]:
    """Four blocks of convolution, normalisation, activation and pooling, and a head."""
    made: list[dict[str, Any]] = []

    def add(name: str, kind: str, detail: str, shape: list[int], parameters: int = 0) -> None:
        one = {"name": name, "type": kind, "detail": detail, "inputs": [made[-1]["name"]] if made else []}
        made.append(one | {"output_shape": shape, "parameters": parameters, "macs": 100 * parameters})

    for block in range(1, 5):
        side, wide = 2 ** (6 - block), filters * block
        add(f"block{block}_conv", "Conv2D", "3×3, same", [side, side, wide], 9 * wide)
        add(f"block{block}_normalization", "BatchNormalization", "", [side, side, wide], 4 * wide)
        add(f"block{block}_relu", "Activation", "relu", [side, side, wide])
        add(f"block{block}_pool", "MaxPooling2D", "2×2", [side // 2, side // 2, wide])
    add("flatten", "Flatten", "", [16 * filters])
    add("output", "Dense", "softmax", [CLASSES], 160 * filters)
    return made


def measure(folder: Path, variants: int, seeds: int, pictures: int) -> list[common.Figure]:
    """Both stages of a study, in an empty folder."""
    project(folder, variants, seeds, pictures)
    figures: list[common.Figure] = []
    for name in ("evaluate", "report"):
        figures += common.cost(folder, f"`{name}`", sys.executable, "-m", f"stages.{name}")
    written = [path for path in (folder / "reports").rglob("*") if path.is_file()]
    return [
        *figures,
        common.Figure("report.html", (folder / "reports/report.html").stat().st_size / 1e6, "MB"),
        common.Figure("reports/", sum(path.stat().st_size for path in written) / 1e6, "MB"),
        common.Figure("files in reports/", len(written)),
    ]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variants", type=int, help="50 by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=10_000, help="of the test part")
    parser.add_argument("--keep", type=Path, help="a new folder to work in and to leave, to look at the report")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=not asked.keep)
        variants = asked.variants or (5 if asked.small else 50)
        common.finish(measure(folder, variants, asked.seeds, asked.pictures), asked)


if __name__ == "__main__":
    main()
