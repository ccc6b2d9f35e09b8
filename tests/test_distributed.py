"""Two or three processes make the run that one would make: equal sums, gradients and weights, and no process waits for
one that is gone."""

import contextlib
import copy
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import without_seconds
from reliability.harness import OVERRIDES, launch, undisturbed_run_of_two, wait_until
from torch import nn

from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch
from tinylab.exceptions import UserError
from tinylab.model import build_model
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, smoke
from tinylab.run.environment import choose
from tinylab.run.folder import Run
from tinylab.training import distributed
from tinylab.training.distributed import (
    ALONE,
    World,
    agree,
    from_rank_0,
    gather_rows,
    highest,
    join,
    share,
    sum_over_ranks,
    synchronise_batch_norm,
    wrap,
)
from tinylab.training.step import new_state, train_step
from tinylab.training.train import train

CPU = torch.device("cpu")


class Processes:
    """`size` connected processes that stay until `close`; a call runs a function of this module in each of them."""

    def __init__(self, size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.pipes, theirs = zip(*(spawn.Pipe() for _ in range(size)), strict=True)
        self.processes = [
            spawn.Process(target=serve, args=(rank, size, port, pipe), daemon=True)
            for rank, pipe in enumerate(theirs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable, *arguments: object) -> list:
        """function(world, *arguments) of each process, in the order of their ranks."""
        for pipe in self.pipes:
            pipe.send_bytes(
                pickle.dumps((function, arguments))
            )  # `send` would have them share each tensor's memory
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(60), "a process hangs"
            answers.append(pickle.loads(pipe.recv_bytes()))
        for _, trouble in answers:
            assert trouble is None, trouble
        return [value for value, _ in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps((None, ())))
        for process in self.processes:
            process.join(20)
            process.kill()


def serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """What each process does: answers calls until there are no more."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join(CPU) as world:
        while True:
            function, arguments = pickle.loads(pipe.recv_bytes())
            if function is None:
                return
            try:
                answer = (function(world, *arguments), None)
            except Exception:
                answer = (None, f"process {rank}: {traceback.format_exc()}")
            pipe.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with contextlib.closing(Processes(2)) as processes:
        yield processes


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    with contextlib.closing(Processes(3)) as processes:
        yield processes


def raised_by(function: Callable, *arguments: object) -> tuple[str, str]:
    """Type and message of what the call raises."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, measured by the largest value of the reference."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


# --- Who is there -----------------------------------------------------------------------------------------------------


def test_shares_follow_each_other_and_differ_by_one_at_most() -> None:
    for count in (0, 1, 5, 256, 1000):
        for size in (1, 2, 3, 8):
            shares = [share(count, World(rank, size, 0)) for rank in range(size)]
            assert [i for each in shares for i in each] == list(range(count))
            assert [each.start for each in shares[1:]] == [each.stop for each in shares[:-1]]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("connected")
    )
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv(
            "WORLD_SIZE", size
        )
        with join(CPU) as world:
            assert world is ALONE
    assert (ALONE.writes, ALONE.several, ALONE.device(CPU)) == (True, False, CPU)


def test_alone_nothing_is_changed() -> None:
    tensor, model = torch.ones(2), nn.Sequential(nn.BatchNorm2d(2))
    assert sum_over_ranks(ALONE, tensor) is gather_rows(ALONE, tensor) is tensor
    assert wrap(model, ALONE) is synchronise_batch_norm(model, ALONE) is model
    assert type(model[0]) is nn.BatchNorm2d
    assert highest(ALONE, 3) == from_rank_0(ALONE, lambda: 3) == 3
    agree(ALONE, None)
    with pytest.raises(UserError, match="diverged"):
        agree(ALONE, UserError("diverged"))


GOOD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changed", "device", "said"),
    [
        ({"WORLD_SIZE": "many"}, "cpu", "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "0"}, "cpu", "WORLD_SIZE is '0'"),
        ({"RANK": ""}, "cpu", "RANK is ''"),
        ({"RANK": "2"}, "cpu", "RANK is '2', not a number below 2"),
        ({"LOCAL_RANK": "-1"}, "cpu", "LOCAL_RANK is '-1'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "cuda", "LOCAL_WORLD_SIZE is '0'"),
        # Also the process that has a GPU says so: it is the one that tells for all.
        ({"RANK": "0", "LOCAL_RANK": "0"}, "cuda", "more processes than GPUs: this machine has 1"),
        ({}, "mps", "not mps; use --device cpu"),
        ({"MASTER_PORT": "here"}, "cpu", "the 2 processes did not find each other"),
    ],
)
def test_an_impossible_start_is_refused_in_one_line(
    changed: dict, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        GOOD | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"} | changed
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("took a GPU"))
    monkeypatch.setattr(distributed, "_end_with_launcher", lambda: None)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=2))
    with pytest.raises(UserError, match=said) as error, join(torch.device(device)):
        pytest.fail("joined")
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()


