"""How MLflow loads a network of Ablation Lab's. This file goes into each model; it needs Keras alone."""

import importlib

import numpy as np


def _load_pyfunc(path, settings=None):
    """Load `model.keras`.

    Args:
        settings: `module`, the one that makes layers of the user's own known to Keras; a copy of it lies beside this
            file.
    """
    if settings and settings.get("module"):
        importlib.import_module(settings["module"])
    import keras

    return Network(keras.saving.load_model(path, compile=False, safe_mode=True))


class Network:
    """What MLflow serves: raw pictures in, class probabilities out."""

    def __init__(self, network):
        self.network = network

    def get_raw_model(self):
        """The Keras model."""
        return self.network

    def predict(self, pictures, params=None):
        """
        Args:
            pictures: uint8, 0 to 255, (n, height, width, channels); MLflow gives them by the name of the input.

        Returns:
            float32 probabilities (n, classes), in the order of `classes` in the model's metadata.
        """
        if isinstance(pictures, dict):
            (pictures,) = pictures.values()
        return self.network.predict(np.asarray(pictures), verbose=0)
