"""Tiny ImageNet for other people's training code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tinylab.data.dataset import FOLDER, open_dataset, prepare
from tinylab.exceptions import UserError


class TinyImageNet(torch.utils.data.Dataset):
    """Images and labels of a data folder, one by one, for any DataLoader.

    root: the data folder that `tinylab prepare` makes. split: "train" or "val". transform: takes
    the PIL image, RGB, 64 x 64. download: find or download Tiny ImageNet if `root` is not there.
    wnids, classes: ids and names. labels (N,): indices into both. boxes (N, 4): x0 y0 x1 y1 in
    pixels, corners included. Raise `UserError` if there is no data.
    """

    def __init__(
        self, root: str | Path = FOLDER, split: str = "train",
        transform: Callable[[Image.Image], Any] | None = None, download: bool = False,
    ) -> None:  # fmt: skip
        if split not in ("train", "val"):
            raise UserError(f"split must be 'train' or 'val', not {split!r}")
        self.data = prepare("auto", root) if download else open_dataset(root)
        every, count = range(len(self.data)), self.data.train_count
        self.rows = every[:count] if split == "train" else every[count:]
        self.transform, self.wnids, self.classes = transform, self.data.wnids, self.data.names
        self.labels, self.boxes = self.data.labels[self.rows], self.data.boxes[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data.images[self.rows[index]])
        return self.transform(image) if self.transform else image, int(self.labels[index])
