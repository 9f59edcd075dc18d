"""cells + evaluation → MLflow: what came from DVC's cache is there too, and every run has its final metrics."""

from pathlib import Path

from ablation_lab import errors


def main() -> None:
    from ablation_lab import files
    from ablation_lab.tracking import mirror

    receipt = mirror.sync()
    files.write_json(Path("mlruns/receipt.json"), receipt)
    print(mirror.told(receipt))


if __name__ == "__main__":
    with errors.explained():
        main()
