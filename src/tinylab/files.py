"""Atomic writes, locks and CSV."""

import contextlib
import csv
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import filelock

from tinylab.exceptions import UserError


def as_csv(rows: Iterable[Sequence[object]]) -> bytes:
    """The rows as UTF-8, comma-separated, one per line. Text that a spreadsheet would take for a formula gets an
    apostrophe in front; what UTF-8 cannot hold becomes an escape."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> object:
    return (
        f"'{value}" if isinstance(value, str) and re.match(r"\s*[=+@＝＋－＠-]", value) else value
    )


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds `data` or what it held before, also if the process is killed or the disk is full meanwhile.

    Written to a temporary name in the same folder, flushed to the disk, renamed. Raises `UserError` if that fails.
    """
    write_and_rename(path, (data,))


def write_and_rename(
    path: Path, parts: tuple[bytes | memoryview, ...], keep_as: Path | None = None
) -> None:
    """Replaces `path` in one step; what it held before stays as `keep_as`, if that is given."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        size = sum(len(part) for part in parts)
        raise UserError(
            f"cannot write {path} ({size:,} bytes): {error.strerror or error}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Removes what a killed process was writing in `folder`; only the holder of the folder's lock may call this."""
    for stray in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            stray.unlink()


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the folder, which need not exist: one writer at a time. Raises `UserError` if another process has it."""
    # On the local disk: the folder may lie on a mounted Google Drive, which knows no locks.
    user = os.getuid() if hasattr(os, "getuid") else 0  # another user's lock could not be opened
    name = hashlib.sha256(f"{user} {folder.resolve()}".encode()).hexdigest()[:24]
    try:
        lock = filelock.FileLock(
            Path(tempfile.gettempdir()) / f"tinylab-{name}.lock", blocking=False
        )
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"another process is writing {folder}; wait for it or choose another --run"
        ) from error
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {error.filename or ''} {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
