"""The house rules that a program can check: layers, imports, and what no file may contain."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tinylab"
LAYERS = (
    {"exceptions"}, {"files", "figures"}, {"recipe"}, {"recipes", "options"}, {"data", "model"},
    {"run"}, {"custom"}, {"training"}, {"explain"}, {"share"}, {"cli"}, {"__main__"},
)  # fmt: skip
"""Each folder or module imports from those before it, and from its own."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "torchvision", "albumentations", "matplotlib", "cv2"}
UNSAFE = (
    r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\.extract(all)?\(|shell\s*=\s*True"
    r"|os\.system\(|\b(eval|exec)\(|pickle\.loads?\(|verify\s*=\s*False|tempfile\.mktemp\("
)


def imported(nodes: list[ast.stmt] | ast.AST) -> set[str]:
    """Return the full names of what is imported: by these statements, or anywhere below a node."""
    names = set()
    for node in ast.walk(nodes) if isinstance(nodes, ast.AST) else nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    names = imported(tree)
    used = {name.split(".")[1] for name in names if name.startswith("tinylab.")}
    wrong = {each for each in used - {own} if LEVEL[each] >= LEVEL[own]}
    assert not wrong, f"{own} imports {wrong}"
    assert own == "figures" or not any(name.startswith("matplotlib") for name in names)
    assert not any(name.endswith(".*") for name in names)
    if own in (
        "recipe",
        "recipes",
        "options",
        "cli",
        "__main__",
    ):  # a bad option is refused at once
        top = imported(
            [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        )
        assert not {name.split(".")[0] for name in top} & HEAVY
        ours = {name.split(".")[1] for name in top if name.startswith("tinylab.")}
        assert ours <= {"exceptions", "files", "recipe", "recipes", "options", "cli"}


def test_no_code_trusts_strangers_and_the_repository_speaks_of_the_project_alone() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    left = r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b"
    for path in [ROOT / name for name in done.stdout.split("\0") if name]:
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        text = content.decode(errors="replace")
        assert not re.search(r"(?<![\w.~-])/(home|root|work|Users)/\w", text), path
        if path.suffix in (".py", ".md", ".toml", ".txt", ""):
            assert not re.search(left, text), path
        if path.suffix == ".py" and "tests" not in path.parts:
            assert not re.search(rf"(?<!\.)({UNSAFE})", text), path
