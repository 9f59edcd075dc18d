"""Why aren't trainings compiled with XLA on the CPU?

    python benchmarks/xla.py        # 10 minutes of two cores, nothing else running; needs no network

`benchmarks/plain/fit.py` trains the networks of `benchmarks/loop.py` on a fifth of its pictures for three epochs with
one thread, compiled by `jit_compile=True` and not, three times in turns. A ratio above 1 says how many times longer XLA
takes: for the whole of `fit`, its compilation included, and for the epochs after the first, without it.
"""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common, loop  # noqa: E402


def measure(sizes: dict[str, loop.Size], times: int) -> list[common.Figure]:
    """Both ways, in turns, for each size."""
    figures = []
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            counts = {"train": size.pictures, "validation": size.pictures // 5, "test": 10}
            common.pictures(folder / "data/processed", size.shape, counts)
            common.warm(folder)
            found = [(loop.plain(folder, size, "jit"), loop.plain(folder, size)) for _ in range(times)]
        whole = ([one["fit"] for one in them] for them in zip(*found, strict=True))
        later = ([sum(one["epochs"][1:]) for one in them] for them in zip(*found, strict=True))
        figures.append(common.ratio(f"{name}: with XLA : without, the whole of `fit`", *whole))
        figures.append(common.ratio(f"{name}: the same, epochs after the first", *later))
    return figures


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--times", type=int, help="how often each way is measured; 3 by default")
    asked = parser.parse_args()
    # A fifth of what the loop has, for XLA takes its time.
    sizes = {name: size._replace(pictures=size.pictures // 5, epochs=3) for name, size in loop.SIZES.items()}
    if asked.small:
        sizes = {name: size._replace(pictures=100, epochs=2) for name, size in loop.SIZES.items()}
    common.finish(measure(sizes, asked.times or (1 if asked.small else 3)), asked)


if __name__ == "__main__":
    main()
