"""The notebook: its source, what is committed, and Colab rehearsed."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "tiny_imagenet_resnet18.ipynb"
sys.path.insert(0, str(ROOT / "notebooks"))

import address as address_book  # noqa: E402
import run as builder  # noqa: E402

from tinylab.exceptions import UserError  # noqa: E402


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in outputs(notebook))


def test_committed_notebook_is_its_source(committed: nbformat.NotebookNode) -> None:
    def content(notebook: nbformat.NotebookNode) -> list[tuple]:
        return [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]

    assert content(committed) == content(builder.build())
    for cell in code_cells(committed):
        lines = filter(None, cell.source.splitlines())
        own = [each for each in lines if not each.startswith(("from ", "import ", "#"))]
        assert len(own) <= 16, cell.source  # cells are thin


def test_committed_notebook_ran_from_top_to_bottom_without_errors(
    committed: nbformat.NotebookNode,
) -> None:
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(committed) if output.output_type == "error"]
    kinds = [
        kind for each in outputs(committed) for kind in each.get("data", {}) if "image" in kind
    ]
    assert len(kinds) >= 14  # and one if images that have two labels are tested
    assert set(kinds) == {"image/png", "image/jpeg"}


def test_committed_notebook_renders_on_github_and_tells_nothing_of_a_machine(
    committed: nbformat.NotebookNode,
) -> None:
    text = NOTEBOOK.read_text()
    assert "widgets" not in committed.metadata
    assert "application/vnd.jupyter.widget" not in text
    without_pictures = re.sub(r'"image/(?:png|jpeg)": "[^"]*"', "", json.dumps(outputs(committed)))
    assert not re.findall(r"/(?:home|root|work|tmp|Users|opt)/[^\s\"]*", without_pictures)
    assert len(text) < 6_000_000


def test_committed_log_is_the_published_record(committed: nbformat.NotebookNode) -> None:
    """The accuracy shown is that of the record in results/ that the run folder names."""
    text = printed(committed)
    name = re.search(r"runs/([\w.-]+) is finished|bytes  runs/([\w.-]+)/summary.json", text)
    summary = json.loads((ROOT / "results" / (name[1] or name[2]) / "summary.json").read_text())
    shown = float(re.search(r"top-1 ([\d.]+) %, top-5", text)[1])
    assert shown == pytest.approx(summary["test_top1"], abs=0.005)


def test_parameters_are_one_tagged_cell_and_unknown_ones_are_refused() -> None:
    notebook = builder.build()
    (cell,) = [each for each in notebook.cells if "parameters" in each.metadata.get("tags", [])]
    for name in ("RECIPE", "EPOCHS", "SOURCE", "RUN", "IMAGE", "UPLOAD", "ONNX", "DRIVE"):
        assert f"{name} = " in cell.source
    with pytest.raises(UserError, match="EPOCS"):
        builder.inject(notebook, {"EPOCS": 3})


def test_the_address_is_the_same_everywhere_and_moves_as_one(tmp_path: Path) -> None:
    names = ["README.md", "pyproject.toml", f"notebooks/{builder.SOURCE.name}"]
    names += [f"notebooks/{NOTEBOOK.name}"]
    (tmp_path / "notebooks").mkdir()
    for name in names:
        shutil.copy(ROOT / name, tmp_path / name)
    for address in ("https://github.com/me/my.lab.git", "https://github.com/You/lab/"):
        address_book.move(tmp_path, address)
        wanted = re.sub(r"(\.git)?/?$", "", address).removeprefix("https://github.com/")
        for name in names:
            text = (tmp_path / name).read_text()
            found = re.findall(r"github(?:\.com)?/([\w.-]+/(?:tinylab|my\.lab|lab))\b", text)
            assert set(found) == {wanted}, name
            assert not re.search(r"github[.\w]*/OWNER", text)
    for wrong in ("", "me/lab", "https://gitlab.com/me/lab", "https://github.com/me"):
        with pytest.raises(ValueError, match="make address"):
            address_book.move(tmp_path, wrong)


def test_requirements_are_the_packages_own_and_the_notebooks() -> None:
    """requirements.txt is the whole list; `pip install .` leaves out what runs notebooks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    whole = [line.partition("#")[0].strip() for line in lines]
    own, notebook = project["dependencies"], project["optional-dependencies"]["notebook"]
    assert sorted(filter(None, whole)) == sorted([*own, *notebook])
    assert not any(re.match("jupy|nb", each) for each in own)
    assert "Private :: Do Not Upload" in project["classifiers"]


