"""Everything that needs a GPU, in one command that can be stopped anywhere and picks up where it stopped.

    python benchmarks/gpu_suite.py                 all of the plan `one-sitting`
    python benchmarks/gpu_suite.py --budget 500    stops after so many seconds; exit status 75: there is more to do
    python benchmarks/gpu_suite.py --plan full     everything
    python benchmarks/gpu_suite.py --list          what there is to do, and what is done
    python benchmarks/gpu_suite.py --trial         the same chain in miniature on made-up images, on a CPU, in a folder
                                                   of its own; its numbers mean nothing

The plan stands in `gpu_plan.py`: a table of throughput, the published recipe, choices on the split `select`, final runs
by seed, the executed notebook, figures. A step is done when its record is there:

    results/throughput.csv      a row per measured setting
    results/selection.jsonl     a line per run on `select`: recipe, result, environment (its run folder is not kept)
    results/decisions.jsonl     a line per choice; later steps obey it
    results/<run>/              the small records of each final run; weights and checkpoints stay in runs/
    LOG.md                      each choice with date, numbers, stop rule and reason
    README.md, results.csv, images-A/, notebooks/    as `tinylab publish`, `tinylab explain --figures` make them

These are small and belong into the repository, so a chain that began on one machine goes on on another; `--pack FILE`
puts them into one archive to carry. A run under way when the budget ends saves a checkpoint and goes on the next time,
if runs/ is still there. Nothing is fetched from a network unless the data set is missing.
"""

import argparse
import dataclasses
import datetime
import gc
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bench_throughput import Setting, fill, missing, settings
from gpu_plan import PLANS, Candidate, Figures, Final, Notebook, Outcome, Stage, Step, Throughput

from tinylab.data.dataset import Dataset, open_dataset, prepare
from tinylab.data.split import make_split
from tinylab.data.synthetic import write_sample
from tinylab.exceptions import RecipeFailed, Stopped, UserError
from tinylab.files import write_atomically
from tinylab.recipe import Recipe
from tinylab.recipes import named, smoke
from tinylab.results import publish_run, rewrite_tables
from tinylab.run.environment import Compute, choose, device_name
from tinylab.run.folder import Run, as_tuple, describe_environment
from tinylab.training.train import train

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = Path("notebooks") / "tiny_imagenet_resnet18.ipynb"
DATA = Path("data") / "tiny-imagenet"
NEEDED = (
    "albumentations",
    "torchsummary",
    "pytorch_grad_cam",
    "jupytext",
    "nbclient",
    "ipykernel",
    "tyro",
)
"""Modules that a later step imports: better missed before the first one."""
MORE_TO_DO = 75
"""Exit status when the budget ended first (EX_TEMPFAIL: try again)."""
TOO_LITTLE = {"run": 20.0, "compiled run": 60.0, "cold run": 200.0, "program": 120.0}
"""Seconds below which nothing of that kind is begun: it would be set up, and then stopped."""
RATE = 13_000
"""Images/s that an H100 may train, for the estimates of `--list` only: not measured."""


class OutOfTime(BaseException):
    """The budget is spent; what was under way is saved, if it was worth it. Not an `Exception`: a compiler that it
    interrupts would take it for its own failure."""


