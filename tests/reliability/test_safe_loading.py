"""Foreign files run nobody's code: pickles in every place from which tinylab reads, none of them
executed."""

import ast
import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reliability.places import TRAIN, impatient, make_template
from tinylab.cli import main
from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError
from tinylab.run import checkpoint
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights

pytestmark = pytest.mark.promise("hostile")


class Touch:
    """Unpickled, it calls a function: the side effect is a file."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def evil(mark: Path) -> Touch:
    return Touch(exec, f"open({str(mark)!r}, 'w').close()")


def torch_file(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numpy_file(save: Callable, *arrays: object, **named: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def objects(mark: Path) -> np.ndarray:
    return np.array([evil(mark), evil(mark)], dtype=object)


def nested(mark: Path) -> Touch:
    legacy = torch_file(evil(mark), _use_new_zipfile_serialization=False)
    return Touch(torch.storage._load_from_bytes, legacy)


def in_metadata(mark: Path) -> bytes:
    header = json.dumps(
        {"__metadata__": {"wnids": pickle.dumps(evil(mark), 0).decode("latin-1")}}
    ).encode()
    return len(header).to_bytes(8, "little") + header


def zipped(mark: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in (
            "archive/data.pkl",
            "rows.npy",
            "labels.npy",
            "logits.npy",
            "tiny-imagenet-200/wnids.txt",
        ):
            archive.writestr(name, pickle.dumps(evil(mark)))
    return buffer.getvalue()


def touch(mark: Path) -> Touch:
    import os

    return Touch(os.system, f"touch '{mark}'")


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda mark: pickle.dumps(evil(mark)),
    "pickle of a shell command": lambda mark: pickle.dumps(touch(mark)),
    "pickle as text": lambda mark: pickle.dumps(evil(mark), 0),
    "pickle that opens a file": lambda mark: pickle.dumps(Touch(open, str(mark), "w")),
    "torch": lambda mark: torch_file({"epoch": 1, "step": 0, "model": evil(mark)}),
    "torch, old format": lambda mark: torch_file(evil(mark), _use_new_zipfile_serialization=False),
    "torch, in a storage": lambda mark: torch_file({"model": nested(mark)}),
    "array of objects": lambda mark: numpy_file(np.save, objects(mark)),
    "arrays of objects": lambda mark: numpy_file(
        np.savez, rows=objects(mark), labels=objects(mark), logits=objects(mark)
    ),
    "safetensors with a pickle inside": in_metadata,
    "zip of pickles": zipped,
    "JSON that asks for it": lambda mark: json.dumps(
        {"py/reduce": [{"py/type": "builtins.exec"}, {"py/tuple": [f"open({str(mark)!r}, 'w')"]}]}
    ).encode(),
    "YAML that asks for it": lambda mark: (
        f"!!python/object/apply:os.system ['touch {mark}']\n".encode()
    ),
}

PLACES = {
    "data/meta.json": ["evaluate run", TRAIN, "verify data", "prepare --data data"],
    "data/images.npy": ["evaluate run", "verify data"],
    "data/labels.npy": ["evaluate run", TRAIN],
    "data/boxes.npy": ["explain run --count 0"],
    "run/recipe.json": ["evaluate run", TRAIN],
    "run/run.json": ["evaluate run", TRAIN],
    "run/environment.json": ["publish run", TRAIN],
    "run/summary.json": ["evaluate run", "publish run"],
    "run/metrics.jsonl": ["publish run", TRAIN],
    "run/predictions.npz": ["explain run --count 0"],
    "run/model.safetensors": ["evaluate run"],
    "run/checkpoints/last.ckpt": [TRAIN],
    "run/SHA256SUMS": ["verify run"],
    "images-A/figures.json": ["table"],
    "results/x/summary.json": ["table"],
    "a.zip": ["prepare --source a.zip --data new"],
}
"""Every file that tinylab reads, and the commands that read it."""


@pytest.fixture(scope="module")
def compute(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"), small_dataset)


def unsafe(content: bytes) -> None:
    """Loads as nobody should."""
    for load in (
        pickle.loads,
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
        lambda data: [*np.atleast_1d(np.load(io.BytesIO(data), allow_pickle=True))],
        lambda data: [*dict(np.load(io.BytesIO(data), allow_pickle=True)).values()],
    ):
        try:
            load(content)
        except Exception:  # this payload is for another loader
            continue


@pytest.mark.parametrize("kind", list(PAYLOADS)[:9])
def test_the_payloads_work(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    unsafe(PAYLOADS[kind](mark))
    assert mark.exists()


@pytest.mark.parametrize("kind", PAYLOADS)
def test_no_payload_is_executed_anywhere(
    kind: str, compute: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    monkeypatch.setenv("TINY_IMAGENET", "nowhere.zip")
    mark = tmp_path / "executed"
    content, loads = PAYLOADS[kind](mark), 0
    for number, (name, lines) in enumerate(PLACES.items()):
        here = tmp_path / str(number)
        shutil.copytree(compute, here)
        monkeypatch.chdir(here)
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        data = content
        if name.endswith(".ckpt"):
            (here / "run" / "summary.json").unlink()
            (here / "run" / "checkpoints" / "previous.ckpt").unlink(missing_ok=True)
            data = (
                checkpoint.MAGIC + hashlib.sha256(content).digest() + content
            )  # its hash is right
        (here / name).write_bytes(data)
        if name.endswith(".safetensors"):
            run = Run(here / "run")
            run.write(
                "summary.json", run.summary | {"model_sha256": hashlib.sha256(data).hexdigest()}
            )
        for line in lines:
            with impatient():
                main(line.split())
            loads += 1
            assert not mark.exists(), (name, line)
        shutil.rmtree(here)
    tally(hostile_files_loaded=loads, executed=0)


@pytest.mark.parametrize("kind", PAYLOADS)
def test_the_loaders_themselves_refuse(kind: str, tmp_path: Path, tally: Callable) -> None:
    mark, path = tmp_path / "executed", tmp_path / "file"
    content = PAYLOADS[kind](mark)
    path.write_bytes(content)
    with pytest.raises(UserError):
        load_weights(path)
    assert checkpoint.read(path) is None
    path.write_bytes(checkpoint.MAGIC + hashlib.sha256(content).digest() + content)
    assert checkpoint.read(path) is None
    assert not mark.exists()
    tally(hostile_files_loaded=3)


def test_what_tinylab_saves_needs_no_exception(compute: Path) -> None:
    """Checkpoints load without any class being allowed, predictions without pickle."""
    found = [path for path in (compute / "run" / "checkpoints").iterdir() if path.suffix == ".ckpt"]
    assert found
    for path in found:
        whole = path.read_bytes()
        payload = whole[len(checkpoint.MAGIC) + hashlib.sha256().digest_size :]
        assert torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(payload)) == []
        assert checkpoint.read(path) is not None
    assert Run(compute / "run").predictions.keys() == {"rows", "labels", "logits"}


BARE = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "extractall",
    "extract",
    "unpack_archive",
    "Unpickler",
    "getoutput",
    "import_module",
    "mktemp",
    "popen",
}
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}


def is_unsafe(call: ast.Call) -> bool:
    """Whether a call would run what a file says, or what a text says that may come from one."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    options = {each.arg: getattr(each.value, "value", None) for each in call.keywords}
    return (
        (not owner and name in BARE)
        or name in METHODS
        or (owner, name) == ("os", "system")
        or (owner in UNSAFE_MODULES and name in ("load", "loads"))
        or ((owner, name) == ("torch", "load") and options.get("weights_only") is not True)
        or any(options.get(option) for option in ("shell", "allow_pickle"))
    )


def problems(source: str) -> list[str]:
    """Unsafe calls in a program."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if is_unsafe(call)]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f, weights_only=False)", "torch.load(f)", "np.load(f, allow_pickle=True)",
        "z.extractall()", "subprocess.run(c, shell=True)", "pickle.load(f)", "pickle.loads(b)",
        "eval(x)", "exec(x)",
        "yaml.load(f)", "os.system(c)", "shutil.unpack_archive(f)", "joblib.load(f)", "np.savez(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_search_finds(line: str) -> None:
    assert problems(line)


def test_no_program_here_runs_what_a_file_says(repository: Path, tally: Callable) -> None:
    paths = [
        path
        for folder in ("src", "notebooks", "benchmarks")
        for path in (repository / folder).rglob("*.py")
    ]
    guilty = {
        path.name: found for path in paths if (found := problems(path.read_text(encoding="utf-8")))
    }
    assert len(paths) > 20
    assert not guilty
    tally(programs_read=len(paths))
