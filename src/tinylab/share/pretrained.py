"""The repository's trained network as a finished run: `pretrained` in place of a run's folder."""

import json
from pathlib import Path

from tinylab.files import write_atomically
from tinylab.run.folder import REPOSITORY, Run
from tinylab.run.weights import PRETRAINED, file_of

FILES = ("recipe.json", "run.json", "environment.json", "metrics.jsonl")


def pretrained_run(folder: Path = Path("runs/pretrained")) -> Path:
    """Return the folder, made of weights/ and results/ if it is not there yet.

    Its summary holds the test results of the weights as they are, rounded to float16. Raise
    `UserError` outside a checkout.
    """
    run, records = Run(folder), REPOSITORY / "results" / PRETRAINED.parent.name
    if not run.finished:
        write_atomically(run.weights, file_of(Path("pretrained")).read_bytes())
        for name in FILES:
            write_atomically(folder / name, (records / name).read_bytes())
        measured = json.loads(PRETRAINED.with_name("test.json").read_text())
        run.write("summary.json", Run(records).summary | measured)  # last: now it is finished
    return folder
