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
from typing import Any

from ablation_lab.errors import LabError


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
for _name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH", "TF_XLA_FLAGS", "NVIDIA_TF32_OVERRIDE"):
    os.environ.pop(_name, None)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Where a training is compiled with XLA on a GPU, each sum in one order. Other flags stay: they tell where CUDA is, say.
if not os.environ.get("XLA_FLAGS", "").endswith(_STEADY := "--xla_gpu_deterministic_ops=true"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_STEADY}".strip()  # the last one holds
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
    from keras.src.backend.common.global_state import set_global_attribute
    from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
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


def set_up(threads: int, replicas: int | None = None) -> str:
    """Make what follows reproducible on this device; call it once, before the first computation.

    Args:
        threads: CPU threads of an operation. One and two threads give different sums, so this is part of a cell.
        replicas: devices that train together; on a machine without a GPU the CPU stands for all of them. None is one
            device as it is.

    Returns:
        What trains: `CPU`, or the name of the first GPU; with `replicas` how many of them.

    Raises:
        LabError: where there are fewer GPUs than `replicas`.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    # Else GPUs of the last years round what they multiply to ten bits: that would be no float32.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and replicas and len(gpus) < replicas:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        only = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible})"
        raise LabError(f"train.replicas: Expected at most {len(gpus)}, a GPU for each{only}. Found: {replicas}.")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)  # leave room for other cells on the same GPU
    device = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else "CPU"
    if replicas is None:
        return device
    if not gpus:
        _divide_cpu(replicas)
    return f"{replicas} × {device}"


def _divide_cpu(devices: int) -> None:
    (cpu,) = tf.config.list_physical_devices("CPU")
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    except RuntimeError:  # TensorFlow has computed something already
        there = len(tf.config.list_logical_devices("CPU"))
        if there < devices:
            raise LabError(
                f"train.replicas: Expected at most {there}, as many devices as this process has begun with. "
                f"Found: {devices}. Train it in a process of its own."
            ) from None


def has_gpu() -> bool:
    """Whether a GPU trains."""
    return bool(tf.config.list_physical_devices("GPU"))


def surroundings(devices: int = 1) -> list[str]:
    """What results depend on beside settings, data and code: versions, and the GPUs that compute, so many of them."""
    used = tf.config.list_physical_devices("GPU")[:devices]
    gpus = [str(tf.config.experimental.get_device_details(one)) for one in used]
    return [tf.__version__, keras.__version__, np.__version__, *gpus]


def use_cpu_only() -> None:
    """Leave the GPUs to those that train; call it before the first computation."""
    tf.config.set_visible_devices([], "GPU")


@contextmanager
def precision(policy: str) -> Iterator[None]:
    """Layers that are made in here compute in this precision (`train.precision`); others aren't concerned.

    Args:
        policy: `float32`; `mixed_float16` or `mixed_bfloat16`, whose weights are float32 all the same.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def compile_network(network: keras.Model, xla: bool | str, **how: Any) -> None:
    """Compile a network as Keras does.

    Args:
        xla: `train.xla`. `auto` leaves it to Keras on a GPU, and is no XLA on the CPU, where small networks get 2 to 4
            times slower. Keras in turn uses none while operations are deterministic, as XLA can't do all of them so.
        how: the other arguments of Keras' `compile`.
    """
    network.compile(**how, jit_compile="auto" if xla == "auto" and has_gpu() else False)
    if xla is True:
        network._jit_compile = True  # Keras would refuse it; what XLA can't do deterministically, it says itself


@contextmanager
def xla_explained(xla: bool | str) -> Iterator[None]:
    """What XLA can't compile, as a mistake in the study.

    Raises:
        LabError: where `train.xla` is true and TensorFlow finds no implementation.
    """
    try:
        yield
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
        if xla is not True:
            raise
        passing = ("Graph execution error", "Detected at", "<stack", "Stack trace", "\t")
        told = [line for line in str(error).splitlines() if line and not line.startswith(passing)]
        raise LabError(
            f"train.xla: Expected auto or false, as XLA can't do all of this training. Found: true; {told[0][:300]}"
        ) from error


def save_weights(network: keras.Model, path: Path) -> None:
    """Write `.weights.h5` as Keras does, but in memory first: HDF5 that finds the disk full ends the process with a
    segmentation fault."""
    written = io.BytesIO()
    store = saving_lib.H5IOStore(written, mode="w")
    without = {id(getattr(network, "optimizer", None))}  # whose memory may be twice as large as the weights
    saving_lib._save_state(network, weights_store=store, assets_store=None, inner_path="", visited_saveables=without)
    store.close()
    path.write_bytes(written.getbuffer())


def renew_global_generator() -> None:
    """Make the generator that `keras.random` uses where no seed is given anew, on all devices of the strategy."""
    set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    global_seed_generator()


def set_generator_states(model: keras.Model, seed: int, epoch: int) -> None:
    """Set every random generator of a network (dropout, augmentation), and Keras' own, from a seed and the epoch.

    An epoch's random numbers then don't depend on what ran before it: a resumed training is the same training.
    """
    states = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    states.append(global_seed_generator().state)  # what `keras.random` uses in a layer that gives no seed
    for position, state in enumerate(states):
        # Of several devices each has a state of its own, or all would drop the same of their pictures.
        for replica, own in enumerate(getattr(state.value, "values", [state])):
            origin = [seed, epoch, position] + ([replica] if replica else [])
            own.assign(np.array([np.random.SeedSequence(origin).generate_state(1)[0], 0], np.int64))
