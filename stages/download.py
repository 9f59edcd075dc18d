"""Stage `download`: the raw files of the data set → data/raw."""

from pathlib import Path

from ablation_lab import errors

RAW, SOURCE = Path("data/raw"), Path("data/source")


def main() -> None:
    from ablation_lab import datasets, params
    from ablation_lab.words import counted

    data = params.load().data
    datasets.download(data, RAW)
    datasets.point_to_source(data, SOURCE)
    files = [file for file in RAW.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{RAW}: {data.dataset}, {counted(len(files), 'file')}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    with errors.explained():
        main()