@dataclass
class Suite:
    """Where the chain reads and writes, and when it has to end."""

    root: Path
    """The repository, or the trial's folder in its place: results/, runs/, images-A/, README.md and LOG.md lie here."""
    dataset: Dataset
    compute: Compute
    classes: int | None
    until: float
    """Of `time.monotonic`."""
    trial: bool = False
    packed: Path | None = None
    """The archive of all records, made anew after each step."""
    _counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def need(self, kind: str) -> None:
        """Raises `OutOfTime` if there is too little of it left for something of that kind."""
        if self.left < TOO_LITTLE[kind]:
            raise OutOfTime

    def recipe(self, name: str) -> Recipe:
        """The recipe as it stands: that of the name, with what was decided so far."""
        changes = {}
        for decision in self.decisions():
            if decision["recipe"] == name:
                changes |= {field: as_tuple(value) for field, value in decision["changes"].items()}
        return replace(self.shrunk(named(name)), **self.allowed(changes))

    def allowed(self, changes: dict) -> dict:
        """The changes; of a trial's those that leave its size alone."""
        own = ("epochs", "batch_size") if self.trial else ()
        return {name: value for name, value in changes.items() if name not in own}

    def shrunk(self, recipe: Recipe) -> Recipe:
        """The recipe, in a trial so small that a CPU runs it in seconds."""
        if not self.trial:
            return recipe
        if recipe.name == "published":
            return replace(smoke(), epochs=1)  # under this name the notebook shows it
        small = {
            "epochs": 2,
            "width": 16,
            "batch_size": 16,
            "max_learning_rate": 0.02,
            "ema_bn_batches": 2,
        }
        return replace(recipe, **small)

    def options(self) -> dict:
        """`compiled` and `precision` as decided."""
        decided = [decision["options"] for decision in self.decisions() if decision["options"]]
        return decided[-1] if decided else {}

    def counts(self, protocol: str) -> tuple[int, int]:
        """Training and test images."""
        if protocol not in self._counts:
            rows = make_split(self.dataset, protocol, self.classes)
            self._counts[protocol] = len(rows.train), len(rows.test)
        return self._counts[protocol]

    def decisions(self) -> list[dict]:
        return _lines(self.results / "decisions.jsonl")

    def selected(self) -> list[dict]:
        return _lines(self.results / "selection.jsonl")

    def add(self, name: str, line: dict) -> None:
        """Adds a line to one of the two files."""
        lines = [*_lines(self.results / name), line]
        self.results.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.results / name, "".join(json.dumps(each) + "\n" for each in lines).encode()
        )


# --- Runs -------------------------------------------------------------------------------------------------------------


def run_within(
    suite: Suite, recipe: Recipe, protocol: str, seed: int, folder: Path, options: dict
) -> Run:
    """Trains, or goes on, until the run is finished. Raises `OutOfTime` when the budget ends first: a run that is being
    trained is saved then, one that is being set up is not."""
    if not Run(folder).finished:
        suite.need("compiled run" if options.get("compiled") else "run")
    expired: list[str] = []

    def expire(_number: int, _frame: object) -> None:
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None) and "asked" not in expired:
            expired.append("set-up")
            raise OutOfTime  # nothing is there to be saved yet
        if "asked" not in expired:  # a second signal would end the run while it is saved
            expired.append("asked")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, expire)
    if suite.left < math.inf:
        signal.setitimer(
            signal.ITIMER_REAL, max(0.1, suite.left), 2.0
        )  # again, where a library swallowed the first
    try:
        return _train(suite, recipe, protocol, seed, folder, options)
    except BaseException as error:
        if expired and not isinstance(error, OutOfTime):  # whatever it was turned into
            raise OutOfTime from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.collect()
        if suite.compute.device.type == "cuda":
            torch.cuda.empty_cache()


def _train(
    suite: Suite, recipe: Recipe, protocol: str, seed: int, folder: Path, options: dict
) -> Run:
    where = {"split": protocol, "folder": folder, "seed": seed, "limit_classes": suite.classes}
    return train(
        recipe,
        suite.dataset,
        **where,
        device=suite.compute.device.type,
        **options,
        quiet=suite.trial,
    )


def run_cold(
    suite: Suite, recipe: Recipe, protocol: str, seed: int, folder: Path, options: dict
) -> Run:
    """Trains in a new process that finds no compiled code of an earlier one. Raises `OutOfTime` as `run_within`."""
    if not Run(folder).finished:
        suite.need("cold run")
        with tempfile.TemporaryDirectory(prefix="cold-") as cache:
            caches = {
                "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
                "TRITON_CACHE_DIR": f"{cache}/triton",
            }
            kept = {name: os.environ.get(name) for name in caches}
            os.environ.update(caches)
            try:
                _in_new_process(suite, (recipe, protocol, seed, folder, options))
            finally:
                for name, value in kept.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})
    return Run(folder)


def _in_new_process(suite: Suite, job: tuple) -> None:
    where = (suite.dataset.folder, suite.compute.device.type, suite.classes)
    child = multiprocessing.get_context("spawn").Process(target=_cold_main, args=(*where, *job))
    child.start()
    try:
        child.join(None if suite.left == math.inf else max(0.1, suite.left))
    finally:
        late = child.is_alive()
        if late:
            child.terminate()
            child.join(20)
            child.kill()
            child.join()
    if late:
        raise OutOfTime
    if child.exitcode != 0:
        raise UserError(f"the cold run ended with status {child.exitcode}")


