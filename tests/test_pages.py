"""README and docs: links lead somewhere, commands are those that CI runs and tinylab has."""

import re
from pathlib import Path

import pytest

from tinylab.cli import COMMANDS
from tinylab.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def commands(path: Path) -> list[str]:
    blocks = [code for language, code in BLOCK.findall(path.read_text()) if language == "bash"]
    return [line.partition("#")[0].strip() for code in blocks for line in code.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", file.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        for program, argument, rest in re.findall(r"\b(make|tinylab) ([\w-]+)(.*)", line):
            assert argument in (targets if program == "make" else COMMANDS), line
            named = rest.split()[:1]
            if argument in ("train", "find-lr", "schedule") and named != ["recipe.json"]:
                assert named[0] in RECIPES, line


def test_the_first_commands_are_those_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands(ROOT / "README.md")[:2] == ["make test", "make run"]
    assert {"make test", "make run"} <= set(script)


def test_the_front_page_is_short_and_holds_measurements_only() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 1300
    assert max(len(line) for line in text.splitlines() if line[:1] not in "|[") <= 100
    assert "not yet measured" not in text.lower()
    speed = (ROOT / "docs" / "speed.md").read_text()
    table = text.split("## Speed")[1].split("\n## ")[0]
    for number in re.findall(r"[\d,.]*\d(?= |$)", table):
        assert number in speed, number
