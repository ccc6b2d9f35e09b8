"""Put the repository's address into README, pyproject.toml and the notebook (`make address`)."""

import re
import sys
import tomllib
from pathlib import Path

PAGES = ("README.md", "pyproject.toml", "notebooks/*.py", "notebooks/*.ipynb", "docs/*.md")


def move(root: Path, address: str) -> None:
    """Replace the address in all pages below `root`. Raise `ValueError` if it is not GitHub's."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address, re.ASCII)
    if not found:
        raise ValueError("make address REPOSITORY=https://github.com/NAME/PROJECT")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    before = re.escape(project["urls"]["repository"].removeprefix("https://github.com/"))
    for path in [path for pattern in PAGES for path in root.glob(pattern)]:
        text = path.read_text(encoding="utf-8")  # Colab's own addresses hold github/NAME/PROJECT
        text = re.sub(rf"(github(?:\.com)?/){before}(?![\w.-]*\w)", rf"\g<1>{found[1]}", text)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    try:
        move(Path(__file__).resolve().parents[1], " ".join(sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
