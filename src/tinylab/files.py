"""Atomic writes, locks, CSV and text that may be printed."""

import contextlib
import csv
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import filelock

from tinylab.exceptions import UserError


def write_atomically(path: Path, *parts: bytes | memoryview, keep_as: Path | None = None) -> None:
    """Replace `path` by the parts in one step; what it held before stays as `keep_as`, if given.

    Written under another name, flushed to the disk, renamed: the file is whole or as before, also
    after a kill or on a full disk. Folders above it are made. Raise `UserError` if that fails.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path} is a device, not a file")
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every system lets a folder be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # makes the rename durable
            finally:
                os.close(folder)
    except OSError as error:
        size = sum(len(part) for part in parts)
        reason = error.strerror or error
        raise UserError(f"cannot write {path} ({size:,} bytes): {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `folder` at the end: that is whole, or not there.

    Raise `UserError` if it cannot be written, or holds something already.
    """
    building, elsewhere = Path(f"{folder}.tinylab-building"), "choose another place"
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} exists, and is not empty: {elsewhere}")
        shutil.rmtree(building, ignore_errors=True)  # of a killed process
        building.mkdir(parents=True)
        yield building
        building.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}; {elsewhere}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing; only the holder of the lock may call this."""
    for stray in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            stray.unlink()


@contextlib.contextmanager
def lock(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder, which need not exist: one process at a time.

    waiting: print this and wait if another process has it; None: raise `UserError`.
    """
    # On the local disk: the path may lie on a mounted Google Drive, which knows no locks.
    user = os.getuid() if hasattr(os, "getuid") else 0  # another user's lock cannot be opened
    name = hashlib.sha256(f"{user} {path.resolve()}".encode(errors="replace")).hexdigest()[:24]
    held = filelock.FileLock(Path(tempfile.gettempdir()) / f"tinylab-{name}.lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        if waiting is None:
            raise UserError(
                f"another process is writing {path}; wait for it or choose another --run"
            ) from error
        print(waiting, file=sys.stderr)
        held.acquire()
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.filename or ''} {error.strerror}") from error
    try:
        yield
    finally:
        held.release()


def as_csv(rows: Iterable[Sequence[object]]) -> bytes:
    """Return UTF-8 CSV that a spreadsheet opens without computing: formulas get an apostrophe."""

    def cell(value: object) -> object:
        formula = isinstance(value, str) and re.match(r"\s*[=+@＝＋－＠-]", value)
        return f"'{value}" if formula else value

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def printable(text: object, limit: int = 200) -> str:
    """Return the text in one line, without control, format and surrogate characters."""
    kept = (each for each in str(text) if not unicodedata.category(each).startswith("C"))
    return "".join(kept).strip()[:limit]


def plain_text(value: object) -> str:
    """Return Markdown and HTML that show the value as it is: no markup, no link, one line."""
    text = printable(" ".join(str(value).split()))
    escaped = "".join(c if c.isalnum() or c in " .,:;+-()%/" else f"&#{ord(c)};" for c in text)
    # Sites turn these into links by themselves.
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def interactive() -> bool:
    """Return whether somebody may be watching, in a terminal or a notebook: then there are bars."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
