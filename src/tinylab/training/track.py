"""The run's numbers in TensorBoard, if asked for."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tinylab.exceptions import UserError

TAGS = {
    "loss/train": "train_loss", "loss/test": "test_loss",
    "top1/train": "train_top1", "top1/test": "test_top1",
    "top5/train": "train_top5", "top5/test": "test_top5",
    "training/learning_rate": "learning_rate", "training/images_per_second": "images_per_second",
}  # fmt: skip
"""TensorBoard's tags, a chart for each, and the history's fields."""


class Tracker:
    """Keep `folder`/tensorboard in step with the run's history. Steps are epochs, from 1.

    Raise `UserError` if tensorboard is not installed, before anything is trained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            text = f"--track tensorboard needs tensorboard: pip install tensorboard ({error})"
            raise UserError(text) from error
        self.open = SummaryWriter

    def up_to(self, history: list[dict]) -> None:
        """Begin a file that holds all of `history` and takes back what earlier files hold."""
        with self.one_line():
            self.writer = self.open(str(self.folder), purge_step=1)
        for row in history:
            self.epoch(row)

    def epoch(self, row: dict) -> None:
        """Add a row of the history; it is in the file when this returns."""
        with self.one_line():
            for tag, field in TAGS.items():
                if field in row:  # an epoch without a test lacks some
                    self.writer.add_scalar(tag, row[field], row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        """End the file."""
        with self.one_line():
            self.writer.close()

    @contextlib.contextmanager
    def one_line(self) -> Iterator[None]:
        """Turn a file that cannot be written into one line."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self.folder} for TensorBoard: {reason}") from error