@pytest.mark.parametrize(("side", "kind"), [(300, "image/jpeg"), (100, "image/png")])
def test_large_pictures_become_light_and_small_ones_stay(side: int, kind: str) -> None:
    rng, png = np.random.default_rng(0), io.BytesIO()
    small = rng.integers(0, 256, (side // 10, side // 10, 3), dtype=np.uint8)
    smooth = Image.fromarray(small).resize((side, side))
    smooth.save(png, "PNG", compress_level=0)
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    output = nbformat.v4.new_output("display_data", data, metadata={"image/png": {"width": 900}})
    builder.lighten(output)
    assert output.metadata == {kind: {"width": 900}}
    content = base64.b64decode(output.data.pop(kind))
    assert not output.data
    shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)
    assert (
        np.abs(shown - np.asarray(smooth, float)).mean() < 5
    )  # of 255, and colours at half the size
    assert len(content) <= len(png.getvalue()) / (3 if kind == "image/jpeg" else 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_colab_rehearsed(tmp_path: Path) -> None:
    """An empty folder, the code fetched by git, a stand-in for google.colab, "Run all" twice, the
    second time on a new machine, when the code has changed."""
    origin = tmp_path / "origin"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.endswith((".png", ".ipynb")):
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            (origin / name).write_bytes((ROOT / name).read_bytes())
    who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=origin, check=True)

    colab = tmp_path / "packages" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "drive.py").write_text(
        "import os\ndef mount(path):\n"
        "    print('mounted', path)\n    os.makedirs(path + '/MyDrive', exist_ok=True)\n"
    )
    site = tmp_path / "packages" / "sitecustomize.py"
    site.write_text("import google.colab\n")  # Colab has it imported, too
    content = tmp_path / "content"
    content.mkdir()
    drive = tmp_path / "drive" / "MyDrive" / "tinylab"
    kept = drive / "smoke-merged-s0-e1"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import run, nbformat; "
        "from pathlib import Path; n = run.build();"
        "v = dict(SOURCE='sample', RECIPE='smoke', EPOCHS=1, REPOSITORY=sys.argv[2], "
        "DRIVE=sys.argv[4], ALLOW_CPU=True); run.inject(n, v);"
        "n.cells.append(nbformat.v4.new_code_cell('import tinylab; print(tinylab.__file__)'));"
        "run.execute(n, Path.cwd()); Path(sys.argv[3]).write_text(nbformat.writes(n))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    texts = []
    for attempt in ("first", "second"):
        out = tmp_path / f"{attempt}.ipynb"
        arguments = [str(ROOT / "notebooks"), origin.as_uri(), str(out), str(drive)]
        command = [sys.executable, "-c", script, *arguments]
        subprocess.run(command, cwd=content, env=environment, check=True, timeout=550)
        texts.append(printed(nbformat.read(out, as_version=4)))
        shutil.rmtree(content / "tinylab")  # the machine is gone, Drive is not
        if attempt == "first":  # as if it had gone before the end: only checkpoints were copied
            shutil.copytree(kept, tmp_path / "finished")
            (kept / "summary.json").unlink()
            step = origin / "src" / "tinylab" / "training" / "step.py"
            step.write_text(step.read_text() + "\n# other code\n")
            subprocess.run(["git", *who, "commit", "-qam", "more"], cwd=origin, check=True)
    names = {path.name for path in (kept / "checkpoints").iterdir()}
    assert names <= {"last.ckpt", "previous.ckpt"}
    assert (kept / "summary.json").exists()
    assert (kept / "figures" / "curves.png").exists()
    for text in texts:
        assert f"mounted {tmp_path}/drive" in text
        assert str(content / "tinylab" / "src" / "tinylab") in text  # the fetched code ran
        assert "epoch 1/1" in text
    for words in ("continuing from the mirror", "as the run on Drive was begun with"):
        assert [words in text for text in texts] == [False, True]
    ours, theirs = (folder / "predictions.npz" for folder in (kept, tmp_path / "finished"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_colab_without_a_gpu_and_without_the_code_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "colab.py").write_text("")
    for colab, values, words in (
        (True, {}, "choose Runtime > Change runtime type > T4 GPU, or set ALLOW_CPU = True"),
        (True, {"ALLOW_CPU": True}, "set REPOSITORY to the address of its repository"),
        (False, {"REPOSITORY": (tmp_path / "gone").as_uri()}, "cannot fetch the code from file:"),
    ):
        notebook = builder.build()
        builder.inject(notebook, {"REPOSITORY": "https://github.com/OWNER/tinylab"} | values)
        setting = "import shutil, sys; shutil.which = lambda name: None; "
        setting += f"sys.path.insert(0, {str(tmp_path)!r})"
        setting += "; import google.colab" if colab else ""
        notebook.cells.insert(0, nbformat.v4.new_code_cell(setting))
        with pytest.raises(CellExecutionError) as caught:
            builder.execute(notebook, tmp_path)
        assert (caught.value.ename, words in caught.value.evalue) == ("UserError", True)
        (shown,) = [each for each in outputs(notebook) if each.output_type == "error"]
        assert len(shown.traceback) == 1
        assert "\n" not in shown.traceback[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_notebook_trains_saves_and_the_same_command_continues(
    tmp_path: Path, number: signal.Signals
) -> None:
    values = ["SOURCE=sample", "RECIPE=smoke", "EPOCHS=2"]
    values += [f"DATA={tmp_path}/data", f"RUN={tmp_path}/run"]
    script = str(ROOT / "notebooks" / "run.py")
    command = [sys.executable, script, str(tmp_path / "out.ipynb"), *values]
    stderr = tmp_path / "stderr"
    with open(stderr, "w") as file:
        options = {"stdout": subprocess.DEVNULL, "stderr": file, "start_new_session": True}
        process = subprocess.Popen(command, **options)
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=120) == 128 + number
    lines = [line for line in stderr.read_text().splitlines() if line.startswith("run.py:")]
    assert len(lines) == 1, lines
    assert "the same command continues" in lines[0]
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run(command, check=True, timeout=400)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stops"] == 1
