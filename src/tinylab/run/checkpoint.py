"""Checkpoints that carry their own hash: two generations, and a mirror on another disk if asked.

A file is MAGIC, the SHA-256 of the payload, then the payload as torch.save writes it: tensors and
plain values only, so that it loads without running anybody's code.
"""

import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch

from tinylab.exceptions import UserError
from tinylab.files import sweep, write_atomically

MAGIC = b"tinylab checkpoint 2\n"
NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"


def save(
    folder: Path, state: dict, mirror: Path | None = None, warn: Callable[[str], None] = print
) -> None:
    """Make `state` the newest checkpoint in `folder`, then in `mirror`, and keep the one before.

    At any moment one of the two files is whole. A mirror that fails is warned about, once.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    head = MAGIC + hashlib.sha256(payload).digest()
    for home in (folder, mirror) if mirror else (folder,):
        try:
            write_atomically(home / NEWEST, head, payload, keep_as=home / PREVIOUS)
        except UserError as error:
            if home is folder:
                raise
            if mirror not in _WARNED:
                _WARNED.add(mirror)
                warn(f"note: the mirror fails, training goes on without it: {error}")


_WARNED: set[Path] = set()


def load(folder: Path, mirror: Path | None = None) -> tuple[dict | None, str | None]:
    """Return the newest whole checkpoint of both folders, or None, and a line for the user.

    Raise `UserError` if there are checkpoints and none of them is whole.
    """
    states, unreadable = {}, None
    for home in (folder, mirror) if mirror else (folder,):
        try:
            states |= read_all(home)
        except UserError as error:
            if home is folder:
                raise
            unreadable = f"the mirror is of no use: {error}"
    damaged = ", ".join(str(path) for path, state in states.items() if state is None)
    whole = {path: state for path, state in states.items() if state is not None}
    if damaged and not whole:
        ways = "delete them and the run folder to start anew"
        raise UserError(f"every checkpoint is damaged ({damaged}); {ways}")
    if not whole:
        return None, unreadable
    newest = max(whole, key=lambda path: progress(whole[path]))
    if damaged:
        return whole[newest], f"{damaged} is damaged; continuing from {newest}"
    elsewhere = f"continuing from the mirror's {newest}" if newest.parent != folder else None
    return whole[newest], unreadable or elsewhere


def progress(state: dict) -> tuple[int, int]:
    """Return the epoch and the steps done in it."""
    return state["epoch"], state["step"]


def clean(folder: Path) -> None:
    """Remove what a killed process left, and a damaged newest checkpoint.

    The next save would move that one over the only whole one.
    """
    sweep(folder)
    states = read_all(folder)
    newest, previous = folder / NEWEST, folder / PREVIOUS
    if newest in states and states[newest] is None and states.get(previous) is not None:
        os.replace(previous, newest)


def read_all(folder: Path) -> dict[Path, dict | None]:
    """Return the states in a folder, the newest first; None for a file that is not whole."""
    paths = (folder / NEWEST, folder / PREVIOUS)
    try:
        return {path: read(path) for path in paths if path.exists()}
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error


def read(path: Path) -> dict | None:
    """Return the state in a checkpoint file, on the CPU, or None if it is not whole.

    Raise `OSError` if it cannot be read, `UserError` if another version of tinylab wrote it.
    """
    data = path.read_bytes()
    if re.match(rb"tinylab checkpoint \d{1,9}\n", data) and not data.startswith(MAGIC):
        raise UserError(
            f"another version of tinylab wrote {path}: continue with that, or choose another --run"
        )
    start = len(MAGIC) + hashlib.sha256().digest_size
    payload = memoryview(data)[start:]
    if data[:start] != MAGIC + hashlib.sha256(payload).digest():
        return None
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError):
        return None


def verify(folder: Path) -> str:
    """Compare the checkpoints in a folder with their hashes; return some words about it."""
    states = {path.name: state for path, state in read_all(folder).items()}
    whole = [name for name, state in states.items() if state is not None]
    if bad := [name for name in states if name not in whole]:
        hint = f"; {whole[0]} is whole, and training continues from it" if whole else ""
        raise UserError(f"{folder} is damaged: {', '.join(bad)}: not as written{hint}")
    where = ""
    if whole:
        newest = states[whole[0]]
        epoch, step = newest["epoch"], newest["step"]
        after = f"step {step} of epoch {epoch}" if step else f"epoch {epoch - 1}"
        where = f", the newest after {after}"
    return f"{len(whole)} whole checkpoint{'s' * (len(whole) != 1)}{where}"
