"""Hashes of a finished run's files, and copies that are verified."""

import hashlib
from pathlib import Path

from tinylab.exceptions import UserError
from tinylab.files import write_atomically
from tinylab.run import checkpoint
from tinylab.run.folder import CHECKSUMS, EXPLAINED, FINAL_FILES, Run, as_json, reading


def write_checksums(run: Run, summary: dict) -> None:
    """Write the sha256 of all final files and of the summary, which is written after this."""
    contents = {name: (run.folder / name).read_bytes() for name in FINAL_FILES}
    contents["summary.json"] = as_json(summary)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items()]
    write_atomically(run.folder / CHECKSUMS, "".join(lines).encode())


def verify_run(run: Run) -> str:
    """Compare every file of a run with its hash; return a line about it."""
    if not run.finished:
        _ = run.identity, run.recipe, run.environment
        epochs = f"not finished, {len(run.history)} epochs done"
        return f"{run.folder}: {epochs}, {checkpoint.verify(run.checkpoints)}"
    path = run.folder / CHECKSUMS
    with reading(path, "nothing to compare the files with"):
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        sums = {name: digest for digest, name in lines}
    if sums.keys() != {*FINAL_FILES, "summary.json"}:
        raise UserError(f"{path} is damaged: it does not name the files of a finished run")
    bad = []
    for name, expected in sums.items():
        file = run.folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            bad.append(name)
    if bad:
        raise UserError(f"{run.folder} is damaged: not as written or missing: {', '.join(bad)}")
    files = f"finished, {len(sums)} files as they were written"
    return f"{run.folder}: {files}, {checkpoint.verify(run.checkpoints)}"


def copy_run(run: Run, target: Path) -> Run:
    """Copy a finished run without its checkpoints, and verify the copy.

    The summary comes last, so that a copy that was cut short does not pass for a finished run.
    """
    _ = run.summary
    figures = [path.relative_to(run.folder) for path in sorted(run.figures.glob("*.png"))]
    others = [Path(name) for name in EXPLAINED if (run.folder / name).exists()]
    for name in (*FINAL_FILES, *others, *figures, CHECKSUMS, "summary.json"):
        with reading(run.folder / name):
            content = (run.folder / name).read_bytes()
        write_atomically(target / name, content)
    verify_run(Run(target))
    return Run(target)


def restore_run(run: Run, kept: Path) -> str | None:
    """Copy a run that is finished in `kept` but not here; return a line if that is impossible."""
    if run.finished or not Run(kept).finished:
        return None
    try:
        with run.lock():
            copy_run(Run(kept), run.folder)
    except UserError as error:
        return f"note: {kept} is of no use: {error}"
    return None
