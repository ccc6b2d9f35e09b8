"""Epochs of device batches: which image comes when, augmented by worker processes or on the device.

A batch is a function of (seed, epoch, step). With several processes each gets its share of the
very same batch.
"""

import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from tinylab.data.augment import (
    Draws,
    Stream,
    augment,
    augment_batch,
    build_transform,
    generator,
    mix_batch,
    mixing_of,
    send,
)  # fmt: skip
from tinylab.data.dataset import Dataset, available_cores
from tinylab.exceptions import UserError
from tinylab.recipe import SIZE, Recipe

TIMEOUT = 300  # seconds without a batch, after which the workers hang
EVALUATION_BATCH = 500
# From one image uint8 (64, 64, 3), with draws from the generator alone, to another.
Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Batch(NamedTuple):
    """What one optimiser step trains on, or, with several processes, this one's share of it."""

    images: torch.Tensor  # uint8 (B, 64, 64, 3), augmented and mixed
    labels: torch.Tensor  # int64 (B,)
    partners: torch.Tensor | None = None  # int64 (B,), labels of the images that were mixed in
    share: float = 1.0  # what `labels` weigh in the loss; `partners` weigh the rest
    total: int = 0  # see `size`; 0: these are all

    @property
    def size(self) -> int:
        """Images of the whole batch, over all processes."""
        return self.total or len(self.labels)


def share(count: int, rank: int, ranks: int) -> range:
    """Return which of `count` things this process takes; lengths differ by one at most."""
    each, left = divmod(count, ranks)
    first = rank * each + min(rank, left)
    return range(first, first + each + (rank < left))


def make_loader(
    dataset: Dataset,
    rows: np.ndarray,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    workers: int | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
    images: "Images | None" = None,
    transform: Transform | None = None,
) -> "WorkerLoader | DeviceLoader":
    """Return the loader that the recipe's `augmentation` asks for, of the training images `rows`.

    images: the data set on the device, if it is there already. transform: in place of the recipe's
    augmentation, image by image. Raise `UserError` for a seed or a number of workers that cannot
    be.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed}")
    order = EpochRows(rows, recipe, seed, rank, ranks)
    if transform or recipe.augmentation == "albumentations":
        return WorkerLoader(dataset, order, device, workers, transform)
    if workers:
        raise UserError("workers run albumentations; this recipe augments on the device")
    return DeviceLoader(order, images or Images(dataset.images, dataset.labels, device))


@dataclass
class EpochRows:
    """Which rows of the data set each step of each epoch trains on."""

    rows: np.ndarray
    recipe: Recipe
    seed: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self.steps = self.recipe.steps_per_epoch(len(self.rows))
        self._epoch, self._order = 0, self.rows

    def rows_at(self, epoch: int, step: int) -> np.ndarray:
        """Return the whole batch's rows, int64 (B,); epochs count from 1, steps from 0."""
        if self._epoch != epoch:
            order = generator(self.seed, Stream.ORDER, epoch).permutation(len(self.rows))
            self._epoch, self._order = epoch, self.rows[order]
        first = step * self.recipe.batch_size
        return self._order[first : first + self.recipe.batch_size]

    def share_at(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray, int, Callable]:
        """Return this process's share of a batch: rows, positions, the whole batch's size, mix.

        If the batch is mixed, the image before the share comes first: each image is mixed with the
        one before it. mix: from images and labels of these rows to a `Batch`.
        """
        rows = self.rows_at(epoch, step)
        total, mine = len(rows), share(len(rows), self.rank, self.ranks)
        rng = generator(self.seed, Stream.MIX, epoch, step)
        way = mixing_of(self.recipe, rng, epoch)
        positions = np.arange(mine.start - (way is not None), mine.stop) % total

        def mix(images: torch.Tensor, labels: torch.Tensor) -> Batch:
            if way is None:
                return Batch(images, labels, total=total)
            images, weight = mix_batch(images[1:], images[:-1], way, self.recipe, rng)
            return Batch(images, labels[1:], labels[:-1], weight, total)

        return rows[positions], positions, total, mix


class AugmentedBatches:
    """Item (epoch, step) is that step's augmented batch on the CPU, from its two numbers alone.

    So any worker may build any batch, and persistent workers need not be told of a new epoch.
    """

    def __init__(self, dataset: Dataset, order: EpochRows, transform: Transform | None) -> None:
        self.dataset, self.order = dataset, order
        self.transform = transform or partial(augment, build_transform(order.recipe))

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """Return this process's share."""
        (epoch, step), order = key, self.order
        rows, positions, _, mix = order.share_at(epoch, step)
        images = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.uint8)
        for i, position in enumerate(positions.tolist()):
            where = step * order.recipe.batch_size + position
            rng = generator(order.seed, Stream.AUGMENT, epoch, where)
            images[i] = self.transform(self.dataset.images[rows[i]], rng)
        labels = self.dataset.labels[rows].astype(np.int64)
        return mix(torch.from_numpy(images), torch.from_numpy(labels))


