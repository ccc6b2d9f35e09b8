"""Epochs of device batches: which image comes when, augmented by worker processes or on the device itself."""

import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tinylab.data.augment import (
    Draws,
    Stream,
    augment,
    augment_batch,
    build_transform,
    generator,
    mix_batch,
    mixing_of,
)
from tinylab.data.dataset import Dataset, available_cores
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe


class World(NamedTuple):
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1


ALONE = World()


def share(count: int, rank: int | World, ranks: int = 1) -> range:
    """Return which of `count` things in a row this process takes; lengths differ by one at most."""
    rank, ranks = rank if isinstance(rank, World) else (rank, ranks)
    each, left = divmod(count, ranks)
    first = rank * each + min(rank, left)
    return range(first, first + each + (rank < left))


EVALUATION_BATCH = 500
CPU_EVALUATION_BATCH = 32
"""What fits a CPU's cache: 87 images/s forward, of 500 at once 70 (64 pixels, two cores, bf16)."""


class Batch(NamedTuple):
    """What one optimiser step trains on, or, with several processes, this one's share of it."""

    images: torch.Tensor
    """uint8 (B, 64, 64, 3), augmented and mixed."""
    labels: torch.Tensor
    """int64 (B,)"""
    partners: torch.Tensor | None = None
    """int64 (B,), the labels of the images that were mixed in; None: nothing was."""
    share: float = 1.0
    """What `labels` weigh in the loss; `partners` weigh the rest."""
    total: int = 0
    """Images of the whole batch over all processes; 0: these are all of it."""

    @property
    def size(self) -> int:
        """Images of the whole batch over all processes."""
        return self.total or len(self.labels)


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order in which epoch number `epoch` (from 1) visits the training images: a permutation, int64 (images,)."""
    return generator(seed, Stream.ORDER, epoch).permutation(images)


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
) -> "TrainingLoader | BatchedLoader":
    """The loader that the recipe's `augmentation` asks for; `images` are shared with it if it works on the device.

    Raises `UserError` for a seed or number of workers that cannot be.
    """
    world = World(rank, ranks)
    if recipe.augmentation == "albumentations":
        return TrainingLoader(dataset, rows, recipe, seed, device, workers, world)
    if workers:
        raise UserError(
            "workers run albumentations; this recipe augments on the device: leave --workers out"
        )
    images = Images(dataset.images, dataset.labels, device) if images is None else images
    return BatchedLoader(rows, recipe, seed, images, world)


class _EpochRows:
    """Which rows of the data set each step of each epoch trains on."""

    def __init__(self, rows: np.ndarray, recipe: Recipe, seed: int) -> None:
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed}")
        self.rows, self.recipe, self.seed = rows, recipe, seed
        self._order = (0, np.empty(0, dtype=np.int64))

    def positions_at(self, epoch: int, step: int) -> np.ndarray:
        """Which of the training images step `step` (from 0) of epoch `epoch` (from 1) trains on: int64 (B,)."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.rows)))
        first = step * self.recipe.batch_size
        return self._order[1][first : first + self.recipe.batch_size]

    def rows_at(self, epoch: int, step: int) -> np.ndarray:
        """The same as rows of the data set: int64 (B,)."""
        return self.rows[self.positions_at(epoch, step)]


class TrainingBatches(_EpochRows, TorchDataset):
    """Item (epoch, step) is that step's augmented batch, uint8 (B, 64, 64, 3) and int64 (B,) on the CPU, computed from
    its two numbers alone.

    So any worker may build any batch, and persistent workers need not be told that an epoch has begun. With several
    processes an item is this one's share of the batch.
    """

    def __init__(
        self, dataset: Dataset, rows: np.ndarray, recipe: Recipe, seed: int, world: World = ALONE
    ) -> None:
        super().__init__(rows, recipe, seed)
        self.images, self.labels = dataset.images, dataset.labels
        self.world = world  # worker processes need its numbers, not its connections
        self._transform = None

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, step = key
        if self.recipe.augmentation == "batched":
            images = Images(self.images, self.labels, torch.device("cpu"))
            return BatchedLoader(self.rows, self.recipe, self.seed, images, self.world).batch(
                epoch, step
            )[:2]
        if self._transform is None:
            self._transform = build_transform(self.recipe)
        rows = self.rows_at(epoch, step)
        mine = share(len(rows), self.world)
        images = np.empty((len(mine), *self.images.shape[1:]), dtype=np.uint8)
        for i, position in enumerate(mine):
            rng = generator(
                self.seed, Stream.AUGMENT, epoch, step * self.recipe.batch_size + position
            )
            images[i] = augment(self._transform, self.images[rows[position]], rng)
        labels = self.labels[rows[mine.start : mine.stop]].astype(np.int64)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def __getstate__(self) -> dict:
        """What a spawned worker receives: a memory map travels as its file name, not as a copy of every image."""
        state = self.__dict__ | {"_transform": None}
        if isinstance(self.images, np.memmap):
            state["images"] = str(self.images.filename)
        return state

    def __setstate__(self, state: dict) -> None:
        if isinstance(state["images"], str):
            state["images"] = np.load(state["images"], mmap_mode="r")
        self.__dict__.update(state)