def test_each_process_of_a_machine_has_a_gpu_of_its_own() -> None:
    assert World(5, 8, 1).device(torch.device("cuda")) == torch.device("cuda", 1)
    assert World(5, 8, 1).device(CPU) == CPU
    assert [World(rank, 2, 0).writes for rank in range(2)] == [True, False]


# --- Sums and agreements ----------------------------------------------------------------------------------------------


def collect(world: World) -> dict:
    rank = world.rank
    rows = torch.arange(6.0).view(3, 2)[:rank] + 10 * rank  # none in the first process
    orders = torch.tensor(
        list(permutations([2.0**24, 1, -(2.0**24)])) * 3
    )  # whichever way Gloo cuts it and goes round
    return {
        "world": (world.rank, world.size, world.local_rank),
        "float": sum_over_ranks(world, orders[:, rank]),
        "int": sum_over_ranks(world, torch.tensor(2**60 + 1 if rank == 0 else 1)),
        "rows": gather_rows(world, rows),
        "labels": gather_rows(world, torch.arange(rank)),
        "half": gather_rows(world, torch.full((1,), rank + 0.5, dtype=torch.float16)),
        "none": gather_rows(world, torch.empty(0, 4)),
        "highest": [highest(world, int(rank == 1)), highest(world, 0), highest(world, 3 - rank)],
        "made": from_rank_0(world, lambda: {"rank": rank, "tensor": torch.arange(3)}),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_gets_the_sums_and_rows_of_all(
    size: int, request: pytest.FixtureRequest
) -> None:
    answers = request.getfixturevalue({2: "two", 3: "three"}[size])(collect)
    rows = torch.cat([torch.arange(6.0).view(3, 2)[:rank] + 10 * rank for rank in range(size)])
    for rank, answer in enumerate(answers):
        assert answer["world"] == (rank, size, rank)
        # Added in float32, 2**24 + 1 - 2**24 would be 0, wherever that is the order.
        assert size == 2 or answer["float"].tolist() == [1] * 18
        assert answer["float"].dtype == torch.float32
        assert answer["int"] == 2**60 + size  # more digits than a float64 has
        assert torch.equal(answer["rows"], rows)
        assert answer["labels"].tolist() == [i for each in range(size) for i in range(each)]
        assert answer["half"].tolist() == [each + 0.5 for each in range(size)]
        assert answer["half"].dtype == torch.float16
        assert answer["none"].shape == (0, 4)
        assert answer["highest"] == [1, 0, 3]
        assert answer["made"]["rank"] == 0
        assert answer["made"]["tensor"].tolist() == [0, 1, 2]


def refuse(kind: type[Exception]) -> None:
    raise kind("the folder is taken")


def fail_together(world: World) -> list:
    own = UserError(f"process {world.rank} has diverged") if world.rank else None
    return [
        raised_by(from_rank_0, world, lambda: refuse(UserError)),
        raised_by(from_rank_0, world, lambda: refuse(OSError)),
        raised_by(agree, world, None),
        raised_by(agree, world, own),
        highest(world, world.rank),  # and they are still in step with each other
    ]


def test_an_error_of_one_process_is_raised_in_all(three: Processes) -> None:
    answers = three(fail_together)
    for rank, (users, other, none, agreed, last) in enumerate(answers):
        assert users == ("UserError", "the folder is taken")
        if rank == 0:
            assert other == ("OSError", "the folder is taken")
        else:
            assert other == (
                "UserError",
                "the first process failed: OSError('the folder is taken')",
            )
        assert none == ("nothing", "")
        assert agreed == ("UserError", "process 1 has diverged")
        assert last == 2


# --- Batch norm -------------------------------------------------------------------------------------------------------


def normalise_share(
    world: World, layer: nn.Module, batches: list, sizes: list[int], scale: float
) -> dict:
    """Two passes of this process's share through the layer: output, gradients, running statistics."""
    layer = synchronise_batch_norm(nn.Sequential(layer), world)[0]
    first = sum(sizes[: world.rank])
    return normalise(layer, [batch[first : first + sizes[world.rank]] for batch in batches], scale)


def normalise(layer: nn.BatchNorm2d, batches: list[torch.Tensor], scale: float = 1.0) -> dict:
    found: dict = {"output": [], "of_x": []}
    for batch in batches:
        x = batch.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=batch.dtype == torch.bfloat16):
            out = layer(x)
        weights = (
            torch.linspace(-1, 2, 12).view(1, 3, 2, 2) + x.detach().float()
        )  # a different gradient everywhere
        (scale * weights * out.float().square()).sum().backward()
        found["output"].append(out.detach())
        found["of_x"].append(x.grad)
    names = ("running_mean", "running_var", "num_batches_tracked")
    return (
        found
        | {name: getattr(layer, name) for name in names}
        | {"grads": [layer.weight.grad, layer.bias.grad]}
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 1), (5, 0), (0, 5), (2, 1, 2), (0, 4, 1)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_sees_the_whole_batch_however_it_is_shared(
    kind: torch.dtype,
    sizes: tuple[int, ...],
    momentum: float | None,
    request: pytest.FixtureRequest,
) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=momentum)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.uniform_(layer.bias, -1, 1)
    offset = torch.tensor([0.0, 5.0, -20.0])[
        :, None, None
    ]  # a mean far from 0 must not cost digits
    batches = [
        (torch.randn(5, 3, 2, 2) * torch.arange(1, 6).view(5, 1, 1, 1) + offset).to(kind)
        for _ in range(2)
    ]
    processes = request.getfixturevalue({2: "two", 3: "three"}[len(sizes)])
    answers = processes(normalise_share, layer, batches, list(sizes), 1.0)
    reference = normalise(copy.deepcopy(layer), batches)

    close = 1e-5 if kind == torch.float32 else 0.02  # bfloat16 has 8 digits: 0.004
    for i in range(2):
        for name in ("output", "of_x"):
            parts = [answer[name][i] for answer in answers]
            assert difference(torch.cat(parts), reference[name][i]) < close, name
        assert (
            difference(sum(answer["grads"][i] for answer in answers), reference["grads"][i]) < close
        )
    for answer in answers:
        for name in ("running_mean", "running_var"):
            assert difference(answer[name], reference[name]) < (
                1e-5 if kind == torch.float32 else 1e-3
            ), name
            assert torch.equal(answer[name], answers[0][name])  # in every bit
        assert answer["num_batches_tracked"] == 2
    if 0 not in sizes:  # one process's statistics are others
        alone = normalise(copy.deepcopy(layer), [batch[: sizes[0]] for batch in batches])
        assert difference(alone["running_mean"], reference["running_mean"]) > 0.02