def _cold_main(
    data: Path,
    device: str,
    classes: int | None,
    recipe: Recipe,
    protocol: str,
    seed: int,
    folder: Path,
    options: dict,
) -> None:
    where = {"split": protocol, "folder": folder, "seed": seed, "limit_classes": classes}
    train(recipe, open_dataset(data), **where, device=device, **options, quiet=True)


# --- Choices ----------------------------------------------------------------------------------------------------------


def do_stage(suite: Suite, stage: Stage) -> None:
    """Runs what the stage still lacks, decides, and writes the decision down."""
    outcomes, rows = [], []
    for candidate in _possible(suite, stage):
        found = [_selection_run(suite, stage, candidate, seed) for seed in stage.seeds]
        rows += found
        failed = next((row["status"] for row in found if row["status"] != "ok"), "")
        good = [row for row in found if row["status"] == "ok"]
        numbers = [[row[name] for row in good] for name in ("top1", "train_loss", "train_seconds")]
        outcomes.append(Outcome(candidate.label, *numbers, failed=failed))
    chosen, reason = stage.rule(outcomes)
    winner = next(candidate for candidate in stage.candidates if candidate.label == chosen)
    now = datetime.datetime.now(datetime.UTC)
    decision = {
        "stage": stage.name,
        "recipe": stage.recipe,
        "question": stage.question,
        "rule": stage.rule_in_words,
        "chosen": chosen,
        "reason": reason,
        "changes": winner.changes,
        "options": winner.options,
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "date": now.strftime("%Y-%m-%d"),
        "fingerprint": _stage_fingerprint(suite, stage),
    }
    write_log(
        suite.root / "LOG.md", decision, rows[0]
    )  # first: a decision without its log would stay without
    suite.add("decisions.jsonl", decision)
    print(f"{stage.name}: {reason}", flush=True)


def _stage_fingerprint(suite: Suite, stage: Stage) -> str:
    """Says which question a decision answered: another plan may have one of the same name."""
    candidates = [
        [candidate.label, candidate.changes, candidate.options] for candidate in stage.candidates
    ]
    settings = [stage.recipe, stage.changes, stage.seeds, stage.rule_in_words, suite.classes]
    return _fingerprint([candidates, *settings, suite.dataset.content_sha256])


def _possible(suite: Suite, stage: Stage) -> Iterator[Candidate]:
    """The candidates that this device can compute: number formats and compilation are a GPU's choice."""
    for number, candidate in enumerate(stage.candidates):
        if number == 0 or not candidate.options or suite.compute.device.type == "cuda":
            yield candidate


def _selection_run(suite: Suite, stage: Stage, candidate: Candidate, seed: int) -> dict:
    """The line of selection.jsonl for one run, made if no earlier stage made it."""
    try:
        recipe = replace(
            suite.recipe(stage.recipe), **suite.allowed(stage.changes | candidate.changes)
        )
    except UserError as error:
        return {"status": str(error)}
    options = candidate.options or suite.options()
    key = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "options": options,
        "seed": seed,
        "classes": suite.classes or len(suite.dataset.wnids),
        "content_sha256": suite.dataset.content_sha256,
        "device": device_name(suite.compute.device),  # some rules compare seconds
        "torch": str(torch.__version__),
    }
    for row in suite.selected():
        if all(row[name] == value for name, value in key.items()):
            return row
    print(f"{stage.name}: {candidate.label}, seed {seed}", flush=True)
    folder = suite.root / "runs" / f"select-{_fingerprint(key)}"
    try:
        row = _row(run_within(suite, recipe, "select", seed, folder, options)) | key
    except (
        RecipeFailed
    ) as error:  # a result, too; any other error is this machine's, and fails the step
        row = {"status": str(error), "environment": describe_environment(suite.compute)} | key
    suite.add("selection.jsonl", {"stage": stage.name, "candidate": candidate.label} | row)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _row(run: Run) -> dict:
    summary = run.summary
    kept = (
        "test_correct", "test_images", "train_images", "train_loss", "train_seconds", "time_to_accuracy_seconds",
        "set_up_seconds", "images_per_second", "skipped_steps",
    )  # fmt: skip
    numbers = {name: summary[name] for name in kept}
    return {"status": "ok", "top1": summary["test_top1"], **numbers, "environment": run.environment}


