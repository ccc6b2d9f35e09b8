"""Which image comes when, whoever augments it: batches are functions of seed, epoch and step."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinylab.data import loader as loading
from tinylab.data.augment import Draws, Stream, augment, augment_batch, build_transform, generator
from tinylab.data.dataset import Dataset
from tinylab.data.loader import (
    DeviceLoader,
    EpochRows,
    Images,
    evaluation_batch_size,
    evaluation_batches,
    make_loader,
    share,
    statistics_batches,
)  # fmt: skip
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.run.environment import choose
from tinylab.training.warm_up import memory_hint

CPU = torch.device("cpu")
ROWS = np.array([3, 1, 4, 15, 9, 2, 6, 5, 8, 7, 12])


def batches(loader, epoch: int = 1, start: int = 0) -> list:
    return list(loader.epoch(epoch, start))


def same(first: list, second: list) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a, b) for one, other in pairs for a, b in zip(one[:2], other[:2], strict=True)
    )


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(narrow: Recipe) -> None:
    order = EpochRows(ROWS, narrow, seed=1)
    assert order.steps == 3
    epochs = [np.concatenate([order.rows_at(epoch, s) for s in range(3)]) for epoch in (1, 2)]
    assert [sorted(each) for each in epochs] == [sorted(ROWS)] * 2
    assert not np.array_equal(*epochs)
    expected = ROWS[generator(1, Stream.ORDER, 2).permutation(len(ROWS))]
    np.testing.assert_array_equal(epochs[1], expected)
    assert not np.array_equal(EpochRows(ROWS, narrow, seed=2).rows_at(1, 0), order.rows_at(1, 0))


def test_worker_batches_are_a_plain_loop_of_augmentations(
    tiny_dataset: Dataset, narrow: Recipe
) -> None:
    loader = make_loader(tiny_dataset, ROWS, narrow, 7, CPU, workers=0)
    transform = build_transform(narrow)
    for step, batch in enumerate(loader.epoch(2)):
        rows = loader.rows_at(2, step)
        for position, (row, image) in enumerate(zip(rows, batch.images, strict=True)):
            rng = generator(7, Stream.AUGMENT, 2, 5 * step + position)
            expected = augment(transform, tiny_dataset.images[row], rng)
            np.testing.assert_array_equal(image.numpy(), expected)
        assert batch.labels.tolist() == tiny_dataset.labels[rows].tolist()
        assert (batch.size, batch.partners) == (len(rows), None)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(sample_dataset: Dataset, narrow: Recipe, workers: int) -> None:
    rows = np.arange(0, 600, 20)
    alone = make_loader(sample_dataset, rows, narrow, 0, CPU, workers=0)
    helped = make_loader(sample_dataset, rows, narrow, 0, CPU, workers=workers)
    for epoch, start in ((1, 0), (2, 4)):
        assert same(batches(helped, epoch, start), batches(alone, epoch, start))
    helped.close()


def test_device_batches_are_augmented_from_their_step_alone(
    tiny_dataset: Dataset, rich: Recipe
) -> None:
    plain = replace(rich, cutmix_probability=0.0, mixup_probability=0.0, resizemix_probability=0.0)
    loader = make_loader(tiny_dataset, ROWS, plain, 3, CPU)
    flips = generator(3, Stream.FLIP, 0).random(18) < plain.flip_probability
    for step, batch in enumerate(loader.epoch(2)):
        rows = loader.rows_at(2, step)
        draws = Draws(generator(3, Stream.AUGMENT, 2, step), len(rows))
        images = torch.from_numpy(tiny_dataset.images[rows].copy())
        expected = augment_batch(images, plain, draws, torch.from_numpy(flips[rows]), 2)
        assert torch.equal(batch.images, expected)


@pytest.mark.parametrize("name", ["narrow", "rich"])
def test_a_batch_by_itself_is_the_epochs(
    tiny_dataset: Dataset, name: str, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(name)
    loader = make_loader(tiny_dataset, ROWS, recipe, 0, CPU)
    whole = batches(loader, 2)
    assert same([loader.batch(2, step) for step in range(loader.steps)], whole)
    assert same(batches(loader, 2, start=1), whole[1:])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["narrow", "rich"])
def test_the_shares_of_several_processes_are_the_batch(
    tiny_dataset: Dataset, name: str, ranks: int, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(name)
    whole = batches(make_loader(tiny_dataset, ROWS, recipe, 0, CPU))
    shares = [
        batches(make_loader(tiny_dataset, ROWS, recipe, 0, CPU, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        parts = [each[step] for each in shares]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert {part.size for part in parts} == {batch.size}
        if batch.partners is not None:
            assert torch.equal(torch.cat([part.partners for part in parts]), batch.partners)
    assert [list(share(7, rank, 3)) for rank in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_images_that_stream_are_those_that_are_resident(
    tiny_dataset: Dataset, rich: Recipe
) -> None:
    order = EpochRows(ROWS, rich, 0)
    resident, streaming = (
        DeviceLoader(order, Images(tiny_dataset.images, tiny_dataset.labels, CPU, resident=kept))
        for kept in (True, False)
    )
    assert same(batches(streaming), batches(resident))


def test_mixed_batches_carry_their_partners(tiny_dataset: Dataset, rich: Recipe) -> None:
    recipe = replace(rich, cutmix_probability=0.0, mixup_probability=1.0, resizemix_probability=0.0)
    loader = make_loader(tiny_dataset, ROWS, recipe, 0, CPU)
    for step, batch in enumerate(loader.epoch(1)):
        labels = tiny_dataset.labels[loader.rows_at(1, step)]
        assert batch.labels.tolist() == labels.tolist()
        assert batch.partners.tolist() == np.roll(labels, 1).tolist()
        assert 0 <= batch.share <= 1


def test_batches_without_gradients(tiny_dataset: Dataset, rich: Recipe) -> None:
    images = Images(tiny_dataset.images, tiny_dataset.labels, CPU)
    plain = list(statistics_batches(images, ROWS, rich, 0, epoch=1))
    assert [len(each) for each in plain] == [4, 4]
    order = generator(0, Stream.STATISTICS, 1).permutation(len(ROWS))
    np.testing.assert_array_equal(plain[0].numpy(), tiny_dataset.images[ROWS[order[:4]]])
    cut = replace(rich, micro_batch=1)
    assert [len(each) for each in statistics_batches(images, ROWS, cut, 0, 1)] == [2] * 4
    tested = list(evaluation_batches(tiny_dataset, ROWS, CPU, batch_size=4))
    assert [len(labels) for _, labels in tested] == [4, 4, 3]
    np.testing.assert_array_equal(torch.cat([i for i, _ in tested]), tiny_dataset.images[ROWS])
    cuda = torch.device("cuda")
    assert [evaluation_batch_size(cuda, micro) for micro in (None, 1, 100)] == [500, 2, 200]
    assert evaluation_batch_size(CPU) == 32


def test_batches_on_their_way_fit_into_shared_memory(
    tiny_dataset: Dataset, narrow: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3: a container has 64 MiB of it; workers that cannot write there hang for ever."""
    recipe, rows, device = replace(narrow, batch_size=256), np.arange(12), torch.device("cpu")
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    batch = 256 * 64 * 64 * 3
    for workers in (1, 4, 8):
        made = make_loader(tiny_dataset, rows, recipe, 0, device, workers)._loader
        assert (workers * made.prefetch_factor + 3) * batch <= 64 * 2**20
        assert made.timeout > 0
    monkeypatch.setattr(loading, "available_cores", lambda: 64)
    order = loading.EpochRows(rows, recipe, 0)
    cuda = loading.WorkerLoader(tiny_dataset, order, torch.device("cuda"))._loader
    assert cuda.num_workers * cuda.prefetch_factor in range(8, 17)
    with pytest.raises(UserError, match=r"/dev/shm has 64 MiB .* --workers 0.*--shm-size=1g"):
        make_loader(tiny_dataset, rows, recipe, 0, device, 200)