def describe_layer(world: World) -> dict:
    plain = build_model(replace(smoke(), width=8), 10, seed=0)
    model = synchronise_batch_norm(copy.deepcopy(plain), world)
    again = synchronise_batch_norm(model, world)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(world.rank))
    plain.load_state_dict(model.state_dict())
    return {
        "names": list(model.state_dict()) == list(plain.state_dict()) == list(again.state_dict()),
        "parameters": all(
            a is b for a, b in zip(model.parameters(), again.parameters(), strict=True)
        ),
        "kinds": {
            type(each).__name__ for each in model.modules() if isinstance(each, nn.BatchNorm2d)
        },
        "tested": torch.equal(model.eval()(x), plain.eval()(x)),
        # One value per channel, in the first process.
        "single": raised_by(model.train().layer1[0].bn1, torch.ones(1 - world.rank, 8, 1, 1)),
    }


def test_a_synchronised_network_holds_the_same_as_a_plain_one_and_tests_alone(
    two: Processes,
) -> None:
    for answer in two(describe_layer):
        assert answer["names"]
        assert answer["parameters"]
        assert answer["kinds"] == {"GlobalBatchNorm2d"}
        assert answer["tested"]
        assert answer["single"][0] == "ValueError"


# --- A step -----------------------------------------------------------------------------------------------------------


