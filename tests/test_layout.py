"""The house rules that a program can check: which module imports which, and what no file may contain."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tinylab"
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("__"))

MAY_IMPORT = {
    "recipe": set(),
    "archive": {"recipe"},
    "sample": {"recipe"},
    "augment": {"recipe"},
    "model": {"recipe"},
    "evaluate": {"recipe"},
    "device": {"recipe"},
    "checkpoint": {"recipe"},
    "plots": set(),
    "dataset": {"recipe", "archive"},
    "split": {"recipe", "dataset"},
    "distributed": {"recipe"},
    "optim": {"recipe"},
    "average": {"recipe"},
    "stop": set(),
    "finite": set(),
    "mirror": {"checkpoint"},
    "loader": {"recipe", "dataset", "split", "augment", "distributed"},
    "tables": set(),
    "record": {"recipe", "checkpoint", "device"},
    "results": {"recipe", "checkpoint", "record", "tables"},
    "step": {
        "recipe", "augment", "average", "device", "distributed", "finite", "loader", "model", "optim", "stop",
    },
    "train": {
        "recipe", "archive", "dataset", "split", "augment", "loader", "average", "distributed", "finite", "optim",
        "step", "stop", "model", "device", "evaluate", "checkpoint", "mirror", "record", "track",
    },
    "track": {"recipe"},
    "range_test": {
        "recipe", "dataset", "split", "loader", "device", "step", "optim", "finite", "stop", "augment", "distributed",
    },
    "errors": {"recipe", "evaluate", "checkpoint", "tables"},
    "boxes": {"recipe"},
    "explain": {"recipe", "boxes", "errors"},
    "localisation": {"boxes", "checkpoint", "explain", "tables"},
    "faithfulness": {"explain"},
    "analysis": {
        "recipe", "dataset", "split", "augment", "loader", "optim", "evaluate", "record", "errors", "explain",
        "localisation", "faithfulness", "plots", "predict",
    },
    "predict": {"recipe", "archive", "model", "record", "errors", "augment", "checkpoint"},
    "card": {"recipe", "archive", "checkpoint", "record", "tables"},
    "report": {"recipe", "record"},
    "cli": set(MODULES) - {"cli"},
}  # fmt: skip
"""Data flows one way: archive -> dataset -> split -> loader -> train -> run folder -> evaluate, explain -> plots."""

HEAVY = {"torch", "torchvision", "albumentations", "matplotlib", "cv2"}


def syntax(module: str) -> ast.Module:
    return ast.parse((SOURCE / f"{module}.py").read_text())


def imported(tree: ast.AST) -> set[str]:
    """Full names of everything imported, wherever the import stands: `tinylab.data.dataset`, `numpy`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {
                f"{node.module}.{alias.name}" if node.module == "tinylab" else node.module
                for alias in node.names
            }
    return names


def tracked_files(repository: Path) -> list[Path]:
    """Text files that are part of the repository, or will be: those that git does not ignore."""
    command = [
        "git",
        "-C",
        str(repository),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("no git checkout")
    binary = {".png", ".jpg", ".jpeg", ".gif", ".zip", ".npz", ".npy", ".safetensors"}
    paths = [repository / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix.lower() not in binary]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    ours = {name.split(".")[1] for name in imported(syntax(module)) if name.startswith("tinylab.")}
    assert module in MAY_IMPORT, f"say in MAY_IMPORT what {module} may import"
    assert ours <= MAY_IMPORT[module], f"{module} imports {sorted(ours - MAY_IMPORT[module])}"


def test_only_plots_imports_matplotlib() -> None:
    users = {
        module
        for module in MODULES
        if any(name.split(".")[0] == "matplotlib" for name in imported(syntax(module)))
    }
    assert users == {"plots"}


def test_recipes_and_the_command_line_load_nothing_heavy() -> None:
    for module in ("recipe", "cli"):
        at_the_top = ast.Module(body=syntax(module).body, type_ignores=[])
        at_the_top.body = [
            node for node in at_the_top.body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        roots = {name.split(".")[0] for name in imported(at_the_top)}
        assert not roots & HEAVY
        assert {name for name in imported(at_the_top) if name.startswith("tinylab")} <= {
            "tinylab.recipe"
        }


@pytest.mark.parametrize("module", MODULES)
def test_modules_explain_themselves(module: str) -> None:
    tree = syntax(module)
    assert ast.get_docstring(tree), "no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_no_work_at_import_time(module: str) -> None:
    """At the top level of a module: imports, definitions, constants; no loops, no calls for their effect."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.If,
    )
    for node in syntax(module).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_text or isinstance(node, allowed), f"line {node.lineno}: {ast.unparse(node)[:80]}"


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)


def test_nothing_is_imported_with_a_star() -> None:
    for module in MODULES:
        for node in ast.walk(syntax(module)):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), module


@pytest.mark.parametrize(
    "unsafe",
    [
        r"weights_only\s*=\s*False",
        r"allow_pickle\s*=\s*True",
        r"\.extract(all)?\(",
        r"shell\s*=\s*True",
        r"os\.system\(",
        r"\b(eval|exec)\(",
        r"pickle\.loads?\(",
        r"verify\s*=\s*False",
        r"tempfile\.mktemp\(",
    ],
)
def test_no_code_that_trusts_strangers(repository: Path, unsafe: str) -> None:
    paths = [
        *SOURCE.glob("*.py"),
        *(repository / "benchmarks").glob("*.py"),
        *(repository / "notebooks").glob("*.py"),
    ]
    guilty = [path.name for path in paths if re.search(rf"(?<!\.){unsafe}", path.read_text())]
    assert not guilty


def test_no_file_names_a_folder_of_somebody_s_machine(repository: Path) -> None:
    pattern = re.compile(r"(?<![\w.~-])/(home|root|work|Users)/\w")
    guilty = {}
    for path in tracked_files(repository):
        match = pattern.search(path.read_text(errors="replace"))
        if match:
            guilty[str(path.relative_to(repository))] = match.group()
    assert not guilty


def test_nothing_is_left_for_later(repository: Path) -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    paths = [
        path
        for path in tracked_files(repository)
        if path.suffix in (".py", ".md", ".toml", ".txt", "")
    ]
    assert not [str(path) for path in paths if marks.search(path.read_text(errors="replace"))]
