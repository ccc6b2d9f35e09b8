"""Batches are a function of (seed, epoch, step): not of worker processes, of history, or of where an epoch began."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinylab import loader
from tinylab.dataset import Dataset
from tinylab.loader import TrainingBatches, TrainingLoader, available_cores, epoch_order
from tinylab.recipe import Recipe, published

CPU = torch.device("cpu")
ROWS = np.arange(3, 15)  # 12 rows of `tiny_dataset`: batches of 5, 5 and 2


def batches_of(
    dataset: Dataset, recipe: Recipe, epoch: int = 1, start: int = 0, seed: int = 0, workers: int = 0
) -> list:
    return list(TrainingLoader(dataset, ROWS, recipe, seed, CPU, workers).epoch(epoch, start))


def assert_same_batches(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
        assert (order == np.arange(1000)).mean() < 0.02
    for i in range(3):
        assert (orders[i] == orders[i - 1]).mean() < 0.02
    assert np.array_equal(epoch_order(0, 1, 1000), orders[0])


def test_the_published_epoch_has_301_steps_and_the_last_one_200_images() -> None:
    rows = np.arange(77_000) + 5
    batches = TrainingBatches(SimpleNamespace(images=None, labels=None), rows, published(), seed=0)
    steps = [batches.rows_at(1, step) for step in range(301)]
    assert [len(step) for step in steps] == [256] * 300 + [200]
    assert np.array_equal(np.sort(np.concatenate(steps)), rows)
    # Any step of any epoch can be asked for at any time.
    batches.rows_at(2, 3)
    assert np.array_equal(batches.rows_at(1, 300), steps[300])


def test_batches_hold_the_rows_asked_for(tiny_dataset: Dataset, narrow: Recipe) -> None:
    source = TrainingBatches(tiny_dataset, ROWS, narrow, seed=4)
    loaded = batches_of(tiny_dataset, narrow, seed=4)
    assert [len(labels) for _, labels in loaded] == [5, 5, 2]
    for step, (images, labels) in enumerate(loaded):
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (64, 64, 3))
        assert labels.dtype == torch.int64
        assert labels.tolist() == tiny_dataset.labels[source.rows_at(1, step)].tolist()
        # The augmentation moves pixels, but the class's colour stays the strongest.
        assert images.float().mean(dim=(1, 2)).argmax(dim=1).tolist() == labels.tolist()


def test_epochs_and_seeds_differ(tiny_dataset: Dataset, narrow: Recipe) -> None:
    first, second, other = (
        torch.cat([images for images, _ in batches_of(tiny_dataset, narrow, epoch, seed=seed)])
        for epoch, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_two_copies_of_an_image_are_augmented_differently(tiny_dataset: Dataset, narrow: Recipe) -> None:
    batches = TrainingBatches(tiny_dataset, np.zeros(12, dtype=np.int64), narrow, seed=0)
    images = torch.cat([batches[1, step][0] for step in range(3)])
    assert len({image.numpy().tobytes() for image in images}) == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(tiny_dataset: Dataset, narrow: Recipe, workers: int) -> None:
    helped = TrainingLoader(tiny_dataset, ROWS, narrow, 0, CPU, workers)
    for epoch in (1, 2):  # the workers live on
        assert_same_batches(list(helped.epoch(epoch)), batches_of(tiny_dataset, narrow, epoch))
    assert_same_batches(list(helped.epoch(3, start_step=1)), batches_of(tiny_dataset, narrow, 3)[1:])


def test_an_epoch_can_begin_anywhere(tiny_dataset: Dataset, narrow: Recipe) -> None:
    whole = batches_of(tiny_dataset, narrow)
    for start in range(4):
        assert_same_batches(batches_of(tiny_dataset, narrow, start=start), whole[start:])


def test_an_abandoned_epoch_leaves_nothing_behind(tiny_dataset: Dataset, narrow: Recipe) -> None:
    helped = TrainingLoader(tiny_dataset, ROWS, narrow, 0, CPU, workers=1)
    abandoned = helped.epoch(1)
    next(abandoned)
    abandoned.close()
    assert_same_batches(list(helped.epoch(2)), batches_of(tiny_dataset, narrow, 2))


def test_a_spawned_worker_gets_a_file_name_instead_of_all_images(sample_dataset: Dataset, narrow: Recipe) -> None:
    batches = TrainingBatches(sample_dataset, np.arange(100), narrow, seed=0)
    before = batches[1, 0]
    data = pickle.dumps(batches)
    assert len(data) < 100_000 < sample_dataset.images.nbytes
    copy = pickle.loads(data)
    assert_same_batches([copy[1, 0]], [before])
    with pytest.raises(ValueError, match="read-only"):
        copy.images[0] = 0


def test_test_batches_are_the_images_as_they_are_in_order(tiny_dataset: Dataset) -> None:
    rows = np.array([5, 3, 17, 0, 7])
    loaded = list(loader.evaluation_batches(tiny_dataset, rows, CPU, batch_size=2))
    assert [len(labels) for _, labels in loaded] == [2, 2, 1]
    images, labels = (torch.cat(parts) for parts in zip(*loaded, strict=True))
    assert np.array_equal(images.numpy(), tiny_dataset.images[rows])
    assert labels.tolist() == tiny_dataset.labels[rows].tolist()
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


def test_cores_are_counted() -> None:
    assert available_cores() >= 1
