"""A disk that fills up while a data set is prepared: one line, and nothing is left."""

import errno
import os

import pytest

from reliability.archives import leftovers, made_up, refused, run, write_zip
from tinylab.data import dataset

pytestmark = pytest.mark.promise("disk-full")

# The three arrays take 221,312, 164 and 200 bytes, the headers 128 each.
SIZES = (0, 150, 100_000, 221_311, 1, 100, 127, 128, 165, 5_000, 12_288, 200_000, 220_000)


@pytest.mark.parametrize("reserve", [True, False])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, full, tally, reserve):
    """RLIMIT_FSIZE stands for the full disk. `reserve`: whether the file system can set space aside."""
    zipped = write_zip(tmp_path / "made.zip", made_up())
    (tmp_path / "neighbour").write_text("kept")
    sizes = SIZES if full else SIZES[:4]
    process = run(
        f"""
        import os, resource
        from tinylab.data import dataset
        from tinylab.recipe import UserError
        if not {reserve}:
            del os.posix_fallocate
        for size in {sizes}:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
            try:
                dataset.prepare({str(zipped)!r}, {str(tmp_path / "ds")!r}, workers=1, progress=False)
                print("prepared", flush=True)
            except UserError as error:
                print(error, flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        print(len(dataset.prepare({str(zipped)!r}, {str(tmp_path / "ds2")!r}, workers=1, progress=False)))
        """
    )
    output, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 0  # no SIGXFSZ, no SIGBUS
    *lines, after = output.splitlines()
    assert after == "18"
    assert len(lines) == len(sizes)
    for line in lines:
        assert f"cannot write {tmp_path / 'ds'}" in line
        assert "it needs 16,998,508 bytes" in line
    assert leftovers(tmp_path) == {"neighbour", "ds2", "ds2.lock"}
    tally(full_disks_while_preparing=len(sizes))


def test_space_is_reserved_before_anything_is_decoded(tmp_path, monkeypatch, tally):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    zipped = write_zip(tmp_path / "made.zip", made_up())
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(dataset, "_decoders", lambda *_: pytest.fail("decoded"))
    assert "No space left on device" in refused(
        dataset.prepare, zipped, tmp_path / "ds", workers=1, progress=False
    )
    assert leftovers(tmp_path) == set()
    tally(full_disks_while_preparing=1)
