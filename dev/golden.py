"""Check that a change of the code moves no result.

    python dev/golden.py OLD        OLD: a commit that has the recipe `cpu`

Trains short narrow runs on the made-up data, once with the code of OLD and once with the working
copy, and compares weights, predictions and metrics in every bit. One thread and fp32, so that the
processor adds up in one order. Exit status 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
NARROW = ("--width", "16", "--precision", "fp32", "--device", "cpu")
TWO = ("--epochs", "2", "--batch-size", "60")
RUNS = {
    "published": ("published", *TWO, "--workers", "0"),
    "published, 2 workers": ("published", *TWO, "--workers", "2"),
    "smoke": ("smoke", "--epochs", "2"),
    "accurate": ("accurate", *TWO),
    "speedrun": ("speedrun", "--epochs", "3", "--batch-size", "60"),
    "cpu": ("cpu", "--epochs", "4", "--batch-size", "60", "--micro-batch", "20"),
    "cpu, killed after an epoch": (
        "cpu",
        "--epochs",
        "4",
        "--batch-size",
        "60",
        "--micro-batch",
        "20",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="the commit to compare with")
    old = parser.parse_args().old
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder, different = Path(temporary), 0
        checkout = folder / "old"
        checkout.mkdir()
        archive = subprocess.run(
            ["git", "-C", REPOSITORY, "archive", old], capture_output=True, check=True
        )
        subprocess.run(["tar", "x", "-C", checkout], input=archive.stdout, check=True)
        sources = {"old": checkout / "src", "new": REPOSITORY / "src"}
        tinylab(sources["old"], folder, "sample", "sample.zip")
        tinylab(sources["old"], folder, "prepare", "--source", "sample.zip", "--data", "data")

        for number, (name, arguments) in enumerate(RUNS.items()):
            killed = "killed" in name
            digests = {}
            for which, source in sources.items():
                run = folder / f"{which}-{number}"
                command = ("train", *arguments, *NARROW, "--data", "data", "--run", str(run))
                if killed:
                    kill_after_an_epoch(source, folder, run, command)
                tinylab(source, folder, *command)
                digests[which] = digest(run)
            differing = [
                part for part, value in digests["old"].items() if digests["new"][part] != value
            ]
            different += bool(differing)
            print(
                f"{name:28}{'differ: ' + ', '.join(differing) if differing else 'equal'}",
                flush=True,
            )
    return int(different > 0)


def tinylab(source: Path, folder: Path, *arguments: str, wait: bool = True) -> subprocess.Popen:
    """Start the command line of the code in `source`; wait for it, and raise if it fails."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tinylab", *arguments],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
    if wait and process.wait() != 0:
        raise SystemExit((folder / "log").read_text()[-2000:])
    return process


def kill_after_an_epoch(source: Path, folder: Path, run: Path, command: tuple[str, ...]) -> None:
    """Start a run and kill it once its first epoch is recorded."""
    process = tinylab(source, folder, *command, wait=False)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit("the run was over before it could be killed")


def digest(run: Path) -> dict[str, str]:
    """Hash what a run computed; clocks are left out."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        for name in [name for name in row if "second" in name]:
            del row[name]
    with np.load(run / "predictions.npz") as arrays:
        parts = {"weights": load_file(run / "model.safetensors"), "predictions": dict(arrays)}
    found = {"metrics": hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()}
    for part, arrays in parts.items():
        content = hashlib.sha256()
        for name in sorted(arrays):
            content.update(
                f"{name} {arrays[name].dtype} {arrays[name].shape}".encode()
                + arrays[name].tobytes()
            )
        found[part] = content.hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())
