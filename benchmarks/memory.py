"""How much memory does a data set of 8 GB take?

    python benchmarks/memory.py        # 5 minutes of two cores, 10 GB of disk; needs no network

A cell of a small network is trained for one epoch on 8 GiB of random pictures of 64×64×3 that lie in `data/processed`,
then predicts the validation and the test part and is evaluated on the training part, as every cell. The same is done
with 8 MiB of such pictures: that is what TensorFlow and the rest need by themselves. Then `download` and `preprocess`
take JPEG files of 256×256×3, 2 GiB once they are decoded, from a folder.

Told is the peak of anonymous memory (`RssAnon` in `/proc/<pid>/status`), looked at every tenth of a second, of the
stage's process and all that it has started together. Files that are mapped are left out: the system takes their pages
back when it needs the room.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common  # noqa: E402

TRAINED, DECODED = (64, 64, 3), (256, 256, 3)
EVERY = 0.1  # seconds


def study(dataset: str, path: str | None) -> dict[str, Any]:
    """A network that has little to compute for a picture."""
    return {
        "study": {"name": "benchmark", "baseline": "baseline"},
        "data": {"dataset": dataset, "path": path, "split": {"validation": 0.05, "test": 0.05, "seed": 0}},
        "input": {},
        "model": {"builder": "cnn", "blocks": {"block1": {"filters": 4, "kernel": 4, "stride": 4}}},
        "train": {"epochs": 1, "batch_size": 256, "threads": 2},
        "seeds": [0],
        "variants": {"baseline": {}},
    }


def stage(folder: Path, *command: str) -> tuple[float, float]:
    """Run a stage; its peak of anonymous memory in MiB, and its seconds."""
    started, highest = time.perf_counter(), 0
    with (folder / "log.txt").open("a") as log:
        words = [sys.executable, "-m", *command]
        process = subprocess.Popen(
            words, cwd=folder, env=common.environment(folder), stdout=log, stderr=subprocess.STDOUT
        )
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            highest = max(highest, sum(anonymous(one.pid) for one in family(watched)))
            time.sleep(EVERY)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{(folder / 'log.txt').read_text()[-3000:]}")
    return highest / 2**10, time.perf_counter() - started


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started, as far as they are still there."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def anonymous(pid: int) -> int:
    """A process' anonymous resident memory in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def train(folder: Path, size: int) -> tuple[float, float]:
    """Train on so many bytes of pictures; peak in MiB, seconds."""
    common.project(folder, study("digits", None))  # in place of which the random pictures are laid
    total = size // int(np.prod(TRAINED))
    part = max(1, total // 20)
    common.pictures(folder / "data/processed", TRAINED, {"train": total - 2 * part, "validation": part, "test": part})
    common.call(folder, sys.executable, "-m", "stages.plan")
    found = stage(folder, "stages.train", "baseline", "0")
    shutil.rmtree(folder)
    return found


def decode(folder: Path, size: int) -> tuple[float, float]:
    """Pack and decode pictures of so many bytes; the peaks of `download` and `preprocess` in MiB."""
    common.project(folder, study("image_folder", "pictures"))
    random = np.random.default_rng(0)
    for label in range(10):
        (folder / f"pictures/class{label}").mkdir(parents=True)
    coarse = random.integers(0, 256, (40, 40, 3), np.uint8)
    typical = np.asarray(Image.fromarray(coarse).resize((512, 512)))
    height, width, _ = DECODED
    for number in range(size // int(np.prod(DECODED))):
        top, left = random.integers(256, size=2)
        one = Image.fromarray(np.ascontiguousarray(typical[top : top + height, left : left + width]))
        one.save(folder / f"pictures/class{number % 10}/{number}.jpg")
    found = stage(folder, "stages.download")[0], stage(folder, "stages.preprocess")[0]
    shutil.rmtree(folder)
    return found


def measure(large: int, little: int, decoded: int) -> list[common.Figure]:
    """The peaks for so many bytes of pictures."""
    with tempfile.TemporaryDirectory() as place:
        common.warm(Path(place))
        needed, _ = train(Path(place) / "little", little)
        peak, seconds = train(Path(place) / "large", large)
        packing, decoding = decode(Path(place) / "decoded", decoded)
    sizes = [common.number(size / 2**20, "MiB") for size in (large, little, decoded)]
    return [
        common.Figure(f"training with {sizes[0]} beyond the same with {sizes[1]}", peak - needed, "MiB", at_most=2048),
        common.Figure(f"training with {sizes[0]}", peak, "MiB"),
        common.Figure(f"training with {sizes[1]}", needed, "MiB"),
        common.Figure(f"seconds of the stage `train` with {sizes[0]}", seconds, "s"),
        common.Figure(f"`download` of a folder of JPEG files, {sizes[2]} decoded", packing, "MiB"),
        common.Figure("`preprocess` of them", decoding, "MiB"),
    ]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--gib", type=float, help="of pictures to train with; 8 by default")
    asked = parser.parse_args()
    large = int((asked.gib or (1 / 16 if asked.small else 8)) * 2**30)
    common.finish(measure(large, 8 << 20, (64 << 20) if asked.small else 2 << 30), asked)


if __name__ == "__main__":
    main()
