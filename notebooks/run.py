"""Build the notebook from its reviewed source and run it from top to bottom.

    python notebooks/run.py OUT.ipynb [--html] [NAME=VALUE ...]

NAME=VALUE (a Python literal, or else text) goes into a cell of its own after the notebook's
parameters. If a cell fails, the notebook so far is kept as OUT.failed.ipynb; exit status 1.
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
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from PIL import Image

from tinylab.exceptions import UserError
from tinylab.files import write_atomically

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "tiny_imagenet_resnet18.py"
LARGEST_PNG = 200_000  # bytes


def build(source: Path = SOURCE) -> nbformat.NotebookNode:
    """Return the notebook that the .py file describes, without outputs."""
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    colab = {"gpuType": "T4", "provenance": []}
    notebook.metadata = {"kernelspec": kernel, "accelerator": "GPU", "colab": colab}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # random ids would change the file each time it is built
    return notebook


def inject(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """Put a cell that sets `values` behind the one tagged "parameters".

    Raise `UserError` for an unknown parameter.
    """
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    index = next(i for i, own in enumerate(tags) if "parameters" in own)
    known = set(re.findall("^([A-Z_]+) = ", notebook.cells[index].source, re.MULTILINE))
    if unknown := values.keys() - known:
        there = f"it has {', '.join(sorted(known))}"
        raise UserError(f"the notebook has no parameter {', '.join(sorted(unknown))}; {there}")
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = nbformat.v4.new_code_cell(
        f"# Parameters of this execution\n{text}", id="injected-parameters"
    )
    cell.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(index + 1, cell)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel whose working folder is `folder`.

    Outputs go into `notebook`. Raise `CellExecutionError`; its `signal` is what stopped it or None.
    """
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
        # Ctrl-C is for the cell that runs: training saves and stops. nbclient's own handler would
        # kill the kernel.
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
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a progress bar that is gone leaves blanks behind
            outputs = [output for output in cell.outputs if output.get("text", "x").strip()]
            cell.outputs = outputs
            for output in outputs:
                lighten(output)


def lighten(output: nbformat.NotebookNode) -> None:
    """Turn a picture of more than 200 kB, a figure full of photographs, into a JPEG.

    GitHub shows no notebook of many megabytes. The run folder keeps the PNG.
    """
    png = base64.b64decode(output.get("data", {}).get("image/png", ""))
    if len(png) <= LARGEST_PNG:
        return
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(jpeg, "JPEG", quality=80)
    del output["data"]["image/png"]
    output["data"]["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()
    if "image/png" in output.metadata:
        output.metadata["image/jpeg"] = output.metadata.pop("image/png")


def parameter(text: str) -> tuple[str, object]:
    """Return NAME=VALUE as a pair; the value is a Python literal if it is one, else text."""
    name, separator, value = text.partition("=")
    if not separator or not re.fullmatch("[A-Z_]+", name):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the executed notebook")
    parser.add_argument("--html", action="store_true", help="also write OUT.html")
    parser.add_argument("values", nargs="*", type=parameter, metavar="NAME=VALUE")
    options = parser.parse_intermixed_args()
    notebook = build()

    def refuse(message: str, status: int) -> int:
        print(f"{parser.prog}: {message}", file=sys.stderr)
        return status

    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.values:
            inject(notebook, dict(options.values))
        execute(notebook, HERE.parent)
    except UserError as error:
        return refuse(str(error), 2)
    except OSError as error:
        return refuse(f"cannot write {options.out}: {error.strerror}", 2)
    except CellExecutionError as error:
        failed = options.out.with_suffix(".failed.ipynb")
        write_atomically(failed, nbformat.writes(notebook).encode())
        if error.ename == "UserError":
            return refuse(error.evalue, 2)
        if error.signal:
            return refuse(error.evalue or "stopped", 128 + error.signal)
        return refuse(f"a cell failed: {error.ename}: {error.evalue}; see {failed}", 1)
    pages = {options.out: nbformat.writes(notebook)}
    if options.html:
        pages[options.out.with_suffix(".html")], _ = HTMLExporter().from_notebook_node(notebook)
    for path, page in pages.items():
        write_atomically(path, page.encode())
        print(path)
    last = [output.get("text", "") for output in notebook.cells[-1].get("outputs", [])]
    print("".join(last), end="")  # the run folder's files
    return 0


if __name__ == "__main__":
    sys.exit(main())
