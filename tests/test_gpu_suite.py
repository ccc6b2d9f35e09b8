"""The chain for a GPU: its rules decide as they say, and it picks up where it stopped, records and all."""

import contextlib
import copy
import importlib
import json
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tinylab.data.dataset import Dataset
from tinylab.data.split import make_split
from tinylab.exceptions import RecipeFailed, UserError
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES, accurate, named
from tinylab.run.environment import Compute, choose
from tinylab.run.folder import Run

pytest.importorskip("timm")

README = "\n".join(f"<!-- {part} -->\n<!-- /{part} -->" for part in (
    "results", "targets", "paired", "throughput", "figures", "maps"))  # fmt: skip


@pytest.fixture
def plan(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("gpu_plan")


@pytest.fixture
def chain(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    module = importlib.import_module("gpu_suite")
    monkeypatch.setattr(module, "TOO_LITTLE", dict.fromkeys(module.TOO_LITTLE, 0.0))
    return module


@pytest.fixture
def suite(chain: ModuleType, small_dataset: Dataset, tmp_path: Path) -> object:
    """A trial on two made-up classes: an epoch is one step."""
    (tmp_path / "README.md").write_text(README)
    return chain.Suite(tmp_path, small_dataset, choose("cpu", "fp32"), None, math.inf, trial=True)


def fail(
    chain: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception, when: Callable[..., bool]
) -> None:
    """From now on the chain's training raises `error` when `when(recipe, seed)` holds."""
    train = chain.train

    def failing(recipe: Recipe, *rest: object, **named: object) -> Run:
        if when(recipe, named["seed"]):
            raise error
        return train(recipe, *rest, **named)

    monkeypatch.setattr(chain, "train", failing)


# --- Rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "others", "expected"),
    [
        ([60.0], {"a": [60.39]}, "base"),
        ([60.0], {"a": [60.4]}, "a"),
        ([60.0], {"a": [60.5], "b": [61.0]}, "b"),
        ([60.0, 62.0], {"a": [61.0, 61.7]}, "base"),  # +0.35 on average
        ([60.0, 62.0], {"a": [61.0, 61.8]}, "a"),
        ([60.0], {"a": []}, "base"),
        ([], {"a": [3.0]}, "a"),
        ([], {"a": []}, "base"),
    ],
)
def test_a_change_is_adopted_if_it_gains_enough(
    plan: ModuleType, base: list, others: dict, expected: str
) -> None:
    outcomes = [plan.Outcome("base", base, failed="" if base else "diverged")]
    outcomes += [
        plan.Outcome(label, top1, failed="" if top1 else "diverged")
        for label, top1 in others.items()
    ]
    chosen, reason = plan.gain(0.4)(outcomes)
    assert chosen == expected
    assert (
        ("adopted" in reason or "best of the others" in reason)
        if chosen != "base"
        else "nothing changes" in reason
    )


def test_a_run_that_failed_for_one_seed_is_not_adopted(plan: ModuleType) -> None:
    outcomes = [plan.Outcome("base", [60.0, 60.0]), plan.Outcome("a", [99.0], failed="diverged")]
    assert plan.gain(0.2)(outcomes)[0] == "base"


def test_the_speedrun_takes_the_fastest_that_reaches_the_target(plan: ModuleType) -> None:
    rule = plan.fastest_reaching(57.55)
    slow, fast = (
        plan.Outcome("slow", [59.0], seconds=[70.0]),
        plan.Outcome("fast", [57.55], seconds=[50.0]),
    )
    faster = plan.Outcome("faster", [57.5], seconds=[40.0])
    assert rule([slow, fast, faster])[0] == "fast"
    chosen, reason = rule([faster, plan.Outcome("far", [50.0], seconds=[10.0])])
    assert (chosen, "none reaches 57.55 %" in reason) == ("faster", True)
    assert rule([plan.Outcome("base", [], failed="x")])[0] == "base"


def test_the_number_format_must_learn_as_well_as_32_bits(plan: ModuleType) -> None:
    def outcome(label: str, loss: float, seconds: float) -> object:
        return plan.Outcome(label, [50.0], [loss], [seconds])

    rule = plan.fastest_of_same_loss(0.02)
    exact, half, broken = (
        outcome("fp32", 4.0, 30.0),
        outcome("fp16", 4.08, 9.0),
        outcome("bf16", 4.09, 6.0),
    )
    assert rule([exact, half, broken])[0] == "fp16"
    assert rule([exact, broken])[0] == "fp32"
    assert rule([exact, plan.Outcome("fp16", [], failed="out of memory")])[0] == "fp32"
    with pytest.raises(
        UserError, match="fp32, which the others are judged by, failed: out of memory"
    ):
        rule([plan.Outcome("fp32", [], failed="out of memory"), half])


# --- Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one-sitting", "full"])
def test_plans_are_sound(plan: ModuleType, name: str) -> None:
    steps = plan.PLANS[name]()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert {step.recipe for step in steps if isinstance(step, plan.Final | plan.Stage)} <= set(
        RECIPES
    )
    finals = [step for step in steps if isinstance(step, plan.Final)]
    assert {(step.recipe, step.protocol) for step in finals if step.recipe == "official"} <= {
        ("official", "official")
    }
    assert all(step.protocol == "merged" for step in finals if step.recipe != "official")
    for step in steps:
        if isinstance(step, plan.Stage):
            labels = [candidate.label for candidate in step.candidates]
            assert len(set(labels)) == len(labels)
            for candidate in step.candidates:
                recipe = replace(
                    named(step.recipe), **step.changes | candidate.changes
                )  # raises if it cannot be
                unchanged = recipe == replace(named(step.recipe), **step.changes)
                assert unchanged == (candidate == plan.BASE or bool(candidate.options)), (
                    candidate.label
                )
        if isinstance(step, plan.Figures | plan.Notebook):
            assert names.index(step.of.name) < names.index(step.name)
    decided = [
        names.index(step.name)
        for step in steps
        if isinstance(step, plan.Stage) and step.recipe == "accurate"
    ]
    first_final = min(
        names.index(step.name) for step in finals if step.recipe in ("accurate", "speedrun")
    )
    assert max(decided) < first_final, "what is final must not come before what decides it"


def test_one_sitting_leaves_room_in_half_an_hour_at_the_rates_that_are_guessed(
    chain: ModuleType, plan: ModuleType, small_dataset: Dataset, tmp_path: Path
) -> None:
    suite = chain.Suite(
        tmp_path, small_dataset, Compute(torch.device("cuda"), "fp16", ""), None, math.inf
    )
    suite._counts |= {
        "merged": (77_000, 33_000),
        "select": (70_000, 7_000),
        "official": (100_000, 10_000),
    }
    steps = plan.one_sitting()
    until = [step.name for step in steps].index("figures-accurate-merged-s0")
    seconds = 0.0
    for step in steps[: until + 1]:
        runs = len(step.candidates) * len(step.seeds) if isinstance(step, plan.Stage) else 1
        set_up = {
            plan.Throughput: 25 * (step.rows or 20) if isinstance(step, plan.Throughput) else 0,
            plan.Notebook: 60,
        }
        seconds += set_up.get(type(step), 25 * runs) + chain.images_of(suite, step) / 10_000
    assert 900 < seconds < 1500, (
        "the first numbers of all recipes but the long one, with time for accidents"
    )


def test_the_throughput_table_asks_the_most_telling_questions_first(
    repository: Path, chain: ModuleType
) -> None:
    throughput = importlib.import_module("bench_throughput")
    rows = throughput.settings(Compute(torch.device("cuda"), "fp16", ""))
    assert len(set(rows)) == len(rows) <= 25
    assert rows[:2] == [throughput.Setting(), throughput.Setting("bf16", compiled="yes")]
    for name, values in {
        "precision": {"fp32", "tf32", "bf16", "fp16"},
        "layout": {"NHWC", "NCHW"},
        "compiled": {"no", "yes", "reduce-overhead"},
        "batch": {256, 512, 1024},
        "resolution": {40, 48, 64},
    }.items():
        assert {getattr(row, name) for row in rows} == values
    every = throughput.settings(Compute(torch.device("cuda"), "fp16", ""), full=True)
    assert len(set(every)) == len(every) == 4 * (3 + 1) * 3 * 3


# --- Throughput -------------------------------------------------------------------------------------------------------


def test_rows_are_kept_as_they_are_measured_and_failures_are_rows(
    chain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = importlib.import_module("bench_throughput")
    asked = []

    def measure(setting: object, *_: object) -> float:
        asked.append(setting.batch)
        if setting.batch == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return 100.0 * setting.batch

    monkeypatch.setattr(throughput, "measure", measure)
    wanted = [throughput.Setting("fp32", batch=batch, resolution=32) for batch in (2, 3, 4)]
    path = tmp_path / "results" / "throughput.csv"
    assert not throughput.fill(path, wanted, "cpu", until=0.0, quick=True)
    assert throughput.fill(path, wanted[:2], "cpu", until=math.inf, quick=True)
    assert throughput.fill(path, wanted, "cpu", until=math.inf, quick=True)
    assert asked == [2, 3, 4]
    rows = throughput.read_rows(path)
    assert [row["status"] for row in rows] == ["ok", "out of memory", "ok"]
    assert [row["images_per_second"] for row in rows] == ["200.0", "", "400.0"]
    assert tuple(rows[0]) == throughput.THROUGHPUT
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of throughput"):
        throughput.read_rows(path)


@pytest.mark.numerical
def test_both_layouts_compute_the_same_step(
    chain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = importlib.import_module("bench_throughput")
    states = []
    make = throughput.new_state
    monkeypatch.setattr(
        throughput, "new_state", lambda *given: states.append(make(*given)) or states[-1]
    )
    for layout in ("NHWC", "NCHW"):
        setting = throughput.Setting("fp32", layout, batch=2, resolution=32)
        step = throughput._step(setting, choose("cpu", "fp32"), width=16)
        seen = []
        state = states[-1]
        before = copy.deepcopy(state.model.state_dict())
        for convolution in (state.model.layer1[0].conv2, state.model.layer3[0].conv2):
            convolution.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        step()
        last = layout == "NHWC"
        assert len(seen) == 2
        assert all(
            tensor.is_contiguous(memory_format=torch.channels_last) == last for tensor in seen
        )
        assert all(tensor.is_contiguous() != last for tensor in seen)
        for parameter, kept in state.optimizer.state.items():
            assert kept["momentum_buffer"].stride() == parameter.stride(), (
                "CUDA's fused SGD takes nothing else"
            )
    first, last = (state.model.state_dict() for state in states)
    assert first["layer1.0.conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    assert last["layer1.0.conv1.weight"].is_contiguous()
    for name, value in first.items():  # of which a ReLU that rounding flips is little
        way, apart = (value - each[name] for each in (before, last))
        assert apart.double().norm() <= 0.1 * way.double().norm(), name


# --- The chain --------------------------------------------------------------------------------------------------------


def test_a_stage_runs_on_select_alone_decides_and_is_obeyed(
    suite: object, chain: ModuleType, plan: ModuleType, small_dataset: Dataset
) -> None:
    candidates = (plan.BASE, plan.Candidate("no smoothing", {"label_smoothing": 0.0}))
    stage = plan.Stage(
        "smoothing", "accurate", "is it any use?", candidates, plan.gain(-100.0), "always"
    )
    assert not chain.is_done(suite, stage)
    chain.do(suite, stage)
    assert chain.is_done(suite, stage)
    rows = suite.selected()
    select = make_split(small_dataset, "select").sha256
    assert [row["environment"]["split_sha256"] for row in rows] == [select, select]
    assert [row["recipe"]["label_smoothing"] for row in rows] == [accurate().label_smoothing, 0.0]
    assert all(row["top1"] == 100 * row["test_correct"] / row["test_images"] for row in rows)
    (decision,) = suite.decisions()
    assert decision["changes"] == {"label_smoothing": 0.0}
    assert suite.recipe("accurate").label_smoothing == 0.0
    assert suite.recipe("speedrun").label_smoothing == 0.2, (
        "a choice holds for the recipe it was made for"
    )
    assert not list((suite.root / "runs").glob("select-*")), "nothing but the line is kept"
    log = (suite.root / "LOG.md").read_text()
    assert f"## {decision['date']}: smoothing (`accurate`)" in log
    assert "Stop rule: always." in log
    assert all(f"{row['top1']:.2f}" in log for row in rows)
    assert str(suite.root) not in log + json.dumps(rows)


def test_equal_runs_are_made_once(
    suite: object, chain: ModuleType, plan: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = chain.train
    monkeypatch.setattr(
        chain,
        "train",
        lambda recipe, *rest, **named: trained.append(recipe) or train(recipe, *rest, **named),
    )
    for name in ("one", "two"):
        chain.do(suite, plan.Stage(name, "accurate", "?", (plan.BASE,), plan.gain(0.4), "none"))
    assert len(trained) == 1
    assert [decision["stage"] for decision in suite.decisions()] == ["one", "two"]


def test_a_run_that_fails_is_a_result(
    suite: object, chain: ModuleType, plan: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(
        chain,
        monkeypatch,
        RecipeFailed("the run has diverged"),
        lambda recipe, _: recipe.max_learning_rate == 5.0,
    )
    impossible = plan.Candidate("impossible", {"label_smoothing": 2.0})
    candidates = (plan.BASE, plan.Candidate("lr 5", {"max_learning_rate": 5.0}), impossible)
    chain.do(suite, plan.Stage("lr", "accurate", "how high?", candidates, plan.gain(0.4), "0.4"))
    (decision,) = suite.decisions()
    assert decision["chosen"] == "as it stands"
    assert [row["status"] for row in suite.selected()] == ["ok", "the run has diverged"]
    log = (suite.root / "LOG.md").read_text()
    assert "| lr 5 | failed: the run has diverged |" in log
    assert "| impossible | failed: label_smoothing must be" in log


def test_a_budget_that_ends_within_a_run_saves_it_and_the_next_call_goes_on(
    suite: object, chain: ModuleType, plan: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = plan.Final("accurate", "merged", 0)
    longer = replace(suite.recipe("accurate"), epochs=150)
    monkeypatch.setattr(chain.Suite, "recipe", lambda *_: longer)
    suite.until = time.monotonic() + 3.0
    with pytest.raises(chain.OutOfTime):
        chain.do(suite, step)
    run = Run(suite.root / "runs" / step.name)
    assert run.trained
    assert not run.finished
    assert 0 < len(run.history) < 150
    suite.until = math.inf
    assert chain.go(suite, [step]) == 0
    assert len(run.history) == 150
    assert run.summary["stops"] == 1
    assert json.loads((suite.results / step.name / "summary.json").read_text()) == run.summary


@pytest.mark.parametrize("swallowed", [0, 1])
def test_a_budget_that_ends_while_a_run_is_set_up_is_no_failure_of_the_recipe(
    suite: object,
    chain: ModuleType,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    swallowed: int,
) -> None:
    """A compiler turns any exception into one of its own, or goes on as if there had been none."""

    def compiling(*_: object, **__: object) -> None:
        for _ in range(swallowed):
            with contextlib.suppress(BaseException):
                time.sleep(30)
        try:
            time.sleep(30)
        except BaseException as error:
            raise RecipeFailed("torch.compile fails here") from error

    monkeypatch.setattr(chain, "train", compiling)
    suite.until = time.monotonic() + 0.5
    stage = plan.Stage("one", "accurate", "?", (plan.BASE,), plan.gain(0.4), "none")
    started = time.monotonic()
    assert chain.go(suite, [stage]) == chain.MORE_TO_DO
    assert time.monotonic() - started < 10
    assert suite.selected() == suite.decisions() == []


def test_what_the_machine_lacks_is_no_result(
    suite: object,
    chain: ModuleType,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    fail(chain, monkeypatch, UserError("no CUDA device here"), lambda *_: True)
    stage = plan.Stage("one", "accurate", "?", (plan.BASE,), plan.gain(0.4), "none")
    assert chain.go(suite, [stage]) == 1
    assert suite.selected() == suite.decisions() == []
    assert not (suite.root / "LOG.md").exists()
    assert "one: no CUDA device here" in capsys.readouterr().err


def test_a_bug_in_one_step_keeps_its_traceback_and_the_records_of_the_others(
    suite: object,
    chain: ModuleType,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    fail(
        chain, monkeypatch, ImportError("no module named albumentations"), lambda _, seed: seed == 0
    )
    suite.packed = suite.root / "records.tar.gz"
    assert chain.go(suite, [plan.Final("accurate", "merged", seed) for seed in (1, 0)]) == 1
    assert "Traceback" in capsys.readouterr().err
    with tarfile.open(suite.packed) as archive:
        assert "results/accurate-merged-s1/summary.json" in archive.getnames()


def test_a_name_that_another_question_or_recipe_had_is_not_done(
    suite: object, chain: ModuleType, plan: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    short = plan.Stage("lr", "accurate", "?", (plan.BASE,), plan.gain(0.4), "none")
    final = plan.Final("accurate", "merged", 0)
    assert chain.go(suite, [short, final]) == 0
    candidates = (plan.BASE, plan.Candidate("no smoothing", {"label_smoothing": 0.0}))
    longer = plan.Stage("lr", "accurate", "?", candidates, plan.gain(-100.0), "none")
    assert not chain.is_done(suite, longer)
    assert chain.is_done(suite, final)
    chain.do(suite, longer)
    assert chain.is_done(suite, short)
    assert chain.is_done(suite, longer)
    assert not chain.is_done(suite, final), "it is of the recipe before that choice"
    assert chain.go(suite, [final]) == 1
    assert "results/accurate-merged-s0 is a run of another recipe" in capsys.readouterr().err


def test_without_a_gpu_only_the_trial_runs(
    chain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here"):
        chain.make_suite(chain.parse([]))


def test_nothing_is_begun_without_time_and_the_status_says_so(
    suite: object,
    chain: ModuleType,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(chain.TOO_LITTLE, "run", 15.0)
    suite.until = time.monotonic() + 10.0
    assert chain.go(suite, [plan.Final("accurate", "merged", 0)]) == chain.MORE_TO_DO
    assert not (suite.root / "runs").exists()
    assert "the same command goes on" in capsys.readouterr().out


def test_a_cold_run_finds_no_compiled_code_and_is_published(
    suite: object,
    chain: ModuleType,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    filled = tmp_path / "cache"
    (filled / "old").mkdir(parents=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(filled))
    for seed, cold in ((0, True), (1, False)):
        chain.do(suite, plan.Final("accurate", "merged", seed, cold=cold))
    caches = [
        json.loads((suite.results / f"accurate-merged-s{seed}" / "environment.json").read_text())[
            "compile_cache"
        ]
        for seed in (0, 1)
    ]
    assert caches == ["empty", "filled"]
    assert chain.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(filled)


def test_records_travel_and_what_needs_weights_waits(
    suite: object, chain: ModuleType, plan: ModuleType, small_dataset: Dataset, tmp_path: Path
) -> None:
    final = plan.Final("accurate", "merged", 0)
    steps = [
        plan.Stage("one", "accurate", "?", (plan.BASE,), plan.gain(0.4), "none"),
        final,
        plan.Figures(final),
    ]
    assert chain.go(suite, steps[:2]) == 0
    chain.pack(suite, tmp_path / "records.tar.gz")
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        names = archive.getnames()
        assert sum(member.size for member in archive.getmembers()) < 100_000
        archive.extractall(tmp_path / "elsewhere", filter="data")
    assert {"LOG.md", "README.md", "results/results.csv", "results/decisions.jsonl"} <= set(names)
    assert not [name for name in names if name.endswith((".safetensors", ".ckpt", ".npz"))]
    there = chain.Suite(
        tmp_path / "elsewhere", small_dataset, suite.compute, None, math.inf, trial=True
    )
    assert [chain.is_done(there, step) for step in steps] == [True, True, False]
    assert [chain.possible(there, step) for step in steps] == [True, True, False]
    assert chain.possible(suite, steps[2])
    lines = chain.table(there, steps).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == ["done", "done", "waits for its run"]


def test_a_record_of_a_longer_name_is_not_taken_for_the_notebook_s(
    suite: object, chain: ModuleType, plan: ModuleType
) -> None:
    step = plan.Notebook(plan.Final("published", "merged", 0))
    notebook = suite.root / chain.NOTEBOOK
    notebook.parent.mkdir()
    notebook.write_text(
        "runs/published-merged-s0-c10-e10 is finished 12 bytes runs/published-merged-s0-c10/summary.json"
    )
    assert not chain.is_done(suite, step)
    notebook.write_text("     1,012 bytes  runs/published-merged-s0/summary.json")
    assert chain.is_done(suite, step)


def test_a_step_that_fails_does_not_stop_the_others(
    suite: object,
    chain: ModuleType,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    fail(chain, monkeypatch, UserError("out of memory"), lambda _, seed: seed == 0)
    steps = [plan.Final("accurate", "merged", seed) for seed in (0, 1)]
    assert chain.go(suite, steps) == 1
    assert [chain.is_done(suite, step) for step in steps] == [False, True]
    assert "accurate-merged-s0: out of memory" in capsys.readouterr().err


def test_unknown_steps_are_refused(chain: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as raised:
        chain.parse(["--only", "lr-wd-12", "nonsense"])
    assert raised.value.code == 2
    assert "no step nonsense; it has throughput" in capsys.readouterr().err


def test_damaged_records_are_named(suite: object, chain: ModuleType) -> None:
    suite.results.mkdir()
    (suite.results / "decisions.jsonl").write_text("{}\n{")
    with pytest.raises(UserError, match=r"decisions\.jsonl is damaged"):
        suite.decisions()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_chain_in_miniature(
    plan: ModuleType, repository: Path, tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    """Every step of the plan, notebook and figures among them, stopped once by its budget, in another folder than the
    repository."""
    root, packed = tmp_path / "trial", tmp_path / "records.tar.gz"
    command = [
        sys.executable,
        str(repository / "benchmarks" / "gpu_suite.py"),
        "--trial",
        "--root",
        str(root),
    ]
    environment = subprocess_environment | {"CUDA_VISIBLE_DEVICES": ""}

    def call(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *options], env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    first = call("--budget", "30")
    assert first.returncode == 75, first.stderr
    before = {path: path.read_bytes() for path in root.glob("results/*/summary.json")}
    done = call("--pack", str(packed))
    assert done.returncode == 0, done.stderr + done.stdout
    assert all(path.read_bytes() == content for path, content in before.items()), (
        "what was done is not done again"
    )
    states = dict(line.split() for line in done.stdout.splitlines() if line.endswith(" done"))
    assert states == {step.name: "done" for step in plan.one_sitting()}
    assert packed.stat().st_size < 16 * 1024 * 1024
    assert {path.name for path in (root / "images-A").glob("*.png")} >= {
        "curves.png",
        "gradcam.png",
        "confusion.png",
    }
    records = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert call().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == records
