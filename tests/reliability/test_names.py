"""Class names from strangers' archives are text everywhere: figures, tables, pages, file names."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reliability.archives import made_up, write_zip
from tinylab.cli import main
from tinylab.data.dataset import open_dataset
from tinylab.run.folder import Run

pytestmark = pytest.mark.promise("names")

NAMES = (
    "$\\frac{1}{0}$ <script>alert(1)</script>",
    "=HYPERLINK(1) {{ 7 * 7 }} | ](http://x) `",
    "\u202eright to left\x1b[31m\x07 " + "x" * 3000,
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three hostile classes, explained, reported and exported."""
    folder = tmp_path_factory.mktemp("names")
    words = "".join(f"n0{i}\t{name}\n" for i, name in enumerate(NAMES, start=1))
    zipped = write_zip(folder / "made.zip", made_up() | {"words.txt": words.encode()})
    data, run = str(folder / "data"), str(folder / "run")
    small = ["--epochs", "1", "--width", "8", "--batch-size", "4", "--device", "cpu"]
    for line in (
        ["prepare", "--source", str(zipped), "--data", data],
        ["train", "smoke", *small, "--precision", "fp32", "--data", data, "--run", run],
        ["explain", run, "--data", data, "--sample", "4", "--count", "2"],
        ["report", run, "--data", data],
        ["export", run],
        ["predict", run, f"{run}/figures/samples.png", "--gradcam", str(folder / "maps")],
    ):
        assert main(line) == 0, line
    return folder


def test_what_is_written_holds_no_markup_and_no_controls(desk: Path, tally: Callable) -> None:
    texts = [path for path in desk.rglob("*") if path.suffix in (".html", ".md", ".csv", ".json")]
    assert len(texts) > 8
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for hostile in ("\x1b", "\u202e", "\x07"):
            assert hostile not in text, path
        if path.suffix in (".html", ".md"):
            assert "<script>alert" not in text, path
            assert path.suffix == ".html" or "](http" not in text, path
    tally(files_read=len(texts))


def test_tables_hold_no_formulas_and_figures_are_drawn(desk: Path, tally: Callable) -> None:
    cells = 0
    for path in desk.rglob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                cells += len(row)
                assert not any(cell.startswith(("=", "+", "@")) for cell in row), path
    figures = list((desk / "run" / "figures").glob("*.png"))
    assert len(figures) >= 14
    assert all(path.stat().st_size > 2_000 for path in figures)
    tally(cells=cells, figures=len(figures))


def test_names_are_kept_as_far_as_they_can_be_printed(desk: Path) -> None:
    names = open_dataset(desk / "data").names
    assert names[0] == NAMES[0]
    assert names[2].startswith("right to left[31m xxx")
    assert len(names[2]) <= 200
    explained = json.loads((desk / "run" / "explain.json").read_text())
    assert {each["name"] for each in explained["errors"]["classes"]} == set(names)
    assert np.isfinite(Run(desk / "run").predictions["logits"]).all()
