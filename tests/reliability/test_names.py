"""Hostile names of classes, runs and devices: text wherever they are shown, never a path, a tag or
a formula."""

import csv
import io
import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from nbconvert import HTMLExporter
from PIL import Image
from publish import PROTOCOLS, publish_run, render, rewrite_tables
from test_plots import FIGURES, draw, texts

from tinylab import figures as plots
from tinylab.cli import main
from tinylab.exceptions import UserError
from tinylab.explain.gradcam import explain
from tinylab.model import ResNet18
from tinylab.recipe import Recipe
from tinylab.recipes import smoke
from tinylab.run.folder import Run, default_folder
from tinylab.run.weights import load_weights, weights_file

pytestmark = pytest.mark.promise("names")

NAMES = [
    "goldfish",
    "$x$ costs $5",
    r"$\frac{1}$",
    "a$b$c_{",
    "_hidden_",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '=HYPERLINK("http://x")',
    "right-to-left \u202e override \u2066",
    "bell \x07 escape \x1b[31m",
    "two\nlines\r\nand\ta tab",
    "金魚, 雪",
    "🐟❄",
    "x" * 5000,
    "",
    "nul \0",
    "../../etc/passwd",
    "a/b",
    "CON",
    "{0.__class__} {braces} %(x)d",
    "%s%n",
    "lone surrogate \ud800",
]
MORE = [
    "W" * 300,
    "W W " * 80,
    "   ",
    r"$\frac{$ broken $x_{1}^{",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "| a | b |",
    "](javascript:alert(1))",
    "![x](http://x/y.png)",
    "[x](javascript:alert(1))",
    "`code` *bold* ~~gone~~",
    "<!-- /results -->",
    "http://example.com www.example.com a@example.com",
    "&lt;b&gt; &#60;b&#62;",
    "# heading",
    "- item",
    "``` fence",
    "..",
    ".",
    "\\",
    "'; DROP TABLE runs; --",
]
"""More that acts: in tables, Markdown, spreadsheets."""
ALL = NAMES + MORE
IMAGES = np.random.default_rng(0).integers(0, 256, (len(ALL), 64, 64, 3), dtype=np.uint8)


