"""Choose hyper-parameters on the split `select`, which holds no test image of `merged`.

    python dev/sweep.py      every question in its order; the same command continues

Each run adds a line to results/selection.jsonl; its folder is not kept. When the runs of a question
are there its rule decides, LOG.md gets a section, and later questions start from the choice. What
is adopted has to be put into recipes.py by hand. A choice by one seed is a bet: a top-1 of 7,000
images has a standard error of 0.58 points. Nothing is chosen for `official`, of whose test images
`select` holds 667.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tinylab.data.dataset import FOLDER, Dataset, open_dataset
from tinylab.exceptions import RecipeFailed, Stopped, UserError
from tinylab.files import write_atomically
from tinylab.recipe import Recipe
from tinylab.recipes import named
from tinylab.run.environment import choose, describe_environment
from tinylab.training.train import train

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = "as it stands"
LIGHT = {"crop_probability": 1.0, "crop_min_area": 0.35}
RAMPS = (((40, 0.25), (48, 0.35)), ((32, 0.3), (48, 0.3)), ())


class Question(NamedTuple):
    """Which of some changes a recipe should get.

    points: by how much a candidate must exceed the recipe as it stands, in percent of top-1.
    goal: if given, the one with least training time that reaches so many percent is chosen instead.
    """

    name: str
    recipe: str
    candidates: list[dict]
    points: float = 0.4
    goal: float | None = None
    seeds: tuple[int, ...] = (0,)


QUESTIONS = (
    Question("lr-wd", "accurate", [
        {"max_learning_rate": rate, "weight_decay": decay}
        for rate in (0.5, 1.0, 2.0) for decay in (2.5e-4, 5e-4, 1e-3) if (rate, decay) != (1, 5e-4)
    ]),
    Question("smoothing", "accurate", [{"label_smoothing": share} for share in (0.0, 0.1, 0.2)]),
    Question("schedule", "accurate", [
        {"anneal": "cos"}, {"final_divisor": 2.0}, {"final_divisor": 1e4},
    ]),
    Question("average", "accurate", [
        {"ema_decay": 0.99}, {"ema_decay": 0.999}, {"ema_decay": None}, {"ema_bn_batches": 100},
    ]),
    Question("crops", "accurate", [
        {"pad_to": 72}, LIGHT, LIGHT | {"test_resolution": 72}, LIGHT | {"crop_probability": 0.5},
        LIGHT | {"crop_min_area": 0.08}, {"alternating_flip": False},
        {"hole_size": 0, "hole_probability": 0.0},
    ]),
    Question("mixing", "accurate", [
        {"cutmix_probability": cutmix, "mixup_probability": mixup}
        for cutmix in (0.0, 0.3) for mixup in (0.0, 0.3)
    ]),
    Question("small-things", "accurate", [
        {"zero_init_residual": False}, {"decay_1d": True}, {"batch_size": 1024},
        {"batch_size": 256, "max_learning_rate": 0.5}, {"brightness": 0.0, "contrast": 0.0},
    ], points=0.2, seeds=(0, 1)),
    Question("frontier", "speedrun", [
        {"epochs": epochs, "ramp": ramp} for epochs in (10, 12, 14) for ramp in RAMPS
    ], goal=57.55),
    Question("muon", "speedrun", [
        {"optimizer": "muon", "muon_learning_rate": rate} for rate in (0.02, 0.05, 0.1, 0.24)
    ], points=0.5),
)  # fmt: skip


def decide(question: Question, outcomes: dict[str, list[dict]]) -> tuple[str, str]:
    """Return the label of the chosen candidate and the reason. outcomes: lines, one per seed."""
    rows = {
        label: each
        for label, each in outcomes.items()
        if all(line["status"] == "ok" for line in each)
    }
    top1 = {label: statistics.mean(line["top1"] for line in rows[label]) for label in rows}
    took = {label: statistics.mean(line["train_seconds"] for line in rows[label]) for label in rows}
    if question.goal is not None:
        reaching = [label for label in rows if top1[label] >= question.goal]
        best = min(reaching, key=took.get) if reaching else max(top1, key=top1.get, default=BASE)
        if not reaching:
            return best, f"none reaches {question.goal} %: nearest is {best}"
        return best, f"least training time that reaches {question.goal} %: {best}"
    best = max(top1.keys() - {BASE}, key=top1.get, default=BASE)
    if best == BASE:
        return BASE, "all others failed: nothing changes"
    above = top1[best] - top1.get(BASE, 0.0)
    adopted = round(above, 6) >= question.points
    reason = f"{best} is the best, {above:+.2f} points; {question.points:.2f} are asked for"
    return best if adopted else BASE, f"{reason}: {'adopted' if adopted else 'nothing changes'}"


class Sweep:
    """The lines of selection.jsonl below `root`, and how they get more."""

    def __init__(self, root: Path, dataset: Dataset, device: str) -> None:
        self.root, self.dataset, self.device = root, dataset, device
        self.path = root / "results" / "selection.jsonl"
        self.environment = describe_environment(choose(device))
        text = self.path.read_text() if self.path.exists() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]
        for line in self.lines:
            line["recipe"].setdefault("split", "select")  # a recipe had none

    def run(self, recipe: Recipe, seed: int, stage: str, label: str) -> dict:
        """Return the run's line; train if it is missing."""
        key = {
            "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
            "seed": seed,
            "classes": len(self.dataset.wnids),
            "content_sha256": self.dataset.content_sha256,
            "device": self.environment["device"],  # seconds are compared
        }
        for line in self.lines:
            if all(line[name] == value for name, value in key.items()):
                return line
        print(f"{stage}: {label}, seed {seed}", flush=True)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.root / "runs" / f"select-{digest}"
        try:
            run = train(recipe, self.dataset, folder=folder, seed=seed, device=self.device)
            summary = run.summary
            kept = ("test_correct", "test_images", "train_images", "train_loss", "train_seconds")
            result = {"status": "ok", "top1": summary["test_top1"], "environment": run.environment}
            result |= {name: summary[name] for name in kept}
        except RecipeFailed as error:  # a result, too
            result = {"status": str(error), "environment": self.environment}
        line = {"stage": stage, "candidate": label, **result}
        self.lines.append(line | key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(each) + "\n" for each in self.lines)
        write_atomically(self.path, text.encode())
        shutil.rmtree(folder, ignore_errors=True)
        return self.lines[-1]

    def answer(self, question: Question, recipe: Recipe) -> Recipe:
        """Return the recipe with what the question chose."""
        candidates = {BASE: replace(recipe, split="select")}
        for changes in question.candidates:
            label = ", ".join(f"{name} {value}" for name, value in changes.items())
            candidates[label] = replace(candidates[BASE], **changes)
        outcomes = {
            label: [self.run(each, seed, question.name, label) for seed in question.seeds]
            for label, each in candidates.items()
        }
        chosen, reason = decide(question, outcomes)
        print(f"{question.name}: {reason}", flush=True)
        self.write_log(question, outcomes, reason)
        return candidates[chosen]

    def write_log(self, question: Question, outcomes: dict[str, list[dict]], reason: str) -> None:
        """Add a section to LOG.md, once: every candidate's numbers, and what the rule gave."""
        log = self.root / "LOG.md"
        before = log.read_text(encoding="utf-8") if log.exists() else "# Log\n"
        title = f"{question.name} (`{question.recipe}`) on `select`"
        if title in before and reason in before:
            return
        lines = [f"\n## {datetime.date.today()}: {title}\n"]
        lines.append("{device}, {precision}, torch {torch}.\n".format(**self.environment))
        lines += ["| candidate | top-1 % by seed | seconds of training |", "|---|---|---|"]
        for label, runs in outcomes.items():
            top1 = [f"{run['top1']:.2f}" if "top1" in run else run["status"] for run in runs]
            took = [f"{run['train_seconds']:.1f}" for run in runs if "train_seconds" in run]
            lines.append(f"| {label} | {', '.join(top1)} | {', '.join(took)} |")
        lines.append(f"\nOutcome: {reason}.\n")
        write_atomically(log, (before + "\n".join(lines)).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    recipes = {question.recipe: named(question.recipe) for question in QUESTIONS}
    try:
        dataset = open_dataset(arguments.data)
        sweep = Sweep(REPOSITORY, dataset, arguments.device)
        for question in QUESTIONS:
            recipes[question.recipe] = sweep.answer(question, recipes[question.recipe])
    except (UserError, Stopped) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 128 + error.signal if isinstance(error, Stopped) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
