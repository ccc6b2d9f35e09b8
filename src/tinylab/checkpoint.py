"""Files that are whole or absent: atomic writes, and checkpoints that carry their own hash.

A checkpoint is MAGIC, the SHA-256 of the payload, then the payload as torch.save writes it: tensors and plain Python
values only, so that it loads without running anybody's code. Its predecessor stays beside it: two generations.
"""

import contextlib
import hashlib
import io
import os
import pickle
from pathlib import Path

import torch

from tinylab.recipe import UserError

MAGIC = b"tinylab checkpoint 1\n"
NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds `data` or what it held before, also if the process is killed or the disk is full meanwhile.

    Written to a temporary name in the same folder, flushed to the disk, renamed. Raises `UserError` if that fails.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(folder: Path, state: dict) -> None:
    """Makes `state` the newest checkpoint in `folder` and keeps the one before; at any moment one is whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    newest = folder / NEWEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
    except OSError as error:
        raise UserError(f"cannot write {newest}: {error.strerror or error}") from error
    write_atomically(newest, MAGIC + hashlib.sha256(payload).digest() + payload)


def load(folder: Path) -> tuple[dict | None, str | None]:
    """The newest whole checkpoint in `folder`, on the CPU, or None; and a line for the user about a damaged one.

    Raises `UserError` if there are checkpoints and none of them is whole.
    """
    for stray in folder.glob("*.tmp"):
        stray.unlink(missing_ok=True)
    newest, previous = folder / NEWEST, folder / PREVIOUS
    damaged = []
    for path in (newest, previous):
        if not path.exists():
            continue
        state = _read(path)
        if state is None:
            damaged.append(path.name)
        elif damaged:
            os.replace(previous, newest)  # else the next save would move the damaged one over the only whole one
            return state, f"{NEWEST} is damaged; continuing from {PREVIOUS}"
        else:
            return state, None
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}); delete the run folder to start anew"
        )
    return None, None


def _read(path: Path) -> dict | None:
    data = path.read_bytes()
    head, payload = len(MAGIC) + 32, memoryview(data)[len(MAGIC) + 32 :]
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(payload).digest() != data[len(MAGIC) : head]:
        return None
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        return None


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
