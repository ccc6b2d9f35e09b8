"""Batches are a function of (seed, epoch, step): not of worker processes, of history, or of where an epoch began."""

import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinylab.data import loader
from tinylab.data.dataset import Dataset
from tinylab.data.loader import (
    Batch,
    BatchedLoader,
    Images,
    TrainingBatches,
    TrainingLoader,
    available_cores,
    epoch_order,
    make_loader,
    statistics_batches,
)
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import published
from tinylab.training.distributed import ALONE, World

CPU = torch.device("cpu")
ROWS = np.arange(3, 15)  # 12 rows of `tiny_dataset`: batches of 5, 5 and 2


def batches_of(
    dataset: Dataset,
    recipe: Recipe,
    epoch: int = 1,
    start: int = 0,
    seed: int = 0,
    workers: int = 0,
) -> list:
    return list(TrainingLoader(dataset, ROWS, recipe, seed, CPU, workers).epoch(epoch, start))


def assert_same_batches(first: list, second: list) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


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
    assert [len(batch.labels) for batch in loaded] == [5, 5, 2]
    for step, (images, labels, *_) in enumerate(loaded):
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (64, 64, 3))
        assert labels.dtype == torch.int64
        assert labels.tolist() == tiny_dataset.labels[source.rows_at(1, step)].tolist()
        # The augmentation moves pixels, but the class's colour stays the strongest.
        assert images.float().mean(dim=(1, 2)).argmax(dim=1).tolist() == labels.tolist()


