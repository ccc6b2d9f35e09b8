"""Runs in child processes that tell where they are, so that a test can kill them there, and what runs are compared by.

A child shares a `Board` with its parent: counts of the events that it has passed. The parent waits for one, and kills;
or the child holds still at that event until it is killed, which hits a place that lasts microseconds.
"""

import builtins
import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from multiprocessing import connection, forkserver, get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import without_seconds

import reliability
import tinylab
from tinylab.data.dataset import Dataset, open_dataset
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, smoke
from tinylab.run import checkpoint
from tinylab.run.environment import Compute
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights
from tinylab.training import train as train_module
from tinylab.training.step import TrainState

PRELOADED = False
"""Whether this process comes from the server that has done a step already."""
MODULES = os.pathsep.join(
    str(Path(module.__file__).resolve().parents[1]) for module in (tinylab, reliability)
)
"""What other processes need to import this."""
PATIENCE = 60
"""Seconds after which something that should have happened counts as hanging."""


# --- Where a child is -------------------------------------------------------------------------------------------------


class Event(IntEnum):
    """Places that a run passes; each is counted just before what it names."""

    LOADED = 0
    STEP = 1
    STEPPED = 2
    SAVE = 3
    WRITE = 4  # the second half of a checkpoint file
    SYNC = 5  # an fsync of a save
    RENAME = 6  # a rename of a save
    RENAMED = 7  # what follows such a rename
    SAVED = 8
    TEST = 9
    RECORD = 10  # the rename of another file


def _number(compute: int, kind: type) -> property:
    """One of a board's numbers."""

    def read(board: "Board") -> object:
        return kind(board.numbers[compute])

    def write(board: "Board", value: int) -> None:
        board.numbers[compute] = value

    return property(read, write)


class Board:
    """Numbers in a file, which a child writes and its parent reads, also after the child's death."""

    in_save = _number(16, bool)
    resumed = _number(17, int)
    """Steps of the run that were done in the checkpoint that the child continued from."""
    saved = _number(18, int)
    """Steps of the run that are done in the newest checkpoint of this child."""
    _held_event = _number(19, int)
    _held_count = _number(20, int)

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * 32))
        self.numbers = np.memmap(path, np.int64, "r+", shape=(32,))

    def count(self, event: Event) -> int:
        return int(self.numbers[event])

    def note(self, event: Event) -> None:
        self.numbers[event] += 1
        if (self._held_event, self._held_count) == (event, self.count(event)):
            time.sleep(2 * PATIENCE)

    def lock(self, event: Event, count: int) -> None:
        """The child, not yet started, will stand still at that event, for the `count`-th time, until it is killed."""
        self._held_event, self._held_count = event, count


def watch(board: Board, steps_per_epoch: int) -> None:
    """From now on this process notes on the board what it does."""
    _watch_checkpoints(board, steps_per_epoch)
    _watch_files(board)
    real_step, real_batches = train_module.train_step, train_module.evaluation_batches

    def step(*arguments: object) -> None:
        board.note(Event.STEP)
        real_step(*arguments)
        board.note(Event.STEPPED)

    def batches(*arguments: object, **options: object) -> Iterator:
        for batch in real_batches(*arguments, **options):
            board.note(Event.TEST)
            yield batch

    train_module.train_step, train_module.evaluation_batches = step, batches


def _watch_checkpoints(board: Board, steps_per_epoch: int) -> None:
    real_load, real_save = checkpoint.load, checkpoint.save

    def position(state: dict) -> int:
        return (state["epoch"] - 1) * steps_per_epoch + state["step"]

    def load(*arguments: object, **options: object) -> tuple:
        found = real_load(*arguments, **options)
        board.resumed = board.saved = position(found[0]) if found[0] else 0
        board.note(Event.LOADED)
        return found

    def save(folder: Path, state: dict, *arguments: object, **options: object) -> object:
        board.in_save = True
        board.note(Event.SAVE)
        answer = real_save(folder, state, *arguments, **options)
        board.saved = position(state)
        board.in_save = False
        board.note(Event.SAVED)
        return answer

    checkpoint.load, checkpoint.save = load, save


def _watch_files(board: Board) -> None:
    real_sync, real_rename = os.fsync, os.replace

    def sync(handle: int) -> None:
        if board.in_save:
            board.note(Event.SYNC)
        real_sync(handle)

    def rename(source: Path, target: Path) -> None:
        board.note(Event.RENAME if board.in_save else Event.RECORD)
        real_rename(source, target)
        if board.in_save:
            board.note(Event.RENAMED)

    os.fsync, os.replace = sync, rename
    checkpoint.open = lambda *arguments, **options: _Halved(board, *arguments, **options)