class TrainingLoader:
    """Yields the batches of an epoch on `device`. `workers` processes augment; 0 augments in this one.

    The batches do not depend on `workers`. None chooses: none for a CPU run, whose cores are busy training, else one
    per core up to eight.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        workers: int | None = None,
        world: World = ALONE,
    ) -> None:
        if workers is not None and not 0 <= workers <= 256:
            raise UserError(f"workers must be from 0 to 256, not {workers}")
        if workers is None:
            workers = 0 if device.type == "cpu" else min(8, available_cores())
        self.steps = recipe.steps_per_epoch(len(rows))
        self._sizes = (recipe.batch_size, len(rows))
        self._device = device
        self._keys: list[tuple[int, int]] = []
        self._loader = DataLoader(
            TrainingBatches(dataset, rows, recipe, seed, world),
            batch_size=None,  # an item is a whole batch already
            sampler=self._keys,  # read anew at the start of each epoch
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=_start_worker,
        )

    def close(self) -> None:
        """Ends the worker processes, which a traceback in a notebook would otherwise keep."""
        self._loader = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch` (from 1), from step `start_step` (from 0) to the last."""
        self._keys[:] = [(epoch, step) for step in range(start_step, self.steps)]
        batch_size, images_in_all = self._sizes
        for step, (images, labels) in enumerate(self._loader, start_step):
            total = min(batch_size, images_in_all - step * batch_size)
            on_device = [tensor.to(self._device, non_blocking=True) for tensor in (images, labels)]
            yield Batch(*on_device, total=total)