def write_log(path: Path, decision: dict, row: dict) -> None:
    """Adds the decision to the log: date, question, every candidate's numbers, the rule and what it gave."""
    about = row.get("environment", {})
    lines = [
        f"## {decision['date']}: {decision['stage']} (`{decision['recipe']}`)",
        "",
        f"{decision['question'][0].upper()}{decision['question'][1:]} On `select`, {about.get('device', '')}, torch "
        f"{about.get('torch', '')}; the recipe as it stands has {row.get('recipe', {}).get('epochs', '')} epochs here.",
        "",
        "| candidate | top-1 % by seed | training loss | seconds of training |",
        "|---|---|---|---|",
    ]
    for outcome in decision["outcomes"]:
        numbers = (("top1", ".2f"), ("train_loss", ".4f"), ("seconds", ".1f"))
        cells = [
            ", ".join(format(value, form) for value in outcome[name]) for name, form in numbers
        ]
        cells = [f"failed: {outcome['failed']}", "", ""] if outcome["failed"] else cells
        lines.append(f"| {' | '.join([outcome['label'], *cells])} |")
    lines += ["", f"Stop rule: {decision['rule']}. Outcome: {decision['reason']}.", ""]
    before = path.read_text(encoding="utf-8") if path.exists() else "# Log\n\n"
    write_atomically(path, (before.rstrip("\n") + "\n\n" + "\n".join(lines)).encode())


# --- The other steps --------------------------------------------------------------------------------------------------


def do_final(suite: Suite, step: Final) -> None:
    """A run whose number counts; published at once."""
    recipe = suite.recipe(step.recipe)
    options = {} if step.recipe == "published" else suite.options()
    folder = suite.root / "runs" / step.name
    for there in (Run(suite.results / step.name), Run(folder)):
        if there.finished and not _is_wanted(suite, step, there):
            where = f"{there.folder.parent.name}/{there.folder.name}"
            raise UserError(
                f"{where} is a run of another recipe or of other images than this step's: move it away"
            )
    job = (recipe, step.protocol, step.seed, folder, options)
    if (step.cold or step.recipe == "speedrun") and not Run(folder).finished:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # a time that is to count is that of one go: begin anew
    run = run_cold(suite, *job) if step.cold else run_within(suite, *job)
    publish_run(run, suite.results, suite.root / "README.md")
    summary = run.summary
    print(
        f"{step.name}: top-1 {summary['test_top1']:.2f} %, training {summary['train_seconds']:.1f} s, time to accuracy "
        f"{summary['time_to_accuracy_seconds']:.1f} s warm, {summary['cold_time_to_accuracy_seconds']:.1f} s cold",
        flush=True,
    )


def do_figures(suite: Suite, step: Figures) -> None:
    """`tinylab explain` of the run, its figures into images-A/, and its record published again with what was found."""
    run = Run(suite.root / "runs" / step.of.name)
    command = ["-m", "tinylab", "explain", str(run.folder), "--data", str(suite.dataset.folder)]
    _call(suite, [*command, "--figures", str(suite.root / "images-A")])
    publish_run(run, suite.results, suite.root / "README.md")


def do_notebook(suite: Suite, step: Notebook) -> None:
    """Executes the committed notebook in place; in a trial a copy, on the trial's run."""
    if not suite.trial:
        if suite.dataset.folder.resolve() != (REPOSITORY / DATA).resolve():
            raise UserError(
                f"the notebook as it is committed looks for the images in {DATA}: use --data {DATA}"
            )
        _call(suite, [str(REPOSITORY / "notebooks" / "run.py"), str(suite.root / NOTEBOOK)])
        return
    folder, data = (suite.root / "runs" / step.of.name).resolve(), suite.dataset.folder.resolve()
    values = [
        "RECIPE=smoke",
        "EPOCHS=1",
        f"CLASSES={suite.classes}",
        "SOURCE=sample",
        f"DATA={data}",
        f"RUN={folder}",
    ]
    _call(suite, [str(REPOSITORY / "notebooks" / "run.py"), str(suite.root / NOTEBOOK), *values])


