"""Checkpoints that carry their own hash.

A checkpoint is MAGIC, the SHA-256 of the payload, then the payload as torch.save writes it: tensors and plain Python
values only, so that it loads without running anybody's code. Its predecessor stays beside it: two generations. A second
home for them is a `mirror.Mirror`.
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tinylab.exceptions import UserError
from tinylab.files import sweep, write_and_rename

MAGIC = b"tinylab checkpoint 2\n"
NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"

Parts = tuple[bytes, memoryview]
"""A checkpoint file's content, in two pieces so that its hundred megabytes are not copied."""


def save(folder: Path, state: dict, mirror: Path | None = None, warn: Callable = print) -> Parts:
    """Makes `state` the newest checkpoint in `folder` and keeps the one before; at any moment one of them is whole.
    Returns the content of the file. Raises `UserError` if it cannot be written: what could be read before still can."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    parts = (MAGIC + hashlib.sha256(payload).digest(), payload)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder / NEWEST}: {error.strerror or error}") from error
    write_and_rename(folder / NEWEST, parts, keep_as=folder / PREVIOUS)
    return parts


class Found(NamedTuple):
    """What `find` has found in one folder."""

    state: dict | None
    """The newest whole checkpoint's, on the CPU."""
    path: Path | None
    """Where it lies."""
    damaged: list[Path]
    """Checkpoints that are newer, or all that there are, and not whole."""

    @property
    def progress(self) -> tuple[int, int]:
        """Epoch and steps done in it; the higher the newer."""
        return (self.state["epoch"], self.state["step"]) if self.state else (0, 0)


def find(folder: Path) -> Found:
    """The newest whole checkpoint in `folder`. Changes nothing. Raises `OSError` if the folder cannot be read."""
    damaged = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        try:
            state = read(path)
        except FileNotFoundError:
            continue
        if state is not None:
            return Found(state, path, damaged)
        damaged.append(path)
    return Found(None, None, damaged)


def load(
    folder: Path,
    mirror: Path | None = None,
    mirror_fails: Callable[[Exception], None] = lambda _: None,
) -> tuple[dict | None, str | None]:
    """The newest whole checkpoint of `folder` and its `mirror`, on the CPU, or None; and a line for the user if
    anything was passed over. Changes nothing. A mirror that cannot be read is none, and `mirror_fails` hears of it.

    Raises `UserError` if there are checkpoints and none of them is whole, or if those in `folder` cannot be read.
    """
    try:
        found = [find(folder)]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from error
    if mirror is not None:
        try:
            found.append(find(mirror))
        except (OSError, UserError) as error:
            if isinstance(error, UserError) and found[0].state is None:
                raise
            mirror_fails(error)
    best = max(found, key=lambda each: each.progress)  # of equals the first: at home
    damaged = ", ".join(str(path) for each in found for path in each.damaged)
    if best.state is None and damaged:
        raise UserError(
            f"every checkpoint is damaged ({damaged}); delete them and the run folder to start anew"
        )
    if damaged:
        return best.state, f"{damaged} is damaged; continuing from {best.path}"
    elsewhere = best.state is not None and best is not found[0]
    return best.state, f"continuing from the mirror's {best.path}" if elsewhere else None


def clean(folder: Path) -> None:
    """Before a run writes in `folder`: no leftovers of a killed process, and no damaged newest checkpoint, which the
    next save would move over the only whole one."""
    sweep(folder)
    with contextlib.suppress(OSError):
        found = find(folder)
        for path in found.damaged:
            path.unlink()
        if found.path == folder / PREVIOUS:
            os.replace(found.path, folder / NEWEST)


def read(path: Path) -> dict | None:
    """The state in the checkpoint file at `path`, on the CPU, or None if it is not whole. Raises `OSError` if it cannot
    be read, `UserError` if another version of tinylab wrote it."""
    if path.exists() and not path.is_file():  # a pipe would never end
        return None
    data = path.read_bytes()
    if re.match(rb"tinylab checkpoint \d{1,9}\n", data) and not data.startswith(MAGIC):
        raise UserError(
            f"another version of tinylab wrote {path}: continue with that, or choose another --run"
        )
    head = len(MAGIC) + hashlib.sha256().digest_size
    payload = memoryview(data)[head:]
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(payload).digest() != data[len(MAGIC) : head]:
        return None
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):
        return None
    numbers = [state.get("epoch"), state.get("step")] if isinstance(state, dict) else [None]
    return state if all(type(number) is int for number in numbers) else None
