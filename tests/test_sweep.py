"""Choices on `select`: rules, a line per run; a sweep that is started again trains nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sweep import BASE, QUESTIONS, Question, Sweep, decide

from tinylab.data.dataset import Dataset
from tinylab.recipe import Recipe
from tinylab.recipes import named


def ok(*top1: float, seconds: float = 10.0) -> list[dict]:
    return [{"status": "ok", "top1": each, "train_seconds": seconds} for each in top1]


FAILED = [{"status": "the run has diverged"}]


@pytest.mark.parametrize(
    ("outcomes", "chosen"),
    [
        ({BASE: ok(50.0), "a": ok(50.4), "b": ok(50.2)}, "a"),
        ({BASE: ok(50.0), "a": ok(50.39)}, BASE),
        ({BASE: ok(50.0, 52.0), "a": ok(51.0, 51.8)}, "a"),  # means of seeds
        ({BASE: ok(50.0), "a": FAILED}, BASE),
        ({BASE: FAILED, "a": ok(1.0)}, "a"),
        ({BASE: FAILED, "a": FAILED}, BASE),
    ],
)
def test_a_candidate_must_exceed_the_base_by_enough(outcomes: dict, chosen: str) -> None:
    assert decide(Question("q", "accurate", []), outcomes)[0] == chosen


def test_the_fastest_that_reaches_the_goal_is_chosen_or_else_the_nearest() -> None:
    question = Question("q", "speedrun", [], goal=57.55)
    outcomes = {
        BASE: ok(58.0, seconds=9.0),
        "a": ok(57.55, seconds=8.0),
        "b": ok(57.5, seconds=1.0),
    }
    assert decide(question, outcomes)[0] == "a"
    assert decide(question, {BASE: ok(50.0), "b": ok(57.5), "c": FAILED})[0] == "b"


def test_every_candidate_is_a_recipe() -> None:
    for question in QUESTIONS:
        for changes in question.candidates:
            replace(named(question.recipe), **changes)


def test_a_sweep_continues_and_writes_its_log_once(
    tmp_path: Path, small_dataset: Dataset, narrow: Recipe, capsys: pytest.CaptureFixture
) -> None:
    question = Question("lr", "narrow", [{"max_learning_rate": 0.01}], points=-100.0)
    recipe = replace(narrow, epochs=1, split="select")
    arguments = (tmp_path, small_dataset, "cpu")
    chosen = Sweep(*arguments).answer(question, recipe)
    assert chosen == replace(recipe, max_learning_rate=0.01)
    lines = (tmp_path / "results" / "selection.jsonl").read_text()
    log = (tmp_path / "LOG.md").read_text()
    candidates = [json.loads(line)["candidate"] for line in lines.splitlines()]
    assert candidates == [BASE, "max_learning_rate 0.01"]
    assert log.count("## ") == log.count("Outcome: max_learning_rate 0.01 is the best") == 1
    assert list((tmp_path / "runs").iterdir()) == []
    capsys.readouterr()
    assert Sweep(*arguments).answer(question, recipe) == chosen
    assert "seed" not in capsys.readouterr().out  # nothing is trained again
    assert (tmp_path / "results" / "selection.jsonl").read_text() == lines
    assert (tmp_path / "LOG.md").read_text() == log