class _Halved:
    """An open file whose large writes come in two halves, so that a kill can come between."""

    def __init__(self, board: Board, *arguments: object, **options: object) -> None:
        self._file, self._board = builtins.open(*arguments, **options), board  # noqa: SIM115

    def write(self, data: bytes) -> int:
        half = memoryview(data).nbytes // 2
        if half < 10_000:
            return self._file.write(data)
        done = self._file.write(memoryview(data)[:half])
        self._file.flush()
        if self._board.in_save:
            self._board.note(Event.WRITE)
        return done + self._file.write(memoryview(data)[half:])

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_Halved":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# --- What a child does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run for children, which save after every step."""

    recipe: Recipe
    data: Path
    precision: str = "fp32"
    workers: int | None = None
    overflow: tuple[int, int] | None = None
    """Epoch and step whose gradients are not finite, in fp16."""
    fault: Callable[[], None] | None = None
    """What is wrong with the code."""
    images: int = 28

    @property
    def steps_per_epoch(self) -> int:
        return self.recipe.steps_per_epoch(self.images)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.recipe.epochs


def rich_recipe(**changes: object) -> Recipe:
    """What the target recipes are made of, on a network of a hundredth: three epochs of seven steps of four images."""
    shape = {
        "name": "rich",
        "epochs": 3,
        "batch_size": 4,
        "width": 4,
        "resolution": 16,
        "test_resolution": 16,
    }
    mixing = {
        "cutmix_probability": 0.3,
        "mixup_probability": 0.2,
        "resizemix_probability": 0.2,
        "unmixed_share": 0.0,
    }
    average = {"ema_decay": 0.6, "ema_bn_batches": 2}
    return replace(
        accurate(), **({"ramp": (), "max_learning_rate": 0.05} | shape | mixing | average | changes)
    )


def plain_recipe(**changes: object) -> Recipe:
    """The same size by albumentations, which runs in this process or in workers."""
    shape = {
        "name": "plain",
        "epochs": 3,
        "batch_size": 4,
        "width": 4,
        "resolution": 16,
        "test_resolution": 16,
    }
    return replace(smoke(), **(shape | {"ema_decay": 0.6, "ema_bn_batches": 2} | changes))


def plans(dataset: Dataset) -> dict[str, Plan]:
    """The runs that are killed: both optimisers, both ways of augmentation, with and without a loss scale."""
    data = dataset.folder
    return {
        "sgd": Plan(rich_recipe(width=8), data),
        "muon": Plan(rich_recipe(optimizer="muon"), data),
        "albumentations": Plan(plain_recipe(width=16), data, workers=0),
        "scaler": Plan(rich_recipe(epochs=2), data, precision="fp16", overflow=(1, 3)),
    }


def _child(plan: Plan, folder: Path, board_path: Path, body: Callable[[Plan, Path], None]) -> None:
    assert PRELOADED, "the server has not done its step: kills would come too early"
    torch.set_num_threads(1)
    # As in a process that a user starts: a server of their own would keep the workers of a killed child.
    set_start_method("fork", force=True)
    train_module.SAVE_SECONDS = 0
    if plan.fault:
        plan.fault()
    if plan.precision == "fp16":  # which the command line refuses on a CPU
        train_module.choose = lambda *_, **__: Compute(
            torch.device("cpu"), "fp16", "for the loss scale"
        )
    if plan.overflow:
        train_module.train_step = _overflowing(plan.overflow, train_module.train_step)
    watch(Board(board_path), plan.steps_per_epoch)
    body(plan, folder)


