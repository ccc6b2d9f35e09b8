"""The run's numbers in TensorBoard, if somebody asks for it: a handful of scalars per epoch."""

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
"""TensorBoard's tags, one chart for each (what stands before the slash groups them), and the history's fields."""


class Tracker:
    """Keeps `folder`/tensorboard, `folder` being a run's, in step with the run's history.

    Steps are epochs, from 1; losses are in nats, accuracies in percent. Nothing is made before `up_to`. Raises
    `UserError` if tensorboard is not installed, before anything is trained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder) / "tensorboard"
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f'--track tensorboard needs tensorboard: pip install "tinylab[track]" ({error})'
            ) from error
        self._open = SummaryWriter

    def up_to(self, history: Sequence[Mapping]) -> None:
        """Begins a file that tells all of `history` and takes back what earlier files tell: so each epoch is shown
        once, also one that had been shown before a killed process lost it, or that was trained without TensorBoard.
        Call it before the first `epoch`. Raises `UserError` if the files cannot be written."""
        with self._told():
            self._writer = self._open(str(self.folder), purge_step=1)
            for row in history:
                self._add(row)
            self._writer.flush()

    def epoch(self, row: Mapping) -> None:
        """Adds one epoch, a row of the history; it is in the file when this returns. Raises `UserError` if it cannot
        be written."""
        with self._told():
            self._add(row)
            self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            with self._told():
                self._writer.close()
        self._writer = None

    def _add(self, row: Mapping) -> None:
        for tag, field in TAGS.items():
            if field not in row:  # an epoch without a test
                continue
            self._writer.add_scalar(tag, row[field], int(row["epoch"]))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder} for TensorBoard: {error.strerror or error}"
            ) from error
