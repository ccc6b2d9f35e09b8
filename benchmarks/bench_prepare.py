"""Is preparing the data set about as fast as unpacking the archive?

In turns, `--repeat` times: `unzip -q` of the archive into a new folder, and `tinylab prepare` into
a new folder, each in a process of its own. Then medians: seconds of both and their ratio, processor
seconds (prepare uses all cores, unzip one), the largest resident memory of a preparing process, and
the seconds of a second start, which opens the result.

    python benchmarks/bench_prepare.py --archive data/tiny-imagenet-200.zip
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARE = """
import json, resource, sys
from tinylab.data.dataset import prepare
prepare(sys.argv[1], sys.argv[2])
who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
peak = max(resource.getrusage(each).ru_maxrss for each in who)
print(json.dumps(peak * (1 if sys.platform == "darwin" else 1024)))
"""
REOPEN = """
import json, sys, time
start = time.perf_counter()
from tinylab.data.dataset import prepare
dataset = prepare(sys.argv[1], sys.argv[2])
dataset.images[0].sum(), dataset.images[-1].sum()
print(json.dumps([time.perf_counter() - start, dataset.is_tiny_imagenet, len(dataset)]))
"""


def timed(command: list[str]) -> tuple[float, float, str]:
    """Return wall-clock and processor seconds of the command, and its standard output."""
    before, start = os.times(), time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user - before.children_user
    return wall, used + after.children_system - before.children_system, output


def measure(archive: Path, scratch: Path, repeat: int) -> dict[str, object]:
    """Alternate both commands. `scratch` needs room for 1.4 GB."""
    rows: dict[str, list[float]] = {}
    prepared = [str(archive), str(scratch / "prepared")]
    for number in range(repeat):
        wall, used, _ = timed(["unzip", "-q", str(archive), "-d", str(scratch / "unzipped")])
        row = {"unzip_seconds": wall, "unzip_cpu_seconds": used}
        shutil.rmtree(scratch / "unzipped")
        os.sync()  # neither pays for the other's unwritten pages
        wall, used, peak = timed([sys.executable, "-c", PREPARE, *prepared])
        row |= {"prepare_seconds": wall, "prepare_cpu_seconds": used}
        row["peak_process_bytes"] = json.loads(peak)
        opened = json.loads(timed([sys.executable, "-c", REOPEN, *prepared])[2])
        row["second_start_seconds"] = opened[0]
        shutil.rmtree(scratch / "prepared")
        os.sync()
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
        print("round {}: unzip {unzip_seconds:.2f} s, ".format(number + 1, **row), end="")
        print("prepare {prepare_seconds:.2f} s".format(**row), flush=True)
    medians = {name: round(statistics.median(values), 3) for name, values in rows.items()}
    medians["peak_process_bytes"] = max(rows["peak_process_bytes"])
    medians["ratio"] = round(medians["prepare_seconds"] / medians["unzip_seconds"], 3)
    return medians | {"is_tiny_imagenet": opened[1], "images": opened[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archive", type=Path, default=Path("data/tiny-imagenet-200.zip"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the temporary folder lies")
    arguments = parser.parse_args()
    if not arguments.archive.is_file():
        parser.error(f"no archive at {arguments.archive}")
    if shutil.which("unzip") is None:
        parser.error("this comparison needs the program unzip")
    with tempfile.TemporaryDirectory(prefix="bench-prepare-", dir=arguments.scratch) as scratch:
        result = measure(arguments.archive.resolve(), Path(scratch), arguments.repeat)
    for name in ("unzip", "prepare"):
        wall, used = result[f"{name}_seconds"], result[f"{name}_cpu_seconds"]
        print(f"  {name:24}{wall:>10.2f} s, {used:.2f} s of processor time")
    print(f"  {'ratio':24}{result['ratio']:>10.2f}")
    print(f"  {'largest process':24}{result['peak_process_bytes'] / 1e6:>10.0f} MB")
    print(f"  {'second start':24}{result['second_start_seconds']:>10.2f} s, imports included")
    about = {
        "repeat": arguments.repeat,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "prepare", **about, **result}))


if __name__ == "__main__":
    main()