def _train(plan: Plan, folder: Path) -> None:
    try:
        train_plan(plan, folder)
    except Exception as error:
        folder.with_name("error.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def train_plan(plan: Plan, folder: Path) -> Run:
    """The plan's run, in this process."""
    settings = {
        "device": "cpu",
        "precision": plan.precision,
        "workers": plan.workers,
        "quiet": True,
    }
    return train_module.train(plan.recipe, open_dataset(plan.data), folder=folder, **settings)


def _overflowing(where: tuple[int, int], step: Callable) -> Callable:
    def call(state: TrainState, *arguments: object) -> None:
        if (state.epoch, state.step) != where:
            return step(state, *arguments)
        hook = state.model.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
        step(state, *arguments)
        hook.remove()

    return call


# --- Children and kills -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """When a child is killed: `delay` seconds after its `count`-th event of a kind, or, held, exactly there."""

    event: Event
    count: int = 1
    held: bool = False
    delay: float = 0.0


@dataclass
class Tale:
    """What became of a run that was killed again and again."""

    folder: Path
    kills: int = 0
    in_save: int = 0
    resumed: list[int] = field(default_factory=list)
    """The step that each child after a kill continued from."""
    error: str | None = None
    """What the last child died of by itself."""


class Children:
    """Starts children from a server that has imported and computed everything once; ends all that are left."""

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["reliability.preload"])
        self._running: list[BaseProcess] = []

    def start(
        self, plan: Plan, folder: Path, board: Path, body: Callable | None = None
    ) -> BaseProcess:
        """A child that runs the plan, or body(plan, folder), and notes on the board where it is."""
        process = self._context.Process(target=_child, args=(plan, folder, board, body or _train))
        process.start()
        self._running.append(process)
        return process

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.join(PATIENCE)

    def undisturbed(self, plan: Plan, folder: Path) -> Path:
        """A finished run."""
        process = self.start(plan, folder, folder.with_name("board"))
        process.join(PATIENCE)
        assert process.exitcode == 0, _last_words(folder)
        return folder

    def killed(
        self,
        plan: Plan,
        folder: Path,
        kills: Callable[[int, int], Kill | None],
        between: Callable[[Path, BaseProcess], None] = lambda *_: None,
        after: Callable[[Path], None] = lambda _: None,
    ) -> Tale:
        """Runs children until one comes to the end. kills(how many there were, steps done) is the next one, or None;
        `between` is called just before each, `after` just after it."""
        tale, position = Tale(folder), 0
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1_000):
            path = folder.with_name(f"board{number}")
            board, kill = Board(path), kills(tale.kills, position)
            if kill and kill.held:
                board.lock(kill.event, kill.count)
            process = self.start(plan, folder, path)
            ended = self.wait(process, board, kill)
            if not ended:
                between(folder, process)
                os.kill(process.pid, signal.SIGKILL)
                process.join(PATIENCE)
            if number:
                tale.resumed.append(board.resumed)
            if process.exitcode != -signal.SIGKILL:
                tale.error = None if process.exitcode == 0 else _last_words(folder)
                return tale
            if Run(folder).finished:
                return tale
            assert any(folder.glob("checkpoints/*.ckpt")), (
                "a kill counts only if there is a checkpoint"
            )
            tale.kills += 1
            tale.in_save += board.in_save
            position = board.saved
            after(folder)
        raise AssertionError("a run never ends")

    @staticmethod
    def wait(
        process: BaseProcess, board: Board, kill: Kill | None, patience: float = PATIENCE
    ) -> bool:
        """Waits for the moment of the kill. True: the child has ended before."""
        deadline = time.monotonic() + patience
        while kill is None or board.count(kill.event) < kill.count:
            if connection.wait([process.sentinel], 0.001 if kill else 1):
                process.join()
                return True
            assert time.monotonic() < deadline, "a child hangs"
        return bool(connection.wait([process.sentinel], kill.delay))


def _last_words(folder: Path) -> str:
    path = folder.with_name("error.txt")
    return path.read_text() if path.exists() else "died without a word"


@contextlib.contextmanager
def children_of() -> Iterator[Children]:
    """`Children`, killed at the end. Their server sees no GPU: the threads of its driver would not survive a fork."""
    with contextlib.closing(Children()) as children:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("PYTHONPATH", MODULES)
            patched.setenv("CUDA_VISIBLE_DEVICES", "")
            forkserver.ensure_running()
        yield children


# --- What runs are compared by ----------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> dict[str, str]:
    """A SHA-256 of each part of what a finished run has left, clocks aside."""
    run = Run(folder)
    clocks = ("stops", "history")
    state = {
        name: value
        for name, value in last_state(folder).items()
        if name not in clocks and "seconds" not in name
    }
    model = state.pop("model")
    statistics = {name for name in model if "running_" in name or "num_batches" in name}
    parts = {
        "weights": {name: value for name, value in model.items() if name not in statistics},
        "batch norm": {name: model[name] for name in statistics},
        **state,
        "history": [without_seconds(row) for row in last_state(folder)["history"]],
        "metrics": [without_seconds(row) for row in run.history],
        "summary": without_seconds(run.summary),
        "predictions": run.predictions,
        "file": load_weights(run.weights)[0].state_dict(),
    }
    return {name: _sha256(value) for name, value in parts.items()}


def last_state(folder: Path) -> dict:
    """The newest checkpoint, its hash not asked."""
    data = (folder / "checkpoints" / checkpoint.NEWEST).read_bytes()
    return torch.load(
        io.BytesIO(data[len(checkpoint.MAGIC) + 32 :]), map_location="cpu", weights_only=True
    )


def _sha256(value: object) -> str:
    total = hashlib.sha256()

    def add(each: object) -> None:
        if isinstance(each, torch.Tensor):
            each = each.detach().contiguous().numpy()
        if isinstance(each, np.ndarray):
            total.update(
                f"{each.dtype} {each.shape}".encode() + np.ascontiguousarray(each).tobytes()
            )
        elif isinstance(each, dict):
            for name in sorted(each, key=str):
                total.update(f"{name}:".encode())
                add(each[name])
        elif isinstance(each, list | tuple):
            total.update(f"{len(each)}[".encode())
            for item in each:
                add(item)
        else:
            total.update(repr(each).encode())

    add(value)
    return total.hexdigest()


