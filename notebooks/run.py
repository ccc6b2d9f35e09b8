"""Builds the notebook from its reviewed source and runs it from top to bottom.

    python notebooks/run.py OUT.ipynb [--html] [NAME=VALUE ...]

NAME=VALUE (a Python literal, or else text) goes into a cell of its own after the notebook's parameters. What is written
is whole or absent; if a cell fails, the notebook so far is kept as OUT.failed.ipynb and the exit status is 1.
"""

import argparse
import ast
import asyncio
import base64
import io
import os
import re
import signal
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from PIL import Image

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "tiny_imagenet_resnet18.py"
LARGEST_PNG = 200_000  # bytes
PLACEHOLDER = (
    "github.com/OWNER/tinylab"  # in the source, for the address that stands in pyproject.toml
)


def build(source: Path = SOURCE) -> nbformat.NotebookNode:
    """The notebook that the .py file describes: the repository's address filled in, no outputs, numbered cell ids."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    text = source.read_text(encoding="utf-8").replace(
        PLACEHOLDER, project["urls"]["repository"].split("//")[1]
    )
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # random ids would change the file each time it is built
    return notebook


def inject(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """Puts a cell that sets `values` behind the one tagged "parameters". Raises `KeyError` for an unknown parameter."""
    index = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    known = {line.split(" = ")[0] for line in notebook.cells[index].source.splitlines()}
    if unknown := values.keys() - known:
        raise KeyError(
            f"the notebook has no parameter {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = nbformat.v4.new_code_cell(
        f"# Parameters of this execution\n{text}", id="injected-parameters"
    )
    cell.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(index + 1, cell)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs all cells in a fresh kernel whose working folder is `folder`; outputs go into `notebook`."""
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,  # GitHub does not render a notebook that holds widget state
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # of the kernel's own notices
    )
    client.km = client.create_kernel_manager()

    received = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        os.kill(client.km.provisioner.pid, signal.SIGINT)

    def take_over(**_: object) -> None:
        # Ctrl-C is for the cell that runs: training saves and stops. nbclient's own handler would kill the kernel.
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, pass_on)

    client.on_cell_execute = take_over
    try:
        client.execute()
    except CellExecutionError as error:
        error.signal = received[0] if received else None
        raise
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:  # a progress bar that is gone leaves blanks behind
        outputs = cell.get("outputs", [])
        cell["outputs"] = [output for output in outputs if output.get("text", "x").strip()]
        if cell.cell_type != "code":
            del cell["outputs"]
        for output in cell["outputs"] if cell.cell_type == "code" else ():
            lighten(output)


def lighten(output: nbformat.NotebookNode) -> None:
    """Turns a picture of more than 200 kB, a figure full of photographs, into a JPEG of a third of that: GitHub shows
    no notebook of many megabytes. The run folder keeps the PNG."""
    png = base64.b64decode(output.get("data", {}).get("image/png", ""))
    if len(png) <= LARGEST_PNG:
        return
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(jpeg, "JPEG", quality=90, subsampling=0)
    del output["data"]["image/png"]
    output["data"]["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()
    if "image/png" in output.metadata:
        output.metadata["image/jpeg"] = output.metadata.pop("image/png")


def parameter(text: str) -> tuple[str, object]:
    """NAME=VALUE as a pair; the value is a Python literal if it is one, else text."""
    name, separator, value = text.partition("=")
    if not separator or not re.fullmatch("[A-Z_]+", name):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the executed notebook")
    parser.add_argument("--html", action="store_true", help="also write OUT.html")
    parser.add_argument("values", nargs="*", type=parameter, metavar="NAME=VALUE")
    options = parser.parse_intermixed_args()
    notebook = build()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        inject(notebook, dict(options.values)) if options.values else None
        execute(notebook, HERE.parent)
    except KeyError as error:
        print(f"{parser.prog}: {error.args[0]}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: cannot write {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    except CellExecutionError as error:
        failed = options.out.with_suffix(".failed.ipynb")
        write(failed, nbformat.writes(notebook))
        if error.ename == "UserError":
            print(f"{parser.prog}: {error.evalue}", file=sys.stderr)
            return 2
        if error.signal:
            print(f"{parser.prog}: {error.evalue or 'stopped'}", file=sys.stderr)
            return 128 + error.signal
        print(
            f"{parser.prog}: a cell failed: {error.ename}: {error.evalue}; see {failed}",
            file=sys.stderr,
        )
        return 1
    write(options.out, nbformat.writes(notebook))
    print(options.out)
    if options.html:
        page, _ = HTMLExporter().from_notebook_node(notebook)
        write(options.out.with_suffix(".html"), page)
        print(options.out.with_suffix(".html"))
    last = [output.get("text", "") for output in notebook.cells[-1].get("outputs", [])]
    print("".join(last), end="")  # the run folder's files
    return 0


if __name__ == "__main__":
    sys.exit(main())
