"""A full disk or a read-only folder while a run is saved: one line, nothing is lost."""

import errno
import os

import pytest

from reliability.harness import assert_same_end
from tinylab.exceptions import UserError
from tinylab.run import checkpoint
from tinylab.run.folder import Run

pytestmark = pytest.mark.promise("disk-full")


def position(run: Run) -> tuple[int, int]:
    """Return the epoch and the steps of it that are saved."""
    saved, _ = checkpoint.load(run.checkpoints)
    return (0, 0) if saved is None else checkpoint.progress(saved)


ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES)


@pytest.mark.parametrize("number", ERRORS, ids=os.strerror)
def test_a_file_that_cannot_be_written_costs_nothing(
    runs, undisturbed, tmp_path, full, tally, number
) -> None:
    """In full at each moment of each of a run's files, the errors in turn; mended, it continues."""
    plan, (reference, names) = runs["sgd"], undisturbed("sgd")
    of_files = [i for i, name in enumerate(names) if name in ("half", "sync", "rename")]
    first = ERRORS.index(number)
    for which in of_files[first :: 3 if full else 21]:
        run, before, left = Run(tmp_path / str(which)), [], iter(range(which + 1))

        def hook(_name: str, run=run, before=before, left=left, which=which) -> None:
            if next(left, None) == which:
                before.append(position(run))
                raise OSError(number, os.strerror(number))

        try:
            plan(run.folder, hook)
        except UserError as error:
            message = str(error)
            assert message.startswith("cannot write ")
            assert os.strerror(number) in message
            assert "\n" not in message
            assert not run.finished
        else:
            assert names[which] == "sync"  # of the folder: the file had its name by then
        assert not list(run.folder.rglob("*.tmp"))
        assert position(run) >= before[0]
        assert_same_end(plan(run.folder), reference)
        tally(faults_while_a_file_is_written=1)
