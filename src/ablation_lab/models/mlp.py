"""Multilayer perceptron: flatten, then the dense layers of the head."""

from typing import Any

from ablation_lab.backend import keras
from ablation_lab.models.layers import apply, head


def hidden(model: dict[str, Any], x: Any) -> Any:
    """All layers between the rescaled picture and the output layer."""
    return head(model, apply(keras.layers.Flatten(name="features"), x))