def _start_worker(_number: int) -> None:
    """Takes a worker out of the process group: a signal to the whole group (Ctrl-C, `timeout`, a batch system) is for
    the process that trains, which saves first; workers that died under it would break its step. They end with it.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Images:
    """The data set's images and labels as `device` reads them: uint8 batches by row number.

    They live on a GPU when they take less than a quarter of its free memory (all of Tiny ImageNet is 1.35 GB), else
    they stream: a thread gathers the next batches from the memory map into pinned memory while the device works. On a
    CPU the memory map itself is read. `resident` decides otherwise.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        device: torch.device,
        resident: bool | None = None,
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # nothing here writes
            on_host = torch.from_numpy(images)
        if resident is None:
            resident = device.type == "cpu" or images.nbytes < _free_memory(device) / 4
        self.device, self.resident = device, resident
        self._images = on_host.to(device) if resident else on_host
        self._labels = torch.from_numpy(labels.astype(np.int64)).to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, rows: np.ndarray) -> torch.Tensor:
        """int64 (B,) on the device, of int64 rows (B,)."""
        return self._labels.index_select(0, self.index(rows))

    def batches(self, row_batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """uint8 (B, 64, 64, 3) on the device for each of the int64 rows (B,), one gather each."""
        if self.resident:
            for rows in row_batches:
                yield self._images.index_select(0, self.index(rows))
            return
        for images in _ahead(self._gather, row_batches):
            yield images.to(self.device, non_blocking=True)

    def _gather(self, rows: np.ndarray) -> torch.Tensor:
        pinned = self.device.type == "cuda"
        out = torch.empty(
            (len(rows), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=pinned
        )
        return torch.index_select(self._images, 0, torch.from_numpy(rows), out=out)

    def index(self, rows: np.ndarray) -> torch.Tensor:
        """`rows`, int64 (B,), on the device, without waiting for it."""
        index = torch.from_numpy(rows)
        if self.device.type == "cuda":
            index = index.pin_memory()  # else the copy waits for the device
        return index.to(self.device, non_blocking=True)


def _free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; on other devices memory is the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _ahead(work: Callable, items: Iterable, depth: int = 3) -> Iterator:
    """work(item) for each item, in order, computed by a thread up to `depth` items ahead of the one asked for."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gather")
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class BatchedLoader(_EpochRows):
    """Yields the batches of an epoch, gathered, augmented and mixed on the device that `images` are for.

    A batch is a function of (seed, epoch, step). With several processes each gets its share of the very same batch.
    """

    def __init__(
        self, rows: np.ndarray, recipe: Recipe, seed: int, images: Images, world: World = ALONE
    ) -> None:
        super().__init__(rows, recipe, seed)
        self.steps = recipe.steps_per_epoch(len(rows))
        self._images, self._world = images, world
        mirrored = generator(seed, Stream.FLIP, 0).random(len(images)) < recipe.flip_probability
        self._mirrored = torch.from_numpy(mirrored).to(images.device)

    def close(self) -> None:
        """Nothing outlives an epoch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch` (from 1), from step `start_step` (from 0) to the last."""
        return self._batches(epoch, range(start_step, self.steps))

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of step `step` (from 0) of epoch number `epoch` (from 1)."""
        return next(self._batches(epoch, range(step, step + 1)))

    def _batches(self, epoch: int, steps: range) -> Iterator[Batch]:
        plans = [self._plan(epoch, step) for step in steps]
        for plan, images in zip(
            plans, self._images.batches(plan.rows for plan in plans), strict=True
        ):
            yield self._finish(epoch, plan, images)

    def _plan(self, epoch: int, step: int) -> "_Plan":
        """Which images this process needs: its share of the batch and, if the batch is mixed, the one before it."""
        rows = self.rows_at(epoch, step)
        mine = share(len(rows), self._world)
        mixed = (
            mixing_of(self.recipe, self._mixing_draws(epoch, step, len(rows)), epoch) is not None
        )
        positions = np.arange(mine.start - mixed, mine.stop) % len(rows)
        return _Plan(step, len(rows), positions, rows[positions], mixed)

    def _finish(self, epoch: int, plan: "_Plan", images: torch.Tensor) -> Batch:
        device, recipe = self._images.device, self.recipe
        rng = generator(self.seed, Stream.AUGMENT, epoch, plan.step)
        draws = Draws(rng, plan.total, plan.positions, device)
        index = self._images.index(plan.rows)
        images = augment_batch(images, recipe, draws, self._mirrored.index_select(0, index), epoch)
        labels = self._images.labels(plan.rows)
        if not plan.mixed:
            return Batch(images, labels, total=plan.total)
        draws = self._mixing_draws(epoch, plan.step, plan.total)
        images, partners, weight = mix_batch(
            images[1:], images[:-1], labels[1:], labels[:-1], recipe, draws, epoch
        )
        return Batch(images, labels[1:], partners, weight, total=plan.total)

    def _mixing_draws(self, epoch: int, step: int, total: int) -> Draws:
        return Draws(
            generator(self.seed, Stream.MIX, epoch, step), total, device=self._images.device
        )


class _Plan(NamedTuple):
    """One step's share of this process. positions: places in the batch; rows: the same as rows of the data set."""

    step: int
    total: int
    positions: np.ndarray
    rows: np.ndarray
    mixed: bool


def statistics_batches(
    images: Images, rows: np.ndarray, recipe: Recipe, seed: int, epoch: int, world: World = ALONE
) -> Iterator[torch.Tensor]:
    """Training images as they are, uint8 (B, 64, 64, 3), for new batch-norm statistics after epoch number `epoch`:
    `ema_bn_batches` of 500 images at most, or as many as there are; with several processes, this one's share of each.
    With a micro-batch, as many images in batches of twice that: without gradients they need no more memory."""
    order = generator(seed, Stream.STATISTICS, epoch).permutation(len(rows))
    whole = min(recipe.batch_size, EVALUATION_BATCH, len(rows))
    size = max(min(whole, 2 * (recipe.micro_batch or whole)), world.size)
    count = min(recipe.ema_bn_batches * whole, len(rows)) // size
    parts = (rows[order[size * i : size * (i + 1)]] for i in range(count))
    return images.batches(
        part[share(len(part), world).start : share(len(part), world).stop] for part in parts
    )


def evaluation_batch_size(device: torch.device, micro_batch: int | None = None) -> int:
    """Images in one forward pass without gradients, which takes less than half the memory of one with them."""
    if device.type == "cpu":
        return CPU_EVALUATION_BATCH
    return EVALUATION_BATCH if micro_batch is None else min(EVALUATION_BATCH, 2 * micro_batch)


def evaluation_batches(
    dataset: Dataset,
    rows: np.ndarray,
    device: torch.device,
    batch_size: int | None = None,
    images: Images | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images `rows` as they are, uint8 (B, 64, 64, 3), and their labels, in that order, in batches on `device`; the
    last one may be smaller. `images`: where to take them from if they are on the device already."""
    if images is None:
        images = Images(dataset.images, dataset.labels, device, resident=device.type == "cpu")
    size = batch_size or evaluation_batch_size(device)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    for part, batch in zip(parts, images.batches(parts), strict=True):
        yield batch, images.labels(part)
