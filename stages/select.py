"""Validation results of the first phase → `selection/`: the variant that goes on, and the second phase's plans."""

from ablation_lab import errors


def main() -> None:
    from ablation_lab import params, selection

    choice = selection.select(params.load())
    if choice["variant"] is None:
        print("This study has one phase.")
        return
    for name, means in choice["candidates"].items():
        accuracy = means["validation_accuracy"]
        shown = "diverged" if accuracy is None else f"validation accuracy {accuracy:.2%}"
        print(f"{'selected:' if name == choice['variant'] else '         '} {name}, {shown}")


if __name__ == "__main__":
    with errors.explained():
        main()