class Tags(HTMLParser):
    """Counts elements with their attributes, and collects what links and pictures point to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.targets = Counter(), []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found[tag, tuple(sorted(name for name, _ in attributes))] += 1
        self.targets += [value or "" for name, value in attributes if name in ("href", "src")]


# --- Pictures -------------------------------------------------------------------------------------


def entries(names: list[str]) -> list[dict]:
    plain = {"name": "plain", "probability": 0.0625}
    return [
        {"predicted": plain | {"name": name}, "actual": plain, "box": [8, 16, 31, 47]}
        for name in names
    ]


def maps(count: int) -> dict[str, np.ndarray]:
    return {"layer4": np.random.default_rng(0).random((count, 8, 8), dtype=np.float32)}


MANY = {
    "grid": lambda names: plots.image_grid(IMAGES[: len(names)], names),
    "augmentation": lambda names: plots.before_after(
        IMAGES[: len(names)], IMAGES[: len(names)], names
    ),
    "classes": lambda names: plots.class_accuracy(
        names, [50.0] * len(names), [50] * len(names), best=len(names)
    ),
    "mistakes": lambda names: plots.misclassified(IMAGES[: len(names)], entries(names)),
    "gradcam": lambda names: plots.gradcam_stages(
        IMAGES[: len(names)], maps(len(names)), entries(names)
    ),
}
"""Figures that show as many names as they are given."""


def assert_plain(figure: object, path: Path) -> None:
    """Nothing is read as a formula, nothing leaves the figure, nothing unprintable is left; and it
    can be saved."""
    renderer = draw(figure).get_renderer()
    for text in texts(figure):
        assert not text.get_parse_math() or "$" not in text.get_text()
        assert all(character.isprintable() or character == "\n" for character in text.get_text())
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        saved = plots.save(figure, path, dpi=20)
    with Image.open(saved) as image:
        image.verify()


@pytest.mark.parametrize("name", MANY)
def test_figures_of_many_names(name: str, tmp_path: Path, full: bool, tally: Callable) -> None:
    names = ALL if full else NAMES[:: 1 + (name == "gradcam")]
    assert_plain(MANY[name](names), tmp_path / "figure.png")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    tally(names_drawn=len(names))


WORST = "$\\frac{$ broken \ud800 \x1b[31m\ntwo lines \u202e" + "W" * 300


@pytest.mark.parametrize("name", FIGURES)
def test_names_as_titles(name: str, tmp_path: Path, full: bool, tally: Callable) -> None:
    titles = [*ALL, WORST] if full else [WORST]
    for title in titles:
        assert_plain(FIGURES[name]([title, *NAMES[:3]]), tmp_path / "figure.png")
    tally(names_drawn=len(titles))


# --- Files ----------------------------------------------------------------------------------------


def test_explain_json_has_the_names_as_they_are(tmp_path: Path, tally: Callable) -> None:
    count, rng = len(ALL), np.random.default_rng(1)
    logits, labels = rng.normal(size=(count, count)).astype(np.float16), np.arange(count)
    logits[labels, labels] = -10  # all are wrong
    explanation = explain(
        ResNet18(count, 4).eval(),
        images=IMAGES,
        labels=labels,
        boxes=np.tile(np.array([8, 8, 55, 55], np.uint8), (count, 1)),
        rows=np.arange(count),
        logits=logits,
        wnids=[f"n{i:08d}" for i in range(count)],
        names=ALL,
        normalise=lambda images: images.permute(0, 3, 1, 2).float() / 255,
        count=count,
    )
    run = Run(tmp_path)
    run.write("explain.json", explanation.to_json())
    shown = json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))["images"]
    assert sorted(entry["actual"]["name"] for entry in shown) == sorted(ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["explain.json"]
    tally(names_written=count)


def test_the_weights_file_has_the_names_as_they_are(tmp_path: Path, tally: Callable) -> None:
    wnids, recipe = tuple(f"n{i:08d}" for i in range(len(ALL))), replace(smoke(), width=4)
    whole = weights_file(
        ResNet18(len(ALL), 4), recipe, wnids, tuple(ALL), {"test_top1": 1.0}, "0" * 64
    )
    (tmp_path / "model.safetensors").write_bytes(whole)
    model, about = load_weights(tmp_path / "model.safetensors", wnids)
    assert about["names"] == ALL
    assert torch.isfinite(model(torch.zeros(1, 3, 64, 64))).all()
    tally(names_written=len(ALL))


def test_names_of_recipes_stay_below_runs(tally: Callable) -> None:
    refused = 0
    for name in ALL:
        try:
            recipe = replace(smoke(), name=name)
        except UserError:
            refused += 1
            continue
        folder = default_folder(recipe, "merged", 0)
        assert folder.parts[0] == "runs"
        assert len(folder.parts) == 2
        assert re.fullmatch(r"\w[\w.-]*", folder.name, re.ASCII)
    assert refused >= len(ALL) - 4
    tally(names_written=len(ALL))


def test_errors_show_names_on_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tally: Callable,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ALL:
        assert main(["evaluate", name]) == 2
        assert main([name or " "]) == 2
        for line in capsys.readouterr().err.splitlines():
            assert line.startswith("tinylab: ")
            assert line.isprintable()
            assert len(line) <= 300
    assert not list(tmp_path.iterdir())
    tally(names_written=len(ALL))


# --- Pages and tables -----------------------------------------------------------------------------


def page_of(text: str) -> str:
    """The HTML of a notebook that has printed `text`."""
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    cell = nbformat.v4.new_code_cell("print(names)", outputs=[output], id="a")
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    return page


def test_names_that_a_notebook_printed_are_text_on_its_page(tally: Callable) -> None:
    printed = [
        name.replace("\ud800", "?").replace("\x1b[31m", "") for name in ALL
    ]  # as a terminal shows them
    hostile, plain = (
        Tags(page_of("\n".join(lines))) for lines in (printed, ["name"] * len(printed))
    )
    more = hostile.found - plain.found
    assert not {tag for tag, _ in more} - {"a", "span"}, more
    assert all(
        re.match(r"https?://", target)
        for target in Counter(hostile.targets) - Counter(plain.targets)
    )
    tally(names_written=len(ALL))


RECORDS = {
    "summary": ("recipe", "protocol", "note"),
    "environment": ("device", "precision", "torch"),
    "identity": ("content_sha256",),
}


PARTS = ("results", "targets", "paired", "throughput", "figures", "maps")
PAGE = "".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in PARTS)


def records(name: str) -> dict[str, dict]:
    """What a published run's files say; every text is `name`."""
    summary = {
        "seed": 0, "classes": 3, "epochs": 1, "train_images": 12, "test_images": 6,
        "test_top1": 50.0,
        "test_top5": 100.0,
        "train_seconds": 60.0, "model_sha256": "m", "recipe": name, "protocol": name, "note": name,
    }  # fmt: skip
    environment = {
        "device": name,
        "precision": name,
        "torch": name,
        "commit": name,
        "date": name,
        name: name,
    }
    identity = {
        "content_sha256": name,
        "split_sha256": "s",
        "protocol": name,
        "classes": 3,
        "seed": 0,
    }
    return {"summary.json": summary, "environment.json": environment, "run.json": identity}


