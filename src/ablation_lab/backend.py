"""TensorFlow, imported quietly and set up so that equal cells give equal bytes."""

import atexit
import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    # Two lines come from the C library before TensorFlow's own switch works; a failing import still raises.
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


# What a user's machine sets for Keras and TensorFlow at large would change a cell's result without being part of it.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
for _name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH"):
    os.environ.pop(_name, None)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# What is imported stays: Python needn't look for garbage among it while it is made, nor when the process ends. That
# takes two seconds of each cell.
gc.disable()
# What Keras imports where it finds it, for ways of using it that are not ours: a third of the time that it takes.
_unused = {"matplotlib", "pandas", "sklearn"} - sys.modules.keys()
sys.modules |= dict.fromkeys(_unused)  # type: ignore[arg-type]  # None: as if it were not installed
with _quiet_stderr():
    import keras
    import numpy as np
    import tensorflow as tf
    from keras.src.random.seed_generator import global_seed_generator
    from keras.src.saving import saving_lib

    tf.config.list_physical_devices()
for _name in _unused:
    del sys.modules[_name]
gc.freeze()
gc.enable()
# Keras looks up what it knows of a layer's attributes under another name than it kept it, and so makes a layer for each
# one that it loads or saves: a second and a half of each cell with DenseNet201.
saving_lib.get_attr_skipset = cache(saving_lib.get_attr_skipset)
atexit.register(gc.freeze)
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)
keras.config.set_image_data_format("channels_last")


def set_up(threads: int) -> str:
    """Make what follows reproducible on this device; call it once, before the first computation.

    Args:
        threads: CPU threads of an operation. One and two threads give different sums, so this is part of a cell.

    Returns:
        The device that trains: `CPU`, or the name of the first GPU.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)  # leave room for other cells on the same GPU
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else "CPU"


def surroundings() -> list[str]:
    """What results depend on beside settings, data and code: versions, and GPUs."""
    gpus = [str(tf.config.experimental.get_device_details(one)) for one in tf.config.list_physical_devices("GPU")]
    return [tf.__version__, keras.__version__, np.__version__, *gpus]


def use_cpu_only() -> None:
    """Leave the GPUs to those that train; call it before the first computation."""
    tf.config.set_visible_devices([], "GPU")


def compile_with_xla() -> bool | str:
    """Whether to compile steps with XLA: `auto` on a GPU; never on the CPU, where small networks get 2 to 4 times
    slower."""
    return "auto" if tf.config.list_physical_devices("GPU") else False


def save_weights(network: keras.Model, path: Path) -> None:
    """Write `.weights.h5` as Keras does, but in memory first: HDF5 that finds the disk full ends the process with a
    segmentation fault."""
    written = io.BytesIO()
    store = saving_lib.H5IOStore(written, mode="w")
    saving_lib._save_state(network, weights_store=store, assets_store=None, inner_path="", visited_saveables=set())
    store.close()
    path.write_bytes(written.getbuffer())


def set_generator_states(model: keras.Model, seed: int, epoch: int) -> None:
    """Set every random generator of a network (dropout, augmentation), and Keras' own, from a seed and the epoch.

    An epoch's random numbers then don't depend on what ran before it: a resumed training is the same training.
    """
    states = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    states.append(global_seed_generator().state)  # what `keras.random` uses in a layer that gives no seed
    for position, state in enumerate(states):
        state.assign([np.random.SeedSequence([seed, epoch, position]).generate_state(1)[0], 0])
