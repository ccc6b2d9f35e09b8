"""What the tests of whole commands share: a folder to run them in, and what they must leave as it
was."""

import contextlib
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinylab.data.dataset import Dataset
from tinylab.recipes import smoke
from tinylab.training.train import train

LONGEST = 300  # characters of the line
PATIENCE = 30  # seconds for a command that refuses, on a busy machine

TRAIN = "train smoke --data data --run run --epochs 1 --width 4 --batch-size 14 --device cpu --precision fp32 --workers 0"
"""The command that finds the run of the template finished, or finishes it."""


def make_template(compute: Path, dataset: Dataset) -> Path:
    """Fills the folder with a data set, a finished run on it, and what `tinylab publish` wants."""
    shutil.copytree(dataset.folder, compute / "data")
    recipe = replace(smoke(), epochs=1, width=4, batch_size=14)
    with contextlib.chdir(compute):
        settings = {"device": "cpu", "precision": "fp32", "workers": 0, "quiet": True}
        train(recipe, replace(dataset, folder=Path("data")), folder=Path("run"), **settings)
    (compute / "results").mkdir()
    parts = ("results", "targets", "paired", "throughput", "figures", "maps")
    (compute / "README.md").write_text(
        "".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in parts)
    )
    return compute


def garbage(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = [pipe, folder, loop, endless]
"""What may lie where a file is expected."""


def tree(folder: Path) -> dict[str, object]:
    """Every name below `folder`: files with their content, the others with their kind; locks aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if stat.S_ISREG(mode)
        else stat.S_IFMT(mode)
        for path in sorted(folder.rglob("*"))
        if (mode := path.lstat().st_mode) and path.suffix != ".lock"
    }


class Hangs(BaseException):
    """A command took longer than `PATIENCE`."""


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Ends what hangs, where the system has alarms."""

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


def assert_one_line(out: str, err: str) -> None:
    assert len(err.splitlines()) == 1, err
    assert err.startswith("tinylab: ")
    assert len("tinylab: ") + 15 < len(err.rstrip("\n")) <= LONGEST, err
    assert err.rstrip("\n").isprintable(), ascii(err)
    assert "Traceback" not in out + err