def _call(suite: Suite, arguments: list[str]) -> None:
    """Runs Python for what is left of the budget. Raises `OutOfTime`, and `UserError` if it fails."""
    suite.need("program")
    paths = [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=None if suite.left == math.inf else suite.left,
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfTime from error
    if done.returncode != 0:
        raise UserError(
            f"{' '.join(arguments)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}"
        )


def do_throughput(suite: Suite, step: Throughput) -> None:
    """Measures the rows that are missing; begins none in the last minute, as compiling may take that long."""
    until = suite.until - (0 if suite.trial else 60)
    done = fill(
        suite.results / "throughput.csv",
        _rows(suite, step),
        suite.compute.device.type,
        until,
        suite.trial,
    )
    rewrite_tables(suite.results, suite.root / "README.md")
    if not done:
        raise OutOfTime


def _rows(suite: Suite, step: Throughput) -> list[Setting]:
    return settings(suite.compute, quick=suite.trial)[: step.rows]


# --- The chain --------------------------------------------------------------------------------------------------------


def is_done(suite: Suite, step: Step) -> bool:
    """Whether the step's record is there."""
    if isinstance(step, Stage):
        asked = _stage_fingerprint(suite, step)
        return any(
            (each["stage"], each["fingerprint"]) == (step.name, asked) for each in suite.decisions()
        )
    if isinstance(step, Final):
        published = Run(suite.results / step.name)
        return published.finished and _is_wanted(suite, step, published)
    if isinstance(step, Figures):
        shown = suite.root / "images-A" / "figures.json"
        return shown.exists() and json.loads(shown.read_text())["run"] == step.of.name
    if isinstance(step, Notebook):
        notebook = suite.root / NOTEBOOK
        shown = (
            f"runs/{step.of.name} is finished",
            f" {step.of.name}/summary.json",
            f"/{step.of.name}/summary.json",
        )
        return notebook.exists() and any(
            words in notebook.read_text(encoding="utf-8") for words in shown
        )
    return not missing(
        suite.results / "throughput.csv", _rows(suite, step), suite.compute.device.type
    )


def _is_wanted(suite: Suite, step: Final, run: Run) -> bool:
    """Whether the run is of the recipe as it stands now, and of these images."""
    identity = run.identity
    images = (identity["classes"], identity["content_sha256"])
    wanted = (suite.classes or len(suite.dataset.wnids), suite.dataset.content_sha256)
    return images == wanted and run.recipe == suite.recipe(step.recipe)


def possible(suite: Suite, step: Step) -> bool:
    """Whether what the step shows is on this disk: weights do not travel with the records."""
    return (
        not isinstance(step, Figures | Notebook) or Run(suite.root / "runs" / step.of.name).finished
    )


def do(suite: Suite, step: Step) -> None:
    """The step, from where it stands to its end. Raises `OutOfTime` when the budget ends first."""
    kinds = {
        Stage: do_stage,
        Final: do_final,
        Figures: do_figures,
        Notebook: do_notebook,
        Throughput: do_throughput,
    }
    kinds[type(step)](suite, step)


def images_of(suite: Suite, step: Step) -> float:
    """Images of 64 x 64 pixels that the step's runs train on, for an estimate of its time."""
    if isinstance(step, Stage):
        base, candidates = suite.recipe(step.recipe), _possible(suite, step)
        recipes = [
            replace(base, **suite.allowed(step.changes | candidate.changes))
            for candidate in candidates
        ]
        return len(step.seeds) * sum(_cost(suite, recipe, "select") for recipe in recipes)
    return (
        _cost(suite, suite.recipe(step.recipe), step.protocol) if isinstance(step, Final) else 0.0
    )


def _cost(suite: Suite, recipe: Recipe, protocol: str) -> float:
    train_images, test_images = suite.counts(protocol)
    areas = sum((recipe.resolution_at(epoch) / 64) ** 2 for epoch in range(1, recipe.epochs + 1))
    return (
        areas * train_images + recipe.epochs * (recipe.test_resolution / 64) ** 2 / 3 * test_images
    )


def table(suite: Suite, steps: list[Step]) -> str:
    """A line per step: done or not, and a guess at what it takes on an H100, without set-up."""
    lines = []
    for step in steps:
        state = (
            "done"
            if is_done(suite, step)
            else "to do"
            if possible(suite, step)
            else "waits for its run"
        )
        images = images_of(suite, step)
        about = (
            f"{math.ceil(images / RATE / 60)} min, a guess"
            if images and state != "done" and not suite.trial
            else ""
        )
        lines.append(f"{step.name:<28}{state:<20}{about}".rstrip())
    return "\n".join(lines)


def go(suite: Suite, steps: list[Step]) -> int:
    """All steps that are left, in their order; the exit status."""
    failed = False
    try:
        for step in steps:
            try:
                if is_done(suite, step) or not possible(suite, step):
                    continue
                do(suite, step)
            except UserError as error:  # the others may still succeed
                failed = True
                print(f"{step.name}: {error}", file=sys.stderr, flush=True)
            except Exception:
                failed = True
                print(f"{step.name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                suite.compute.synchronise()  # a GPU that is lost to this process says so here, and ends the chain
            if suite.packed:
                pack(suite, suite.packed)
    except OutOfTime:
        print("the budget is spent; the same command goes on", flush=True)
        return MORE_TO_DO
    left = [step for step in steps if not is_done(suite, step) and possible(suite, step)]
    return 1 if failed else MORE_TO_DO if left else 0


def pack(suite: Suite, path: Path) -> None:
    """Puts everything that belongs into the repository into one archive, to be unpacked there."""
    names = [
        "results",
        "LOG.md",
        "README.md",
        "images-A",
        str(NOTEBOOK),
        str(NOTEBOOK.with_suffix(".failed.ipynb")),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with tarfile.open(temporary, "w:gz", compresslevel=1) as archive:
        for name in names:
            if (suite.root / name).exists():
                archive.add(suite.root / name, name)
    os.replace(temporary, path)


def make_suite(arguments: argparse.Namespace) -> Suite:
    """Opens or prepares the data, and in a trial makes the folder that stands for the repository."""
    until = time.monotonic() + arguments.budget
    compute = choose(arguments.device)
    if not arguments.trial:
        if compute.device.type != "cuda" and not arguments.list:
            raise UserError(
                "no CUDA GPU here, without which this takes weeks; --trial shows it on a CPU"
            )
        if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise UserError(f"not installed: {', '.join(lacking)}; see requirements.txt")
        dataset = prepare(arguments.source, arguments.data)
        return Suite(REPOSITORY, dataset, compute, None, until, packed=arguments.pack)
    root = arguments.root.resolve()
    if not (root / "README.md").exists():
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            REPOSITORY / "results" / "reference", root / "results" / "reference", dirs_exist_ok=True
        )
        shutil.copy(REPOSITORY / "README.md", root / "README.md")
    data = root / "data" / "sample"
    if not (data / "meta.json").exists():
        data.parent.mkdir(exist_ok=True)
        prepare(write_sample(root / "data" / "sample.zip"), data, workers=1, progress=False)
    return Suite(root, open_dataset(data), compute, 4, until, trial=True, packed=arguments.pack)


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", choices=PLANS, default="one-sitting")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which to stop (default: never)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="only these steps, in the plan's order"
    )
    parser.add_argument("--list", action="store_true", help="show the steps and do nothing")
    parser.add_argument("--data", type=Path, default=DATA, help="the prepared data set")
    parser.add_argument(
        "--source", default="auto", help="where it is prepared from, if it is not there"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="at the end put all records into this .tar.gz"
    )
    parser.add_argument(
        "--trial", action="store_true", help="in miniature, on made-up images, below --root"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/trial"), help="the trial's folder")
    found = parser.parse_args(arguments)
    known = [step.name for step in PLANS[found.plan]()]
    for name in found.only or ():
        if name not in known:
            parser.error(f"the plan {found.plan} has no step {name}; it has {', '.join(known)}")
    return found


def main() -> int:
    arguments = parse()
    try:
        suite = make_suite(arguments)
        steps = [
            step
            for step in PLANS[arguments.plan]()
            if not arguments.only or step.name in arguments.only
        ]
        print(f"{suite.compute}; torch {torch.__version__}", flush=True)
        try:
            status = 0 if arguments.list else go(suite, steps)
        finally:
            if arguments.pack:
                pack(suite, arguments.pack)
                print(f"{arguments.pack}: {arguments.pack.stat().st_size / 1e6:.1f} MB", flush=True)
        print(table(suite, steps), flush=True)
    except UserError as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"gpu_suite.py: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    return status


if __name__ == "__main__":
    sys.exit(main())
