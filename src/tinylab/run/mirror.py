"""A second home for a run's checkpoints, on a disk that may be slow, full or gone: a mounted Google Drive, say.

Every checkpoint is written at home first. A thread then copies it, so that training never waits for the mirror, nor
stops because of it. There are two files at the most, at any moment, and one of them is whole.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tinylab.files import sync_folder
from tinylab.run.checkpoint import NEWEST, PREVIOUS, Parts, clean

HANGS = 300.0
"""Seconds after which a copy that has not ended is told of."""
TEMPORARY = f"{NEWEST}.tmp"
_COPYING = threading.Lock()
"""A run that was stopped in a notebook may still be copying when it is started again."""


class Mirror:
    """Keeps the newest checkpoints of a run in `folder`, too. `say` tells the user, once, that it fails.

    A context manager: on leaving it waits for the last copy, at most `patience` seconds, or two if the run was told to
    stop. A folder that cannot be read or made at the start is left alone: it may hold a newer checkpoint than any here.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], patience: float = 120.0) -> None:
        self.folder, self._say, self._patience = Path(folder), say, patience
        self._waiting: Parts | None = None
        self._trouble: str | None = None
        self._warned = self._closing = self._left_alone = False
        self._busy_since: float | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        # Only now: a folder that vanishes later is a drive that is gone, and a new one in its place would be no copy.
        try:
            if not self._left_alone:
                self.folder.mkdir(parents=True, exist_ok=True)
                clean(
                    self.folder
                )  # a copy goes over the oldest file, which must not be the only whole one
        except OSError as error:
            self.leave_alone(error)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._patience if kind is None else min(2.0, self._patience))
        self._warn()
        with self._changed:
            late, self._waiting = self._waiting is not None or self._busy_since is not None, None
        if late and not self._warned:
            self._say(
                f"note: the last checkpoint was not copied to the mirror {self.folder} in time"
            )

    def update(self, checkpoint: Parts) -> None:
        """Has `checkpoint` copied, and returns at once. If the one before is still waiting, it is left out."""
        if self._left_alone:
            return
        with self._changed:
            self._waiting = checkpoint
            self._changed.notify_all()
            if self._busy_since is not None and time.monotonic() - self._busy_since > HANGS:
                self._trouble = (
                    self._trouble or f"a copy has taken more than {HANGS / 60:.0f} minutes"
                )
        self._warn()

    def leave_alone(self, error: Exception) -> None:
        """Has nothing written there any more, and tells the user why."""
        self._left_alone, self._trouble = True, f"{getattr(error, 'strerror', None) or error}"
        self._warn()

    def wait(self, seconds: float) -> bool:
        """Whether all is copied, or has failed, within so many seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._waiting is not None or self._busy_since is not None:
                if not self._changed.wait(deadline - time.monotonic()):
                    return False
        return True

    def _warn(self) -> None:
        if self._trouble is not None and not self._warned:
            self._warned = True
            self._say(
                f"note: the mirror {self.folder} fails ({self._trouble}); training goes on without it"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    if self._closing:
                        return
                    self._changed.wait()
                checkpoint, self._waiting, self._busy_since = self._waiting, None, time.monotonic()
            try:
                with _COPYING:
                    copy(checkpoint, self.folder)
            except Exception as error:  # whatever it is, it must not end the training
                self._trouble = (
                    f"{getattr(error, 'strerror', None) or error or type(error).__name__}"
                )
            with self._changed:
                self._busy_since = None
                self._changed.notify_all()


def copy(checkpoint: Parts, folder: Path) -> None:
    """Makes `checkpoint` the newest one in `folder`: written under another name, read again and compared, renamed.

    The oldest file is written over rather than deleted: on Google Drive deleted files fill the trash, which counts.
    Raises `OSError`; the newest one that was there is then still whole.
    """
    newest, previous, temporary = folder / NEWEST, folder / PREVIOUS, folder / TEMPORARY
    if not folder.is_dir():
        raise OSError("the folder is not there")
    if previous.exists() and newest.exists():
        os.replace(previous, temporary)
    try:
        with open(temporary, "r+b" if temporary.exists() else "w+b") as file:
            for part in checkpoint:
                file.write(part)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            if hasattr(
                os, "posix_fadvise"
            ):  # else it may be read from memory and not from where it was written
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = hashlib.sha256()
        for part in checkpoint:
            written.update(part)
        with open(temporary, "rb") as file:
            if hashlib.file_digest(file, "sha256").digest() != written.digest():
                raise OSError("a copy was not what had been written")
        if newest.exists():
            os.replace(newest, previous)
        os.replace(temporary, newest)
        sync_folder(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
