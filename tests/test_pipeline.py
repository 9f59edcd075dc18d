from dataclasses import replace

import numpy as np
import pytest

import one_thread  # noqa: F401  isort: skip
from ablation_lab import pipeline


def arrays(n: int = 23) -> pipeline.Arrays:
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    labels = (np.arange(n) % 3).astype(np.int32)
    everything = np.arange(n)
    return pipeline.Arrays([images], labels, everything, everything[:5], everything[5:9], ["a", "b", "c"])


def shuffled(**settings) -> pipeline.Shuffled:
    return pipeline.Shuffled(
        **{"indices": np.arange(23), "batch_size": 5, "steps_per_epoch": None, "seed": 0} | settings
    )


def test_an_epoch_sees_each_picture_once_in_an_order_of_its_own():
    order = shuffled()
    epochs = [np.concatenate([order.batch(epoch * order.steps + step) for step in range(5)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert list(epochs[0]) != list(epochs[1])
    assert len(order.batch(4)) == 3  # the last batch of an epoch is smaller


def test_with_steps_per_epoch_the_stream_of_pictures_goes_on_where_the_last_epoch_ended():
    order = shuffled(steps_per_epoch=3)
    stream = np.concatenate([order.batch(step) for step in range(3 * 7)])
    assert order.steps == 3
    assert sorted(stream[:23]) == list(range(23))
    assert sorted(stream[23:46]) == list(range(23))


def test_a_batch_may_be_larger_than_the_data_set():
    assert len(shuffled(steps_per_epoch=2, batch_size=60).batch(0)) == 60


@pytest.mark.parametrize("steps", [None, 3])
def test_a_step_depends_on_seed_and_number_alone(steps):
    forwards, backwards = shuffled(steps_per_epoch=steps), shuffled(steps_per_epoch=steps)
    straight = [list(forwards.batch(step)) for step in range(12)]
    assert straight == [list(backwards.batch(step)) for step in reversed(range(12))][::-1]
    assert straight != [list(shuffled(steps_per_epoch=steps, seed=1).batch(step)) for step in range(12)]


@pytest.mark.parametrize("form", ["one_hot", "number"])
def test_batches_hold_pictures_with_their_own_labels(form):
    order = shuffled()
    batches = list(pipeline.training_batches(arrays(), order, 1, 3, form))
    assert len(batches) == 2 * order.steps
    for number, (images, labels) in enumerate(batches, start=order.steps):
        seen = images.numpy().reshape(-1)
        classes = labels.numpy().argmax(axis=1) if form == "one_hot" else labels.numpy()
        assert list(seen) == list(order.batch(number))
        assert list(classes) == [index % 3 for index in seen]


def test_labels_of_a_sigmoid_are_one_for_the_second_class():
    two = replace(arrays(), labels=np.arange(23) % 2, classes=["a", "b"])
    (_, labels), *_ = pipeline.ordered_batches(two, np.arange(4), 4, "second")
    assert labels.numpy().tolist() == [[0], [1], [0], [1]] and labels.dtype == "float32"


def test_features_are_fed_in_place_of_pictures_several_at_once():
    left, right = np.arange(23, dtype=np.float32)[:, None], np.ones((23, 2, 3), np.float32)
    ((one, other), labels), *_ = pipeline.ordered_batches(
        replace(arrays(), inputs=[left, right]), np.array([5, 2]), 2, "number"
    )
    assert one.numpy().tolist() == [[5], [2]] and other.shape == (2, 2, 3)
    assert labels.numpy().tolist() == [2, 2]


def test_ordered_batches_keep_the_order():
    images = [
        images.numpy().reshape(-1) for images, _ in pipeline.ordered_batches(arrays(), np.arange(7, 20), 5, "number")
    ]
    assert list(np.concatenate(images)) == list(range(7, 20))
    assert [len(batch) for batch in images] == [5, 5, 3]


def test_a_fraction_takes_the_same_share_of_each_class_and_grows_by_adding():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    train = np.flatnonzero(np.arange(160) % 2)
    half, fifth = (pipeline.training_indices(train, labels, fraction) for fraction in (0.5, 0.2))
    assert list(np.bincount(labels[half])) == [25, 12, 2]
    assert set(fifth) < set(half) < set(train)
    assert pipeline.training_indices(train, labels, 1) is train
