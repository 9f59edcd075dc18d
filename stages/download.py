"""Stage `download`: the raw files of the data set → data/raw."""

from pathlib import Path

from ablation_lab import errors

RAW, SOURCE = Path("data/raw"), Path("data/source")


def main() -> None:
    from ablation_lab import datasets, params

    data = params.load().data
    datasets.download(data, RAW)
    datasets.point_to_source(data, SOURCE)
    files = [file for file in RAW.rglob("*") if file.is_file()]
    print(f"{RAW}: {data.dataset}, {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    with errors.explained():
        main()
