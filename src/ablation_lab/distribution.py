"""One cell on several devices: a copy of its network on each of them, each batch shared out among the copies.

Whatever is about a batch is about the whole of it, as on one device: the loss, gradients before they are clipped, what
batch normalisation measures. So results with more devices differ in the last digits, not in what is computed, where
nothing is drawn at random.
"""

from ablation_lab import backend
from ablation_lab.backend import keras, tf


def mirrored(network: keras.Model, replicas: int) -> keras.Model:
    """A network's copy on the first `replicas` GPUs or, without a GPU, on as many parts of the CPU; the weights are the
    same, and stay the same on all of them."""
    kind = "GPU" if backend.has_gpu() else "CPU"
    strategy = tf.distribute.MirroredStrategy(
        [f"{kind}:{number}" for number in range(replicas)],
        # Sums in the devices' order, which is what a second run repeats.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    with strategy.scope():
        backend.renew_global_generator()
        copy = type(network).from_config(network.get_config())
    for layer in copy._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True
    copy.set_weights(network.get_weights())
    return copy


def distributed(network: keras.Model, batches: tf.data.Dataset) -> tf.distribute.DistributedDataset:
    """Make a compiled copy ready for its batches.

    Args:
        batches: those that come for one device after the other (`pipeline.shared_batches`).

    Returns:
        The batches, each on its device.
    """
    strategy = network.distribute_strategy
    # Keras would make what else needs variables from the mean of the devices' first batches, and there is no mean of
    # batches that differ in size.
    with strategy.scope():
        network._symbolic_build(data_batch=batches.element_spec)
    network._maybe_symbolic_build = lambda **_: None
    return strategy.distribute_datasets_from_function(lambda context: batches)
