"""Stage `preprocess`: data/raw → uint8 arrays, the indices of the parts and a data card in data/processed."""

from pathlib import Path

from ablation_lab import errors

OUT = Path("data/processed")


def main() -> None:
    from ablation_lab import files, params
    from ablation_lab.preprocess import PARTS, preprocess

    preprocess(params.load().data, Path("data/raw"), OUT)
    card = files.read_json(OUT / "card.json")
    counts = ", ".join(f"{part} {card['counts'][part]}" for part in PARTS)
    shape = "×".join(map(str, card["image_shape"]))
    print(f"{OUT}: {card['name']}, {len(card['classes'])} classes, pictures of {shape}; {counts}")


if __name__ == "__main__":
    with errors.explained():
        main()
