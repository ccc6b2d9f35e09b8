"""The run's numbers in TensorBoard, if asked for."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tinylab.exceptions import UserError

TAGS = {
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "top1/train": "train_top1",
    "top1/test": "test_top1",
    "top5/train": "train_top5",
    "top5/test": "test_top5",
    "training/learning_rate": "learning_rate",
    "training/images_per_second": "images_per_second",
}
"""TensorBoard's tags, a chart for each, and the history's fields."""


class Tracker:
    """Keep `folder`/tensorboard in step with the run's history. Steps are epochs, from 1.

    Raise `UserError` if tensorboard is not installed, before anything is trained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder) / "tensorboard"
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"--track tensorboard needs tensorboard: pip install tensorboard ({error})"
            ) from error
        self._open = SummaryWriter

    def up_to(self, history: Sequence[Mapping]) -> None:
        """Begin a file that holds all of `history` and takes back what earlier files hold.

        So each epoch is shown once, also one that a killed process lost.
        """
        with self._one_line():
            self._writer = self._open(str(self.folder), purge_step=1)
            for row in history:
                self._add(row)
            self._writer.flush()

    def epoch(self, row: Mapping) -> None:
        """Add a row of the history; it is in the file when this returns."""
        with self._one_line():
            self._add(row)
            self._writer.flush()

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            with self._one_line():
                self._writer.close()
        self._writer = None

    def _add(self, row: Mapping) -> None:
        for tag, field in TAGS.items():
            if field in row:  # an epoch without a test lacks some
                self._writer.add_scalar(tag, row[field], int(row["epoch"]))

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self.folder} for TensorBoard: {reason}") from error
