"""A network of your own, to start from: two parallel branches of convolutions, which no builder of the lab makes."""

from keras import Input, Model, layers


def build(
    image_shape: tuple[int, int, int], classes: int, *, filters: int = 16, branches: tuple[int, ...] = (3, 5)
) -> Model:
    """Branches of different kernels, side by side.

    The first two arguments come from the data; all others are keys of `model` in params.yaml, so that variants can
    change them. Pictures come in rescaled as `input.rescale` says; class probabilities go out.

    Args:
        image_shape: height, width, channels.
        classes: number of classes.
        filters: output channels of each branch.
        branches: kernel sizes, one a branch.
    """
    inputs = Input(image_shape)
    sides = [
        layers.Conv2D(filters, size, padding="same", activation="relu", name=f"branch{size}")(inputs)
        for size in branches
    ]
    x = layers.Concatenate()(sides) if len(sides) > 1 else sides[0]
    x = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(x))
    return Model(inputs, layers.Dense(classes, activation="softmax", name="probabilities")(x))
