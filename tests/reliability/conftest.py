"""What the tests of reliability share: how much to do, and the table of what was done.

A module names the row of the table that it fills (`pytestmark = pytest.mark.promise("kill")`), and
its tests add to it what they counted. `--soak` does the full amount; `--table FILE` writes the
table into that page.
"""

import datetime
import functools
import platform
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from publish import replace_between

from reliability.harness import Plan, plans
from tinylab.run.environment import device_name
from tinylab.run.folder import Run

PROMISES = {
    "kill": "SIGKILL at any moment, resume: the same bits",
    "faults": "seeded faults in the code, each found by the kill test",
    "signals": "SIGINT and SIGTERM at any moment: one line, exit 130 / 143, resume: the same bits",
    "workers": "a worker process dies: one line, resume: the same bits",
    "processes": "one of torchrun's two processes is killed: all end, the same command continues",
    "damaged-files": "damaged checkpoints, data sets and weights: detected",
    "damaged-archives": "damaged archives: refused or harmless, never silently wrong",
    "names": "hostile class names: text in every figure, page, table and file name",
    "concurrent": "several processes prepare at once, one is killed: one whole data set",
    "disk-full": "a full or read-only disk: one line, what was there is whole",
    "non-finite": "numbers that are not finite: one line, the newest checkpoint is finite",
}
"""The table's rows, in its order."""
COUNTS: dict[str, Counter] = defaultdict(Counter)
SECONDS, SKIPPED, FAILED = Counter(), Counter(), set()


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether the full amount is asked for (`--soak`), not the quick one."""
    return request.config.getoption("--soak")


@pytest.fixture
def tally(request) -> Callable[..., None]:
    """A function that adds to the row: tally(kills=40). Names are the table's words."""

    def add(**counts: int) -> None:
        for what, count in counts.items():
            request.node.user_properties.append((what.replace("_", " "), int(count)))

    return add


@pytest.fixture(scope="session")
def runs(train_tiny, rich, narrow) -> dict[str, Plan]:
    """One run of each kind, to be trained."""
    return plans(train_tiny, rich, narrow)


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory) -> Callable[[str], tuple[Run, list[str]]]:
    """A function: the run of that name that nothing happens to, and its moments. Read only."""

    @functools.cache
    def call(name: str) -> tuple[Run, list[str]]:
        names = []
        return runs[name](tmp_path_factory.mktemp("undisturbed") / "run", names.append), names

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := item.get_closest_marker("promise"):
            assert marker.args[0] in PROMISES
            item.user_properties.append(("promise", marker.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count; a worker process of pytest-xdist sends its reports to the process that writes."""
    row = dict(report.user_properties).get("promise")
    if row is None:
        return
    SECONDS[row] += report.duration
    SKIPPED[row] += report.skipped
    if report.failed:
        FAILED.add(row)
    if report.when == "teardown":  # every report holds all properties so far
        for what, count in report.user_properties:
            if what != "promise":
                COUNTS[row][what] += count


def table() -> str:
    """Return the Markdown table of what was done."""
    lines = ["| promise | done | outcome | time |", "|---|---|---|---|"]
    for row in (each for each in PROMISES if each in SECONDS):
        done = "; ".join(f"{what}: {count:,}" for what, count in COUNTS[row].items())
        skipped = f" ({SKIPPED[row]} tests skipped)" if SKIPPED[row] else ""
        outcome = ("FAILED" if row in FAILED else "kept") + skipped
        lines.append(f"| {PROMISES[row]} | {done} | {outcome} | {SECONDS[row]:.0f} s |")
    return "\n".join(lines)


def pytest_sessionfinish(session: pytest.Session) -> None:
    option = session.config.getoption
    if option("--table") is None or hasattr(session.config, "workerinput"):
        return
    head = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip() or "unknown"
    text = (
        f"{datetime.date.today()}, {'full' if option('--soak') else 'quick'} amount, "
        f"{SECONDS.total() / 60:.0f} minutes of tests: {device_name(torch.device('cpu'))}, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"commit {commit}.\n\n{table()}"
    )
    page = Path(option("--table"))
    text = replace_between(page.read_text(encoding="utf-8"), "reliability", text, page)
    page.write_text(text, encoding="utf-8")
