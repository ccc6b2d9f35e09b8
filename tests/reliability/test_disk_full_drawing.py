"""A full disk while figures are drawn or tables written: one line, every old file whole, nothing left over."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reliability.places import assert_one_line, make_template
from tinylab.cli import main
from tinylab.data.dataset import Dataset
from tinylab.run.folder import Run

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.promise("disk-full")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While entered, no file grows beyond so many bytes. (Python ignores the signal that comes with it.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def command(line: str, size: int | None = None) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    disk = contextlib.nullcontext() if size is None else largest_file(size)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), disk:
        status = main(line.split())
    return status, out.getvalue(), err.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def drawn(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, explained and published, in a checkout with a long README."""
    compute = make_template(tmp_path_factory.mktemp("drawn"), small_dataset)
    page = (compute / "README.md").read_text()
    (compute / "README.md").write_text(page + "text\n" * 4000)
    with contextlib.chdir(compute):
        assert command("explain run --count 2")[0] == 0
        assert command("publish run")[0] == 0
    return compute


@pytest.fixture
def here(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(drawn, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def assert_old_or_new(
    before: dict[str, bytes], after: dict[str, bytes], new: dict[str, bytes], size: int
) -> None:
    """Every file is the old one or the new one, to the last byte; those that are too large are the old ones."""
    assert after.keys() == before.keys()
    for name, content in after.items():
        assert content in (before[name], new[name]), name
        if len(new[name]) > size and new[name] != before[name]:
            assert content == before[name], name


@pytest.fixture(scope="module")
def explained_anew(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What explaining in another way writes, where there is room."""
    compute = tmp_path_factory.mktemp("anew") / "here"
    shutil.copytree(drawn, compute)
    with contextlib.chdir(compute):
        assert command(ANEW)[0] == 0
    return files(compute)


ANEW = "explain run --count 1 --method hirescam"


def test_drawing(here: Path, explained_anew: dict[str, bytes], full: bool, tally: Callable) -> None:
    before = files(here)
    changed = [name for name, content in explained_anew.items() if content != before[name]]
    assert {"run/explain.json", "run/figures/gradcam.png", "run/figures/misclassified.png"} <= set(
        changed
    )
    sizes = [0, 512, 4096, 10_000, 20_000, 30_000, 40_000, 60_000, 80_000, 100_000]
    largest = max(len(content) for content in explained_anew.values())
    for size in sizes if full else (0, 4096, 40_000):
        assert size < largest
        status, out, err = command(ANEW, size)
        assert status == 2
        assert_one_line(out, err)
        assert "cannot write" in err
        assert "File too large" in err
        assert_old_or_new(before, files(here), explained_anew, size)
        tally(full_disks=1)
    assert command(ANEW)[0] == 0
    assert files(here) == explained_anew


def test_explain_json_alone_does_not_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    from tinylab.explain.gradcam import analysis

    monkeypatch.setattr(
        analysis, "figures_of_training", lambda *_: {}
    )  # the figures that are left are smaller
    path = here / "run" / "explain.json"
    before = path.read_bytes()
    explanation = json.loads(before)
    monkeypatch.setattr(
        "tinylab.explain.gradcam.Explanation.to_json",
        lambda _: explanation | {"more": "x" * 1_000_000},
    )
    status, out, err = command(ANEW, 900_000)
    assert status == 2
    assert_one_line(out, err)
    assert "explain.json" in err
    assert path.read_bytes() == before
    assert not list(here.rglob("*.tmp"))
    tally(full_disks=1)


def test_publishing(here: Path, full: bool, tally: Callable) -> None:
    """README and results.csv are the old ones, or the new ones, whole; a run half copied is no published run."""
    run, new = Run(here / "run"), here.parent / "new"
    shutil.copytree(here / "run", here / "other")
    history = [row | {"train_loss": 1.0} for row in run.history]
    Run(here / "other").write_history(history)
    shutil.copytree(here, new)
    with contextlib.chdir(new):
        assert command("publish other")[0] == 0
    before, after = files(here), files(new)
    assert after["README.md"] != before["README.md"]
    sizes = [0, 64, 256, 500, 700, 1000, 1500, 2000, 3000, 15_000]
    for size in sizes if full else (0, 700, 15_000):
        status, out, err = command("publish other", size)
        assert status == 2
        assert_one_line(out, err)
        assert "cannot write" in err
        found = files(here)
        for name, content in found.items():
            assert content in (before.get(name), after[name]), name
        assert found["README.md"] == before["README.md"]
        assert not [name for name in found if name.endswith(".tmp")]
        tally(full_disks=1)
    assert command("publish other")[0] == 0
    assert files(here) == after


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_figure_on_a_device_that_is_full(
    here: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    """The figure is written under a temporary name, and what was there before stays."""
    from tinylab.figures import plots

    path = here / "run" / "figures" / "curves.png"
    before = path.read_bytes()
    real = plots._write

    def write(figure: object, target: Path, dpi: float) -> None:
        target.symlink_to("/dev/full")
        real(figure, target, dpi)

    monkeypatch.setattr(plots, "_write", write)
    with pytest.raises(OSError, match="No space left"):
        plots.save(plots.message("text"), path)
    assert path.read_bytes() == before
    assert not [each.name for each in path.parent.iterdir() if each.name.startswith(".")]
    tally(full_disks=1)