@pytest.mark.parametrize("workers", [0, 1])
def test_without_albumentations_the_way_out_is_said(
    tiny_dataset: Dataset, narrow: Recipe, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(
        UserError, match=r"cannot be imported .* --augmentation batched does without"
    ):
        make_loader(tiny_dataset, np.arange(12), narrow, 0, torch.device("cpu"), workers)


def test_workers_that_hang_end_the_run_in_one_line(
    tiny_dataset: Dataset, narrow: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "TIMEOUT", 1)
    monkeypatch.setattr(loading, "augment", lambda *_: time.sleep(60))
    loader = make_loader(tiny_dataset, np.arange(12), narrow, 0, torch.device("cpu"), 1)
    hangs = pytest.raises(UserError, match=r"stopped sending batches.*--workers 0.*--shm-size")
    with hangs, memory_hint(narrow, choose("cpu")):
        next(iter(loader.epoch(1)))
    loader.close()


def test_what_cannot_be_is_refused(tiny_dataset: Dataset, narrow: Recipe, rich: Recipe) -> None:
    for recipe, seed, workers, problem in (
        (narrow, -1, 0, "seed must be"),
        (narrow, 2**63, 0, "seed must be"),
        (narrow, 0, -1, "workers must be"),
        (narrow, 0, 257, "workers must be"),
        (rich, 0, 1, "workers run albumentations"),
    ):
        with pytest.raises(UserError, match=problem):
            make_loader(tiny_dataset, ROWS, recipe, seed, CPU, workers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_gets_the_same_batches(
    tiny_dataset: Dataset, rich: Recipe, resident: bool, tmp_path: Path
) -> None:
    cuda = torch.device("cuda")
    images = Images(tiny_dataset.images, tiny_dataset.labels, cuda, resident=resident)
    on_gpu = DeviceLoader(EpochRows(ROWS, rich, 0), images)
    for ours, theirs in zip(
        on_gpu.epoch(1), make_loader(tiny_dataset, ROWS, rich, 0, CPU).epoch(1), strict=True
    ):
        assert (ours.images.cpu().int() - theirs.images.int()).abs().max() <= 1