def test_epochs_and_seeds_differ(tiny_dataset: Dataset, narrow: Recipe) -> None:
    first, second, other = (
        torch.cat([images for images, *_ in batches_of(tiny_dataset, narrow, epoch, seed=seed)])
        for epoch, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_two_copies_of_an_image_are_augmented_differently(
    tiny_dataset: Dataset, narrow: Recipe
) -> None:
    batches = TrainingBatches(tiny_dataset, np.zeros(12, dtype=np.int64), narrow, seed=0)
    images = torch.cat([batches[1, step][0] for step in range(3)])
    assert len({image.numpy().tobytes() for image in images}) == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(
    tiny_dataset: Dataset, narrow: Recipe, workers: int
) -> None:
    helped = TrainingLoader(tiny_dataset, ROWS, narrow, 0, CPU, workers)
    for epoch in (1, 2):  # the workers live on
        assert_same_batches(list(helped.epoch(epoch)), batches_of(tiny_dataset, narrow, epoch))
    assert_same_batches(
        list(helped.epoch(3, start_step=1)), batches_of(tiny_dataset, narrow, 3)[1:]
    )


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


def test_a_spawned_worker_gets_a_file_name_instead_of_all_images(
    sample_dataset: Dataset, narrow: Recipe
) -> None:
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


# --- Batched on the device --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(narrow: Recipe) -> Recipe:
    """Everything that the device can do, every second batch mixed: on ROWS 3 steps of 5, 5 and 2 images."""
    return replace(
        narrow,
        epochs=8,
        augmentation="batched",
        alternating_flip=True,
        crop_probability=0.3,
        brightness=0.3,
        contrast=0.3,
        cutmix_probability=0.2,
        mixup_probability=0.2,
        resizemix_probability=0.2,
        mixup_alpha=1.0,
    )


def device_loader(
    dataset: Dataset,
    recipe: Recipe,
    world: World = ALONE,
    resident: bool | None = None,
    seed: int = 0,
) -> BatchedLoader:
    images = Images(dataset.images, dataset.labels, CPU, resident)
    return make_loader(dataset, ROWS, recipe, seed, CPU, world=world, images=images)


def whole_epoch(
    dataset: Dataset, recipe: Recipe, epoch: int = 1, start: int = 0, **options
) -> list[Batch]:
    return list(device_loader(dataset, recipe, **options).epoch(epoch, start))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for left, right in zip(one, other, strict=True):
            same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
            assert same


def differ(first: list[Batch], second: list[Batch]) -> bool:
    return any(
        not torch.equal(one.images, other.images) for one, other in zip(first, second, strict=True)
    )


def test_a_batched_epoch_visits_every_image_once(tiny_dataset: Dataset, batched: Recipe) -> None:
    plain = replace(
        batched, crop_probability=0.0, pad_to=64, hole_size=0, brightness=0.0, contrast=0.0,
        cutmix_probability=0.0, mixup_probability=0.0, resizemix_probability=0.0,
    )  # fmt: skip
    for epoch in (1, 2):
        order = ROWS[epoch_order(0, epoch, len(ROWS))]
        batches = whole_epoch(tiny_dataset, plain, epoch)
        assert [len(batch.labels) for batch in batches] == [5, 5, 2]
        images = torch.cat([batch.images for batch in batches]).numpy()
        for image, row in zip(images, order, strict=True):
            original = tiny_dataset.images[row]
            assert np.array_equal(image, original) or np.array_equal(image, original[:, ::-1])
        assert (
            torch.cat([batch.labels for batch in batches]).tolist()
            == tiny_dataset.labels[order].tolist()
        )


def test_flips_alternate_from_epoch_to_epoch(tiny_dataset: Dataset, batched: Recipe) -> None:
    """Every image in both views in any two epochs; about half of them mirrored in each."""
    plain = replace(
        batched, crop_probability=0.0, pad_to=64, hole_size=0, brightness=0.0, contrast=0.0,
        cutmix_probability=0.0, mixup_probability=0.0, resizemix_probability=0.0, flip_probability=0.5,
    )  # fmt: skip
    mirrored = []
    for epoch in (1, 2, 3):
        images = torch.cat(
            [batch.images for batch in whole_epoch(tiny_dataset, plain, epoch)]
        ).numpy()
        rows = ROWS[epoch_order(0, epoch, len(ROWS))]
        flags = {
            int(row): not np.array_equal(tiny_dataset.images[row], image)
            for row, image in zip(rows, images, strict=True)
        }
        mirrored.append(flags)
    assert all(
        mirrored[0][row] != mirrored[1][row] == (not mirrored[2][row]) for row in mirrored[0]
    )
    assert 2 <= sum(mirrored[0].values()) <= 10


def test_batched_epochs_and_seeds_differ_and_repeat(tiny_dataset: Dataset, batched: Recipe) -> None:
    assert_same(whole_epoch(tiny_dataset, batched), whole_epoch(tiny_dataset, batched))
    assert differ(whole_epoch(tiny_dataset, batched), whole_epoch(tiny_dataset, batched, epoch=2))
    assert differ(whole_epoch(tiny_dataset, batched), whole_epoch(tiny_dataset, batched, seed=1))


def test_a_batched_epoch_can_begin_anywhere(tiny_dataset: Dataset, batched: Recipe) -> None:
    for epoch in range(1, 6):
        whole = whole_epoch(tiny_dataset, batched, epoch)
        for start in range(4):
            assert_same(whole_epoch(tiny_dataset, batched, epoch, start), whole[start:])
            if start < 3:
                assert_same(
                    [device_loader(tiny_dataset, batched).batch(epoch, start)], [whole[start]]
                )


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_several_processes_make_up_the_batch(
    tiny_dataset: Dataset, batched: Recipe, size: int
) -> None:
    """Mixed or not, each process has exactly its part of what one process would train on."""
    recipe, mixed = replace(batched, batch_size=6), 0
    for epoch in range(1, 9):
        whole = whole_epoch(tiny_dataset, recipe, epoch)
        shares = [
            whole_epoch(tiny_dataset, recipe, epoch, world=World(rank, size, 0, None))
            for rank in range(size)
        ]
        for number, batch in enumerate(whole):
            parts = [each[number] for each in shares]
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
            assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
            assert {part.size for part in parts} == {len(batch.labels)}
            assert {part.share for part in parts} == {batch.share}
            if batch.partners is not None:
                mixed += 1
                assert torch.equal(torch.cat([part.partners for part in parts]), batch.partners)
                assert torch.equal(batch.partners, batch.labels.roll(1))
    assert 4 <= mixed <= 14


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_albumentations_make_up_the_batch(
    tiny_dataset: Dataset, narrow: Recipe, size: int
) -> None:
    whole = batches_of(tiny_dataset, narrow)
    shares = [
        list(
            make_loader(tiny_dataset, ROWS, narrow, 0, CPU, 0, World(rank, size, 0, None)).epoch(1)
        )
        for rank in range(size)
    ]
    for number, batch in enumerate(whole):
        parts = [each[number] for each in shares]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert {part.size for part in parts} == {len(batch.labels)}


def test_streamed_images_are_the_resident_ones(tiny_dataset: Dataset, batched: Recipe) -> None:
    assert_same(
        whole_epoch(tiny_dataset, batched, resident=False),
        whole_epoch(tiny_dataset, batched, resident=True),
    )


def test_an_abandoned_stream_leaves_no_thread(tiny_dataset: Dataset, batched: Recipe) -> None:
    before = threading.active_count()
    stream = device_loader(tiny_dataset, replace(batched, batch_size=1), resident=False).epoch(1)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_while_streaming_arrives(tiny_dataset: Dataset) -> None:
    images = Images(tiny_dataset.images, tiny_dataset.labels, CPU, resident=False)
    with pytest.raises((IndexError, RuntimeError)):
        list(images.batches([np.array([0]), np.array([10_000])]))


def test_batches_for_statistics_are_plain_training_images(
    tiny_dataset: Dataset, batched: Recipe
) -> None:
    images = Images(tiny_dataset.images, tiny_dataset.labels, CPU)
    recipe = replace(batched, ema_bn_batches=7)
    seen = []
    for epoch in (1, 2):
        batches = list(statistics_batches(images, ROWS, recipe, 0, epoch))
        assert [len(batch) for batch in batches] == [5, 5]  # as many whole batches as there are
        seen.append(torch.cat(batches).numpy())
        rows = [
            int(np.flatnonzero((tiny_dataset.images == image).all(axis=(1, 2, 3)))[0])
            for image in seen[-1]
        ]
        assert len(set(rows)) == 10
        assert set(rows) <= set(ROWS.tolist())
    assert not np.array_equal(*seen)
    assert (
        len(list(statistics_batches(images, ROWS, replace(batched, ema_bn_batches=1), 0, 1))) == 1
    )
    halves = [
        list(statistics_batches(images, ROWS, recipe, 0, 1, World(rank, 2, 0, None)))
        for rank in range(2)
    ]
    assert np.array_equal(
        torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)]).numpy(), seen[0]
    )


def test_workers_without_albumentations_are_refused(tiny_dataset: Dataset, batched: Recipe) -> None:
    with pytest.raises(UserError, match="workers"):
        make_loader(tiny_dataset, ROWS, batched, 0, CPU, workers=2)


def test_the_notebooks_batches_are_those_of_training(
    tiny_dataset: Dataset, batched: Recipe
) -> None:
    shown = TrainingBatches(tiny_dataset, ROWS, batched, 0)[1, 1]
    trained = whole_epoch(tiny_dataset, batched)[1]
    assert torch.equal(shown[0], trained.images)
    assert torch.equal(shown[1], trained.labels)