def differing(folder: Path, reference: dict[str, str]) -> list[str]:
    """Names of the parts in which a finished run differs from a fingerprint."""
    ours = fingerprint(folder)
    return [
        name for name in ours.keys() | reference.keys() if ours.get(name) != reference.get(name)
    ]


_REFERENCES: dict[Plan, dict[str, str]] = {}


def reference(children: Children, plan: Plan) -> dict[str, str]:
    """The fingerprint of the plan's run that nothing disturbed, computed once."""
    if plan not in _REFERENCES:
        with tempfile.TemporaryDirectory() as folder:
            _REFERENCES[plan] = fingerprint(children.undisturbed(plan, Path(folder) / "run"))
    return _REFERENCES[plan]


# --- Several processes ------------------------------------------------------------------------------------------------

OVERRIDES = {"epochs": 3, "batch_size": 9, "width": 16, "ema_decay": 0.5, "max_learning_rate": 0.05}
"""28 images: batches of 9 (5 + 4 in two processes), and a last one of 1 left out, as the recipe says."""

SCRIPT = """
import os, sys
from pathlib import Path
import tinylab.training.train
from tinylab.cli import main
tinylab.training.train.EVALUATION_BATCH = 5  # 12 test images: batches of 5 and 5 for the first process, and 2 for the second
if "BOARDS" in os.environ:
    from reliability.harness import Board, watch
    tinylab.training.train.SAVE_SECONDS = 0
    watch(Board(Path(os.environ["BOARDS"]) / os.environ["RANK"]), 3)
sys.exit(main())
"""


def launch(
    *arguments: str, environment: dict[str, str], size: int = 2, **options: object
) -> subprocess.Popen:
    """torchrun with `size` processes, its output in a pipe."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
        *arguments,
    ]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def launch_run(
    dataset: Dataset, folder: Path, environment: dict[str, str], boards: Path | None = None
) -> subprocess.Popen:
    """A small run of two processes. boards: where each of them notes what it does, in a file named by its rank; then it
    saves after every step."""
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    overrides = [
        text
        for name, value in OVERRIDES.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    places = [
        "--data",
        str(dataset.folder),
        "--run",
        str(folder),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    if boards is not None:
        environment = environment | {"BOARDS": str(boards), "PYTHONPATH": MODULES}
    # Without "--" torchrun takes --run for its own --run-path.
    return launch(
        "--", str(script), "train", "accurate", *places, *overrides, environment=environment
    )


_RUNS_OF_TWO: dict[Path, Run] = {}


def undisturbed_run_of_two(
    dataset: Dataset, environment: dict[str, str], folder: Callable[[], Path]
) -> Run:
    """The same run that nothing disturbed, made once, in a folder that is asked for then. Read only."""
    if dataset.folder not in _RUNS_OF_TWO:
        run = Run(folder() / "run")
        launcher = launch_run(dataset, run.folder, environment)
        out, err = launcher.communicate(timeout=2 * PATIENCE)
        assert launcher.returncode == 0, err
        assert out.count("epoch 1/3") == 1  # one of them tells
        assert ", 2 processes" in out
        assert sorted(path.name for path in run.folder.parent.iterdir()) == ["run", "script.py"]
        _RUNS_OF_TWO[dataset.folder] = run
    return _RUNS_OF_TWO[dataset.folder]


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- Places in a run of this process ----------------------------------------------------------------------------------

TEST_BATCH = 3


def moments(patched: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """A function whose argument is called, with a number counted from 0, after every step and before every test batch,
    which has `TEST_BATCH` images."""
    count, hooks = iter(range(1_000_000)), []
    step, batches = train_module.train_step, train_module.evaluation_batches

    def counted_step(*arguments: object) -> None:
        step(*arguments)
        for hook in hooks:
            hook(next(count))

    def counted_batches(
        dataset: Dataset, rows: np.ndarray, device: torch.device, _: int, images: object
    ) -> Iterator:
        for batch in batches(dataset, rows, device, TEST_BATCH, images):
            for hook in hooks:
                hook(next(count))
            yield batch

    def install(hook: Callable[[int], None]) -> None:
        nonlocal count
        count = iter(range(1_000_000))
        hooks[:] = [hook]

    patched.setattr(train_module, "train_step", counted_step)
    patched.setattr(train_module, "evaluation_batches", counted_batches)
    return install


def send(number: int) -> None:
    """The signal comes to this process now."""
    signal.raise_signal(number)  # unlike os.kill, it waits until the signal has come