def one_step(
    world: World, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, leave_out: str = ""
) -> dict:
    """Gradients and weights after one plain SGD step on this process's share, in float64: in float32 the network's own
    rounding flips a ReLU here and there, with one process as with several, and gradients differ by some per cent."""
    model = build_model(
        recipe, 3, seed=world.rank
    ).double()  # the others start from the first one's weights
    if leave_out != "batch norm":
        model = synchronise_batch_norm(model, world)
    network = wrap(model, world)
    mine = share(len(labels), world)
    mine = slice(mine.start, mine.stop)
    loss = (
        F.cross_entropy(network(images[mine]), labels[mine], reduction="sum")
        * world.size
        / len(labels)
    )
    if leave_out == "scaling":
        loss = F.cross_entropy(network(images[mine]), labels[mine])
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return {
        "loss": float(sum_over_ranks(world, loss.detach()) / world.size),
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "state": model.state_dict(),
    }


def largest_difference(ours: dict, reference: dict) -> float:
    assert ours.keys() == reference.keys()
    return max(
        difference(ours[name], reference[name])
        for name in reference
        if reference[name].is_floating_point()
    )


def test_a_step_of_several_processes_is_the_step_of_one(
    two: Processes, three: Processes, narrow: Recipe
) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    narrow = replace(narrow, width=8)
    alone = one_step(ALONE, narrow, images, labels)
    for processes in (two, three):  # 3 + 2 and 2 + 2 + 1 images
        answers = processes(one_step, narrow, images, labels)
        for answer in answers:
            assert answer["loss"] == pytest.approx(alone["loss"], rel=1e-12)
            assert largest_difference(answer["grads"], alone["grads"]) < 1e-11
            assert largest_difference(answer["state"], alone["state"]) < 1e-12
            for name, tensor in answer["state"].items():
                assert torch.equal(tensor, answers[0]["state"][name])
    for left_out in ("batch norm", "scaling"):  # each of them is needed
        answer = two(one_step, narrow, images, labels, left_out)[0]
        assert largest_difference(answer["grads"], alone["grads"]) > 0.01


def pieces_of_a_step(
    world: World, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, micro: int
) -> dict:
    """Weights after two optimiser steps, each on this process's share in pieces of at most `micro` images."""
    compute = choose("cpu", "fp32")
    state = new_state(recipe, 3, 0, 4, compute, world)
    recipe = replace(recipe, micro_batch=micro)
    state.model.train()
    mine = share(len(labels), world)
    batch = Batch(images[mine.start : mine.stop], labels[mine.start : mine.stop], total=len(labels))
    for _ in range(2):
        train_step(state, recipe, compute, batch)
    return state.model.state_dict() | {"totals": state.totals}