class WorkerLoader:
    """Yields batches on `device` that `workers` processes augment; 0: this one.

    The batches do not depend on `workers`. None chooses: 0 on a CPU, whose cores are busy training,
    else one per core up to eight, as far as their batches fit into shared memory.
    """

    def __init__(
        self, dataset: Dataset, order: EpochRows, device: torch.device,
        workers: int | None = None, transform: Transform | None = None,
    ) -> None:  # fmt: skip
        if workers is not None and not 0 <= workers <= 256:
            raise UserError(f"workers must be from 0 to 256, not {workers}")
        # A container may have 64 MiB of it. Three more batches are on their way to the device.
        shared = Path("/dev/shm")
        free = shutil.disk_usage(shared).free if shared.is_dir() else 2**40
        batch = order.recipe.batch_size * dataset.images[0].nbytes
        room = max(int(0.9 * free / batch) - 3 * order.ranks, 0)
        if workers is None:
            workers = 0 if device.type == "cpu" else min(8, available_cores(), room)
        if workers > room:
            few = f"/dev/shm has {free / 2**20:.0f} MiB free, too little for {workers} workers"
            raise UserError(f"{few}: use --workers 0, or start the container with --shm-size=1g")
        self.steps, self.rows_at = order.steps, order.rows_at
        self._device, self._keys = device, []
        self._batches = AugmentedBatches(dataset, order, transform)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,  # an item is a whole batch already
            sampler=self._keys,  # read anew at the start of each epoch
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            prefetch_factor=min(4, room // workers) if workers else None,
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=partial(start_worker, os.getpid()),
        )

    def close(self) -> None:
        """End the worker processes, which a traceback in a notebook would otherwise keep."""
        self._loader = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch (from 1), from step `start` (from 0) on."""
        self._keys[:] = [(epoch, step) for step in range(start, self.steps)]
        pinned = self._device.type == "cuda"
        for batch in self._loader:
            yield Batch(*(
                each.to(self._device, non_blocking=pinned) if torch.is_tensor(each) else each
                for each in batch
            ))  # fmt: skip

    def batch(self, epoch: int, step: int) -> Batch:
        """Return one step's batch, on the CPU."""
        return self._batches[epoch, step]


def start_worker(parent: int, _number: int) -> None:
    """Leave the process group: Ctrl-C is for the process that trains, which saves first."""
    served = multiprocessing.get_start_method() == "forkserver"  # then the server is the parent
    if os.getppid() != parent and not served:  # killed: torch would wait for its heir for ever
        os._exit(1)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Images:
    """The data set's images and labels as `device` reads them, by row number.

    They live on a GPU if they take less than a quarter of its free memory (Tiny ImageNet: 1.35 GB),
    else each batch is copied from the memory map.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        device: torch.device,
        resident: bool | None = None,
    ) -> None:
        if resident is None and device.type == "cuda":
            resident = images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        with warnings.catch_warnings(action="ignore"):  # "not writable": nothing here writes
            self._images = torch.from_numpy(images).to(device if resident else "cpu")
        self._labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.device = device

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, rows: np.ndarray) -> torch.Tensor:
        """Return int64 (B,) on the device, of int64 rows (B,)."""
        return self._labels.index_select(0, send(rows, self.device))

    def at(self, rows: np.ndarray) -> torch.Tensor:
        """Return uint8 (B, 64, 64, 3) on the device, of int64 rows (B,)."""
        return self._images.index_select(0, send(rows, self._images.device)).to(self.device)


class DeviceLoader:
    """Yields batches that are gathered, augmented and mixed on the device of `images`."""

    def __init__(self, order: EpochRows, images: Images) -> None:
        self.steps, self.rows_at = order.steps, order.rows_at
        self._order, self._images = order, images
        drawn = generator(order.seed, Stream.FLIP, 0).random(len(images))
        self._mirrored = drawn < order.recipe.flip_probability

    def close(self) -> None:
        """Do nothing: this loader has no workers."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch (from 1), from step `start` (from 0) on."""
        return (self.batch(epoch, step) for step in range(start, self.steps))

    def batch(self, epoch: int, step: int) -> Batch:
        """Return one step's batch."""
        order = self._order
        rows, positions, total, mix = order.share_at(epoch, step)
        draws = Draws(generator(order.seed, Stream.AUGMENT, epoch, step), total, positions)
        mirrored = send(self._mirrored[rows], self._images.device)
        images = augment_batch(self._images.at(rows), order.recipe, draws, mirrored, epoch)
        return mix(images, self._images.labels(rows))


def statistics_batches(
    images: Images, rows: np.ndarray, recipe: Recipe, seed: int, epoch: int
) -> Iterator[torch.Tensor]:
    """Yield training images as they are, uint8 (B, 64, 64, 3), for batch-norm statistics.

    `ema_bn_batches` of 500 images at most; with a micro-batch in pieces of twice that.
    """
    order = generator(seed, Stream.STATISTICS, epoch).permutation(len(rows))
    whole = min(recipe.batch_size, EVALUATION_BATCH, len(rows))
    size = min(whole, 2 * (recipe.micro_batch or whole))
    count = min(recipe.ema_bn_batches * whole, len(rows)) // size
    return (images.at(rows[order[size * i : size * (i + 1)]]) for i in range(count))


def evaluation_batch_size(device: torch.device, micro_batch: int | None = None) -> int:
    """Return the images in one forward pass, which takes less than half the memory of training."""
    if device.type == "cpu":
        return 32  # fits its cache: 87 images/s, of 500 at once 70 (64 px, two cores, bf16)
    return min(EVALUATION_BATCH, 2 * (micro_batch or EVALUATION_BATCH))


def evaluation_batches(
    dataset: Dataset,
    rows: np.ndarray,
    device: torch.device,
    batch_size: int | None = None,
    images: Images | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the images `rows` as they are, uint8 (B, 64, 64, 3), and their labels, on `device`."""
    if images is None:
        images = Images(dataset.images, dataset.labels, device, resident=False)
    size = batch_size or evaluation_batch_size(device)
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        yield images.at(part), images.labels(part)
