"""Epochs of device batches: which image comes when, augmented in worker processes, moved while the device works."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tinylab.augment import Stream, augment, build_transform, generator
from tinylab.dataset import Dataset, available_cores
from tinylab.recipe import Recipe, UserError

Batch = tuple[torch.Tensor, torch.Tensor]
"""images uint8 (B, 64, 64, 3), labels int64 (B,)."""


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order in which epoch number `epoch` (from 1) visits the training images: a permutation, int64 (images,)."""
    return generator(seed, Stream.ORDER, epoch).permutation(images)


class TrainingBatches(TorchDataset):
    """Item (epoch, step) is that step's augmented batch, computed from its two numbers alone.

    So any worker may build any batch, and persistent workers need not be told that an epoch has begun.
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray, recipe: Recipe, seed: int) -> None:
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed}")
        self.images, self.labels, self.rows = dataset.images, dataset.labels, rows
        self.recipe, self.seed = recipe, seed
        self._transform = None
        self._order = (0, np.empty(0, dtype=np.int64))

    def rows_at(self, epoch: int, step: int) -> np.ndarray:
        """Rows of the data set that step `step` (from 0) of epoch `epoch` (from 1) trains on: int64 (B,)."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.rows)))
        first = step * self.recipe.batch_size
        return self.rows[self._order[1][first : first + self.recipe.batch_size]]

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, step = key
        if self._transform is None:
            self._transform = build_transform(self.recipe)
        rows = self.rows_at(epoch, step)
        images = np.empty((len(rows), *self.images.shape[1:]), dtype=np.uint8)
        for i, row in enumerate(rows):
            rng = generator(self.seed, Stream.AUGMENT, epoch, step * self.recipe.batch_size + i)
            images[i] = augment(self._transform, self.images[row], rng)
        return torch.from_numpy(images), torch.from_numpy(self.labels[rows].astype(np.int64))

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
    per core up to four.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        if workers is not None and not 0 <= workers <= 256:
            raise UserError(f"workers must be from 0 to 256, not {workers}")
        if workers is None:
            workers = 0 if device.type == "cpu" else min(4, available_cores())
        self.steps = recipe.steps_per_epoch(len(rows))
        self._device = device
        self._keys: list[tuple[int, int]] = []
        self._loader = DataLoader(
            TrainingBatches(dataset, rows, recipe, seed),
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
        for images, labels in self._loader:
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


def _start_worker(_number: int) -> None:
    """Takes a worker out of the process group: a signal to the whole group (Ctrl-C, `timeout`, a batch system) is for
    the process that trains, which saves first; workers that died under it would break its step. They end with it.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluation_batches(
    dataset: Dataset,
    rows: np.ndarray,
    device: torch.device,
    batch_size: int = 500,
) -> Iterator[Batch]:
    """The images `rows` as they are, in that order, in batches on `device`; the last one may be smaller."""
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        images = torch.from_numpy(np.ascontiguousarray(dataset.images[part]))
        labels = torch.from_numpy(dataset.labels[part].astype(np.int64))
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