def test_pieces_of_uneven_shares_keep_the_processes_in_step(two: Processes, narrow: Recipe) -> None:
    images = torch.randint(
        0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(0)
    ).byte()
    # 2 + 1 images one by one: the second piece of the second process is empty.
    first, second = two(pieces_of_a_step, narrow, images, torch.tensor([0, 1, 2]), 1)
    assert (first["totals"][3], second["totals"][3]) == (4, 2)
    for name, tensor in first.items():
        assert name == "totals" or torch.equal(tensor, second[name]), name
        assert torch.isfinite(tensor).all()


# --- The launcher -----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from tinylab.cli import _complain
from tinylab.training.distributed import highest, join
from tinylab.recipe import UserError

folder = Path(sys.argv[1])
try:
    with join(torch.device("cpu")) as world:
        (folder / f"{world.rank}.pid").write_text(str(os.getpid()))
        for step in range(10_000):
            highest(world, 0)
            if "raise" in sys.argv and step == 5 and world.rank == 1:
                raise OSError("the second process cannot go on")
            time.sleep(0.01)
except UserError as error:
    _complain(error)
    sys.exit(2)
"""


def test_a_process_that_fails_ends_the_others_at_once(
    tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = launch(
        "script.py", str(tmp_path), "raise", environment=subprocess_environment, cwd=tmp_path
    )
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    _, err = launcher.communicate(
        timeout=25
    )  # well below the patience of the other, and of the launcher
    assert launcher.returncode == 1
    assert "OSError: the second process cannot go on" in err
    told = [line for line in err.splitlines() if line.startswith("tinylab: ")]
    assert told in (
        [],
        [
            "tinylab: another process of this run has ended, which should have said why: this one ends, too"
        ],
    )
    assert err.count("Traceback") <= 2  # the process's and torchrun's own


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_two(
    small_dataset: Dataset, subprocess_environment: dict, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run of two processes that nothing disturbed. Read only."""
    return undisturbed_run_of_two(
        small_dataset, subprocess_environment, lambda: tmp_path_factory.mktemp("two")
    )


@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(
    run_of_two: Run, small_dataset: Dataset, tmp_path: Path
) -> None:
    recipe = replace(accurate(), **OVERRIDES)
    alone = train(
        recipe, small_dataset, folder=tmp_path / "run", device="cpu", precision="fp32", quiet=True
    )
    assert len(run_of_two.history) == len(alone.history) == 3
    for ours, reference in zip(run_of_two.history, alone.history, strict=True):
        ours, reference = without_seconds(ours), without_seconds(reference)
        for name in ("epoch", "learning_rate", "test_total"):
            assert ours[name] == reference[name], name
        assert ours == pytest.approx(reference, rel=1e-3)
    for name in ("rows", "labels"):
        np.testing.assert_array_equal(run_of_two.predictions[name], alone.predictions[name])
    logits, expected = (run.predictions["logits"] for run in (run_of_two, alone))
    np.testing.assert_allclose(logits, expected, atol=0.02)  # a batch norm of one's own: 0.17
    assert without_seconds(run_of_two.summary).keys() == without_seconds(alone.summary).keys()
    for name in ("seed", "train_images", "test_images", "test_correct", "parameters"):
        assert run_of_two.summary[name] == alone.summary[name], name
    assert run_of_two.summary["flip_tta_top1"] == pytest.approx(alone.summary["flip_tta_top1"])


def test_what_all_processes_refuse_one_of_them_tells(
    small_dataset: Dataset, subprocess_environment: dict[str, str], tmp_path: Path
) -> None:
    places = [
        "--data",
        str(small_dataset.folder),
        "--run",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    command = [
        "-m",
        "--",
        "tinylab",
        "train",
        "smoke",
        *places,
        "--batch-size",
        "9",
    ]  # the last batch has one image
    launcher = launch(*command, environment=subprocess_environment, cwd=tmp_path)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    told = [line for line in err.splitlines() if line.startswith("tinylab: ")]
    assert len(told) == 1, err
    assert told[0].startswith(
        "tinylab: 2 processes, but the smallest batch of an epoch has 1 images"
    )
    assert not (tmp_path / "run").exists()
