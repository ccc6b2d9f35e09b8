"""A folder to run whole commands in."""

import contextlib
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tinylab.data.dataset import Dataset
from tinylab.recipes import smoke
from tinylab.training.train import train

PATIENCE = 30  # seconds for a command that refuses, on a busy machine
TRAIN = (
    "train smoke --data data --run run --epochs 1 --width 4 --batch-size 14 --device cpu "
    "--precision fp32 --workers 0"
)
"""The command that finds the run of the template finished, or finishes it."""


def make_template(folder: Path, dataset: Dataset) -> Path:
    """Fill the folder with a data set and a finished run on it."""
    shutil.copytree(dataset.folder, folder / "data")
    recipe = replace(smoke(), epochs=1, width=4, batch_size=14)
    with contextlib.chdir(folder):
        settings = {"device": "cpu", "precision": "fp32", "workers": 0, "quiet": True}
        train(recipe, replace(dataset, folder=Path("data")), folder=Path("run"), **settings)
    return folder


class Hangs(BaseException):
    """A command took longer than `PATIENCE`."""


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """End what hangs, where the system has alarms."""

    def end(*_: object) -> None:
        raise Hangs

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
