"""The run's numbers and figures in TensorBoard or Weights & Biases, if asked for.

A tracker is what `start` returns. Steps are epochs, from 1.
"""

import contextlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.run.folder import Run

Kind = Literal["tensorboard", "wandb"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
TAGS = {
    "loss/train": "train_loss", "loss/test": "test_loss",
    "top1/train": "train_top1", "top1/test": "test_top1",
    "top5/train": "train_top5", "top5/test": "test_top5",
    "training/learning_rate": "learning_rate", "training/images_per_second": "images_per_second",
}  # fmt: skip
"""The trackers' names, a chart for each, and the history's fields."""


class Tracker(Protocol):
    """Keep a tracker's store, a folder in the run folder, in step with the run."""

    def up_to(self, history: list[dict]) -> None:
        """Begin a store that holds all of `history`, once."""

    def epoch(self, row: dict) -> None:
        """Add a row of the history."""

    def figures(self, paths: Iterable[Path], step: int) -> None:
        """Add PNG files, by their names."""

    def close(self) -> None:
        """End the store."""


def start(kind: Kind, run: Run) -> Tracker:
    """Return a tracker. Raise `UserError` if it is not installed, before anything is trained."""
    try:
        library = importlib.import_module(MODULES[kind])
    except ImportError as error:
        raise UserError(f"--track {kind} needs {kind}: pip install {kind} ({error})") from error
    return (TensorBoard if kind == "tensorboard" else WandB)(library, run)


def log_figures(run: Run, paths: Iterable[Path]) -> None:
    """Add the figures to every tracker that the run was trained with."""
    for kind in MODULES:
        if (run.folder / kind).exists():
            tracker = start(kind, run)
            with contextlib.closing(tracker):
                tracker.figures(paths, len(run.history))


def numbers(row: dict) -> dict[str, float]:
    """Return the row by the trackers' names; an epoch without a test lacks some."""
    return {tag: row[field] for tag, field in TAGS.items() if field in row}


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what a tracker raises into one line."""
    try:
        yield
    except Exception as error:  # wandb has errors of its own
        reason = getattr(error, "strerror", None) or printable(error, 200)
        raise UserError(f"cannot write {what}: {reason}") from error


class TensorBoard:
    """The folder `tensorboard`. A new file takes back what earlier ones hold of later epochs."""

    def __init__(self, library: object, run: Run) -> None:
        self.folder, self.open = run.folder / "tensorboard", library.SummaryWriter
        self.writer = None

    def up_to(self, history: list[dict]) -> None:
        with one_line(f"{self.folder} for TensorBoard"):
            self.writer = self.open(str(self.folder), purge_step=1)
        for row in history:
            self.epoch(row)

    def epoch(self, row: dict) -> None:
        with one_line(f"{self.folder} for TensorBoard"):
            for tag, value in numbers(row).items():
                self.writer.add_scalar(tag, value, row["epoch"])
            self.writer.flush()

    def figures(self, paths: Iterable[Path], step: int) -> None:
        with one_line(f"{self.folder} for TensorBoard"):
            self.writer = self.open(str(self.folder))
            for path in paths:
                picture = np.asarray(Image.open(path).convert("RGB"))
                self.writer.add_image(path.stem, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self.writer:
            with one_line(f"{self.folder} for TensorBoard"):
                self.writer.close()


class WandB:
    """The folder `wandb`, sent to its server unless WANDB_MODE is offline; one run, by its id.

    A stopped run sends only later epochs than the last one that it sent: wandb takes back nothing.
    """

    def __init__(self, library: object, run: Run) -> None:
        self.library, self.folder, self.run, self.sent = library, run.folder, None, 0
        self.note = run.folder / "wandb" / "tinylab.json"
        self.id = os.urandom(8).hex()

    def begin(self, config: dict | None = None) -> None:
        with one_line("to Weights & Biases"):
            self.note.parent.mkdir(parents=True, exist_ok=True)
            if self.note.exists():
                self.id, self.sent = json.loads(self.note.read_text()).values()
            self.run = self.library.init(
                project="tinylab", id=self.id, name=self.folder.name, dir=str(self.folder),
                resume="allow", config=config,
            )  # fmt: skip

    def up_to(self, history: list[dict]) -> None:
        self.begin(Run(self.folder).identity | vars(Run(self.folder).recipe))
        for row in history:
            self.epoch(row)

    def epoch(self, row: dict) -> None:
        if row["epoch"] > self.sent:
            with one_line("to Weights & Biases"):
                self.run.log(numbers(row), step=row["epoch"])
                self.sent = row["epoch"]
                self.note.write_text(json.dumps({"id": self.id, "sent": self.sent}))

    def figures(self, paths: Iterable[Path], step: int) -> None:
        self.begin()
        with one_line("to Weights & Biases"):
            self.run.log({path.stem: self.library.Image(str(path)) for path in paths}, step=step)

    def close(self) -> None:
        if self.run:
            with one_line("to Weights & Biases"):
                self.run.finish()