@pytest.fixture
def checkout(tmp_path: Path, narrow: Recipe) -> Path:
    """A README and results/ with a published run for every name, in a folder of that name where
    there can be one."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    for number, name in enumerate(ALL):
        folder = tmp_path / "results" / (name if "/" not in name else f"run{number}")
        try:
            folder.mkdir()
        except (OSError, ValueError):  # no name for a folder
            folder = tmp_path / "results" / f"run{number}"
            folder.mkdir()
        run = Run(folder)
        for file, record in records(name).items():
            run.write(file, record)
        run.write("recipe.json", asdict(narrow))
    return tmp_path


def outside(checkout: Path) -> list[Path]:
    """Paths beside README and results/."""
    return [
        path for path in checkout.iterdir() if path.name not in ("README.md", "results", "images-A")
    ]


def test_the_table_of_results_is_no_program(checkout: Path, tally: Callable) -> None:
    rewrite_tables(checkout / "results", checkout / "README.md")
    text = (checkout / "results" / "results.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len(rows) == 1 + len(ALL)
    assert {len(row) for row in rows} == {len(rows[0])}
    cells = [cell for row in rows for cell in row]
    assert not [
        cell
        for cell in cells
        if re.match(r"\s*[=+@-]", cell) and not re.fullmatch(r"-?[\d.e+-]+", cell)
    ]
    assert not outside(checkout)
    tally(names_written=len(ALL), cells=len(cells))


def assert_inert(markdown: str, targets: str) -> Tags:
    """As HTML it has the elements of a table and nothing else, and every link leads where `targets`
    says."""
    page = Tags(
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    )
    harmless = {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "p",
        "a",
        "code",
        "em",
        "strong",
        "img",
    }
    assert not {tag for tag, _ in page.found} - harmless, page.found
    attributes = {name for _, names in page.found for name in names}
    assert attributes <= {"href", "src", "alt"}
    for target in page.targets:
        assert re.fullmatch(targets, target), target
        assert not {"..", "."} & set(unquote(target).split("/")[:2]), target
    # What the site links by itself, without brackets.
    visible = re.sub(r"\]\([^)]*\)", "", markdown)
    assert not re.search(r"https?://|www\.\w", visible)
    return page


def test_the_readme_s_table_holds_text_only(checkout: Path, tally: Callable) -> None:
    rewrite_tables(checkout / "results", checkout / "README.md")
    page = (checkout / "README.md").read_text(encoding="utf-8")
    assert page.count("<!-- /results -->") == 1
    table = page.split("<!-- results -->\n")[1].split("\n<!-- /results -->")[0]
    lines = len(PROTOCOLS) + len(ALL)  # a line for what is not measured of every recipe
    assert len(table.splitlines()) == 2 + lines
    tags = assert_inert(table, r"results/[^/]+").found
    assert tags["tr", ()] == 1 + lines
    assert tags["td", ()] == 11 * lines
    rewrite_tables(checkout / "results", checkout / "README.md")
    assert (checkout / "README.md").read_text(encoding="utf-8") == page
    tally(names_written=len(ALL))


def test_the_caption_of_the_figures_holds_text_only(tmp_path: Path, tally: Callable) -> None:
    figures = tmp_path / "images-A"
    figures.mkdir()
    (figures / "curves.png").write_bytes(b"")
    for name in ALL:
        shown = dict.fromkeys(("run", "title", "device", "precision", "torch", "date"), name)
        numbers = {
            "train_images": 1,
            "test_images": 1,
            "test_top1": 1.0,
            "test_top5": 1.0,
            "classes": 3,
        }
        (figures / "figures.json").write_text(json.dumps(shown | numbers))
        text = render("figures", [], tmp_path / "results", tmp_path)
        assert_inert(text, r"results/[^/]+|images-A/curves\.png")
    tally(names_written=len(ALL))


def test_a_run_folder_s_name_is_one_folder_below_results(
    finished_run: Run, tmp_path: Path, tally: Callable
) -> None:
    """Published under its own name, however it is spelled on the command line."""
    for number, name in enumerate(ALL):
        home = tmp_path / f"home{number}"
        (home / "results").mkdir(parents=True)
        (home / "README.md").write_text(PAGE)
        try:
            shutil.copytree(
                finished_run.folder, home / "runs" / name, ignore=shutil.ignore_patterns("*.ckpt")
            )
        except (OSError, ValueError):  # no name for a folder
            shutil.copytree(
                finished_run.folder, home / "runs" / "x", ignore=shutil.ignore_patterns("*.ckpt")
            )
            name = "x"
        try:
            published, *_ = publish_run(
                Run(home / "runs" / name), home / "results", home / "README.md"
            )
        except UserError:
            continue
        assert published.resolve().parent == (home / "results").resolve()
        assert sorted(path.name for path in home.iterdir()) == ["README.md", "results", "runs"]
    tally(names_written=len(ALL))
